"""Chinese characters with captions that say their radical, strokes, typeface, weight and meaning."""

import bz2
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from kuosan.fetch import catalogue, fetch, to_stderr
from kuosan.files import is_held_out
from kuosan.image.data import Examples, ImageData, recalled

#: What a caption says that can be read off the picture, and the values of each. The radicals are the 20 commonest
#: among the characters, the commonest first.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "typeface": ("sans", "serif"),
    "weight": ("regular", "bold"),
    "strokes": ("up to 5", "6 to 8", "9 to 11", "12 to 15", "16 and more"),
    "radical": (
        *("water", "tree", "gold", "mouth", "grass", "hand", "man", "silk", "speech", "heart"),
        *("earth", "insect", "meat", "fish", "bamboo", "fire", "bird", "woman", "jade", "stone"),
        "other",
    ),
}

#: The most strokes of each of those values but the last.
LAST_OF_BUCKET = (5, 8, 11, 15)

#: The English names of the 214 Kangxi radicals, in their order: those of the Unicode characters U+2F00 .. U+2FD5.
RADICALS: tuple[str, ...] = tuple(
    unicodedata.name(chr(0x2F00 + index)).removeprefix("KANGXI RADICAL ").lower() for index in range(214)
)


def characters() -> ImageData:
    """Chinese characters in four typefaces: 32x32, grey, black on white, each with a caption.

    14,483 characters, in the order of their code points, each in sans regular, sans bold, serif regular and serif bold:
    those of U+4E00 .. U+9FFF that have a definition in Unihan and a glyph in all four fonts (Noto CJK, forms of
    simplified Chinese). The em is 28 pixels, in the middle. A caption reads "water radical, 8 strokes, serif, bold;
    river": the radical (kRSUnicode), all strokes (kTotalStrokes), typeface, weight, and what the character means
    (kDefinition, see :func:`gloss`), or nothing after "bold" where that is not said.

    Held out are all images of combinations of radical, strokes, typeface and weight that :func:`unseen` names, so that
    a model has to combine what it saw apart; and, by a hash, 3 % of the characters in all four typefaces.

    The rendered images are kept in the cache of fetched data.

    Raises:
        FetchError: the data are not in the cache and cannot be downloaded (64.5 MB from Debian).
    """
    root = fetch("chinese-characters")
    fonts = root / "fonts-noto-cjk" / "usr" / "share" / "fonts" / "opentype" / "noto"
    tables = root / "unicode-data" / "usr" / "share" / "unicode"
    files = {(face, weight): fonts / f"Noto{face.title()}CJK-{weight.title()}.ttc" for face, weight in _STYLES}
    (known,) = (data for data in catalogue() if data.name == "chinese-characters")
    key = repr((_FORMAT, [package.sha256 for package in known.packages]))
    kept = recalled(
        "characters", key, ("codes", "levels", "captions"), lambda: _rendered(tables, files), "characters: the images"
    )
    return _split(kept, known.licence, known.source)


def attributes_of(captions: Sequence[str]) -> Tensor:
    """What captions say of each of the `ATTRIBUTES`, int64 (N, 4): the index of the value, -1 where it is not said.

    Only what stands before the first ";" is read, as words may mean anything after it; case does not matter, and of
    several values the first counts. "other" is a radical by name, but none of the 20; an unknown one is not said.
    """
    return torch.tensor([_attributes(caption) for caption in captions], dtype=torch.int64).reshape(-1, len(ATTRIBUTES))


def strokes_of(captions: Sequence[str]) -> Tensor:
    """How many strokes captions say, int64 (N,); -1 where they do not."""
    found = (re.search(r"\b([1-9][0-9]*) strokes?\b", caption.split(";")[0].lower()) for caption in captions)
    return torch.tensor([int(one[1]) if one else -1 for one in found])


def unseen(captions: Sequence[str]) -> Tensor:
    """Which captions name a combination of radical, strokes, typeface and weight that is held out, bool (N,).

    Of the combinations that at least four characters have, with a radical of the 20, those whose hash is below 10 %.
    """
    of_caption = (
        tuple(values[index] for values, index in zip(ATTRIBUTES.values(), row, strict=True) if index >= 0)
        for row in attributes_of(captions).tolist()
    )
    return torch.tensor([said in _HELD_OUT for said in of_caption], dtype=torch.bool)


def held_out_combinations() -> list[tuple[str, ...]]:
    """Every combination that is held out, in the order of `ATTRIBUTES`: ("serif", "bold", "6 to 8", "water")."""
    return sorted(_HELD_OUT)


def gloss(definition: str) -> str:
    """What a definition of Unihan says first: up to six words in lower case of printable ASCII, or nothing.

    Brackets are dropped, marks of tones too ("Wǎ" becomes "wa"). Of the parts between ";" and ",", the first counts
    that has a letter or digit and does not only name another character ("same as 單 U+55AE").
    """
    bare = definition
    while (shorter := re.sub(r"\([^()]*\)|\[[^][]*\]", " ", bare)) != bare:  # the innermost first
        bare = shorter
    for part in re.split("[;,]", bare):
        if re.search(r"U\+[0-9A-F]{4}|[\u3400-\u9fff]", part):
            continue
        plain = unicodedata.normalize("NFKD", part).encode("ascii", "ignore").decode().lower()
        words = "".join(letter for letter in plain if letter not in "()[]" and letter.isprintable()).split()
        if any(letter.isalnum() for word in words for letter in word):
            return " ".join(words[:6]).rstrip(".:")
    return ""


_FORMAT = 1  # of the cached images and captions: raise it when they become other than before
_SIZE, _EM = 32, 28  # pixels
_BASELINE = 27  # pixels from the top: the em box of Noto CJK is 0.88 above the baseline, so it spans rows 2 to 30
_SIMPLIFIED = 2  # the face "Noto ... CJK SC" in each of the collections
_STYLES = tuple(product(ATTRIBUTES["typeface"], ATTRIBUTES["weight"]))
_TABLES = {"Unihan_IRGSources": ("kRSUnicode", "kTotalStrokes"), "Unihan_Readings": ("kDefinition",)}
_RADICAL = re.compile(rf"\b({'|'.join(sorted(RADICALS, key=len, reverse=True))}) radical\b")

# Pairs of radical and strokes that fewer than four characters have: a count of the data, so that the combinations
# are known without them.
_TOO_FEW = {
    *product(("gold", "silk", "insect", "meat", "fire", "woman", "jade", "stone", "bird"), ("up to 5",)),
    *product(("bamboo",), ("up to 5", "6 to 8")),
    *product(("fish",), ("up to 5", "6 to 8", "9 to 11")),
}


def _held_out() -> frozenset[tuple[str, ...]]:
    common = [said for said in product(*ATTRIBUTES.values()) if said[3] != "other" and said[:1:-1] not in _TOO_FEW]
    held = is_held_out([", ".join(said) for said in common], 0.1)
    return frozenset(said for said, out in zip(common, held, strict=True) if out)


_HELD_OUT = _held_out()


def _bucket(strokes: int) -> int:
    return sum(strokes > last for last in LAST_OF_BUCKET)


def _attributes(caption: str) -> tuple[int, int, int, int]:
    said = caption.split(";")[0].lower()
    typeface, weight = re.search(r"\b(sans|serif)\b", said), re.search(r"\b(regular|bold)\b", said)
    strokes, radical = re.search(r"\b([1-9][0-9]*) strokes?\b", said), _RADICAL.search(said)
    radicals = ATTRIBUTES["radical"]
    return (
        ATTRIBUTES["typeface"].index(typeface[1]) if typeface else -1,
        ATTRIBUTES["weight"].index(weight[1]) if weight else -1,
        _bucket(int(strokes[1])) if strokes else -1,
        radicals.index(radical[1] if radical[1] in radicals else "other") if radical else -1,
    )


def _caption(radical: str, strokes: int, typeface: str, weight: str, meaning: str) -> str:
    count = "1 stroke" if strokes == 1 else f"{strokes} strokes"
    return f"{radical} radical, {count}, {typeface}, {weight}" + (f"; {meaning}" if meaning else "")


def _unihan(tables: Path) -> dict[int, dict[str, str]]:
    """The fields of `_TABLES` of each character that has them all, by code point and in its order.

    A line of the tables (Unicode Standard Annex #38) is "U+6CB3<tab>kDefinition<tab>river; stream; yellow river".
    """
    found: dict[int, dict[str, str]] = {}
    for name, fields in _TABLES.items():
        with bz2.open(tables / f"{name}.txt.bz2", "rt", encoding="utf-8") as lines:
            for line in lines:
                if not line.startswith("U+"):  # a comment, or empty
                    continue
                code, field, value = line.rstrip("\n").split("\t", 2)
                if field in fields and 0x4E00 <= int(code[2:], 16) <= 0x9FFF:
                    found.setdefault(int(code[2:], 16), {})[field] = value
    every = {field for fields in _TABLES.values() for field in fields}
    return {code: found[code] for code in sorted(found) if found[code].keys() == every}


def _glyph(font: ImageFont.FreeTypeFont, letter: str) -> np.ndarray:
    """One letter as uint8 (32, 32), black on white."""
    image = Image.new("L", (_SIZE, _SIZE), 255)
    ImageDraw.Draw(image).text(((_SIZE - _EM) // 2, _BASELINE), letter, fill=0, font=font, anchor="ls")
    return np.asarray(image)


def _rendered(tables: Path, fonts: Mapping[tuple[str, str], Path], face: int = _SIMPLIFIED) -> dict[str, np.ndarray]:
    """Every character in every font: its code point (M,), levels uint8 (M, fonts, 32, 32), captions (M, fonts)."""
    known = _unihan(tables)
    # the basic layout, as the other one depends on a library that Pillow may have been built without
    basic = ImageFont.Layout.BASIC
    opened = [ImageFont.truetype(file, _EM, index=face, layout_engine=basic) for file in fonts.values()]
    missing = [_glyph(font, "\uffff") for font in opened]  # which no font has, so this is how it shows that
    levels = np.empty((len(known), len(opened), _SIZE, _SIZE), np.uint8)
    codes: list[int] = []
    tenth = max(1, len(known) // 10)
    for place, code in enumerate(known, 1):
        glyphs = [_glyph(font, chr(code)) for font in opened]
        if not any(np.array_equal(glyph, empty) for glyph, empty in zip(glyphs, missing, strict=True)):
            levels[len(codes)] = glyphs
            codes.append(code)
        if place % tenth == 0:
            to_stderr(f"characters: rendered {place:,} of {len(known):,}")
    captions = [list(_captions(known[code], list(fonts))) for code in codes]
    return {"codes": np.array(codes), "levels": levels[: len(codes)], "captions": np.array(captions)}


def _captions(fields: Mapping[str, str], styles: Sequence[tuple[str, str]]) -> Iterator[str]:
    # of several values the first is the usual one, of stroke counts that of simplified Chinese; in "85'.5", the mark
    # says that the radical has its simplified form
    number = re.match("[0-9]+", fields["kRSUnicode"])
    assert number is not None
    radical, strokes = RADICALS[int(number[0]) - 1], int(fields["kTotalStrokes"].split()[0])
    return (_caption(radical, strokes, *style, gloss(fields["kDefinition"])) for style in styles)


def _split(kept: Mapping[str, np.ndarray], licence: str, source: str) -> ImageData:
    codes, levels, captions = kept["codes"], kept["levels"], kept["captions"].ravel().tolist()
    unseen_character = is_held_out([f"U+{code:04X}" for code in codes], 0.03)
    unseen_combination = unseen(captions).numpy()
    held = unseen_character.repeat(levels.shape[1]) | unseen_combination
    images = torch.from_numpy(levels).reshape(-1, 1, _SIZE, _SIZE)

    def part(chosen: np.ndarray) -> Examples:
        index = chosen.nonzero()[0].tolist()
        return Examples(images[index], captions=tuple(captions[place] for place in index))

    return ImageData(
        name="characters",
        train=part(~held),
        held_out=part(held),
        level_count=256,
        classes=None,
        licence=licence,
        source=source,
        notes=(
            f"{len(codes):,} characters, each in {levels.shape[1]} typefaces",
            f"held out: {int(unseen_combination.sum()):,} images of {len(_HELD_OUT)} combinations of radical, strokes, "
            f"typeface and weight, and all {levels.shape[1]} of {int(unseen_character.sum()):,} characters",
        ),
    )
