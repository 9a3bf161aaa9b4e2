"""The report of text to speech: sounds that play, words heard, when each is said, and numbers of report.json."""

import base64
import json
import re

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("librosa")
pytest.importorskip("soxr")
pytest.importorskip("pocketsphinx")

from kuosan.measurements import TextToSpeechMeasurements, measurements_of
from kuosan.measurements.spoken import EVALUATIONS, MANY
from kuosan.report import write_report
from kuosan.runs import load
from kuosan.speech.judge import word_error_rate
from kuosan.speech.mel import Mel
from kuosan.speech.phonemes import SYMBOLS, encode
from kuosan.speech.pictures import BANDS
from kuosan.train import train
from pages import Page, written
from test_speech_report import waves_of
from test_tts_run import HOP, RATE, SAID, recordings, slow_voice, tiny

pytestmark = pytest.mark.slow

SECTIONS = ["samples", "quality", "alignment", "loss", "evaluations", "provenance"]
COLUMNS = {"natural": "natural", "analysed": "natural mel made sound again", "samples": "ours"}
BUDGET = 0.05


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on hisses, hardly trained, in which each symbol lasts four frames."""
    folder = tmp_path_factory.mktemp("said")
    train(tiny(recordings(folder / "said", SAID)), folder / "run")
    return slow_voice(load(folder / "run"))


@pytest.fixture(scope="module")
def page(run):
    return Page(write_report(run, budget=BUDGET))


@pytest.fixture(scope="module")
def numbers(run, page):
    return written(run)


def made(run, i):
    """The three waves of a held-out recording: the natural one, its mel made sound again, and the text read out."""
    natural, text = run.data.held_out.waves[i], run.data.held_out.transcripts[i]
    again = Mel.of(natural, run.medium.analysis).griffin_lim(2)
    return {"natural": natural, "analysed": again, "samples": run.sample(text=text, seeds=[i])[0]}


def test_a_run_of_text_to_speech_has_measurements_of_its_own(run, page):
    assert type(measurements_of(run, BUDGET)) is TextToSpeechMeasurements
    assert [attributes["id"] for attributes in page.of("section")] == SECTIONS


def test_the_page_loads_nothing_from_anywhere(page):
    page.check_alone()


def test_every_text_is_there_to_be_heard_three_times(run, page, numbers):
    """Truth: the held-out wave, Griffin-Lim of its mel, and what `kuosan sample` draws, each cut to 16 bits."""
    clips, part, played = numbers["samples"]["clips"], run.data.held_out, waves_of(page)
    assert list(played) == [f"{clip['name']}, {column}" for clip in clips for column in COLUMNS.values()]
    assert len(clips) >= min(3, len(part))
    for clip in clips:
        i = clip["seed"]
        assert (clip["name"], clip["text"]) == (part.names[i], part.transcripts[i])
        assert f"“{clip['text']}”" in page.source
        for key, truth in made(run, i).items():
            sound = played[f"{clip['name']}, {COLUMNS[key]}"]
            assert len(sound) == len(truth)
            assert clip["lasts"][key] == pytest.approx(len(truth) / RATE)
            steps = np.rint(truth.double().numpy() * 32768).clip(-32768, 32767)
            assert np.abs(sound - steps).max() <= 1
        assert clip["lasts"]["samples"] == (4 * len(encode(clip["text"])) - 1) * HOP / RATE
        assert clip["heard"]["natural"] == run.judge(part.waves[i])
    assert page.source.count("heard as</span>") == len(played)


def test_spectrograms_are_as_wide_as_their_sounds_are_long(page, numbers, run):
    """Of each text the longest has the whole width."""
    described = page.of("img")
    assert [a["alt"] for a in described] == [f"spectrogram of {label}" for label in waves_of(page)]
    for k, clip in enumerate(numbers["samples"]["clips"]):
        lasts = list(clip["lasts"].values())
        sizes = [picture.size for picture in page.images(f"spectrogram of {clip['name']},")]
        assert sizes == [(run.medium.analysis.frames(round(one * RATE)), BANDS) for one in lasts]
        for one, attributes in zip(lasts, described[3 * k : 3 * k + 3], strict=True):
            width = float(re.fullmatch(r"width: ([\d.]+)%", attributes["style"])[1])
            assert width == pytest.approx(100 * one / max(lasts), rel=1e-3)


def test_alignments_are_of_all_frames_and_all_symbols(run, page, numbers):
    """Truth: the run's own alignment; a mel of N samples has 1 + N // 256 frames; four are predicted of each symbol."""
    part, drawn = run.data.held_out, numbers["alignment"]["drawn"]
    assert len(drawn) == min(2, len(part))
    for one in drawn:
        i = one["seed"]
        symbols = [SYMBOLS[k] for k in encode(part.transcripts[i])]
        assert [{"gap": " ", "rest": ",", "stop": "."}.get(name, name) for name in one["symbols"]] == symbols
        assert one["found"] == run.aligned(part, torch.tensor([i]))[2][0].tolist()
        assert sum(one["found"]) == one["frames"] == 1 + len(part.waves[i]) // HOP
        assert one["predicted"] == [4] * len(symbols)
        assert sum(one["predicted"]) == one["frames_predicted"]
    pictures = page.source.count('aria-label="alignment of text')
    assert pictures == len(drawn)
    assert len(page.of("image")) == pictures  # the spectrogram above each


def test_predicted_durations_are_compared_with_found_ones(run, numbers):
    """Truth: every held-out recording, whose symbols are predicted to last four frames each."""
    part = run.data.held_out
    found = torch.cat([run.aligned(part, torch.tensor([i]))[2][0] for i in range(len(part))]).double()
    of_json = numbers["alignment"]
    assert (of_json["recordings"], of_json["symbols"]) == (len(part), len(found))
    assert of_json["difference"] == pytest.approx(1000 * HOP / RATE * float((found - 4).abs().mean()))
    assert of_json["ratio"] == pytest.approx(4 * len(found) / float(found.sum()))


def test_the_numbers_on_the_page_are_those_of_the_json(page, numbers):
    assert len(page.numbers) > 50
    for name, value, printed in page.numbers:
        truth = numbers
        for part in name.split("."):
            truth = truth[int(part)] if isinstance(truth, list) else truth[part]
        assert float(value) == truth, name
        digits, unit = printed.replace(",", "").replace("−", "-").rstrip("\u202f%"), 0.01 if "%" in printed else 1.0
        last = unit * 10.0 ** -len(digits.partition(".")[2])  # rounded to the last digit
        assert unit * float(digits) == pytest.approx(truth, rel=1e-9, abs=0.5001 * last), name


def test_the_facts_count_what_it_learnt_from(run, numbers):
    texts = [encode(text) for text in run.data.train.transcripts]
    facts = numbers["facts"]
    assert facts["data"]["train"] == len(texts)
    assert facts["symbols"]["said"] == sum(map(len, texts))
    assert facts["symbols"]["distinct"] == len(set().union(*texts))
    assert facts["seconds"]["train"] == pytest.approx(sum(map(len, run.data.train.waves)) / RATE)
    assert facts["vocoder"] == "Griffin-Lim"


def test_without_an_evaluation_words_are_counted_here(run, page, numbers):
    """Truth: the recogniser and word_error_rate on the same texts, of which at this budget there are three."""
    found, part = numbers["quality"], run.data.held_out
    assert not found["from_evaluation"]
    assert "Measured for this page on" in page.source
    chosen = measurements_of(run, BUDGET)._order[: found["samples"]["utterances"]]
    assert len(chosen) == min(3, len(part))
    waves = [made(run, i) for i in chosen]
    for key in COLUMNS:
        truth, error = word_error_rate([part.texts[i] for i in chosen], [run.judge(one[key]) for one in waves])
        assert found[key]["word_error_rate"] == pytest.approx(truth)
        assert found[key]["word_error_rate_error"] == pytest.approx(error)
        assert found[key]["seconds"] == pytest.approx(sum(len(one[key]) for one in waves) / RATE)
    assert found["speed"]["samples"] > 0
    assert found["speed"]["analysed"] > 0


def test_an_evaluation_of_this_step_is_used_and_one_of_another_step_is_not(run):
    kept = run.folder / "evaluation.json"
    row = {"utterances": 40, "seconds": 100.0, "word_error_rate": 0.25, "word_error_rate_error": 0.125}
    quality = dict.fromkeys(COLUMNS, row) | {"real_time_factor": 0.75, "threads": 2}
    try:
        for step, evaluations, used in ((run.step, 2, True), (run.step - 1, 2, False), (run.step, 3, False)):
            way = run.way(run.sampler()) | {"evaluations": evaluations}
            told = quality | {"evaluations": evaluations, "way": way}
            kept.write_text(json.dumps({"step": step, "quality": told}))
            page = Page(write_report(run, budget=BUDGET))
            found = written(run)["quality"]
            assert found["from_evaluation"] is used
            assert (found["samples"] == row) is used
            assert ("Measured by <code>kuosan evaluate</code>" in page.source) is used
            assert ("quality.real_time_factor" in {name for name, _, _ in page.numbers}) is used
    finally:
        kept.unlink()


def test_without_a_recogniser_there_is_no_word_error_rate(run, monkeypatch):
    monkeypatch.setattr(type(run), "judge", None)
    monkeypatch.setattr(type(run), "why_no_judge", "nobody listens")
    page = Page(write_report(run, budget=BUDGET))
    found = written(run)
    assert found["quality"]["samples"]["word_error_rate"] is None
    assert found["quality"]["samples"]["seconds"] > 0
    assert "There is no word error rate: nobody listens" in page.source
    assert "heard as" not in page.source


def test_evaluations_are_compared_with_many_of_the_same_noise(run, numbers):
    """Truth: the mels that run.mel makes with the same seeds, and with seeds that no held-out text has."""
    found, part = numbers["evaluations"], run.data.held_out
    assert [point["evaluations"] for point in found["points"]] == list(EVALUATIONS)
    assert found["most"] == MANY
    chosen = measurements_of(run, BUDGET)._order[: found["recordings"]]

    def mels(steps, first=0):
        sampler = run.sampler(steps=steps, solver={"kind": "auto"})
        return [run.mel(sampler, part.transcripts[i], first + i).values for i in chosen]

    def apart(ours, others):
        return np.mean([float((x - y).abs().mean()) for x, y in zip(ours, others, strict=True)])

    for point in found["points"]:
        assert point["difference"] == pytest.approx(apart(mels(point["evaluations"]), mels(MANY)), rel=1e-4, abs=1e-6)
    assert found["other_noise"]["difference"] == pytest.approx(apart(mels(MANY, len(part)), mels(MANY)), rel=1e-4)


def test_long_sounds_are_cut_on_the_page_alone(run, monkeypatch):
    """With room for a tenth of a second of each of three waves of six recordings."""
    monkeypatch.setattr("kuosan.measurements.speech.SOUND", 0.1 * RATE * 2 * 4 / 3 * 3 * 6)
    found, pictures = measurements_of(run, BUDGET).samples()
    assert found["cut"]
    for row in pictures:
        for one in row:
            assert len(base64.b64decode(one["sound"].partition(",")[2])) == 44 + 2 * 0.1 * RATE
