"""A vocoder's run from end to end on a folder of made sounds: trained, sampled from files of all kinds, measured."""

import dataclasses
import json
import math

import numpy as np
import pytest
import soundfile
import torch

pytest.importorskip("av")
pytest.importorskip("librosa")
pytest.importorskip("soxr")

import kuosan
from kuosan import recipe as recipes
from kuosan.cli import main
from kuosan.runs import VocoderRun
from kuosan.speech.analysis import Analysis
from kuosan.speech.audio import read_audio
from kuosan.speech.judge import judge
from kuosan.speech.mel import Mel
from kuosan.train import train

TINY = {
    "magnitude": ("vocoder", "network.width=16", "network.depth=1"),
    "spectrum": ("vocoder-spectrum", "network.width=16", "network.depth=1"),
    "wave": ("vocoder-wavegrad", "network.width=4"),
    "step": ("vocoder-diffwave", "network.channels=4", "network.depth=2", "network.cycle=2"),
}


def sound(seconds, rate=16000, pitch=200.0, seed=0):
    """A hissing buzz, (n,) in float64."""
    t = np.arange(round(seconds * rate)) / rate
    buzz = sum(np.sin(2 * math.pi * k * pitch * t) / k for k in range(1, 8))
    return 0.1 * buzz * np.sin(math.pi * t / t[-1]) + 0.01 * np.random.default_rng(seed).standard_normal(len(t))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight sounds, without words."""
    folder = tmp_path_factory.mktemp("sounds")
    for i in range(8):
        soundfile.write(folder / f"sound-{i}.wav", sound(1.2 + 0.1 * i, pitch=150 + 20 * i, seed=i), 16000)
    return folder


def tiny(kind, folder, *more):
    name, *network = TINY[kind]
    table = recipes.shipped()[name].read_text("utf-8").replace('name = "asterisk-en"', f'folder = "{folder}"')
    path = folder.parent / f"{name}.toml"
    path.write_text(table, "utf-8")
    small = ("training.steps=2", "training.batch_size=4", "training.sample_every=0", "data.speech.frames=16")
    phases = ["sampling.griffin_lim=4"] if kind == "magnitude" else []
    return recipes.read(path, [*network, *small, "data.held_out=0.4", *phases, *more])


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """Of magnitudes."""
    return train(tiny("magnitude", folder), tmp_path_factory.mktemp("runs") / "run")


@pytest.mark.parametrize("kind", TINY)
def test_every_kind_of_vocoder_makes_a_wave_of_the_length_that_it_was_given(kind, folder, tmp_path):
    trained = train(tiny(kind, folder), tmp_path / "run")
    loaded = kuosan.load(trained.folder)
    assert isinstance(loaded, VocoderRun)
    assert ("griffin_lim" in loaded.sampler().how) == (kind == "magnitude")
    waves = loaded.sample(input=[folder / "sound-0.wav", folder / "sound-3.wav"], steps=2)
    assert [len(wave) for wave in waves] == [19200, 24000]
    assert all(bool(wave.isfinite().all()) for wave in waves)
    chosen = loaded.sample(2, steps=2)  # the first held-out clips
    assert [len(wave) for wave in chosen] == loaded.data.held_out.lengths[:2].tolist()


def test_a_wave_depends_on_its_own_seed_and_mel_only(run, folder):
    files = [folder / "sound-0.wav", folder / "sound-1.wav"]
    both = run.sample(input=files, seeds=[3, 4])
    torch.testing.assert_close(run.sample(input=files[1], seeds=[4])[0], both[1])
    other = run.sample(input=files[1], seeds=[5])[0]
    assert float((other - both[1]).abs().max()) > 1e-3


def test_a_lower_temperature_brings_samples_nearer_to_each_other(run, folder):
    def apart(temperature):
        one, other = (
            run.sample(input=folder / "sound-0.wav", seeds=[seed], temperature=temperature)[0] for seed in (0, 1)
        )
        return float((run.medium.analysis.mel(one[None]) - run.medium.analysis.mel(other[None])).abs().mean())

    assert apart(0.01) < 0.5 * apart(1.0)
    with pytest.raises(ValueError, match="temperature"):
        run.sample(1, temperature=0.0)


def test_the_command_writes_a_wav_file_for_each_sound_and_a_page_of_spectrograms(run, folder, tmp_path, capsys):
    out = tmp_path / "made"
    assert main(["sample", str(run.folder), "--input", str(folder / "sound-2.wav"), "--out", str(out)]) == 0
    wave, rate = soundfile.read(out / "sound-2.wav")
    assert (wave.shape, rate) == ((22400,), 16000)
    assert soundfile.info(out / "sound-2.wav").subtype == "PCM_16"
    assert (out / "sheet.png").is_file()
    told = json.loads((out / "samples.json").read_text())
    assert told["samples"] == [{"file": str(out / "sound-2.wav"), "seed": 0}]
    assert (told["griffin_lim"], told["evaluations"]) == (4, 6)
    assert str(out / "sheet.png") in capsys.readouterr().out


def test_one_sound_goes_to_the_file_that_is_asked_for(run, folder, tmp_path):
    out = tmp_path / "again.wav"
    assert main(["sample", str(run.folder), "--input", str(folder / "sound-2.wav"), "--out", str(out)]) == 0
    assert soundfile.info(out).frames == 22400
    assert main(["sample", str(run.folder), "-n", "2", "--out", str(out)]) == 2


KINDS = {
    "8-bit": ("wav", 16000, "PCM_U8"),
    "24-bit": ("wav", 16000, "PCM_24"),
    "float": ("wav", 16000, "FLOAT"),
    "96 kHz": ("wav", 96000, "PCM_16"),
    "8 kHz": ("wav", 8000, "PCM_16"),
    "flac": ("flac", 44100, "PCM_16"),
    "ogg": ("ogg", 22050, "VORBIS"),
}


@pytest.mark.parametrize("stereo", [False, True], ids=["mono", "stereo"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_any_kind_is_made_anew_at_the_rate_of_the_model(kind, stereo, run, tmp_path, capsys):
    suffix, rate, subtype = KINDS[kind]
    wave = sound(0.7, rate)
    file = tmp_path / f"clip.{suffix}"
    soundfile.write(file, np.stack([wave, 0.5 * wave], 1) if stereo else wave, rate, subtype=subtype)
    out = tmp_path / "out.wav"
    assert main(["sample", str(run.folder), "--input", str(file), "--steps", "1", "--out", str(out)]) == 0
    assert soundfile.info(out).samplerate == 16000
    assert soundfile.info(out).duration == pytest.approx(0.7, abs=0.03)  # lossy codecs pad
    assert (f"resampled from {rate:,} to 16,000" in capsys.readouterr().err) == (rate != 16000)


def refused(arguments, capsys):
    """What the command says on its way out with 2."""
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("kuosan: ")
    return error


def test_what_is_no_sound_is_refused(run, tmp_path, capsys):
    (tmp_path / "text.wav").write_text("these are words")
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "silence.wav", np.zeros(16000), 16000)
    for name, message in (
        ("text.wav", "text.wav"),
        ("empty.wav", "empty.wav"),
        ("none.wav", "none.wav"),
        ("silence.wav", "is silent"),
        ("nothing.wav", "nothing"),
        ("notes.txt", "notes.txt"),
    ):
        assert message in refused(["sample", str(run.folder), "--input", str(tmp_path / name)], capsys)


def test_a_clipped_wave_is_made_and_what_is_cut_off_is_said(run, tmp_path, capsys):
    """A square wave at full scale: what is made of it overshoots here and there."""
    soundfile.write(tmp_path / "loud.wav", np.sign(np.sin(np.arange(16000) / 20)), 16000)
    assert (
        main(["sample", str(run.folder), "--input", str(tmp_path / "loud.wav"), "--out", str(tmp_path / "o.wav")]) == 0
    )
    assert "beyond full scale" in capsys.readouterr().err
    assert float(read_audio(tmp_path / "o.wav")[0].abs().max()) <= 1


def test_a_mel_of_the_same_constants_is_made_sound_and_another_is_refused(run, folder, tmp_path, capsys):
    wave, _ = read_audio(folder / "sound-1.wav")
    same = Mel.of(wave, run.medium.analysis, "same").save(tmp_path / "same.npz")
    torch.testing.assert_close(run.sample(input=same)[0], run.sample(input=wave)[0])
    other = Mel.of(wave, Analysis(hop=200, high=7600.0)).save(tmp_path / "other.npz")
    error = refused(["sample", str(run.folder), "--input", str(other)], capsys)
    assert "other constants: hop 200 instead of 256, high 7600 instead of 8000" in error


def test_times_outside_the_trained_range_are_an_error_and_not_left_out(run, capsys):
    error = refused(["sample", str(run.folder), "-n", "1", "--grid", "1,0.5,0.0000001"], capsys)
    assert "trained at times from 0.001 to 1" in error
    assert "1e-07" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "hello"], "has no text"),
        (["--prompt", "hello"], "has no prompt"),
        (["-n", "90"], "90 samples are asked for"),
        (["--griffin-lim", "-1"], "griffin_lim"),
        (["--guidance", "2"], "guidance"),
    ],
)
def test_what_a_vocoder_does_not_have_is_refused(options, message, run, capsys):
    assert message in refused(["sample", str(run.folder), *options], capsys)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.clip=true", "set clip = false"),
        ("data.speech.hop=512", "hop must be at most n_fft / 4"),
        ("data.speech.frames=2000", "a window of 2000 frames takes"),
        ("data.size=8", "of images, and this is speech"),
        ("data.conditional=true", "without classes"),
        ("data.speech.state=mel", r"\[encoder\]"),
        ("denoiser.predicts=levels", "is not of speech"),
        ("network.kind=mlp", "frames, wavenet, wavegrad"),
    ],
)
def test_a_recipe_that_does_not_fit_speech_says_why(override, message, folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        train(tiny("magnitude", folder, override), tmp_path / "run")


def test_speech_needs_its_table_and_nothing_else_may_have_it(tmp_path):
    with pytest.raises(recipes.RecipeError, match=r"add a table \[data.speech\]"):
        train(recipes.read("digits", ["data.name=asterisk-en"]), tmp_path / "a")
    with pytest.raises(recipes.RecipeError, match="is not speech"):
        train(recipes.read("vocoder", ["data.name=digits"]), tmp_path / "b")


def test_the_distances_while_training_are_kept_by_step(folder, tmp_path):
    """Truth: the judge on what the run makes of the same clips, once it is trained."""
    trained = train(tiny("magnitude", folder, "training.sample_every=1"), tmp_path / "run")
    lines = [json.loads(line) for line in (trained.folder / "quality.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    waves = kuosan.load(trained.folder).sample(len(trained.data.held_out))
    found = judge(trained.data.held_out.waves, waves, None, trained.medium.analysis)
    assert lines[1]["mel_l1"] == pytest.approx(found.mel_l1, rel=1e-3)
    assert (trained.folder / "samples" / "step-00000002.png").is_file()


def test_the_curve_has_the_minutes_that_training_took(folder, tmp_path):
    """Truth: the clock of metrics.jsonl; a line that was cut off, and what it would say, is left out."""
    trained = train(tiny("magnitude", folder, "training.sample_every=1"), tmp_path / "run")
    metrics = trained.folder / "metrics.jsonl"
    seconds = [json.loads(line)["seconds"] for line in metrics.read_text().splitlines()]
    assert [(p["step"], p["minutes"]) for p in trained.curve()] == [(k, seconds[k - 1] / 60) for k in (1, 2)]
    metrics.write_text(metrics.read_text()[:-10])
    assert [point["step"] for point in trained.curve()] == [1]
    (trained.folder / "quality.jsonl").unlink()
    assert trained.curve() == []


@pytest.mark.slow
def test_quality_stands_beside_griffin_lim_and_natural_speech(run, capsys):
    """Nothing is known of the words, so there is no error rate; natural waves are no distance from themselves."""
    assert main(["evaluate", str(run.folder), "--examples", "4"]) == 0
    found = json.loads((run.folder / "evaluation.json").read_text())["quality"]
    assert found["natural"]["mel_l1"] == 0
    assert 0 < found["griffin_lim"]["mel_l1"] < 1
    assert found["samples"]["utterances"] == found["griffin_lim"]["utterances"] == len(run.data.held_out)
    assert found["samples"]["word_error_rate"] is None
    assert found["real_time_factor"] > 0
    out = capsys.readouterr().out
    assert "mel-L1" in out
    assert "Griffin-Lim" in out


@pytest.mark.slow
def test_a_table_can_be_tuned_to_a_vocoder_and_is_used(run, capsys):
    assert main(["tune", str(run.folder), "--steps", "2", "--pairs", "4", "--iterations", "2", "--fine", "8"]) == 0
    assert main(["sample", str(run.folder), "-n", "1", "--steps", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["solver"].startswith("tuned")


def test_the_reverse_variance_and_the_bound_are_of_windows(run):
    """A bound of real numbers is a density: no levels are spoken of."""
    variance = run.optimal_variance.scalar.mean_squared_error(torch.tensor([0.1, 0.9]))
    assert 0 < float(variance[0]) < float(variance[1]) < 5
    bound = run.bound(examples=2, steps=5)
    assert not bound.discrete
    assert bound.dimensions == math.prod(run.shape)


def test_a_process_among_several_makes_the_waves_of_its_own_places(run):
    """Under torchrun one of two draws the second and fourth: the same waves that one process alone draws there."""
    sampler = run.sampler()
    n = min(4, len(run.data.held_out))
    whole = [wave for (wave,) in run.batches(sampler, list(range(n)))]
    places = list(range(1, n, 2))
    for place, (wave,) in zip(places, run.batches(run.share(sampler, places), places), strict=True):
        torch.testing.assert_close(wave, whole[place])


def test_every_sample_has_a_file_of_its_own(run):
    waves = [torch.zeros(100)] * 4
    sampler = dataclasses.replace(run.sampler(), items=list(zip(("a", "a", "a-1", "b/c"), waves, strict=True)))
    names = run.names(sampler, range(4), None)
    assert len(set(names)) == 4
    assert all("/" not in name for name in names)


def test_what_is_too_long_to_be_made_in_one_piece_is_refused(run):
    with pytest.raises(ValueError, match="has 601 s, and at most 600 s"):
        run.sample(input=torch.zeros(601 * 16000))


def test_guidance_away_from_a_vocoder_of_other_constants_is_refused(run, folder, tmp_path):
    other = train(tiny("magnitude", folder, "data.speech.hop=200"), tmp_path / "other")
    with pytest.raises(ValueError, match="hop 200 instead of 256"):
        run.sampler(weak=other.folder, guidance=1.0)


def test_settings_of_a_likelihood_need_one_to_be_measured(run):
    with pytest.raises(ValueError, match="variance is of a likelihood"):
        run.evaluate(variance="beta")
    with pytest.raises(ValueError, match="of held-out recordings"):
        run.evaluate(split="train")
