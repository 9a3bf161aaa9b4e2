"""Speech to train on, as waves in memory: Asterisk's English prompts, or any folder of sound files."""

import gzip
import hashlib
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from kuosan.fetch import catalogue, fetch, to_stderr
from kuosan.files import csv_rows, decoded, is_held_out, visible_files
from kuosan.speech.audio import FORMATS, SILENT, Sound, read_audio, resampled
from kuosan.speech.words import DIGITS, normalised

#: Trimming takes off what is this many dB below the loudest frame of a clip.
TOP_DB = 40


@dataclass(frozen=True)
class Clips:
    """Recordings in memory, with or without what is said in them.

    Attributes:
        waves: float32 (length,) each, at the rate of the data.
        texts: what is said, as :func:`.words.normalised` spells it, empty where nothing is known of it; or None if
            nothing is of any clip.
        transcripts: the same as it was read.
        names: of the files, inside their folder.
        lengths: int64 (N,), samples of each wave.
        labels: None, as speech has no classes here.
    """

    waves: list[Tensor]
    texts: list[str] | None
    transcripts: list[str] | None
    names: list[str]
    lengths: Tensor
    labels: None = None

    def __len__(self) -> int:
        return len(self.waves)

    @cached_property
    def joined(self) -> Tensor:
        """All waves laid end to end."""
        return torch.cat(self.waves)


@dataclass(frozen=True)
class SpeechData:
    """A data set of recordings, split once and for all into a training and a held-out part.

    Attributes:
        rate: samples a second, of every wave.
        notes: what was done to the recordings on the way in, and what was left out, one sentence each.
    """

    name: str
    train: Clips
    held_out: Clips
    rate: int
    licence: str
    source: str
    notes: tuple[str, ...] = ()
    classes: None = None


def load(
    folder: str | Path,
    *,
    rate: int = 16000,
    held_out: float = 0.05,
    trim: bool = False,
    shortest: float = 0.6,
) -> SpeechData:
    """Every sound file in a folder, at any depth, mixed down to one channel and resampled; see :mod:`.audio`.

    What is said in a file stands in a `metadata.csv` with the columns `file_name`, which is relative to where that
    table is, and `text`; or else in a .txt file beside it, of the same name up to the ending; in UTF-8. Neither is
    needed. Names that start with a dot are passed over.

    Left out, and said in `notes`: what cannot be read, is silent (never above -60 dB of full scale) or too short, and
    training clips that are the same as a held-out one, sample for sample.

    A file is held out when a hash of its name inside the folder, without the ending, falls below `held_out`. Both parts
    get at least one: where none falls there, the lowest is held out. Otherwise files added later move no other from one
    part to the other, and a recording that is there as .wav and .mp3 is in one of them.

    Args:
        rate: samples a second that every wave is brought to.
        held_out: the share to hold out, between 0 and 1.
        trim: take off silence at both ends: what is 40 dB below the loudest 50 ms (`librosa.effects.trim`).
        shortest: seconds that a clip must have, after trimming.

    Raises:
        FileNotFoundError: there is nothing at `folder`.
        ValueError: it is a file, or cannot be listed; an argument is out of range; there are fewer than two clips to
            use; a `metadata.csv` lacks a column, names no file in a row, or gives two texts to one file; or what is
            said is not in UTF-8.
        ImportError: the library `av`, or `soxr` or `librosa` where it is needed, is not installed.
    """
    if rate < 1:
        raise ValueError(f"rate must be at least 1 sample a second, got {rate}")
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie between 0 and 1 (a share of the files), got {held_out}")
    if not shortest >= 0:
        raise ValueError(f"shortest must be at least 0 seconds, got {shortest}")
    root = Path(folder)
    if not root.exists():
        raise FileNotFoundError(f"expected a folder of sound files, but there is nothing at {root}")
    if not root.is_dir():
        raise ValueError(f"expected a folder of sound files, but {root} is a file: give the folder that holds it")
    names = sorted(file.relative_to(root).as_posix() for file in visible_files(root))
    sounds = {name: root / name for name in names if Path(name).suffix.lower() in FORMATS}
    if not sounds:
        raise ValueError(f"{root} holds no sound files: expected files that end in {', '.join(FORMATS)}")
    transcripts, notes = _matched(_transcripts(root, names, sounds), sounds)
    about = {"name": root.resolve().name, "licence": "not stated (a folder of recordings)", "source": str(root)}
    return _assemble(sounds, transcripts, notes, rate, held_out, trim, shortest, about)


def asterisk() -> SpeechData:
    """English telephone prompts of one speaker, Allison Smith: 16 kHz, with transcripts.

    495 clips to train on, 1,249 s in all (0.6 to 31 s, half of them under 1.4 s), and 52 held out, 131 s (0.7 to 21 s):
    1 in 10, by a hash of names such as "digits/1".

    Transcripts are without what is in brackets, which is not said; digits, "*" and "#" became "one", "star" and
    "pound", as they are spoken. Recordings in which nothing is said (tones, silence, monkeys) are left out, and so are
    the demonstration of 73 s and clips under 0.6 s.

    Raises:
        FetchError: the data are not in the cache and cannot be downloaded (10.6 MB from Debian).
        ImportError: the library `av` is not installed.
    """
    root = fetch("asterisk-en")
    folder = root / "asterisk-core-sounds-en-g722" / "usr" / "share" / "asterisk" / "sounds" / "en_US_f_Allison"
    table = root / "asterisk-core-sounds-en" / "usr" / "share" / "doc" / "asterisk-core-sounds-en"
    written = {}
    for line in gzip.decompress((table / "core-sounds-en.txt.gz").read_bytes()).decode("utf-8").splitlines():
        if line.strip() and not line.startswith(";"):  # a comment
            name, text = line.split(":", 1)
            written[name] = text.strip()
    files = sorted(folder.rglob("*.g722"))
    sounds = {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
    transcripts, notes = _matched(written, sounds)
    spoken = {name: _as_spoken(text) for name, text in transcripts.items()}
    wordless = [name for name, text in spoken.items() if not text]
    left_out = {*wordless, "demo-instruct"}
    notes += [
        f"{len(wordless):,} recordings in which nothing is said were left out: {_listed(wordless)}",
        "demo-instruct, of 73 s, was left out",
        "transcripts are without what is in brackets, and digits, * and # are spelled out as they are spoken",
    ]
    kept = {name: file for name, file in sounds.items() if name not in left_out}
    (known,) = (data for data in catalogue() if data.name == "asterisk-en")
    about = {"name": known.name, "licence": known.licence, "source": known.source}
    return _assemble(kept, spoken, notes, 16000, 0.1, False, 0.6, about)


#: The data sets of speech that recipes know by name.
NAMED = {"asterisk-en": asterisk}


_MANY = 1000  # files, above which reading shows progress
_FULL = 1e-3  # the share of samples at full scale from which on a clip is said to be clipped
_SPOKEN = dict(zip("0123456789", DIGITS, strict=True)) | {"*": "star", "#": "pound"}


def _as_spoken(text: str) -> str:
    said = re.sub(r"\[[^]]*\]|\([^)]*\)|<[^>]*>", " ", text)
    return " ".join(re.sub(r"[0-9*#]", lambda found: f" {_SPOKEN[found[0]]} ", said).split())


def _listed(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _stem(name: str) -> str:
    stem, dot, ending = name.rpartition(".")
    return stem if dot + ending.lower() in FORMATS else name


def _transcripts(root: Path, names: Sequence[str], sounds: Iterable[str]) -> dict[str, str]:
    """What is said in which file, by tables and by .txt files; those that belong to no file are in it too."""
    beside: dict[str, list[str]] = {}
    for sound in sounds:
        beside.setdefault(_stem(sound), []).append(sound)
    found: dict[str, str] = {}
    for name in names:
        if name.lower().endswith(".txt"):
            text = decoded(root / name).strip()
            found |= dict.fromkeys(beside.get(name[:-4], [name]), text)
    for name in names:
        if name.rpartition("/")[2] == "metadata.csv":
            found |= _table(root / name, name.removesuffix("metadata.csv"))
    return found


def _table(file: Path, inside: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for line, row in csv_rows(file, ("file_name", "text")):
        where = f"{file}: line {line:,}"
        if not row["file_name"].strip():
            raise ValueError(f"{where} names no file")
        name, text = posixpath.normpath(inside + row["file_name"].strip()), row["text"].strip()
        if found.setdefault(name, text) != text:
            raise ValueError(f"{where} gives {row['file_name']} another text than a line before it")
    return found


def _matched(written: Mapping[str, str], sounds: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """The transcripts that have a file and say something, and what is to be said of all others."""
    said = {name: text for name, text in written.items() if normalised(text)}
    found = {name: said[name] for name in sounds if name in said}
    notes = []
    if written:
        if lone := sorted(set(said) - set(found)):
            notes.append(f"{len(lone):,} transcripts have no sound file: {_listed(lone)}")
        if silent := sorted(set(sounds) - set(found)):
            notes.append(f"{len(silent):,} sound files have no transcript: {_listed(silent)}")
    return found, notes


@dataclass(frozen=True)
class _Clip:
    """A wave as it goes into the data, what its file was, and seconds that were trimmed."""

    wave: Tensor
    sound: Sound
    trimmed: float


def _clip(file: Path, rate: int, trim: bool) -> _Clip | str:
    """A file's wave; or why it cannot be read."""
    try:
        wave, sound = read_audio(file)
    except ValueError as error:
        return str(error)
    wave = resampled(wave, sound.rate, rate)
    whole = len(wave)
    if trim and not sound.silent:
        wave = _trimmed(wave, rate)
    return _Clip(wave, sound, (whole - len(wave)) / rate)


def _trimmed(wave: Tensor, rate: int) -> Tensor:
    try:
        import librosa
    except ImportError:
        raise ImportError("trimming needs librosa: pip install 'kuosan[speech]'") from None
    frame, hop = max(2, rate // 20), max(1, rate // 80)
    _, (start, end) = librosa.effects.trim(wave.numpy(), top_db=TOP_DB, frame_length=frame, hop_length=hop)
    return wave[int(start) : int(end)].clone()


def _read(files: Mapping[str, Path], rate: int, trim: bool) -> Iterator[tuple[str, _Clip | str]]:
    """Each file's clip, on all processor cores: libraries that decode and resample do not hold each other up."""
    names = list(files)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(names), _MANY):  # batches, so that an interrupt need not wait for every file
            if start:
                to_stderr(f"read {start:,} of {len(names):,} sound files")
            batch = names[start : start + _MANY]
            yield from zip(batch, pool.map(lambda name: _clip(files[name], rate, trim), batch), strict=True)


def _assemble(
    files: Mapping[str, Path],
    transcripts: Mapping[str, str],
    notes: Sequence[str],
    rate: int,
    held_out: float,
    trim: bool,
    shortest: float,
    about: dict[str, str],
) -> SpeechData:
    """Read, leave out what cannot be used, split, and say what was done."""
    clips: dict[str, _Clip] = {}
    unread, silent, short = [], [], []
    for name, clip in _read(files, rate, trim):
        if isinstance(clip, str):
            unread.append(f"{name} ({clip})")
        elif clip.sound.silent:
            silent.append(name)
        elif len(clip.wave) < shortest * rate:
            short.append(name)
        else:
            clips[name] = clip
    dropped = [
        f"{len(which):,} of {len(files):,} files {what}: {_listed(which)}"
        for which, what in (
            (unread, "could not be read and were left out"),
            (silent, f"never come above {SILENT} of full scale, and were left out as silent"),
            (short, f"were left out as shorter than {shortest} s"),
        )
        if which
    ]
    stems = sorted({_stem(name) for name in clips})
    if len(stems) < 2:
        raise ValueError(
            f"{about['source']}: two clips are needed, one to train on and one to hold out; of {len(files):,} files "
            f"{len(stems)} can be used" + "".join(f"; {why}" for why in dropped)
        )
    chosen = {stem for stem, out in zip(stems, is_held_out(stems, held_out), strict=True) if out}
    held = [name for name in clips if _stem(name) in chosen]
    known = {_digest(clips[name].wave) for name in held}
    others = [name for name in clips if _stem(name) not in chosen]
    train = [name for name in others if _digest(clips[name].wave) not in known]
    if not train:
        raise ValueError(f"{about['source']}: all clips to train on are held out too, sample for sample: add others")
    said = [*notes, *dropped, *_done_to(clips, rate, trim)]
    if twice := len(others) - len(train):
        said.append(f"{twice:,} clips to train on that are also held out, sample for sample, were dropped")

    def part(names: list[str]) -> Clips:
        waves = [clips[name].wave for name in names]
        raw = [transcripts.get(name, "") for name in names] if transcripts else None
        texts = None if raw is None else [normalised(text) for text in raw]
        return Clips(waves, texts, raw, names, torch.tensor([len(wave) for wave in waves]))

    return SpeechData(
        name=about["name"],
        train=part(train),
        held_out=part(held),
        rate=rate,
        licence=about["licence"],
        source=about["source"],
        notes=tuple(said),
    )


def _digest(wave: Tensor) -> bytes:
    return hashlib.sha256(wave.numpy().tobytes()).digest()


def _done_to(clips: Mapping[str, _Clip], rate: int, trim: bool) -> Iterator[str]:
    rates = Counter(clip.sound.rate for clip in clips.values())
    for other, count in sorted(rates.items()):
        if other != rate:
            yield f"{count:,} clips were resampled from {other:,} to {rate:,} Hz"
    if mixed := sum(clip.sound.channels > 1 for clip in clips.values()):
        yield f"{mixed:,} clips of several channels were mixed down to one"
    if trim:
        seconds, cut = sum(clip.trimmed for clip in clips.values()), sum(clip.trimmed > 0 for clip in clips.values())
        yield f"{seconds:,.1f} s were trimmed from the ends of {cut:,} clips, {TOP_DB} dB below their loudest frame"
    if clipped := [name for name, clip in clips.items() if clip.sound.full_scale >= _FULL]:
        yield f"{len(clipped):,} clips have {_FULL:.1%} of their samples or more at full scale: {_listed(clipped)}"
