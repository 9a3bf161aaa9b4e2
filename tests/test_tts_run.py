"""Text to speech from end to end on a folder of made sounds: trained, told what to say, tuned; clear where wrong."""

import csv
import json
import math

import numpy as np
import pytest
import soundfile
import torch

pytest.importorskip("av")
pytest.importorskip("librosa")
pytest.importorskip("soxr")
pytest.importorskip("pocketsphinx")

import kuosan
from kuosan import recipe as recipes
from kuosan.cli import main
from kuosan.runs import TextToSpeechRun
from kuosan.speech.phonemes import encode
from kuosan.train import train

RATE, HOP, MELS = 16000, 256, 80
SAID = ("one two", "two three", "Three, one!", "one", "two two", "three two one", "one three", "two")


def sound(seconds, pitch=200.0, seed=0):
    """A hissing buzz, (n,) in float64."""
    t = np.arange(round(seconds * RATE)) / RATE
    buzz = sum(np.sin(2 * math.pi * k * pitch * t) / k for k in range(1, 8))
    return 0.1 * buzz * np.sin(math.pi * t / t[-1]) + 0.01 * np.random.default_rng(seed).standard_normal(len(t))


def recordings(folder, texts):
    """Recordings of 1 s and more with a table of what is said in them; None: nothing is written of it."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(len(texts)):
        soundfile.write(folder / f"{i}.wav", sound(1.0 + 0.1 * i, 150 + 20 * i, i), RATE)
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text"])
        table.writerows([f"{i}.wav", text] for i, text in enumerate(texts) if text is not None)
    return folder


def tiny(folder, *more):
    """The recipe that ships, of a folder, so small that two steps are nothing."""
    path = folder.parent / "tts.toml"
    table = recipes.shipped()["tts"].read_text("utf-8")
    path.write_text(table.replace('name = "asterisk-en"', f'folder = "{folder}"'), "utf-8")
    small = (
        *("network.width=16", "network.depth=1", "encoder.width=16", "encoder.depth=2", "data.speech.frames=16"),
        *("objective.frames=16", "training.steps=2", "training.batch_size=4", "training.sample_every=2"),
        *("training.warmup=0", "data.held_out=0.4", "sampling.steps=2", "sampling.griffin_lim=2"),
    )
    return recipes.read(path, [*small, *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight recordings, all of them with what is said in them."""
    return recordings(tmp_path_factory.mktemp("said") / "said", SAID)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    return train(tiny(folder), tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def vocoders(folder, tmp_path_factory):
    """A tiny vocoder of the same mels, and one of a hop of 200 and a bank that ends at 7,600 Hz."""
    path = tmp_path_factory.mktemp("vocoders")
    table = recipes.shipped()["vocoder"].read_text("utf-8").replace('name = "asterisk-en"', f'folder = "{folder}"')
    (path / "vocoder.toml").write_text(table, "utf-8")
    small = ("network.width=16", "network.depth=1", "training.steps=1", "training.batch_size=2", "data.held_out=0.4")
    small = (*small, "training.sample_every=0", "data.speech.frames=16", "sampling.steps=2", "sampling.griffin_lim=2")
    others = ("data.speech.hop=200", "data.speech.high=7600.0")
    return {
        name: train(recipes.read(path / "vocoder.toml", [*small, *more]), path / name).folder
        for name, more in (("same", ()), ("other", others))
    }


def frames_of(run, text, speed=1.0):
    """How many frames the model wants: its durations' sum, to the nearest whole one, but one for each symbol."""
    with torch.no_grad():
        _, logs = run.denoiser.encoder(torch.tensor([encode(text)]))
    return max(round(float((logs.double().exp() / speed).sum())), len(encode(text)))


def refused(arguments, capsys):
    """What the command says on its way out with 2."""
    assert main([str(one) for one in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("kuosan: ")
    return error


def slow_voice(run, frames=4.0):
    """The run with an encoder that lets each symbol last so long, so that no minimum of a frame is in the way."""
    torch.nn.init.zeros_(run.denoiser.encoder.lasting[1].weight)
    torch.nn.init.constant_(run.denoiser.encoder.lasting[1].bias, math.log(frames))
    return run


@pytest.fixture
def slow(run):
    """A copy of the run in which each symbol lasts four frames."""
    return slow_voice(kuosan.load(run.folder))


# -- what is said ------------------------------------------------------------------------------------------------------


def test_a_run_of_text_to_speech_shows_pages_while_it_trains(run):
    loaded = kuosan.load(run.folder)
    assert isinstance(loaded, TextToSpeechRun)
    assert loaded.shape == (MELS, 16)
    assert (run.folder / "samples" / "step-00000002.png").is_file()
    assert [json.loads(line)["step"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_a_wave_is_as_long_as_the_model_wants(run, slow):
    """T frames stand on T - 1 hops: (T - 1) * 256 samples."""
    for one in (run, slow):
        for text in ("one two", "Three, two; one."):
            (wave,) = one.sample(text=text)
            assert len(wave) == (frames_of(one, text) - 1) * HOP
            assert bool(wave.isfinite().all())
            assert wave.dtype == torch.float32
    assert frames_of(slow, "one two") == 4 * len(encode("one two"))


def test_the_command_writes_one_text_to_the_file_that_is_asked_for(run, tmp_path, capsys):
    out = tmp_path / "new" / "hello.wav"
    assert main(["sample", str(run.folder), "--text", "one two", "--out", str(out)]) == 0
    about = soundfile.info(out)
    assert (about.samplerate, about.channels, about.subtype) == (RATE, 1, "PCM_16")
    assert about.frames == (frames_of(run, "one two") - 1) * HOP
    told = json.loads(out.with_suffix(".json").read_text())
    assert told["samples"] == [{"file": str(out), "seed": 0}]
    assert told["vocoder"] == "Griffin-Lim"
    assert (told["evaluations"], told["griffin_lim"], told["temperature"]) == (2, 2, 0.667)
    assert str(out) in capsys.readouterr().out
    assert sorted(one.name for one in out.parent.iterdir()) == ["hello.json", "hello.wav"]


def test_a_folder_gets_a_wave_for_each_seed_and_a_page(run, tmp_path):
    out = tmp_path / "made"
    assert main(["sample", str(run.folder), "--text", "one two", "-n", "2", "--out", str(out)]) == 0
    made = json.loads((out / "samples.json").read_text())["samples"]
    assert [one["seed"] for one in made] == [0, 1]
    waves = [soundfile.read(one["file"])[0] for one in made]
    assert len(waves[0]) == len(waves[1])
    assert float(np.abs(waves[0] - waves[1]).max()) > 1e-3
    assert (out / "sheet.png").is_file()


def test_without_a_text_the_held_out_ones_are_said(run, tmp_path):
    n = len(run.data.held_out)
    waves = run.sample(n)
    assert [len(wave) for wave in waves] == [(frames_of(run, t) - 1) * HOP for t in run.data.held_out.transcripts]
    assert main(["sample", str(run.folder), "-n", str(n), "--out", str(tmp_path / "all")]) == 0
    made = {one.name for one in (tmp_path / "all").glob("*.wav")}
    assert made == {f"{name}.wav" for name in run.data.held_out.names}


def test_a_wave_depends_on_its_own_seed_and_text_only(slow):
    both = slow.sample(text=["one two", "three"], seeds=[3, 4])
    assert torch.equal(slow.sample(text="three", seeds=[4])[0], both[1])
    assert torch.equal(slow.sample(text="three", seeds=[9, 4])[1], both[1])
    other = slow.sample(text="three", seeds=[5])[0]
    assert len(other) == len(both[1])
    assert float((other - both[1]).abs().max()) > 1e-3


def test_twice_the_speed_takes_half_the_time(slow):
    """Of 4 frames for each symbol: 2 and 8."""
    text, symbols = "one two three", len(encode("one two three"))
    for speed, each in ((1.0, 4), (2.0, 2), (0.5, 8)):
        assert len(slow.sample(text=text, speed=speed)[0]) == (each * symbols - 1) * HOP


def test_speed_on_the_command_line_is_the_same(run, tmp_path):
    out = tmp_path / "slowly.wav"
    assert main(["sample", str(run.folder), "--text", "one two", "--speed", "0.1", "--out", str(out)]) == 0
    assert soundfile.info(out).frames == (frames_of(run, "one two", 0.1) - 1) * HOP


@pytest.mark.parametrize("seconds", ["0.5", "1", "2.345"])
def test_so_many_seconds_are_met_to_within_a_frame(seconds, run, tmp_path):
    out = tmp_path / "timed.wav"
    assert main(["sample", str(run.folder), "--text", "one two", "--seconds", seconds, "--out", str(out)]) == 0
    assert abs(soundfile.info(out).duration - float(seconds)) <= HOP / RATE


def test_a_lower_temperature_brings_waves_nearer_to_each_other(slow):
    def apart(temperature):
        sampler = slow.sampler(text="one two three", temperature=temperature)
        one, other = (slow.mel(sampler, "one two three", seed).values for seed in (0, 1))
        return float((one - other).abs().mean())

    assert apart(0.01) < 0.5 * apart(1.0)


# -- vocoders ----------------------------------------------------------------------------------------------------------


def test_a_vocoder_makes_the_sound_where_one_is_given(slow, vocoders, tmp_path):
    (plain,), (made,) = (slow.sample(text="one two", vocoder=one) for one in (None, vocoders["same"]))
    assert len(made) == len(plain)
    assert float((made - plain).abs().max()) > 1e-3
    loaded = kuosan.load(vocoders["same"])
    torch.testing.assert_close(slow.sample(text="one two", vocoder=loaded)[0], made)
    out = tmp_path / "o.wav"
    command = ["sample", str(slow.folder), "--text", "one", "--vocoder", str(vocoders["same"]), "--out", str(out)]
    assert main(command) == 0
    assert json.loads(out.with_suffix(".json").read_text())["vocoder"] == str(vocoders["same"])


def test_a_recipe_may_name_its_vocoder(folder, vocoders, tmp_path):
    own = train(tiny(folder, f"sampling.vocoder={vocoders['same']}", "training.steps=1"), tmp_path / "run")
    assert own.sampler().how["vocoder"] == str(vocoders["same"])


def test_a_vocoder_of_other_mels_is_refused_and_says_which_constants_differ(run, vocoders, capsys):
    error = refused(["sample", run.folder, "--text", "one", "--vocoder", vocoders["other"]], capsys)
    assert "cannot be the vocoder of" in error
    assert "hop 256 instead of 200, high 8000 instead of 7600" in error


def test_what_is_no_vocoder_is_refused(run, tmp_path, capsys):
    error = refused(["sample", run.folder, "--text", "one", "--vocoder", run.folder], capsys)
    assert "is the run of a model of text to speech" in error
    error = refused(["sample", run.folder, "--text", "one", "--vocoder", tmp_path / "none"], capsys)
    assert "is not a run: there is no such folder" in error


# -- what cannot be said -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text", "one zzyzxq two"], "no pronunciation is known of 'zzyzxq'"),
        (["--text", "one 中 two"], "the character '中'"),
        (["--text", ""], "expected words to say"),
        (["--text", " .!? "], "expected words to say"),
        (["--text", "{Q}"], "expected phonemes in braces"),
        (["--text", "one", "--speed", "0"], "speed must lie in 0.1 to 10, got 0"),
        (["--text", "one", "--seconds", "-1"], "seconds must be more than 0 and at most 600, got -1"),
        (["--text", "one", "--seconds", "nan"], "seconds must be more than 0 and at most 600, got nan"),
        (["--text", "one two three", "--seconds", "0.1"], "7 frames are too few for"),
        (["--text", "one", "--seconds", "2", "--speed", "2"], "drop one of them"),
        (["--text", "one", "--temperature", "0"], "temperature"),
        (["--text", "one", "--guidance", "2"], "guidance"),
        (["--prompt", "one"], "has no prompt to choose"),
        (["-n", "90"], "90 samples are asked for, and"),
    ],
)
def test_what_cannot_be_said_is_refused(options, words, run, capsys):
    assert words in refused(["sample", run.folder, *options], capsys)


def test_sounds_are_not_for_text_to_speech(run, folder, capsys):
    error = refused(["sample", run.folder, "--input", folder / "0.wav"], capsys)
    assert "is the run of a model of text to speech: it has no input to choose" in error


def test_texts_are_for_text_to_speech_alone(vocoders, tmp_path, capsys):
    small = ["data.name=digits", "training.steps=1", "training.batch_size=4", "training.sample_every=0"]
    table = '[process]\nkind = "cosine"\n[network]\nkind = "mlp"\nwidth = 8\n[objective]\nkind = "simple"\n[training]\n'
    (tmp_path / "pictures.toml").write_text(table + "steps = 1\n")
    pictures = train(recipes.read(tmp_path / "pictures.toml", small), tmp_path / "pictures").folder
    for other, kind in ((pictures, "a diffusion model"), (vocoders["same"], "a vocoder")):
        for name, value in (("text", "one"), ("speed", "2"), ("seconds", "2"), ("vocoder", vocoders["same"])):
            error = refused(["sample", other, f"--{name}", value], capsys)
            assert f"is the run of {kind}: it has no {name} to choose" in error


def test_several_waves_do_not_go_into_one_file(run, tmp_path, capsys):
    out = tmp_path / "hello.wav"
    error = refused(["sample", run.folder, "--text", "one", "-n", "2", "--out", out], capsys)
    assert "is one file, and there are 2 samples: give a folder" in error
    assert not out.exists()


# -- recordings --------------------------------------------------------------------------------------------------------


def test_recordings_whose_words_are_not_known_are_left_out_and_counted(tmp_path):
    """Of twelve, two have no text, one no words in it, two have words that cannot be read, one is too short: six are
    left. Which are held out is of their names."""
    odd = {1: None, 3: None, 4: "...", 5: "one zzyzxq", 7: "中 two", 10: "one two three " * 14}
    folder = recordings(tmp_path / "some", [odd.get(i, SAID[i % len(SAID)]) for i in range(12)])
    trained = train(tiny(folder, "training.steps=1"), tmp_path / "run")
    kept = [*trained.data.train.names, *trained.data.held_out.names]
    assert sorted(kept) == ["0.wav", "11.wav", "2.wav", "6.wav", "8.wav", "9.wav"]
    about = json.loads((trained.folder / "run.json").read_text())["data"]
    assert (about["train"], about["held_out"]) == (len(trained.data.train), len(trained.data.held_out))
    words = "; ".join(about["notes"])
    assert sum(int(n.split()[1]) for n in about["notes"] if "recordings without words were left out" in n) == 3
    assert "5.wav (no pronunciation is known of 'zzyzxq')" in words
    assert "7.wav (the character '中' (cjk unified ideograph-4e2d) has no English reading)" in words
    assert "10.wav (too short for its" in words
    for part in (trained.data.train, trained.data.held_out):
        assert part.transcripts == [SAID[int(name.removesuffix(".wav")) % len(SAID)] for name in part.names]
        assert part.lengths.tolist() == list(map(len, part.waves))


def test_a_folder_without_words_is_refused_and_says_where_they_would_stand(tmp_path):
    folder = recordings(tmp_path / "mute", [None] * 4)
    with pytest.raises(recipes.RecipeError, match=r"no train recording with words.*stand in a metadata\.csv, or in a"):
        train(tiny(folder), tmp_path / "a")
    (folder / "metadata.csv").unlink()
    with pytest.raises(recipes.RecipeError, match=r"no train recording with words.*stand in a metadata\.csv, or in a"):
        train(tiny(folder), tmp_path / "b")
    recordings(folder, ["zzyzxq"] * 4)
    with pytest.raises(recipes.RecipeError, match=r"no train recording with words.*known of 'zzyzxq'"):
        train(tiny(folder), tmp_path / "c")


def test_an_example_is_a_whole_recording_with_its_text(run, folder):
    """A mel of N samples has 1 + N // 256 frames; what is behind the shorter ones is 0."""
    part = run.data.train
    index = run.medium.arranged(part, torch.arange(len(part)).flip(0))
    lengths = part.lengths[index].tolist()
    assert lengths == sorted(lengths)
    index = index.roll(1)  # batches may stand in any order
    x_0, ids = run.medium.batch(part, index)
    assert x_0.shape == (len(part), MELS, 1 + max(lengths) // HOP)
    for i, k in enumerate(index.tolist()):
        wave, _ = soundfile.read(folder / part.names[k], dtype="float32")
        mel = run.medium.analysis.mel(torch.from_numpy(wave)[None])[0]
        n = mel.shape[1]
        torch.testing.assert_close(x_0[i, :, :n], (mel + 5) / 3)
        assert not x_0[i, :, n:].any()
        text = encode(SAID[int(part.names[k].removesuffix(".wav"))])
        assert ids[i].tolist() == [*text, *[0] * (ids.shape[1] - len(text))]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sampling.clip=true", "set clip = false"),
        ("data.conditional=true", "without classes"),
        ("data.speech.state=wave", r"\[encoder\]"),
        ("encoder.kernel=4", "encoder: kernel must be odd, got 4"),
        ("objective.frames=0", "objective: a window has at least 1 frame"),
        ("objective.kind=simple", "objective"),
        ("denoiser.predicts=levels", "is not of speech"),
    ],
)
def test_a_recipe_that_does_not_fit_says_why(override, words, folder, tmp_path):
    with pytest.raises(ValueError, match=words):
        train(tiny(folder, override), tmp_path / "run")


# -- what is measured of it --------------------------------------------------------------------------------------------


def test_states_are_windows_of_recordings_beside_the_means_that_the_network_is_told(run):
    """The first 16 frames of each; each frame is told a column of the encoder's means of that text, in their order."""
    part = run.data.train
    x, mu = run.states(part)
    assert x.shape == mu.shape == (len(part), MELS, 16)
    assert run.conditions(20).shape == (20, MELS, 16)
    assert torch.equal(run.conditions(20)[: len(part)], mu)
    assert torch.equal(run.conditions(20)[len(part) : 2 * len(part)], mu)
    for row, k in enumerate(run.medium.arranged(part, torch.arange(len(part))).tolist()):
        mels, ids = run.medium.batch(part, torch.tensor([k]))
        torch.testing.assert_close(x[row], mels[0, :, :16])
        with torch.no_grad():
            mean = run.denoiser.encoder(ids)[0][0]
        nearest = torch.cdist(mu[row].T, mean.T)
        assert float(nearest.min(1).values.max()) < 1e-4
        assert float((mu[row][:, 0] - mean[:, 0]).abs().max()) < 1e-4


def test_windows_longer_than_a_recording_go_round(folder, tmp_path):
    """Recordings of 1.0 to 1.7 s have 63 to 107 frames."""
    own = train(tiny(folder, "training.steps=1", "data.speech.frames=200", "objective.frames=200"), tmp_path / "run")
    part = own.data.train
    x, mu = own.states(part)
    for row, k in enumerate(own.medium.arranged(part, torch.arange(len(part))).tolist()):
        n = 1 + int(part.lengths[k]) // HOP
        assert n < 200
        for window in (x[row], mu[row]):
            assert torch.equal(window[:, n:], window[:, [k % n for k in range(n, 200)]])
            assert not torch.equal(window[:, n - 1], window[:, 0])


def test_the_reverse_variance_is_of_windows(run):
    optimal = run.optimal_variance
    assert tuple(optimal.error.shape[1:]) == run.shape
    assert (run.folder / "variance.safetensors").is_file()


def test_a_table_can_be_tuned_to_text_to_speech_and_is_used(folder, tmp_path, capsys):
    own = train(tiny(folder), tmp_path / "run")
    assert main(["tune", str(own.folder), "--steps", "2", "--pairs", "4", "--iterations", "2", "--fine", "8"]) == 0
    capsys.readouterr()
    out = str(tmp_path / "o.wav")
    assert main(["sample", str(own.folder), "--text", "one two", "--steps", "2", "--json", "--out", out]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["solver"].startswith("tuned")
