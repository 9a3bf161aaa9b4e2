"""Recordings come in at one rate and are split by their names, and what was done to them is said."""

import gzip
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("soxr")
soundfile = pytest.importorskip("soundfile")

import kuosan.speech.data as data_module  # noqa: E402
from kuosan.fetch import cache_folder  # noqa: E402
from kuosan.speech.data import asterisk, load  # noqa: E402

ONE_TO_NINE = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def put(folder, name, values=None, rate=16000, **how):
    """A sound file; a second of a noise of its own, if nothing else is said."""
    file = Path(folder, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    if values is None:
        values = 0.1 * np.random.default_rng(list(name.encode())).standard_normal(rate)
    soundfile.write(file, values, rate, **how)
    return file


def write(folder, name, content):
    file = Path(folder, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def all_names(data):
    return sorted(data.train.names + data.held_out.names)


def said_in(data, kind="texts"):
    parts = (data.train, data.held_out)
    return {name: text for part in parts for name, text in zip(part.names, getattr(part, kind), strict=True)}


def noted(data, words):
    return [note for note in data.notes if words in note]


@pytest.fixture
def twenty(tmp_path):
    for n in range(20):
        put(tmp_path, f"{n}.wav")
    return tmp_path


# -- reading ----------------------------------------------------------------------------------------------------------


def test_a_folder_gives_waves_at_one_rate(twenty):
    """Of 16 bits, to half a step of them what numpy wrote."""
    data = load(twenty, held_out=0.2)
    assert (data.rate, data.classes, data.source) == (16000, None, str(twenty))
    assert data.name == twenty.name
    assert all_names(data) == sorted(f"{n}.wav" for n in range(20))
    for part in (data.train, data.held_out):
        assert len(part) == len(part.waves) == len(part.names) == len(part.lengths)
        assert part.lengths.dtype == torch.int64
        assert part.lengths.tolist() == [16000] * len(part)
        assert part.texts is part.transcripts is part.labels is None
        for name, wave in zip(part.names, part.waves, strict=True):
            assert wave.dtype == torch.float32
            written = 0.1 * np.random.default_rng(list(name.encode())).standard_normal(16000)
            assert np.allclose(wave.numpy(), written, atol=2**-15)
    assert data.notes == ()


def test_what_was_resampled_and_mixed_down_is_said(twenty):
    """Of a tone, which is there at the new rate, and whose second channel is silent."""
    tone = 0.5 * np.sin(2 * np.pi * 500 * np.arange(48000) / 48000)
    put(twenty, "sub/tone.FLAC", np.stack([tone, 0 * tone], axis=1), 48000, format="FLAC")
    put(twenty, "low.wav", rate=8000)
    put(twenty, "low2.wav", rate=8000)
    data = load(twenty)
    assert noted(data, "2 clips were resampled from 8,000 to 16,000 Hz")
    assert noted(data, "1 clips were resampled from 48,000 to 16,000 Hz")
    assert noted(data, "1 clips of several channels were mixed down to one")
    waves = dict(zip(data.train.names, data.train.waves, strict=True)) | dict(
        zip(data.held_out.names, data.held_out.waves, strict=True)
    )
    expected = 0.25 * np.sin(2 * np.pi * 500 * np.arange(16000) / 16000)
    assert np.allclose(waves["sub/tone.FLAC"].numpy()[1600:-1600], expected[1600:-1600], atol=1e-4)
    assert len(load(twenty, rate=8000).train.waves[0]) == 8000


def test_silent_short_and_unreadable_files_are_left_out_and_named(twenty):
    """0.6 s are 9,600 samples; -60 dB of full scale is a thousandth."""
    put(twenty, "silent.wav", np.full(16000, 0.0009))
    put(twenty, "quiet.wav", np.full(16000, 0.0011))
    put(twenty, "short.wav", np.full(9599, 0.5))
    put(twenty, "enough.wav", np.full(9600, 0.5))
    write(twenty, "text.wav", "this is text")
    write(twenty, "zero.mp3", "")
    data = load(twenty)
    assert set(all_names(data)) == {*(f"{n}.wav" for n in range(20)), "quiet.wav", "enough.wav"}
    assert noted(data, "1 of 26 files never come above 0.001 of full scale, and were left out as silent: silent.wav")
    assert noted(data, "1 of 26 files were left out as shorter than 0.6 s: short.wav")
    (note,) = noted(data, "2 of 26 files could not be read and were left out: text.wav (")
    assert "zero bytes" in note
    assert "short.wav" in all_names(load(twenty, shortest=0.5))


def test_clipped_clips_are_named_and_kept(twenty):
    """One sample of a thousand at full scale is said, one of two thousand is not."""
    for name, every in (("loud.wav", 1000), ("less.wav", 2000)):
        values = np.full(16000, 0.3)
        values[::every] = 1
        put(twenty, name, values)
    data = load(twenty)
    assert noted(data, "1 clips have 0.1% of their samples or more at full scale: loud.wav")
    assert {"loud.wav", "less.wav"} <= set(all_names(data))


def test_long_lists_are_cut_and_counted(twenty):
    for n in range(8):
        put(twenty, f"s{n}.wav", np.full(100, 0.5))
    (note,) = noted(load(twenty), "8 of 28 files were left out as shorter than 0.6 s: s0.wav, ")
    assert note.endswith("s0.wav, s1.wav, s2.wav, s3.wav, s4.wav and 3 more")


def test_silence_is_trimmed_from_the_ends_if_asked(tmp_path):
    """Noise from 1 to 2 s of 4, a gap in it kept, at -50 dB else; frames of 50 ms every 12.5 ms are off by two hops."""
    pytest.importorskip("librosa")
    noise = np.random.default_rng(0)
    for n in range(6):
        values = 0.0003 * noise.standard_normal(64000)
        values[16000:32000] = 0.1 * noise.standard_normal(16000)
        values[22000:26000] = 0
        put(tmp_path, f"{n}.wav", values)
    put(tmp_path, "brief.wav", np.where(np.arange(32000) < 3200, 0.1, 0.0))
    whole, data = load(tmp_path), load(tmp_path, trim=True)
    assert whole.train.lengths.max() == 64000
    assert not noted(whole, "trimmed")
    for length in [*data.train.lengths.tolist(), *data.held_out.lengths.tolist()]:
        assert length == pytest.approx(16000, abs=1200)
    (note,) = noted(data, "s were trimmed from the ends of 6 clips, 40 dB below their loudest frame")
    assert float(note.split()[0]) == pytest.approx(18, abs=0.5)
    (note,) = noted(load(tmp_path, trim=True, rate=8000), "s were trimmed")
    assert float(note.split()[0]) == pytest.approx(18, abs=0.5)
    assert noted(data, "shorter than 0.6 s: brief.wav")


def test_hidden_and_other_files_are_passed_over(twenty):
    put(twenty, ".git/a.wav")
    put(twenty, ".b.wav")
    write(twenty, "notes.md", "no sound")
    (twenty / "loop").symlink_to(twenty)
    assert len(all_names(load(twenty))) == 20


def test_a_link_to_another_folder_is_followed(twenty, tmp_path_factory):
    put(tmp_path_factory.mktemp("elsewhere"), "a.wav")
    (twenty / "linked").symlink_to(tmp_path_factory.getbasetemp() / "elsewhere0")
    assert "linked/a.wav" in all_names(load(twenty))


def test_a_thousand_files_show_progress(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_module, "_MANY", 4)
    for n in range(10):
        put(tmp_path, f"{n}.wav", np.full(10, 0.1 + n / 20))
        put(tmp_path, f"b/{n}.wav", np.full(10, 0.125 + n / 20))
    assert len(all_names(load(tmp_path, shortest=0))) == 20
    said = capsys.readouterr()
    assert said.err.splitlines() == [f"read {n} of 20 sound files" for n in (4, 8, 12, 16)]
    assert not said.out


# -- what is said -----------------------------------------------------------------------------------------------------


def test_text_files_beside_are_transcripts(twenty):
    """One in another folder of the same name, one file without, two transcripts without a file; 18 is "one eight"."""
    for n in range(19):
        write(twenty, f"{n}.txt", f"  This is\r\nnumber {n}!\n")
    put(twenty, "sub/3.wav")
    write(twenty, "sub/3.TXT", "\ufeffAnother, a third one.")
    write(twenty, "100.txt", "no sound")
    write(twenty, "sub/4.txt", "nor here")
    data = load(twenty)
    texts, raw = said_in(data), said_in(data, "transcripts")
    teens = [f"one {digit}" for digit in ONE_TO_NINE[:8]]
    spelled = ["zero", *ONE_TO_NINE, "one zero", *teens]
    assert texts == {f"{n}.wav": f"this is number {word}" for n, word in enumerate(spelled)} | {
        "19.wav": "",
        "sub/3.wav": "another a third one",
    }
    assert raw["3.wav"] == "This is\r\nnumber 3!"
    assert raw["sub/3.wav"] == "Another, a third one."
    assert raw["19.wav"] == ""
    assert noted(data, "1 sound files have no transcript: 19.wav")
    assert noted(data, "2 transcripts have no sound file: 100.txt, sub/4.txt")


def test_a_table_has_transcripts(twenty):
    """As `csv` writes it, with another column and a comma in a text; in a sub-folder, names are relative to that."""
    write(
        twenty, "metadata.csv", 'id,file_name,text\n1,0.wav,"Yes, ""0""."\n2,./sub/a.wav,From here\n3,77.wav,nothing\n'
    )
    put(twenty, "sub/a.wav")
    put(twenty, "sub/deep/b.wav")
    write(twenty, "sub/metadata.csv", "file_name,text\ndeep/b.wav,It's  B\n")
    write(twenty, "0.txt", "the table goes first")
    write(twenty, "1.txt", "but this is read too")
    data = load(twenty)
    texts = said_in(data)
    assert {name: text for name, text in texts.items() if text} == {
        "0.wav": "yes zero",
        "1.wav": "but this is read too",
        "sub/a.wav": "from here",
        "sub/deep/b.wav": "it's b",
    }
    assert said_in(data, "transcripts")["0.wav"] == 'Yes, "0".'
    assert noted(data, "1 transcripts have no sound file: 77.wav")
    assert noted(data, "18 sound files have no transcript: 10.wav, 11.wav, 12.wav, 13.wav, 14.wav and 13 more")


def test_a_transcript_without_words_is_none(twenty):
    for n in range(20):
        write(twenty, f"{n}.txt", "..." if n == 7 else "word")
    data = load(twenty)
    assert said_in(data)["7.wav"] == said_in(data, "transcripts")["7.wav"] == ""
    assert data.notes == ("1 sound files have no transcript: 7.wav",)


# -- the split --------------------------------------------------------------------------------------------------------


def test_files_added_later_move_no_other(tmp_path):
    """Three folders that grow from 25 to 60 files, each in an order of its own."""
    names = [f"{n % 3}/{n}.wav" for n in range(60)]
    held = []
    for some in range(3):
        order = random.Random(some).sample(names, 60)
        grown = tmp_path / str(some)
        for name in order[:25]:
            put(grown, name, 0.1 + np.arange(50) * 1e-4 * int(name[2:-4]))
        before = load(grown, held_out=0.3, shortest=0)
        assert len(before.held_out) >= 2
        for name in order[25:]:
            put(grown, name, 0.1 + np.arange(50) * 1e-4 * int(name[2:-4]))
        after = load(grown, held_out=0.3, shortest=0)
        assert set(before.held_out.names) == set(after.held_out.names) & set(before.held_out.names + before.train.names)
        assert set(before.train.names) <= set(after.train.names)
        held.append(set(after.held_out.names))
    assert held[0] == held[1] == held[2]
    assert 8 <= len(held[0]) <= 28


def test_the_split_is_the_same_on_every_machine(twenty):
    """`sha256sum` prints 1958... of "9" and 2c62... of "8"; all others to "19" are above a fifth, 3333..."""
    assert load(twenty, held_out=0.2).held_out.names == ["8.wav", "9.wav"]


def test_both_parts_have_a_clip_however_small_the_share(tmp_path):
    for name in ("a.wav", "b.wav"):
        put(tmp_path, name)
    for share in (0.001, 0.999):
        data = load(tmp_path, held_out=share)
        assert len(data.train) == len(data.held_out) == 1


def test_two_files_of_one_name_in_different_folders_are_two_clips(tmp_path):
    for n in range(12):
        put(tmp_path, f"{n}/a.wav")
    data = load(tmp_path, held_out=0.5)
    assert all_names(data) == sorted(f"{n}/a.wav" for n in range(12))
    assert len(data.held_out) > 1
    assert len(data.train) > 1


def test_one_recording_in_two_formats_is_in_one_part(twenty):
    letters = "abcdefghijklmnopqrst"
    for n in range(20):
        put(twenty, f"{n}.ogg")
        write(twenty, f"{n}.txt", f"number {letters[n]}")
    data = load(twenty, held_out=0.4)
    assert {n[:-4] for n in data.train.names}.isdisjoint(n[:-4] for n in data.held_out.names)
    assert len(all_names(data)) == 40
    assert all(text == f"number {letters[int(name[:-4])]}" for name, text in said_in(data).items())


def test_a_training_clip_that_is_also_held_out_is_dropped(twenty):
    """Every recording a second time, under another name, and once as FLAC, which is the same to the sample."""
    for n in range(20):
        (twenty / f"again{n}.wav").write_bytes((twenty / f"{n}.wav").read_bytes())
    values, rate = soundfile.read(twenty / "8.wav", dtype="int16")
    put(twenty, "like8.flac", values, rate)
    data = load(twenty, held_out=0.2)
    held = {wave.numpy().tobytes() for wave in data.held_out.waves}
    assert "8.wav" in data.held_out.names
    assert "like8.flac" not in data.train.names
    assert not held & {wave.numpy().tobytes() for wave in data.train.waves}
    dropped = 41 - len(data.train) - len(data.held_out)
    assert dropped >= 2
    assert noted(data, f"{dropped} clips to train on that are also held out, sample for sample, were dropped")


# -- what cannot be used ----------------------------------------------------------------------------------------------


BAD_TABLES = {
    "columns": ("file,words\n0.wav,hi\n", "metadata.csv has no column 'file_name'; it has file, words"),
    "no text": ("file_name\n0.wav\n", "metadata.csv has no column 'text'; it has file_name"),
    "nothing": ("", "metadata.csv has no column 'file_name'; it has none"),
    "no name": ("file_name,text\n0.wav,hi\n,ho\n", "metadata.csv: line 3 names no file"),
    "twice": ("file_name,text\n0.wav,hi\n./0.wav,ho\n", "line 3 gives ./0.wav another text than a line before it"),
    "encoding": (b"file_name,text\n0.wav,caf\xe9\n", r"metadata.csv: byte 24 \(0xe9\), in line 2, is not UTF-8"),
    "a huge field": (
        "file_name,text\n0.wav," + "x" * 200_000,
        "metadata.csv: after line 1 it is not CSV: field larger",
    ),
}


@pytest.mark.parametrize(("content", "words"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_a_table_that_cannot_be_used_says_why(twenty, content, words):
    write(twenty, "metadata.csv", content)
    with pytest.raises(ValueError, match=words):
        load(twenty)


def test_a_transcript_of_another_encoding_says_where(twenty):
    write(twenty, "3.txt", "ok\nna\xefve\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"3\.txt: byte 5 \(0xef\), in line 2, is not UTF-8"):
        load(twenty)


def test_a_path_without_recordings_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing at .*nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no sound files: expected files that end in \.wav, \.flac"):
        load(tmp_path)
    file = put(tmp_path, "a.wav")
    with pytest.raises(ValueError, match=r"a\.wav is a file: give the folder that holds it"):
        load(file)


def test_one_file_is_too_few(tmp_path):
    put(tmp_path, "a.wav")
    with pytest.raises(ValueError, match="two clips are needed, one to train on and one to hold out; of 1 files 1 can"):
        load(tmp_path)
    put(tmp_path, "a.flac")
    write(tmp_path, "b.wav", "text")
    put(tmp_path, "c.wav", np.zeros(16000))
    with pytest.raises(ValueError, match=r"of 4 files 1 can be used; 1 of 4 .*b\.wav \(.*; 1 of 4 .* silent: c\.wav"):
        load(tmp_path)


def test_copies_of_one_recording_are_too_few(tmp_path):
    for name in ("a.wav", "b.wav", "c.wav"):
        put(tmp_path, name, np.full(16000, 0.5))
    with pytest.raises(ValueError, match="all clips to train on are held out too, sample for sample"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"rate": 0}, "^rate must be at least 1"),
        ({"held_out": 0.0}, "^held_out must lie between 0 and 1"),
        ({"held_out": 1.0}, "^held_out must lie between 0 and 1"),
        ({"shortest": -1}, "^shortest must be at least 0"),
        ({"shortest": float("nan")}, "^shortest must be at least 0"),
    ],
)
def test_arguments_out_of_range_are_refused(twenty, how, words):
    with pytest.raises(ValueError, match=words):
        load(twenty, **how)


# -- Asterisk ---------------------------------------------------------------------------------------------------------


def test_prompts_are_read_as_they_are_spoken(tmp_path, monkeypatch):
    """A folder laid out like the package; what is said of each by hand."""
    av = pytest.importorskip("av")
    if "g722" not in av.codecs_available:
        pytest.skip("this FFmpeg has no encoder for G.722")
    from test_audio import encode

    written = {
        "beep": "[this is a simple beep tone]",
        "tone": "<beep ascending>",
        "silence/1": "(1 second of silence)",
        "demo-instruct": "If you would like to learn more",
        "digits/1": "one",
        "digits/oh": "oh",
        "letters/at": "at [@]",
        "spy-h323": "H.323",
        "help": "press * to pause, press # or 10: now (a tone)",
        "time": "the time: o'clock",
    }
    folder = tmp_path / "asterisk-core-sounds-en-g722/usr/share/asterisk/sounds/en_US_f_Allison"
    for n, name in enumerate(written):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        length = 8000 if name == "digits/oh" else 16000
        tone = 0.5 * np.sin(np.arange(length) * (0.1 + 0.05 * n))
        encode(folder / f"{name}.g722", tone, "g722", "g722")
    lines = ["; Core Sounds", "", *(f"{name}: {text}" for name, text in written.items()), "lost: No sound."]
    write(
        tmp_path,
        "asterisk-core-sounds-en/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz",
        gzip.compress("\n".join(lines).encode()),
    )
    monkeypatch.setattr(data_module, "fetch", lambda name: {"asterisk-en": tmp_path}[name])
    data = asterisk()
    assert said_in(data) == {
        "digits/1": "one",
        "letters/at": "at",
        "spy-h323": "h three two three",
        "help": "press star to pause press pound or one zero now",
        "time": "the time o'clock",
    }
    assert noted(data, "3 recordings in which nothing is said were left out: beep, silence/1, tone")
    assert noted(data, "1 transcripts have no sound file: lost")
    assert noted(data, "demo-instruct, of 73 s, was left out")
    assert noted(data, "1 of 6 files were left out as shorter than 0.6 s: digits/oh")
    assert (data.name, data.rate, data.licence) == ("asterisk-en", 16000, "CC-BY-SA-3.0")


@pytest.mark.slow
@pytest.mark.skipif(not (cache_folder() / "asterisk-en").is_dir(), reason="asterisk-en is not in the cache")
def test_the_prompts_are_those_that_the_docstring_tells_of():
    start = time.process_time()
    data = asterisk()
    assert time.process_time() - start < 30
    assert (len(data.train), len(data.held_out)) == (495, 52)
    assert [round(int(part.lengths.sum()) / 16000) for part in (data.train, data.held_out)] == [1249, 131]
    lengths = torch.cat([data.train.lengths, data.held_out.lengths]) / 16000
    assert lengths.min() >= 0.6
    assert 31 < lengths.max() < 32
    assert all(part.texts and all(part.texts) for part in (data.train, data.held_out))
    assert set("".join(said_in(data).values())) == set("abcdefghijklmnopqrstuvwxyz' ")
    assert said_in(data)["digits/1"] == "one"
    assert noted(data, "1 transcripts have no sound file: pls-try-call-later")
    assert noted(data, "17 recordings in which nothing is said")
