"""The report of a vocoder: sounds that play, spectrograms beside them, and numbers that are those of report.json."""

import base64
import io
import json
import wave as riff

import numpy as np
import pytest
import torch

from kuosan import recipe as recipes
from kuosan.measurements import VocoderMeasurements, measurements_of
from kuosan.measurements.speech import EVALUATIONS, TEMPERATURES
from kuosan.report import write_report
from kuosan.runs import load
from kuosan.speech.audio import read_audio, write_wav
from kuosan.speech.judge import judge
from kuosan.speech.pictures import BANDS
from kuosan.train import train
from pages import Page, written

pytestmark = pytest.mark.slow

RATE = 16000
SECTIONS = ["samples", "quality", "loss", "curve", "evaluations", "temperature", "provenance"]
COLUMNS = ["natural", "Griffin-Lim, 32", "ours"]
TINY = [
    "network.width=32",
    "network.depth=2",
    "training.steps=4",
    "training.batch_size=4",
    "training.warmup=1",
    "training.precision=float32",
    "training.sample_every=4",
    "sampling.steps=2",
]
MEASURED = ("mel_l1", "log_spectral_distance", "mel_cepstral_distortion")
BUDGET = 0.05


def vowel(k):
    """A tone that rises, with five harmonics, of 0.65 to 1.3 seconds: no two alike."""
    t = torch.arange(int(RATE * (0.65 + 0.07 * k))) / RATE
    pitch = 2 * torch.pi * (100 + 7 * k) * (t + 0.1 * t**2)
    return 0.2 * torch.sin(torch.pi * t / t[-1]) * sum(torch.sin(n * pitch) / n for n in range(1, 6))


def trained(folder, *overrides, transcripts=True):
    sounds = folder / "sounds"
    sounds.mkdir(parents=True)
    for k in range(10):
        write_wav(sounds / f"take-{k}.wav", vowel(k), RATE)
        if transcripts:
            (sounds / f"take-{k}.txt").write_text(f"Hello number {k}, “A & B”", "utf-8")
    data = f'data={{folder="{sounds}", held_out=0.4, speech={{state="magnitude", frames=16}}}}'
    train(recipes.read("vocoder", [data, *TINY, *overrides]), folder / "run")
    return load(folder / "run")


def waves_of(page):
    """The waves that a browser would play, as whole numbers: each column's, by its label."""
    found = {}
    for attributes in page.of("audio"):
        assert "controls" in attributes
        kind, _, content = attributes["src"].partition(";base64,")
        assert kind == "data:audio/wav"
        with riff.open(io.BytesIO(base64.b64decode(content, validate=True)), "rb") as file:
            assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, RATE)
            steps = np.frombuffer(file.readframes(file.getnframes()), "<i2")
            assert len(steps) == file.getnframes()
        found[attributes["aria-label"]] = steps
    return found


@pytest.fixture(scope="module")
def vowels(tmp_path_factory):
    """A run on rising tones, hardly trained, and followed."""
    return trained(tmp_path_factory.mktemp("runs") / "vowels", "training.sample_every=2")


@pytest.fixture(scope="module")
def unheard(tmp_path_factory):
    """The same without transcripts, so that nothing is given to a recogniser, which is slow."""
    return trained(tmp_path_factory.mktemp("runs") / "unheard", transcripts=False)


@pytest.fixture(scope="module")
def page(vowels):
    return Page(write_report(vowels, budget=BUDGET))


@pytest.fixture(scope="module")
def numbers(vowels, page):
    return written(vowels)


def test_the_page_has_every_section_in_order(page):
    assert [attributes["id"] for attributes in page.of("section")] == SECTIONS


def test_the_page_loads_nothing_from_anywhere(page):
    page.check_alone()
    policy = next(a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "media-src data:" in policy  # or a browser would refuse to play


def test_every_recording_is_there_to_be_heard_three_times(vowels, page, numbers):
    """Truth: the held-out waves, Griffin-Lim of their mels, and what `kuosan sample` draws, each cut to 16 bits."""
    clips, part = numbers["samples"]["clips"], vowels.data.held_out
    played, drawn = waves_of(page), vowels.sample(len(part))
    assert list(played) == [f"{clip['name']}, {column}" for clip in clips for column in COLUMNS]
    assert len(clips) >= 3
    for clip in clips:
        i = clip["seed"]
        assert (clip["name"], clip["text"]) == (part.names[i], part.transcripts[i])
        assert clip["seconds"] == pytest.approx(len(part.waves[i]) / RATE)
        for column, truth in zip(
            COLUMNS, (part.waves[i], vowels.medium.griffin_lim(part.waves[i]), drawn[i]), strict=True
        ):
            steps = np.rint(truth.double().numpy() * 32768).clip(-32768, 32767)
            assert np.abs(played[f"{clip['name']}, {column}"] - steps).max() <= 1


def test_every_sound_has_its_spectrogram_beside_it(page, numbers, vowels):
    described = [a["alt"] for a in page.of("img")]
    assert described == [f"spectrogram of {label}" for label in waves_of(page)]
    for clip in numbers["samples"]["clips"]:
        frames = vowels.medium.analysis.frames(len(vowels.data.held_out.waves[clip["seed"]]))
        pictures = page.images(f"spectrogram of {clip['name']},")
        assert [picture.size for picture in pictures] == [(frames, BANDS)] * 3


def test_what_is_said_and_heard_is_on_the_page(vowels, page, numbers):
    """Truth: the recogniser itself, on the natural waves."""
    assert vowels.judge is not None
    for clip in numbers["samples"]["clips"]:
        assert clip["heard"]["natural"] == vowels.judge(vowels.data.held_out.waves[clip["seed"]])
        assert f"“Hello number {clip['name'][5]}, “A &amp; B””" in page.source
    assert page.source.count("heard as</span>") == len(page.of("audio"))


def test_the_numbers_on_the_page_are_those_of_the_json(page, numbers):
    """Each marked number carries its name in report.json; what is printed is that value, rounded."""
    assert len(page.numbers) > 100
    for name, value, printed in page.numbers:
        truth = numbers
        for part in name.split("."):
            truth = truth[int(part)] if isinstance(truth, list) else truth[part]
        assert float(value) == truth, name
        shown = float(printed.replace(",", "").replace("−", "-").rstrip("\u202f%"))
        assert shown / (100 if "%" in printed else 1) == pytest.approx(truth, rel=6e-3, abs=6e-3), name


def test_without_an_evaluation_the_table_is_measured_here_and_says_on_how_many(vowels, page, numbers):
    """Truth: the judge, on as many recordings, of which at this budget there are three; natural ones are 0 away."""
    found, part = numbers["quality"], vowels.data.held_out
    assert not found["from_evaluation"]
    assert "Measured for this page on" in page.source
    assert found["samples"]["utterances"] == min(3, len(part))
    chosen = measurements_of(vowels, BUDGET)._order[: found["samples"]["utterances"]]
    drawn = vowels.sample(len(part))
    natural, texts = [part.waves[i] for i in chosen], [part.texts[i] for i in chosen]
    rows = {"natural": natural, "griffin_lim": [vowels.medium.griffin_lim(x) for x in natural]}
    for name, made in (rows | {"samples": [drawn[i] for i in chosen]}).items():
        truth = judge(natural, made, texts, vowels.medium.analysis, vowels.judge)
        for key in (*MEASURED, "word_error_rate"):
            assert found[name][key] == pytest.approx(getattr(truth, key), abs=1e-6), (name, key)
            assert found[name][f"{key}_error"] == pytest.approx(getattr(truth, f"{key}_error"), abs=1e-6)
    assert found["natural"]["mel_l1"] == 0
    assert found["speed"]["samples"] > 0
    assert found["speed"]["griffin_lim"] > 0


def test_the_sweeps_hold_all_else_fixed(vowels, numbers):
    """Truth: the same recordings made anew by run.sample with the seeds of their places, and judged."""
    settings = [point["evaluations"] for point in numbers["evaluations"]["points"]]
    assert settings == list(EVALUATIONS[: len(settings)])
    assert len(settings) >= 4
    assert [point["temperature"] for point in numbers["temperature"]["points"]] == list(TEMPERATURES)
    for name, index, how in (("evaluations", 2, {"steps": 3}), ("temperature", 1, {"temperature": 0.25})):
        chosen = measurements_of(vowels, BUDGET)._order[: numbers[name]["recordings"]]
        natural = [vowels.data.held_out.waves[i] for i in chosen]
        truth = judge(natural, vowels.sample(input=natural, seeds=chosen, **how), None, vowels.medium.analysis)
        assert numbers[name]["points"][index]["mel_l1"] == pytest.approx(truth.mel_l1, rel=1e-4)
        beside = judge(natural, [vowels.medium.griffin_lim(x) for x in natural], None, vowels.medium.analysis)
        assert numbers[name]["griffin_lim"]["mel_l1"] == pytest.approx(beside.mel_l1, rel=1e-4)


def test_the_curve_is_what_training_kept_beside_griffin_lim(vowels, numbers, unheard):
    """Truth: quality.jsonl, and the judge on Griffin-Lim's waves of the same recordings. One point is no curve."""
    kept = [json.loads(line) for line in (vowels.folder / "quality.jsonl").read_text("utf-8").splitlines()]
    assert [point["step"] for point in kept] == [2, 4]
    for point, line in zip(numbers["curve"]["points"], kept, strict=True):
        assert {key: point[key] for key in line} == line
    natural = vowels.data.held_out.waves[: kept[0]["utterances"]]
    beside = judge(natural, [vowels.medium.griffin_lim(x) for x in natural], None, vowels.medium.analysis)
    assert numbers["curve"]["griffin_lim"]["mel_l1"] == pytest.approx(beside.mel_l1, rel=1e-4)
    assert measurements_of(unheard, BUDGET).curve() == (None, None)


def test_an_evaluation_of_this_step_is_used_and_one_of_another_step_is_not(unheard):
    """And not one with other evaluations; it needs no bound, which is not on the page."""
    kept = unheard.folder / "evaluation.json"
    row = {"utterances": 40, "seconds": 100.0, "word_error_rate": 0.25, "word_error_rate_error": 0.125}
    row |= {key: value for name in MEASURED for key, value in ((name, 0.0625), (f"{name}_error", None))}
    quality = {name: row for name in ("natural", "griffin_lim", "samples")} | {"real_time_factor": 0.75, "threads": 2}
    here = unheard.step
    try:
        for step, evaluations, used in ((here, 2, True), (here - 1, 2, False), (here, 3, False)):
            way = unheard.way(unheard.sampler()) | {"evaluations": evaluations}
            told = quality | {"evaluations": evaluations, "way": way}
            kept.write_text(json.dumps({"step": step, "quality": told}))
            page = Page(write_report(unheard, budget=BUDGET))
            found = written(unheard)["quality"]
            assert found["from_evaluation"] is used
            assert (found["samples"] == row) is used
            assert ("Measured by <code>kuosan evaluate</code>" in page.source) is used
            assert (
                {"quality.real_time_factor", "quality.natural.word_error_rate"} <= {n for n, _, _ in page.numbers}
            ) is used
    finally:
        kept.unlink()


def test_recordings_without_transcripts_have_no_recogniser(unheard):
    page = Page(write_report(unheard, budget=BUDGET))
    found = written(unheard)
    assert [attributes["id"] for attributes in page.of("section")] == [name for name in SECTIONS if name != "curve"]
    assert found["facts"]["judge"] is False
    assert all(clip["heard"] is None is clip["text"] for clip in found["samples"]["clips"])
    assert found["quality"]["samples"]["word_error_rate"] is None
    assert "There is no word error rate: nobody knows what is said" in page.source
    assert "heard as" not in page.source
    assert len(waves_of(page)) == 3 * len(found["samples"]["clips"])


def test_long_recordings_are_cut_on_the_page_alone(unheard, monkeypatch):
    """With room for a tenth of a second of each of three waves of six recordings."""
    monkeypatch.setattr("kuosan.measurements.speech.SOUND", 0.1 * RATE * 2 * 4 / 3 * 3 * 6)
    measurements = measurements_of(unheard, BUDGET)
    assert isinstance(measurements, VocoderMeasurements)
    found, pictures = measurements.samples()
    assert found["cut"]
    for clip, row in zip(found["clips"], pictures, strict=True):
        assert clip["seconds"] == pytest.approx(len(unheard.data.held_out.waves[clip["seed"]]) / RATE)
        assert clip["shown"] == pytest.approx(0.1)
        for one in row:
            assert len(base64.b64decode(one["sound"].partition(",")[2])) == 44 + 2 * 0.1 * RATE


def test_recordings_of_one_to_six_seconds_with_words_are_shown_first(unheard):
    measurements = measurements_of(unheard, BUDGET)
    measurements.budget = 1000.0
    part = measurements.clips
    waves = [torch.zeros(int(RATE * seconds)) for seconds in (0.5, 2, 3, 9, 4, 5, 2, 2, 3)]
    texts = ["a", "b", "", "d", "e", "f", "g", "h", "i"]
    measurements.clips = type(part)(waves, texts, texts, texts, torch.tensor([len(wave) for wave in waves]))
    measurements.__dict__ |= {"_beside": (0.1, 0.1)}
    assert measurements._shown == [1, 4, 5, 6, 7, 8]  # all that there are
    for budget, shown in ((1e-9, [1, 5, 8]), (1000.0, [1, 4, 5, 6, 7, 8])):  # spread evenly, however few
        measurements.budget = budget
        del measurements.__dict__["_shown"]
        assert measurements._shown == shown
    measurements.clips = type(part)(waves[:5], texts[:5], texts[:5], texts[:5], torch.tensor([1]))
    del measurements.__dict__["_shown"]
    assert measurements._shown == [0, 1, 2, 3, 4]  # the others too, where there are not enough


def test_a_sound_of_the_page_is_the_file_that_write_wav_writes(tmp_path):
    from kuosan import figures

    wave = torch.linspace(-1.5, 1.5, 999)
    write_wav(tmp_path / "a.wav", wave, 22050)
    content = base64.b64decode(figures.sound(wave, 22050).partition(",")[2])
    assert content == (tmp_path / "a.wav").read_bytes()
    (tmp_path / "b.wav").write_bytes(content)
    assert read_audio(tmp_path / "b.wav")[1].rate == 22050
