"""Emoji with captions: their names and what they stand for."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from kuosan.fetch import catalogue, fetch
from kuosan.files import is_held_out
from kuosan.image.data import Examples, ImageData, read_or_recall


def emoji() -> ImageData:
    """Google's emoji: 32x32, colour, on white, each with a caption; the 9 categories of Unicode are the classes.

    1,906 emoji, flags among them; the 1,875 variations of skin colour and the 5 components that make them are left out.
    A caption reads "grinning face: face, smile, happy, joy, grin, smiley": the name, and up to 6 keywords of emojilib.
    Held out are 5 %, by a hash of the short name; what looks the same as one of them is not trained on.

    Raises:
        FetchError: the data are not in the cache and cannot be downloaded (74.4 MB from npm).
    """
    return _read(fetch("emoji"))


_SIZE = 32
_KEYWORDS = 6


def _read(root: Path) -> ImageData:
    tables = root / "emoji-datasource-google"
    listed = json.loads((tables / "emoji.json").read_text(encoding="utf-8"))
    keywords = json.loads((root / "emojilib" / "dist" / "emoji-en-US.json").read_text(encoding="utf-8"))
    of_file = {one["image"]: one for one in listed if one["has_img_google"] and one["category"] != "Component"}
    pictures = read_or_recall(tables / "img" / "google" / "64", sorted(of_file), _SIZE, 3)
    kept = [of_file[name] for name in pictures.names]
    captions = [_caption(one["name"], keywords.get(_letters(one["unified"]), ())) for one in kept]
    classes = tuple(sorted({one["category"] for one in kept}))
    labels = torch.tensor([classes.index(one["category"]) for one in kept])
    held = is_held_out([one["short_name"] for one in kept], 0.05)
    # some emoji look the same: the flags of Norway and of Bouvet Island, and many families
    seen = {levels.tobytes() for levels in pictures.levels[held]}
    same = ~held & np.array([levels.tobytes() in seen for levels in pictures.levels])
    skins = sum(len(one.get("skin_variations", ())) for one in listed)

    def part(chosen: np.ndarray) -> Examples:
        index = chosen.nonzero()[0].tolist()
        return Examples(torch.from_numpy(pictures.levels[chosen]), labels[index], tuple(captions[i] for i in index))

    (known,) = (data for data in catalogue() if data.name == "emoji")
    return ImageData(
        name="emoji",
        train=part(~held & ~same),
        held_out=part(held),
        level_count=256,
        classes=classes,
        licence=known.licence,
        source=known.source,
        notes=(
            f"{skins:,} variations of skin colour and the category Component were left out",
            f"{int(same.sum()):,} to train on that are also held out, pixel for pixel, were left out",
            *pictures.notes,
        ),
    )


def _letters(unified: str) -> str:
    """The emoji itself: "0023-FE0F-20E3" names the code points of the key of the hash sign."""
    return "".join(chr(int(code, 16)) for code in unified.split("-"))


def _caption(name: str, keywords: Sequence[str]) -> str:
    """The name in lower case and up to six keywords; not the name again, and no faces of punctuation such as ":D"."""
    words = [keyword.replace("_", " ").replace("\ufe0f", "").strip().lower() for keyword in keywords]
    said = [word for word in dict.fromkeys(words) if re.match(r"\w", word) and word != name.lower()][:_KEYWORDS]
    return name.lower() + (f": {', '.join(said)}" if said else "")
