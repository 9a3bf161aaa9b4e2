"""Images with captions to train on: a folder of pictures with what each one shows, and those known by name."""

import json
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import torch

from kuosan.files import csv_rows, decoded, is_held_out, visible_files
from kuosan.image.characters import characters
from kuosan.image.data import SUFFIXES, Examples, ImageData, checked, find_pictures, read_or_recall
from kuosan.image.emoji import emoji

#: The data sets of images with captions that recipes know by name.
CAPTIONED = {"characters": characters, "emoji": emoji}


def has_captions(path: str | Path) -> bool:
    """Whether a folder says what its pictures show: in a metadata file, or a .txt file beside any picture.

    Raises:
        ValueError: the folder, or one in it, cannot be listed.
    """
    root = Path(path)
    if not root.is_dir():
        return False
    if any((root / name).is_file() for name in _METADATA):
        return True
    files = [file.relative_to(root).as_posix() for file in visible_files(root)]
    return not _stems(files, SUFFIXES).isdisjoint(_stems(files, (".txt",)))


def folder(
    path: str | Path, size: int, channels: int | None = None, held_out: float = 0.05, text: str = "text"
) -> ImageData:
    """Every picture in a folder that has a caption, at any depth, cropped to its centre square and resized.

    Captions stand in `metadata.csv`, whose first line names its columns, or in `metadata.jsonl`, with a JSON object in
    each line; `file_name` is the picture's path inside the folder. Without either, they stand in a .txt file beside
    each picture, of the same name up to the ending. All in UTF-8; white space in a caption becomes single spaces.

    Pictures without a caption, or with an empty one, and captions without a picture are left out, and said in `notes`.
    How pictures are read and which are held out is said at :func:`.data.folder`; sub-folders are no classes here.

    Args:
        size: height and width of the images, in pixels.
        channels: 3 for colour, which None means too, or 1 for grey.
        held_out: the share to hold out, between 0 and 1.
        text: the column, or the key of the objects, that has the captions.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: `path` is a file, cannot be listed, holds no pictures or no captions of them; an argument is out of
            range; both metadata files are there; one is not UTF-8, CSV or JSON, lacks a column, or has a line that
            names no file, one outside the folder, or one that a line before it named; or fewer than two pictures with
            captions can be read.
    """
    channels = checked(size, channels, held_out)
    root = Path(path)
    names = find_pictures(root)
    captions, alone, where = _captions(root, names, text)
    known = [name for name in names if captions.get(name)]
    silent = [name for name in names if not captions.get(name)]
    if not known:
        raise ValueError(
            f"{root}: none of its {len(names):,} pictures (such as {names[0]}) has a caption"
            + (f", and {where} has captions of {_listed(alone)}, which are not there" if alone else "")
            + ": expected metadata.csv or metadata.jsonl with the path of each picture inside the folder as file_name "
            "and its caption, or a .txt file beside each picture"
        )
    pictures = read_or_recall(root, known, size, channels)
    held = is_held_out(pictures.names, held_out)
    notes = list(pictures.notes)
    if silent:
        notes.append(f"{len(silent):,} pictures have no caption and were left out: {_listed(silent)}")
    if alone:
        notes.append(f"{len(alone):,} captions have no picture and were left out: {_listed(alone)}")

    def part(chosen: np.ndarray) -> Examples:
        said = tuple(captions[name] for name, one in zip(pictures.names, chosen, strict=True) if one)
        return Examples(torch.from_numpy(pictures.levels[chosen]), captions=said)

    return ImageData(
        name=root.resolve().name,
        train=part(~held),
        held_out=part(held),
        level_count=256,
        classes=None,
        licence="not stated (a folder of pictures)",
        source=str(root),
        notes=(*notes, f"captions are from {where}"),
    )


_METADATA = ("metadata.csv", "metadata.jsonl")


def _captions(root: Path, names: Sequence[str], text: str) -> tuple[dict[str, str], list[str], str]:
    """The caption of each picture, whatever has one but is no picture, and where they stand, in words."""
    tables = [name for name in _METADATA if (root / name).is_file()]
    if len(tables) > 1:
        raise ValueError(f"{root} has {' and '.join(tables)}: only one can be used; remove the other")
    if not tables:
        return *_beside(root, names), ".txt files"
    (table,) = tables
    written = _table(root / table, text)
    return written, sorted(set(written) - set(names)), table


def _beside(root: Path, names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Captions in .txt files by the picture's name, and the .txt files beside which there is no picture."""
    of_stem: dict[str, list[str]] = {}
    for name in names:
        of_stem.setdefault(posixpath.splitext(name)[0], []).append(name)
    found: dict[str, str] = {}
    alone: list[str] = []
    for name in sorted(file.relative_to(root).as_posix() for file in visible_files(root)):
        stem, ending = posixpath.splitext(name)
        if ending.lower() == ".txt" and stem in of_stem:
            found |= dict.fromkeys(of_stem[stem], _plain(decoded(root / name)))
        elif ending.lower() == ".txt":
            alone.append(name)
    return found, alone


def _stems(files: Iterable[str], endings: Sequence[str]) -> set[str]:
    return {stem for stem, ending in map(posixpath.splitext, files) if ending.lower() in endings}


def _table(file: Path, text: str) -> dict[str, str]:
    rows = csv_rows(file, ("file_name", text)) if file.suffix == ".csv" else _json_rows(file, ("file_name", text))
    found: dict[str, str] = {}
    lines: dict[str, int] = {}
    for line, row in rows:
        where, name = f"{file}: line {line:,}", posixpath.normpath(row["file_name"].strip() or ".")
        if name == ".":
            raise ValueError(f"{where} names no file: expected the path of a picture inside the folder as file_name")
        if PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or name.split("/")[0] == "..":
            raise ValueError(f"{where} names {row['file_name']}: expected a path inside the folder, relative to it")
        if name in found:
            raise ValueError(f"{where} names {name}, which line {lines[name]:,} named before: keep one caption of it")
        found[name], lines[name] = _plain(row[text]), line
    return found


def _json_rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, object) of a file with a JSON object in each line; empty lines are passed over, and null is ""."""
    for line, content in enumerate(decoded(file).split("\n"), 1):  # not splitlines: JSON may hold U+2028
        if not content.strip():
            continue
        where = f"{file}: line {line:,}"
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f'{where}: expected an object such as {{"file_name": "a.png", ...}}, got {content[:40]}')
        for column in columns:
            if column not in row:
                raise ValueError(f"{where} has no {column!r}; it has {', '.join(row) or 'none'}")
            if not isinstance(row[column], str | None):
                raise ValueError(f"{where}: expected text as {column!r}, got {row[column]!r:.40}")
        yield line, {column: row[column] or "" for column in columns}


def _plain(caption: str) -> str:
    return " ".join(caption.split())


def _listed(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
