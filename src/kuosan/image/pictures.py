"""Images as pictures: levels to pixels, and sheets of many."""

from __future__ import annotations

import math

import torch
from PIL import Image
from torch import Tensor


def to_image(levels: Tensor, count: int, scale: int = 1) -> Image.Image:
    """A picture of levels (C, H, W) in 0 .. count - 1, C = 1 or 3, each pixel drawn ``scale`` wide."""
    shades = (levels.double() * 255 / (count - 1)).round().to(torch.uint8)
    shades = shades.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    array = shades[0].numpy() if len(shades) == 1 else shades.movedim(0, -1).contiguous().numpy()
    return Image.fromarray(array)


def sheet(levels: Tensor, count: int, columns: int | None = None, scale: int = 1, gap: int = 1) -> Image.Image:
    """Many images (N, C, H, W) in rows, left to right, top to bottom, on a grey ground."""
    n, c, h, w = levels.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    pixel = gap * scale
    page = Image.new(
        "L" if c == 1 else "RGB", (pixel + columns * (w * scale + pixel), pixel + rows * (h * scale + pixel))
    )
    page.paste(96 if c == 1 else (96, 96, 96), (0, 0, *page.size))
    for i, one in enumerate(levels):
        row, column = divmod(i, columns)
        place = (pixel + column * (w * scale + pixel), pixel + row * (h * scale + pixel))
        page.paste(to_image(one, count, scale), place)
    return page


def good_scale(shape: tuple[int, ...]) -> int:
    """How wide a pixel is drawn so that a small image can be seen: about 64 screen pixels a side."""
    return max(1, round(64 / shape[-1]))
