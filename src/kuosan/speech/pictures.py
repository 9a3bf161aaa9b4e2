"""Waves as spectrograms: those that are to be compared on one scale, with their harmonics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool1d

from kuosan.files import save_png
from kuosan.speech.analysis import Analysis

#: Nats between black and the brightest colour: 78 dB.
RANGE = 9.0
#: Bands of frequencies, at most: of 31 Hz at 16,000 samples a second, so that the harmonics of a voice stand apart.
BANDS = 256
#: Pixels of one frame on a page.
WIDE = 2
#: Frames that are shown of one wave.
MOST = 400
GAP = 4
#: Black, violet, red, orange, pale yellow: evenly spaced.
COLOURS = np.array([(0, 0, 0), (64, 15, 110), (148, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164)])


def spectrograms(waves: Sequence[Tensor], analysis: Analysis) -> list[Image.Image]:
    """Pictures of waves (N,) that are to be compared: on the scale of the first one, low frequencies at the bottom.

    Of each wave the first MOST frames are shown, a pixel for each band of each frame.
    """
    found = [_levels(wave, analysis) for wave in waves]
    top = max(float(found[0].max()), math.log(analysis.floor) + RANGE)  # so that silence is black
    return [_picture((levels - top) / RANGE + 1) for levels in found]


def _levels(wave: Tensor, analysis: Analysis) -> Tensor:
    """Half the logarithm of the mean power of bands of equal width, in each frame: (bands, T)."""
    power = analysis.stft(wave[None].double().cpu())[0, 1:, :MOST].abs().square()
    bands = adaptive_avg_pool1d(power.mT, min(BANDS, len(power))).mT
    return bands.clamp(min=analysis.floor**2).log() / 2


def _picture(share: Tensor) -> Image.Image:
    """Shares of the brightest colour, as colours."""
    places = np.linspace(0, 255, len(COLOURS))
    palette = (
        np.stack([np.interp(np.arange(256), places, channel) for channel in COLOURS.T], 1).round().astype(np.uint8)
    )
    picture = Image.fromarray((share.clamp(0, 1) * 255).round().byte().flip(0).numpy())
    picture.putpalette(palette.astype(np.uint8).tobytes())  # a third of the bytes of RGB
    return picture


def save_page(
    rows: Sequence[Sequence[Tensor]],
    analysis: Analysis,
    path: Path,
    notes: Mapping[str, object],
    headings: Sequence[str] = (),
) -> Path:
    """A PNG of waves (N,): rows of those that are to be compared, under headings."""
    pictures = [
        [one.resize((one.width * WIDE, one.height)).convert("RGB") for one in spectrograms(row, analysis)]
        for row in rows
    ]
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
