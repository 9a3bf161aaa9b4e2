"""What of a wave is diffused: there and back exactly, noise of the shape of the energy, windows that are parts."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("librosa")

from kuosan.process import Process
from kuosan.schedules import Cosine
from kuosan.speech.analysis import Analysis
from kuosan.speech.mel import Mel
from kuosan.speech.states import STATES, Magnitude, Spectrum, Wave, told, untold

A = Analysis()


def voice(n, seed=0):
    """A buzz with a falling pitch that swells and fades, and some hiss: (1, n) in float64."""
    g = torch.Generator().manual_seed(seed)
    t = torch.arange(n, dtype=torch.float64) / A.rate
    phase = 2 * math.pi * (220 * t - 20 * t**2)
    buzz = sum(torch.sin(k * phase) / k for k in range(1, 12))
    swell = 0.05 + torch.sin(math.pi * t / t[-1]) ** 2
    return (swell * (0.1 * buzz + 0.01 * torch.randn(n, generator=g, dtype=torch.float64)))[None]


@pytest.mark.parametrize("kind", [Spectrum, Wave])
def test_a_spectrum_and_a_wave_come_back_as_they_were(kind):
    wave = voice(20_000)
    state, mel = kind(A), A.mel(wave)
    x = state.encode(wave, mel)
    assert tuple(x.shape[1:]) == state.shape(mel.shape[2])
    torch.testing.assert_close(state.decode(x, mel, 20_000), wave)


def test_magnitudes_come_back_and_only_the_phases_are_lost():
    """With the magnitudes of the wave itself Griffin-Lim comes near to them: 32 iterations within 3 dB of natural."""
    wave = voice(20_000)
    state, mel = Magnitude(A), A.mel(wave)
    x = state.encode(wave, mel)
    assert tuple(x.shape[1:]) == state.shape(mel.shape[2])
    loud = A.stft(wave).abs() > 1e-2
    c, s = np.euler_gamma / 2 + math.log(math.sqrt(math.pi) / 2), math.pi / math.sqrt(24)
    back = (x * s - c + A.envelope(mel).clamp_min(1e-3).log()).exp()
    torch.testing.assert_close(back[loud], A.stft(wave).abs()[loud])
    made = state.decode(x, mel, 20_000)
    assert made.shape == wave.shape
    assert float((A.mel(made) - mel).abs().mean()) < 0.1 < float((A.mel(0.8 * wave) - mel).abs().mean())


@pytest.mark.parametrize("name", STATES)
def test_a_window_is_a_part_of_the_whole(name):
    """What is cut out of a longer wave has the columns that the whole wave has there: no end of a window shows."""
    state, wave = STATES[name](A), voice(40 * A.hop)
    whole = state.encode(wave, A.mel(wave))
    frames, first = 12, 9
    n, start = state.window(frames), (first - state.reach) * A.hop
    x, mel = state.cut(wave[:, start : start + n])
    each = whole.shape[2] // A.frames(wave.shape[1])
    assert tuple(x.shape[1:]) == state.shape(frames)
    torch.testing.assert_close(mel, A.mel(wave)[..., first : first + frames])
    ours, theirs = x, whole[..., first * each : (first + frames) * each]
    if name == "wave":  # the energy between the last frame and the next is not known inside a window
        ours, theirs = ours[..., : -A.hop], theirs[..., : -A.hop]
    torch.testing.assert_close(ours, theirs)


def test_states_of_noise_in_the_shape_of_the_energy_are_of_unit_size():
    """Coloured, swelling noise, far from white: relative to its mel it is nearly so."""
    g = torch.Generator().manual_seed(0)
    white = torch.randn(1, 60_000, generator=g, dtype=torch.float64)
    red = torch.tensor(np.cumsum(white.numpy(), axis=1) * 0.01) * torch.linspace(0.05, 1, 60_000, dtype=torch.float64)
    red = red - torch.nn.functional.avg_pool1d(red[:, None], 801, 1, 400)[:, 0]
    mel = A.mel(red)
    for kind in STATES:
        x = STATES[kind](A).encode(red, mel)
        assert float(x.std()) == pytest.approx(1, abs=0.15)  # the lowest mels know each frequency: there it is less
        assert float(x.mean()) == pytest.approx(0, abs=0.1)
    parts = Wave(A).encode(red, mel)[0, 0].unflatten(0, (-1, A.hop * 5))[:-1].square().mean(1).sqrt()
    assert float(parts.max() / parts.min()) < 3 < float(red[0, -5000:].std() / red[0, :5000].std())


def test_a_process_of_scaled_data_is_priorgrad_s():
    """PriorGrad's marginal (equation 6), posterior and loss with the covariance s^2, written out as in the paper, and
    the ordinary process of x / s: the same numbers."""
    g = torch.Generator().manual_seed(1)
    s = torch.rand(7, generator=g, dtype=torch.float64) + 0.1
    x_0, eps, guess = (torch.randn(7, generator=g, dtype=torch.float64) for _ in range(3))
    process, t, earlier = (
        Process(Cosine()),
        torch.tensor(0.6, dtype=torch.float64),
        torch.tensor(0.4, dtype=torch.float64),
    )
    (a, b), (a_s, b_s) = (tuple(float(v) for v in process.scales(u)) for u in (t, earlier))
    x_t = a * x_0 + b * s * eps  # noise of covariance s^2
    scaled = process.marginal((x_0 / s)[None], t).sample(eps[None])[0]
    torch.testing.assert_close(s * scaled, x_t)
    # q(x_s | x_t, x_0): precisions add, coordinate by coordinate
    step = a / a_s
    noise = (b**2 - step**2 * b_s**2) * s**2
    precision = step**2 / noise + 1 / (b_s * s) ** 2
    mean = (step * x_t / noise + a_s * x_0 / (b_s * s) ** 2) / precision
    q = process.posterior(scaled[None], t, (x_0 / s)[None], earlier)
    torch.testing.assert_close(s * q.mean[0], mean)
    torch.testing.assert_close(s**2 * q.variance.expand(1, 7)[0], 1 / precision)
    # the loss: (eps' - eps')^T S^-1 (eps' - eps') of eps' = s eps
    torch.testing.assert_close(((s * eps - s * guess) ** 2 / s**2).mean(), ((eps - guess) ** 2).mean())


def test_what_a_network_is_told_is_of_unit_scale_and_comes_back():
    mel = A.mel(voice(20_000))
    torch.testing.assert_close(untold(told(mel)), mel)
    assert -3 < float(told(mel).min()) < float(told(mel).max()) < 4


def test_a_mel_comes_back_from_its_file_with_its_constants(tmp_path):
    mel = Mel.of(voice(5000)[0].float(), A, "a word")
    kept = Mel.load(mel.save(tmp_path / "word.npz"))
    torch.testing.assert_close(kept.values, mel.values)
    assert (kept.analysis, kept.samples, kept.name) == (A, 5000, "word")


def test_a_file_that_is_no_mel_says_so(tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "bare.npz", mel=np.zeros((80, 3)))
    np.savez(tmp_path / "other.npz", mel=np.zeros((80, 3)), samples=512, analysis='{"rate": 16000}')
    for name, message in (
        ("text", "not the file of a mel"),
        ("bare", "lacks analysis, samples"),
        ("other", "lack n_fft"),
    ):
        with pytest.raises(ValueError, match=message):
            Mel.load(tmp_path / f"{name}.npz")
    with pytest.raises(FileNotFoundError):
        Mel.load(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"\.npz"):
        Mel.of(voice(5000)[0], A).save(tmp_path / "mel.wav")


@pytest.mark.parametrize(
    ("values", "samples", "message"),
    [
        (torch.zeros(40, 3), 512, r"\(80, T\)"),
        (torch.zeros(80, 3), 5000, "20 frames"),
        (torch.full((80, 3), math.nan), 512, "not finite"),
    ],
)
def test_an_impossible_mel_is_refused(values, samples, message):
    with pytest.raises(ValueError, match=message):
        Mel(values, A, samples)
