"""Spectrograms: where a tone stands, how bright it is, and on which scale waves are that are compared."""

import numpy as np
import pytest
import torch
from PIL import Image

from kuosan.speech.analysis import Analysis
from kuosan.speech.pictures import BANDS, MOST, RANGE, save_page, spectrograms

ANALYSIS = Analysis()


def tone(hertz, seconds=0.5, amplitude=0.5):
    return amplitude * torch.sin(2 * torch.pi * hertz * torch.arange(int(seconds * ANALYSIS.rate)) / ANALYSIS.rate)


def brightness(picture):
    """The index of each pixel's colour, from black on, low frequencies first."""
    return np.asarray(picture)[::-1].astype(int)


@pytest.mark.parametrize("hertz", [100, 1000, 3210, 7900])
def test_a_tone_is_brightest_in_the_band_that_has_its_frequency(hertz):
    (picture,) = spectrograms([tone(hertz)], ANALYSIS)
    assert picture.size == (ANALYSIS.frames(8000), BANDS)
    rows = brightness(picture)[:, 10:-10].argmax(0)
    expected = hertz / (ANALYSIS.rate / 2) * BANDS
    assert np.abs(rows + 0.5 - expected).max() <= 1


def test_the_harmonics_of_a_voice_stand_apart():
    """Truth: a sum of 200, 400, ... Hz has a bright band every 6.4 bands, and dark ones between them."""
    (picture,) = spectrograms([sum(tone(200 * k, amplitude=0.05) for k in range(1, 20))], ANALYSIS)
    column = brightness(picture)[:120, 16]
    tops = [i for i in range(1, 119) if column[i] >= column[i - 1] and column[i] > column[i + 1]]
    assert len(tops) == pytest.approx(120 / 6.4, abs=1)
    assert all(column[i] - column[min(i + 3, 119)] > 40 for i in tops)


def test_brightness_is_decibels_below_the_first_wave():
    """Truth: a tenth of the amplitude is ln 10 nats of a range of RANGE."""
    loud, soft = (brightness(one)[:, 10:-10].max() for one in spectrograms([tone(1000), tone(1000) / 10], ANALYSIS))
    assert loud == 255
    assert 255 - soft == pytest.approx(255 * np.log(10) / RANGE, abs=1)


def test_silence_is_black_and_long_waves_are_cut():
    (picture,) = spectrograms([torch.zeros((MOST + 50) * ANALYSIS.hop)], ANALYSIS)
    assert picture.width == MOST
    assert brightness(picture).max() == 0
    loud, silent = spectrograms([tone(1000), torch.zeros(8000)], ANALYSIS)
    assert brightness(loud).max() == 255
    assert brightness(silent).max() == 0


def test_an_analysis_of_few_frequencies_has_a_row_for_each():
    small = Analysis(rate=16000, n_fft=128, hop=32, mels=10)
    (picture,) = spectrograms([tone(1000)], small)
    assert picture.height == 64


def test_a_page_has_a_row_for_those_that_are_compared(tmp_path):
    wave = tone(1000)
    path = save_page([[wave, wave / 10], [wave]], ANALYSIS, tmp_path / "page.png", {"seeds": [0, 1]}, ["loud", "soft"])
    page = Image.open(path)
    assert page.width > 2 * 2 * ANALYSIS.frames(8000)
    assert page.height > 2 * BANDS
    assert page.text["seeds"] == "[0, 1]"
