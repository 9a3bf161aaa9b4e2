"""What all kinds of data share in files: which are in a folder, which are held out, UTF-8, pictures to look at."""

import csv
import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo


def visible_files(folder: Path, *, links: bool = True) -> Iterator[Path]:
    """Every file in a folder, at any depth, in no order; names that start with a dot are passed over.

    Args:
        links: follow links to other folders, but not to those that the link is in. Links to files always count.

    Raises:
        ValueError: the folder, or one in it, cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise ValueError(f"the folder {error.filename} cannot be listed: {error.strerror}")

    for place, subfolders, files in os.walk(folder, onerror=refuse, followlinks=links):
        here = Path(place).resolve()
        around = (here, *here.parents)  # a link to one of these would go round for ever
        subfolders[:] = [n for n in subfolders if not n.startswith(".") and Path(place, n).resolve() not in around]
        yield from (Path(place, name) for name in files if not name.startswith("."))


def is_held_out(names: Sequence[str], share: float) -> np.ndarray:
    r"""Which of some names are held out, bool (N,): those whose hash, the same on every machine, is below the share.

    .. math:: h = 2^{-64} \sum_{i=0}^{7} 256^{7-i} \, \mathrm{SHA256}(\text{name})_i \in [0, 1)

    Names added later move no other one, except that the lowest hash is always held out and the highest never.

    Args:
        names: of at least two, so that both parts have one.
        share: between 0 and 1.
    """
    place = np.array([int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") / 2**64 for name in names])
    held = place < share
    held[place.argmin()] = True
    held[place.argmax()] = False
    return held


def decoded(file: Path) -> str:
    """A file's text in UTF-8, line ends as they are, without the mark that some editors begin UTF-8 with.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8; says at which byte and line.
    """
    content = file.read_bytes()
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        at, line = error.start, content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}: byte {at:,} (0x{content[at]:02x}), in line {line:,}, is not UTF-8") from None


def csv_rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of a table with a first line of names; the line is the row's last, and short rows end in "".

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8, not CSV, or lacks one of the columns.
    """
    rows = csv.DictReader(io.StringIO(decoded(file), newline=""), restval="")
    try:
        for column in columns:
            if column not in (rows.fieldnames or ()):
                raise ValueError(
                    f"{file} has no column {column!r}; it has {', '.join(rows.fieldnames or ()) or 'none'}"
                )
        for row in rows:
            yield rows.line_num, row
    except csv.Error as error:
        raise ValueError(f"{file}: after line {rows.line_num:,} it is not CSV: {error}") from None


def save_png(picture: Image.Image, path: Path, notes: Mapping[str, object]) -> None:
    """Write a PNG whose text fields say where it came from (``seed``, ``run``, ...)."""
    text = PngInfo()
    for key, value in notes.items():
        text.add_text(key, str(value))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, pnginfo=text)
