"""Spectra, mels and Griffin-Lim against sums by hand, scipy and librosa."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

pytest.importorskip("librosa")

import librosa

from kuosan.speech.analysis import Analysis

A = Analysis()
SMALL = Analysis(rate=8000, n_fft=128, hop=32, mels=12, low=50, high=3900, floor=1e-4)


def noise(rows, n, seed=0):
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sine(frequency, seconds=0.5, rate=16000, loudness=0.5):
    """A sine as a wave (1, N) in float64."""
    return (
        loudness
        * torch.sin(2 * math.pi * frequency * torch.arange(int(seconds * rate), dtype=torch.float64) / rate)[None]
    )


def voice(seconds=0.6, rate=16000):
    """A gliding buzz of twelve harmonics with pauses, (1, N): something like speech that needs no data."""
    t = torch.arange(int(seconds * rate), dtype=torch.float64) / rate
    turns = torch.cumsum(140 + 50 * torch.sin(2 * math.pi * 3 * t), 0) / rate
    buzz = sum(torch.sin(2 * math.pi * k * turns) / k for k in range(1, 13))
    return (0.2 * buzz * torch.sin(2 * math.pi * 2 * t).clamp(min=0))[None]


@pytest.mark.parametrize("frame", [0, 1, 5, 9])
def test_a_frame_is_the_windowed_sum_around_its_sample(frame):
    """numpy's FFT of the wave with zeros around it, times sin^2(pi k / n), for the first, middle and last frame."""
    wave = noise(2, 9 * SMALL.hop + 17)
    padded = np.pad(wave.numpy(), ((0, 0), (64, 64 + 32)))
    window = np.sin(np.pi * np.arange(128) / 128) ** 2
    truth = np.fft.rfft(padded[:, frame * 32 : frame * 32 + 128] * window)
    found = SMALL.stft(wave)
    assert found.shape == (2, SMALL.bins, SMALL.frames(wave.shape[1])) == (2, 65, 10)
    np.testing.assert_allclose(found[:, :, frame], truth, rtol=0, atol=1e-12)


def test_energy_is_kept():
    """Parseval: with a hop of n / 4 the squared windows sum to 3 / 2 everywhere, so that sum |X|^2 = 3/2 n sum x^2."""
    wave = noise(1, 4000)
    wave[:, :128] = wave[:, -128:] = 0  # the windows beyond the ends are missing
    weights = torch.full((SMALL.bins, 1), 2.0, dtype=torch.float64)
    weights[[0, -1]] = 1  # the other half of the spectrum
    energy = (weights * SMALL.stft(wave).abs().square()).sum()
    assert float(energy) == pytest.approx(1.5 * SMALL.n_fft * float(wave.square().sum()), rel=1e-12)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 1000, 1023, 1024, 1025])
@pytest.mark.parametrize("analysis", [SMALL, replace(SMALL, hop=20), replace(A, n_fft=512, hop=100)])
def test_the_inverse_of_a_spectrum_is_the_wave(analysis, n):
    wave = noise(3, n)
    spectrum = analysis.stft(wave)
    assert spectrum.shape[2] == analysis.frames(n)
    torch.testing.assert_close(analysis.inverse(spectrum, n), wave, rtol=0, atol=1e-10)
    single = analysis.inverse(analysis.stft(wave.float()), n)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, wave.float(), rtol=0, atol=1e-5)


def test_the_inverse_is_the_nearest_wave():
    """A least squares solution of the whole transform as one matrix, by numpy."""
    small, n = Analysis(rate=8000, n_fft=16, hop=4, mels=2, high=4000), 30
    columns = torch.cat(
        [torch.view_as_real(small.stft(unit[None])).flatten()[:, None] for unit in torch.eye(n).double()], 1
    )
    both = (
        torch.ones(9, 1, 1).double().index_fill(0, torch.tensor([0, 8]), 0.5).sqrt()
    )  # the other half of the spectrum
    weight = both.expand(9, small.frames(n), 2).flatten()[:, None]
    spectrum = torch.complex(noise(9, 8, 1), noise(9, 8, 2))[None]
    spectrum[:, [0, -1]] = spectrum[:, [0, -1]].real.to(spectrum.dtype)
    target = torch.view_as_real(spectrum).flatten()[:, None]
    truth = np.linalg.lstsq((weight * columns).numpy(), (weight * target).numpy(), rcond=None)[0][:, 0]
    np.testing.assert_allclose(small.inverse(spectrum, n)[0], truth, atol=1e-10)


@pytest.mark.parametrize("frequency", [250, 440, 1000, 2500, 6000])
def test_a_sine_s_mel_is_highest_where_the_sine_is(frequency):
    """Slaney's scale by hand: 3/200 mel a hertz up to 1 kHz, then 27 mels a factor of 6.4."""

    def mel(hertz):
        return 3 * hertz / 200 if hertz < 1000 else 15 + 27 * math.log(hertz / 1000) / math.log(6.4)

    nearest = round(mel(frequency) / mel(8000) * (A.mels + 1)) - 1  # centres are equally far apart, the ends left out
    found = A.mel(sine(frequency))
    assert abs(int(found[0, :, 10].argmax()) - nearest) <= 1
    quiet = np.abs(np.arange(A.mels) - nearest) > 8
    assert found[0, :, 10].max() - found[0, quiet, 10].max() > 5  # nats


def test_a_mel_is_the_logarithm_of_librosa_s():
    wave = voice()
    theirs = librosa.feature.melspectrogram(
        y=wave[0].numpy(),
        sr=8000,
        n_fft=128,
        hop_length=32,
        n_mels=12,
        fmin=50,
        fmax=3900,
        power=1,
        pad_mode="constant",
    )
    np.testing.assert_allclose(SMALL.mel(wave)[0], np.log(np.maximum(1e-4, theirs)), atol=1e-4)  # theirs is float32
    assert SMALL.mel(wave.float()).dtype == torch.float32


def test_triangles_have_area_one():
    """A flat spectrum of height 1 is 1 / (hertz of a bin) in every mel: the spectrum of an impulse is flat."""
    impulse = torch.zeros(1, 1).double() + 1  # alone in the middle of the first window, where the window is 1
    fine = Analysis(n_fft=16384, hop=4096, mels=10)
    torch.testing.assert_close(
        fine.mel(impulse).exp(), torch.full((1, 10, 1), 16384 / 16000).double(), rtol=1e-3, atol=0
    )


def test_silence_has_the_floor():
    assert (A.mel(torch.zeros(2, 3000)) == torch.tensor(math.log(1e-5))).all()
    wave = A.griffin_lim(A.magnitude(A.mel(torch.zeros(1, 3000).double())), iterations=3)
    assert wave.isfinite().all()
    assert wave.abs().max() < 1e-4  # three levels of a sound file
    assert (A.griffin_lim(torch.zeros(1, A.bins, 5), iterations=3) == 0).all()


def test_magnitudes_have_the_mel_that_they_were_made_of():
    """Exactly where the pseudo-inverse is not negative: for a spectrum that is made of the triangles."""
    filters = librosa.filters.mel(sr=16000, n_fft=1024, n_mels=80, dtype=float)
    spectrum = filters.T @ np.exp(np.random.default_rng(0).normal(-2, 0.3, (80, 4)))
    mel = torch.from_numpy(np.log(filters @ spectrum))[None]
    found = A.magnitude(mel)
    np.testing.assert_allclose(found[0], spectrum, rtol=1e-8, atol=1e-15)  # of some processors 0 is 2e-19
    speech = A.mel(voice())
    found = A.magnitude(speech)
    assert (found >= 0).all()
    theirs = np.maximum(0, np.linalg.pinv(filters) @ speech[0].exp().numpy())
    np.testing.assert_allclose(found[0], theirs, rtol=1e-6, atol=1e-12)


def kl(mel, magnitude, analysis=A):
    """Of the mel magnitudes of a log-mel (M, T) from those that magnitudes (F, T) have, by numpy and librosa."""
    filters = librosa.filters.mel(
        sr=analysis.rate, n_fft=analysis.n_fft, n_mels=analysis.mels, fmin=analysis.low, fmax=analysis.high, dtype=float
    )
    wanted, found = np.exp(mel.numpy()), filters @ magnitude.numpy()
    return float((wanted * np.log(wanted / found) - wanted + found).sum())


def test_magnitudes_come_nearer_to_a_mel_with_every_step():
    """Expectation maximisation: the divergence never grows, and from flat magnitudes it all but vanishes."""
    mel = A.mel(voice())
    magnitude = torch.ones(1, A.bins, mel.shape[2], dtype=torch.float64)
    apart = []
    for _ in range(60):
        apart.append(kl(mel[0], magnitude[0]))
        magnitude = A.with_mel(magnitude, mel, 1)
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(apart))
    assert apart[-1] < 1e-3 * apart[1]
    torch.testing.assert_close(A.with_mel(magnitude, mel, 5), A.with_mel(A.with_mel(magnitude, mel, 2), mel, 3))


def test_magnitudes_that_have_the_mel_stay_and_so_do_those_that_no_triangle_holds():
    magnitude = A.stft(voice()).abs() + 0.1
    filters = torch.from_numpy(librosa.filters.mel(sr=16000, n_fft=1024, n_mels=80, fmin=0, fmax=8000, dtype=float))
    torch.testing.assert_close(A.with_mel(magnitude, (filters @ magnitude).log(), 7), magnitude)
    moved = A.with_mel(magnitude, (3 * filters @ magnitude).log(), 7)
    torch.testing.assert_close(moved[:, [0, -1]], magnitude[:, [0, -1]])  # 0 Hz and 8 kHz
    torch.testing.assert_close(moved[:, 1:-1], 3 * magnitude[:, 1:-1])


def test_the_envelope_of_white_noise_is_flat_and_everywhere_positive():
    """Where there is nothing but level, the mel says all: its magnitudes are of one size, without ringing."""
    flat = torch.full((1, A.bins, 4), 0.37, dtype=torch.float64)
    filters = torch.from_numpy(librosa.filters.mel(sr=16000, n_fft=1024, n_mels=80, fmin=0, fmax=8000, dtype=float))
    torch.testing.assert_close(A.envelope((filters @ flat).log()), flat)
    spoken = A.envelope(A.mel(voice()))
    assert bool((spoken > 0).all())
    assert bool((A.magnitude(A.mel(voice())) == 0).any())  # as the pseudo-inverse's are not


def test_the_envelope_is_nearer_to_natural_magnitudes_than_the_pseudo_inverse():
    """In nats, over all that is louder than the floor: the standard deviation of the logarithm of the ratio."""
    wave = voice(1.0)
    natural, mel = A.stft(wave).abs().clamp(min=1e-3).log(), A.mel(wave)
    smooth, pinv = ((natural - m.clamp(min=1e-3).log()).std() for m in (A.envelope(mel), A.magnitude(mel)))
    assert float(smooth) < 0.8 * float(pinv)


def inconsistency(magnitude, wave, analysis=A):
    """|| |STFT(wave)| - S || / || S ||."""
    return float((analysis.stft(wave).abs() - magnitude).norm() / magnitude.norm())


@pytest.mark.parametrize("momentum", [0.0, 0.99])
def test_griffin_lim_comes_nearer_with_iterations(momentum):
    wave = voice()
    magnitude = A.stft(wave).abs()
    found = [inconsistency(magnitude, A.griffin_lim(magnitude, k, momentum)) for k in (0, 1, 4, 16, 64)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.35 * found[1]


def test_momentum_hastens_it():
    """Perraudin et al. 2013: alpha 0.99 is nearer after as many iterations; the mean over four starts."""
    magnitude = A.stft(voice()).abs()
    plain, fast = (
        np.mean([inconsistency(magnitude, A.griffin_lim(magnitude, 32, m, seed=seed)) for seed in range(4)])
        for m in (0.0, 0.99)
    )
    assert fast < 0.9 * plain


def test_without_momentum_the_inconsistency_never_grows():
    """Griffin and Lim (1984): each iteration descends on the distance that the wave's whole spectrum has."""
    magnitude = A.magnitude(A.mel(voice(0.3)))
    twice = torch.full((A.bins, 1), 2.0).double().index_fill(0, torch.tensor([0, A.bins - 1]), 1)
    distances = []
    for k in range(12):
        spectrum = A.stft(A.griffin_lim(magnitude, k, momentum=0.0))
        distances.append(float((twice * (spectrum.abs() - magnitude).square()).sum()))
    assert all(after <= before for before, after in pairwise(distances))


@pytest.mark.parametrize("momentum", [0.0, 0.6, 0.99])
@pytest.mark.parametrize("iterations", [0, 1, 2, 9])
def test_griffin_lim_is_librosa_s(momentum, iterations):
    """From the phases that librosa draws."""
    magnitude = A.stft(voice()).abs()
    start = 2 * np.pi * np.random.default_rng(5).random((1, *magnitude.shape[1:]))
    theirs = librosa.griffinlim(
        magnitude[0].numpy(),
        n_iter=iterations,
        hop_length=256,
        momentum=momentum,
        random_state=np.random.default_rng(5),
        length=9600,
    )
    found = A.griffin_lim(magnitude, iterations, momentum, start=torch.from_numpy(start), n=9600)
    np.testing.assert_allclose(found[0], theirs, atol=1e-4 * np.abs(theirs).max())  # its phases are single precision


def test_from_the_right_phases_the_wave_comes_back():
    """The truth is a fixed point, whatever the iterations."""
    wave = torch.cat([voice(), noise(1, 9600)])
    spectrum = A.stft(wave)
    for iterations in (0, 5):
        found = A.griffin_lim(spectrum.abs(), iterations, start=spectrum.angle(), n=9600)
        torch.testing.assert_close(found, wave, rtol=0, atol=1e-9)


def test_a_wave_is_a_function_of_its_row_and_the_seed():
    magnitude = A.stft(torch.cat([voice(), voice(), noise(1, 9600)])).abs()
    together = A.griffin_lim(magnitude, 3, seed=4)
    torch.testing.assert_close(A.griffin_lim(magnitude[:1], 3, seed=4), together[:1])
    assert (together[0] - together[1]).abs().max() > 0.01  # the same magnitudes, other phases
    assert (A.griffin_lim(magnitude[:1], 3, seed=5) - together[:1]).abs().max() > 0.01
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    A.griffin_lim(magnitude, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    prefix = A.griffin_lim(magnitude[:, :, :20], 0, seed=4)
    torch.testing.assert_close(prefix[:, :4096], A.griffin_lim(magnitude, 0, seed=4)[:, :4096])


def test_phases_start_anywhere_on_the_circle():
    """Unit magnitudes in one frame: a sample is (2 sum of 63 cosines + 2 cosines) / n over its window, each of mean 0
    and variance 1 / 2 if its phase is uniform; over 4,000 rows, within 5 standard errors."""
    rows, k = 4000, 16
    magnitude = torch.ones(rows, SMALL.bins, 1).double()
    found = SMALL.griffin_lim(magnitude, 0, n=k + 1)[:, k] * 128 * math.cos(math.pi * k / 128) ** 2
    variance = 4 * 63 / 2 + 2 / 2
    assert abs(float(found.mean())) < 5 * math.sqrt(variance / rows)
    assert float(found.var()) == pytest.approx(variance, rel=5 * math.sqrt(2 / rows))


def test_a_made_wave_has_the_asked_length():
    magnitude = SMALL.stft(noise(2, 1000)).abs()
    assert SMALL.griffin_lim(magnitude, 1).shape == (2, 31 * 32)
    assert SMALL.griffin_lim(magnitude.float(), 1, n=1023).shape == (2, 1023)
    assert SMALL.griffin_lim(magnitude.float(), 1).dtype == torch.float32
    with pytest.raises(ValueError, match="1024 samples have 33 frames, and the spectrum has 32"):
        SMALL.griffin_lim(magnitude, n=1024)


def test_gradients_flow_from_a_mel_to_the_wave():
    """Also where the window and the triangles were first asked for in inference mode; finite differences."""
    fresh = replace(SMALL, n_fft=256, hop=64)
    with torch.inference_mode():
        fresh.mel(noise(1, 300))
    wave = noise(1, 300).requires_grad_()
    fresh.mel(wave).sum().backward()
    step = torch.zeros_like(wave)
    step[0, 150] = 1e-6
    with torch.no_grad():
        slope = (fresh.mel(wave + step).sum() - fresh.mel(wave - step).sum()) / 2e-6
    assert float(wave.grad[0, 150]) == pytest.approx(float(slope), rel=1e-5)


def test_constants_go_through_json():
    again = Analysis.from_plain(json.loads(json.dumps(SMALL.plain())))
    assert again == SMALL
    SMALL.check(again)
    assert Analysis(high=8000) == Analysis(high=8000.0)
    assert hash(Analysis(high=8000)) == hash(Analysis(high=8000.0))
    with pytest.raises(ValueError, match="lack floor"):
        Analysis.from_plain({k: v for k, v in SMALL.plain().items() if k != "floor"})
    with pytest.raises(ValueError, match="have the unknown power"):
        Analysis.from_plain({**SMALL.plain(), "power": 2})


def test_a_mel_of_other_constants_is_refused_by_name():
    other = replace(A, hop=200, floor=1e-4)
    with pytest.raises(
        ValueError, match=r"^a mel made with other constants: hop 200 instead of 256, floor 0.0001 instead of 1e-05$"
    ):
        A.check(other)
    for name, value in SMALL.plain().items():
        with pytest.raises(ValueError, match=f"constants: {name} "):
            replace(A, **{name: A.plain()[name]}).check(_with(A, name, value))


def _with(analysis, name, value):
    """The analysis with one constant changed, whatever `Analysis` would say of it."""
    changed = replace(analysis)
    object.__setattr__(changed, name, value)
    return changed


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"rate": 0}, "rate must be a whole number of at least 1, got 0"),
        ({"hop": 256.0}, "hop must be a whole number"),
        ({"mels": True}, "mels must be a whole number"),
        ({"floor": 0.0}, "floor must be positive"),
        ({"floor": math.nan}, "floor must be a finite number"),
        ({"high": "8000"}, "high must be a finite number"),
        ({"n_fft": 1025}, "n_fft must be even"),
        ({"hop": 257}, r"hop must be at most n_fft / 4 = 256, got 257"),
        ({"rate": 8000}, "low 0 and high 8000"),
        ({"low": 9000.0}, "low 9000 and high 8000"),
        ({"low": -1.0}, "low -1"),
    ],
)
def test_constants_that_cannot_be_are_refused(constants, message):
    with pytest.raises(ValueError, match=message):
        Analysis(**constants)


def test_too_many_mels_are_refused_where_they_are_made():
    with pytest.raises(ValueError, match=r"mel 0 of 80 is narrower than a frequency of n_fft 128"):
        Analysis(n_fft=128, hop=32).mel(noise(1, 100))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: A.stft(torch.zeros(100)), r"expected waves \(B, N\) of real numbers, got \(100,\)"),
        (lambda: A.stft(torch.zeros(1, 100, dtype=torch.int16)), "torch.int16"),
        (lambda: A.mel(torch.zeros(1, 0)), "a wave needs at least 1 sample, got 0"),
        (lambda: A.frames(0), "at least 1 sample"),
        (lambda: A.magnitude(torch.zeros(1, 40, 9)), r"a mel of this analysis has the shape \(B, 80, T\), got \(1, 40"),
        (lambda: A.magnitude(torch.zeros(1, 80, 0)), "a mel of this analysis"),
        (lambda: A.griffin_lim(torch.zeros(1, 80, 9)), r"a magnitude of this analysis has the shape \(B, 513, T\)"),
        (lambda: A.griffin_lim(torch.full((1, 513, 4), math.nan)), "finite and at least 0"),
        (lambda: A.griffin_lim(torch.full((1, 513, 4), -1.0)), "finite and at least 0"),
        (lambda: A.griffin_lim(torch.ones(1, 513, 4), iterations=-1), "iterations must be at least 0"),
        (lambda: A.griffin_lim(torch.ones(1, 513, 4), momentum=1.1), "may not converge"),
        (lambda: A.griffin_lim(torch.ones(1, 513, 4), start=torch.zeros(1, 513, 5)), "phases .* do not fit"),
        (lambda: A.griffin_lim(torch.ones(1, 513, 1)), "at least 1 sample, got 0"),
        (lambda: A.inverse(torch.ones(1, 513, 4), 800), "expected a complex spectrum"),
        (lambda: A.inverse(torch.ones(1, 65, 4).cfloat(), 800), "a spectrum of this analysis"),
    ],
)
def test_input_that_does_not_fit_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_without_librosa_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "librosa.filters", None)
    with pytest.raises(ImportError, match=r"pip install 'kuosan\[speech\]'"):
        Analysis(mels=79).mel(noise(1, 100))


def test_importing_costs_no_library_of_speech():
    """In a fresh interpreter: the command line and both modules leave librosa, pocketsphinx and jiwer alone."""
    code = (
        "import sys, kuosan, kuosan.cli, kuosan.speech.analysis, kuosan.speech.judge\n"
        "print([name for name in ('librosa', 'torchaudio', 'pocketsphinx', 'jiwer', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
