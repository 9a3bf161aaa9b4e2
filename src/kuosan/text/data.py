"""Texts to train on, as tokens in memory: WordNet's glosses, Tang poems, or any file or folder of texts."""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kuosan.fetch import catalogue, fetch
from kuosan.files import decoded, visible_files
from kuosan.tokenizer import PAD, UNKNOWN, Kind, Tokenizer


@dataclass(frozen=True)
class Texts:
    """Texts in memory, with or without classes.

    Attributes:
        tokens: int64 (N, L), <pad> (0) after the text, which is what says that it has ended.
        lengths: int64 (N,), how many of the L are text, at least 1.
        labels: int64 (N,), the index into `TextData.classes`, or None.
        texts: what was read, whole, before it became tokens.
    """

    tokens: Tensor
    lengths: Tensor
    labels: Tensor | None
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class TextData:
    """A data set of texts, split once and for all into a training and a held-out part.

    Attributes:
        tokenizer: learned from the training part alone.
        length: L, the tokens that every text is padded or cut to.
        classes: the name of each class, or None where the texts have no classes.
        notes: what was done to the texts on the way in, and what was left out, one sentence each.
    """

    name: str
    train: Texts
    held_out: Texts
    tokenizer: Tokenizer
    length: int
    classes: tuple[str, ...] | None
    licence: str
    source: str
    notes: tuple[str, ...] = ()


def load(
    path: str | Path,
    *,
    length: int,
    kind: Kind = "word",
    size: int = 2500,
    text: str = "text",
    label: str | None = None,
    held_out: float = 0.05,
) -> TextData:
    """Texts from a file or a folder, in UTF-8.

    A .txt file has a text in each line; a .csv or .jsonl file in the column or key `text` of each row, and its class
    in `label`. In a folder each .txt file, at any depth, is a text, and each sub-folder a class. Texts in the folder
    itself, or in only one sub-folder, have no classes; names that start with a dot and links to folders are passed
    over.

    White space around a text is dropped, and an empty text left out. `numpy.random.default_rng(0).permutation(N)` makes
    the split: its last ones are held out, at least one. A training text that is also held out is dropped.

    Args:
        length: how many tokens every text is padded or cut to.
        kind: what a token is: see `Tokenizer`.
        size: the most tokens that the vocabulary may have.
        held_out: the share to hold out, between 0 and 1.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: an argument is out of range; the file is of an unknown kind, not UTF-8 or damaged; a folder cannot
            be listed; a column is missing; there are fewer than two texts or classes; or all tokens of a part are
            unknown.
        ImportError: the library `tokenizers` is not installed.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must lie between 0 and 1 (a share of the texts), got {held_out}")
    if length < 1:
        raise ValueError(f"length must be at least 1 token, got {length}")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"expected a file or a folder of texts, but there is nothing at {path}")
    reader = _folder if path.is_dir() else _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"{path} is of an unknown kind: expected .txt, .csv, .jsonl, or a folder of .txt files")
    if label is not None and reader in (_folder, _lines):
        raise ValueError(f"{path} has no columns, so label={label!r} means nothing: leave it out")
    rows = list(reader(path, text, label))
    names = {name for _, name in rows}
    if label is not None and len(names) == 1:
        raise ValueError(f"{path}: {label!r} is {names.pop()!r} in every row; classes are at least two: leave it out")
    about = {"name": path.resolve().stem, "licence": "not stated (a file of texts)", "source": str(path)}
    return _assemble(rows, [], length, kind, size, held_out, about)


def lines(file: Path) -> list[str]:
    """The lines of a file in UTF-8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8; says at which byte and line.
    """
    return [line for line, _ in _lines(file, "", None)]


def glosses() -> TextData:
    """Definitions of WordNet 3.0 in ten classes, nine of nouns and one of verbs: words, 20 tokens, 1 in 20 held out.

    A definition is what stands before the first semicolon, without what is in brackets, as plain lower-case words.
    Kept are those of 3 to 19 words; the vocabulary has the 2,500 most frequent ones.

    Raises:
        FetchError: the data are not in the cache and cannot be downloaded (6.5 MB from Debian).
        ImportError: the library `tokenizers` is not installed.
    """
    folder = fetch("glosses") / "wordnet-base" / "usr" / "share" / "wordnet"
    found = [*_synsets(folder / "data.noun", _NOUNS), *_synsets(folder / "data.verb", None)]
    kept = [(gloss, name) for gloss, name in found if 3 <= len(gloss.split()) <= 19]
    notes = [f"{len(found) - len(kept):,} of {len(found):,} glosses, not of 3 to 19 words, were left out"]
    return _assemble(kept, notes, 20, "word", 2502, 0.05, _about("glosses"))


def poems() -> TextData:
    """313 poems of the Tang: characters, 64 tokens (eight lines of seven and a mark just fit), 1 in 20 held out.

    Titles and authors are left out, and lines joined. A longer poem becomes several texts, cut at line ends, each as
    long as it can be; it is held out with all of them or not at all.

    Raises:
        FetchError: the data are not in the cache and cannot be downloaded (0.5 MB from Debian).
        ImportError: the library `tokenizers` is not installed.
    """
    content = _content(fetch("tang-poems") / "fortunes-zh" / "usr" / "share" / "games" / "fortunes" / "tang300")
    whole = re.split(r"^%\s*$", re.sub(r"\x1b\[[0-9;]*m", "", content), flags=re.MULTILINE)
    found = [pieces for poem in whole if (pieces := _pieces(poem, 64))]
    rows, groups = zip(*(((piece, None), i) for i, pieces in enumerate(found) for piece in pieces), strict=True)
    notes = [
        "titles and authors are not part of the texts",
        f"{sum(len(p) > 1 for p in found):,} of {len(found):,} poems, longer than 64 characters, were cut into pieces",
    ]
    return _assemble(rows, notes, 64, "character", 5000, 0.05, _about("tang-poems"), groups)


#: The data sets of texts that recipes know by name.
NAMED = {"glosses": glosses, "tang-poems": poems}

Row = tuple[str, str | None]  # a text and the name of its class

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")
# WordNet's lexicographer files of these nouns, lexnames(5WN)
_FILES = "05 animal, 06 artifact, 10 communication, 12 feeling, 13 food, 15 location, 18 person, 20 plant, 27 substance"
_NOUNS = dict(one.split() for one in _FILES.split(", "))


def _about(name: str) -> dict[str, str]:
    (known,) = (data for data in catalogue() if data.name == name)
    return {"name": name, "licence": known.licence, "source": known.source}


def _synsets(file: Path, classes: dict[str, str] | None) -> Iterator[Row]:
    """Each gloss and its class; without `classes`, all are verbs."""
    for line in _content(file).splitlines():
        if not line.startswith("  "):  # as the licence does
            fields, gloss = line.split(" | ", 1)
            name = classes.get(fields.split(" ", 2)[1]) if classes else "verb"
            if name is not None:
                definition = re.sub(r"\([^)]*\)", " ", gloss).split(";")[0]
                yield " ".join(_WORD.findall(definition.lower())), name


def _pieces(poem: str, longest: int) -> list[str]:
    """The body's lines joined into as few pieces as their order allows; only a line can be longer than `longest`."""
    pieces: list[str] = []
    for line in map(str.strip, poem.split("\n")):
        if not line or line.startswith(("《", "作者：")):
            continue
        if pieces and len(pieces[-1]) + len(line) <= longest:
            pieces[-1] += line
        else:
            pieces.append(line)
    return pieces


def _content(file: Path) -> str:
    """A file's text, with line ends "\\n"."""
    return decoded(file).replace("\r\n", "\n").replace("\r", "\n")


def _lines(file: Path, text: str, label: str | None) -> Iterator[Row]:
    return ((line, None) for line in _content(file).removesuffix("\n").split("\n"))


def _csv(file: Path, text: str, label: str | None) -> Iterator[Row]:
    table = csv.DictReader(io.StringIO(_content(file), newline=""), restval="")
    try:
        for name in filter(None, (text, label)):
            if name not in (table.fieldnames or ()):
                raise ValueError(f"{file} has no column {name!r}; it has {', '.join(table.fieldnames or ()) or 'none'}")
        for row in table:
            yield row[text], _class_in(row, label, f"{file}: line {table.line_num:,}")
    except csv.Error as error:
        raise ValueError(f"{file}: after line {table.line_num:,} it is not CSV: {error}") from None


def _jsonl(file: Path, text: str, label: str | None) -> Iterator[Row]:
    for number, line in enumerate(_content(file).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}: line {number:,}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno:,}") from None
        if not isinstance(row, dict) or not isinstance(row.get(text), str):
            raise ValueError(f"{where} is not an object with a string under {text!r}: {line[:60]}")
        yield row[text], _class_in(row, label, where)


def _class_in(row: dict, label: str | None, where: str) -> str | None:
    if label is None:
        return None
    if row.get(label) in (None, ""):
        raise ValueError(f"{where} has no {label!r}: give it one, or take the row out")
    return str(row[label])


def _folder(folder: Path, text: str, label: str | None) -> Iterator[Row]:
    files = visible_files(folder, links=False)
    names = sorted(file.relative_to(folder) for file in files if file.suffix.lower() == ".txt")
    beside = sum(len(name.parts) == 1 for name in names)
    if not names:
        raise ValueError(f"{folder} holds no texts: expected files that end in .txt")
    if 0 < beside < len(names):
        raise ValueError(f"{folder} holds {beside:,} texts itself and others in sub-folders: move all into sub-folders")
    one = beside or len({name.parts[0] for name in names}) == 1
    return ((_content(folder / name), None if one else name.parts[0]) for name in names)


_READERS = {".txt": _lines, ".csv": _csv, ".jsonl": _jsonl}


def _assemble(
    rows: Sequence[Row],
    notes: Sequence[str],
    length: int,
    kind: Kind,
    size: int,
    held_out: float,
    about: dict[str, str],
    groups: Sequence[int] = (),
) -> TextData:
    """Split, learn the vocabulary, encode. Rows of one group (none given: each is its own) are held out together."""
    where = about["source"]
    found = [(text.strip(), name, g) for (text, name), g in zip(rows, groups or range(len(rows)), strict=True)]
    full = [row for row in found if row[0]]
    units = sorted({g for _, _, g in full})
    if len(units) < 2:
        raise ValueError(f"{where}: two texts are needed, one to train on and one to hold out; it has {len(units)}")
    count = min(max(1, round(held_out * len(units))), len(units) - 1)
    chosen = {units[i] for i in np.random.default_rng(0).permutation(len(units))[-count:]}
    held = [row for row in full if row[2] in chosen]
    known = {row[0] for row in held}
    train = [row for row in full if row[2] not in chosen and row[0] not in known]
    if not train:
        raise ValueError(f"{where}: all texts to train on are held out too, to the character: add others")
    tokenizer = Tokenizer.train([row[0] for row in train], kind, size)
    classes = tuple(sorted({name for _, name, _ in full if name is not None})) or None
    said = list(notes)
    if empty := len(found) - len(full):
        said.append(f"{empty:,} empty texts were left out")
    if twice := len(full) - len(held) - len(train):
        said.append(f"{twice:,} texts to train on that are also held out were dropped")

    def part(chosen: list[tuple[str, str | None, int]], what: str) -> Texts:
        texts = tuple(row[0] for row in chosen)
        ids = tokenizer.encode_all(texts)
        kept = torch.tensor([(row + [PAD] * length)[:length] for row in ids])
        lengths = torch.tensor([min(len(row), length) for row in ids])
        unknown = int((kept == UNKNOWN).sum()) / int(lengths.sum())
        if unknown == 1:
            raise ValueError(f"{where}: all {what} tokens are unknown: give more texts, a larger size, or kind='bpe'")
        said.append(f"{sum(len(row) > length for row in ids):,} {what} texts were cut to {length} tokens")
        said.append(f"{unknown:.1%} of the {what} tokens are unknown to the vocabulary of {tokenizer.size:,}")
        labels = torch.tensor([classes.index(row[1]) for row in chosen if row[1] is not None]) if classes else None
        return Texts(kept, lengths, labels, texts)

    parts = (part(train, "training"), part(held, "held-out"))
    return TextData(about["name"], *parts, tokenizer, length, classes, about["licence"], where, tuple(said))
