"""Mels as pictures: one or many, each row on one scale, so that what is beside each other can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from kuosan.files import save_png
from kuosan.speech.analysis import Analysis

#: Nats between black and the brightest colour: 78 dB.
RANGE = 9.0
#: Pixels of one mel, and of one frame.
HIGH, WIDE = 2, 2
#: Frames that are shown of one wave.
MOST = 400
GAP = 4
#: Black, violet, red, orange, pale yellow: evenly spaced.
COLOURS = np.array([(0, 0, 0), (64, 15, 110), (148, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)])


def spectrogram(mel: Tensor, top: float) -> Image.Image:
    """A log-mel (M, T) as a picture, low frequencies at the bottom.

    Args:
        top: the value that is brightest.
    """
    share = ((mel.double().cpu() - top) / RANGE + 1).clamp(0, 1).flip(0).numpy() * (len(COLOURS) - 1)
    below = np.minimum(share.astype(int), len(COLOURS) - 2)
    part = (share - below)[..., None]
    pixels = (COLOURS[below] * (1 - part) + COLOURS[below + 1] * part).round().astype(np.uint8)
    return Image.fromarray(pixels.repeat(HIGH, 0).repeat(WIDE, 1))


def spectrograms(waves: Sequence[Tensor], analysis: Analysis) -> list[Image.Image]:
    """Pictures of waves (N,) that are to be compared: on the scale of the first one."""
    mels = [analysis.mel(wave[None].float())[0, :, :MOST] for wave in waves]
    return [spectrogram(mel, float(mels[0].max())) for mel in mels]


def save_page(
    rows: Sequence[Sequence[Tensor]],
    analysis: Analysis,
    path: Path,
    notes: Mapping[str, object],
    headings: Sequence[str] = (),
) -> Path:
    """A PNG of waves (N,): rows of those that are to be compared, under headings."""
    pictures = [spectrograms(row, analysis) for row in rows]
    columns = [max(row[i].width for row in pictures if i < len(row)) for i in range(max(map(len, pictures)))]
    top = 16 if headings else 0
    page = Image.new(
        "RGB",
        (sum(columns) + GAP * (len(columns) + 1), top + sum(row[0].height + GAP for row in pictures) + GAP),
        (96, 96, 96),
    )
    draw = ImageDraw.Draw(page)
    y = top + GAP
    for row in pictures:
        x = GAP
        for width, picture in zip(columns, row, strict=False):
            page.paste(picture, (x, y))
            x += width + GAP
        y += row[0].height + GAP
    x = GAP
    for width, heading in zip(columns, headings, strict=False):
        draw.text((x, 2), heading, fill="white")
        x += width + GAP
    save_png(page, path, notes)
    return path
