"""Waves to mels and back: one set of constants, the transforms that they define, and Griffin-Lim."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kuosan.seeds import stream


@dataclass(frozen=True)
class Analysis:
    r"""The constants of a mel analysis, and what they define: of a wave x its spectrum X, its mel m, and ways back.

    .. math:: m = \log \max(\text{floor}, M |X|)

    where X is the short-time Fourier transform with a periodic Hann window, centred (a frame stands on every hop-th
    sample, with zeros before and behind the wave), and M holds Slaney's triangles of area 1, as librosa makes them.
    Waves are (B, N), spectra (B, F, T) with F = n_fft / 2 + 1, mels (B, mels, T); all torch, in the caller's precision.

    Args:
        rate: samples a second.
        n_fft: samples of a frame, and of its window.
        hop: samples from a frame to the next, at most n_fft / 4: the last samples of a wave lie under the window's
            edge, and what is divided by the squared window there must not be noise.
        mels: how many triangles.
        low: where the lowest one begins, in Hz.
        high: where the highest one ends, in Hz.
        floor: what the logarithm, and every measure made with one, does not go below; in the units of |X|, where a
            sine of amplitude 1 has n_fft / 4.

    Raises:
        ValueError: a constant is not a number that it can be.
    """

    rate: int = 16000
    n_fft: int = 1024
    hop: int = 256
    mels: int = 80
    low: float = 0.0
    high: float = 8000.0
    floor: float = 1e-5

    def __post_init__(self):
        for name in ("rate", "n_fft", "hop", "mels"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("low", "high", "floor"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
            object.__setattr__(self, name, float(value))  # so that 8000 and 8000.0 are one analysis
        if self.n_fft % 2:
            raise ValueError(f"n_fft must be even, got {self.n_fft}")
        if 4 * self.hop > self.n_fft:
            raise ValueError(f"hop must be at most n_fft / 4 = {self.n_fft // 4}, got {self.hop}")
        if not 0 <= self.low < self.high <= self.rate / 2:
            raise ValueError(
                f"0 <= low < high <= rate / 2 = {self.rate / 2:g} Hz must hold, got low {self.low:g} "
                f"and high {self.high:g}"
            )
        if self.floor <= 0:
            raise ValueError(f"floor must be positive, got {self.floor:g}")

    @property
    def bins(self) -> int:
        """How many frequencies a spectrum has, F."""
        return self.n_fft // 2 + 1

    @property
    def window_energy(self) -> float:
        """The sum of the window's squares: 3 n_fft / 8 of a Hann window."""
        return 0.375 * self.n_fft

    def plain(self) -> dict[str, Any]:
        """The constants by name, ready for JSON; `from_plain` reads them."""
        return asdict(self)

    @classmethod
    def from_plain(cls, said: Mapping[str, Any]) -> "Analysis":
        """The analysis that `plain` described.

        Raises:
            ValueError: a constant is missing, unknown, or not a number that it can be.
        """
        names = [field.name for field in fields(cls)]
        for problem, wrong in (
            ("lack", [name for name in names if name not in said]),
            ("have the unknown", [str(name) for name in said if name not in names]),
        ):
            if wrong:
                raise ValueError(f"the constants of a mel analysis are {', '.join(names)}; these {problem} {wrong[0]}")
        return cls(**said)

    def check(self, other: "Analysis") -> None:
        """Pass if the other analysis, of a mel that was made elsewhere, is this one.

        Raises:
            ValueError: it differs; the message names every constant that does.
        """
        mine, theirs = self.plain(), other.plain()
        wrong = [f"{name} {theirs[name]:g} instead of {mine[name]:g}" for name in mine if mine[name] != theirs[name]]
        if wrong:
            raise ValueError(f"a mel made with other constants: {', '.join(wrong)}")

    def frames(self, n: int) -> int:
        """How many frames n samples have, T = 1 + floor(n / hop).

        Raises:
            ValueError: n is less than 1.
        """
        if n < 1:
            raise ValueError(f"a wave needs at least 1 sample, got {n}")
        return 1 + n // self.hop

    def stft(self, wave: Tensor) -> Tensor:
        r"""The short-time Fourier transform, complex (B, F, T).

        .. math:: X_{ft} = \sum_{k=0}^{n-1} w_k \, x_{t \cdot \text{hop} + k - n / 2} \, e^{-2 \pi i f k / n},
            \qquad w_k = \sin^2(\pi k / n), \quad n = \text{n\_fft}

        Raises:
            ValueError: the wave is not (B, N) of real numbers, or empty.
        """
        if wave.ndim != 2 or not wave.is_floating_point():
            raise ValueError(f"expected waves (B, N) of real numbers, got {tuple(wave.shape)} of {wave.dtype}")
        self.frames(wave.shape[1])  # refuses an empty wave
        window = _window(self.n_fft, wave.dtype, wave.device)
        return torch.stft(
            wave, self.n_fft, self.hop, window=window, center=True, pad_mode="constant", return_complex=True
        )

    def inverse(self, spectrum: Tensor, n: int) -> Tensor:
        """The wave (B, n) whose spectrum is nearest to the given one, in least squares (Griffin and Lim 1984).

        Raises:
            ValueError: the spectrum is not complex (B, F, T), or n samples do not have T frames.
        """
        if not spectrum.is_complex():
            raise ValueError(f"expected a complex spectrum, got {spectrum.dtype}")
        self._expect(spectrum, self.bins, "a spectrum")
        if self.frames(n) != spectrum.shape[2]:
            raise ValueError(f"{n} samples have {self.frames(n)} frames, and the spectrum has {spectrum.shape[2]}")
        window = _window(self.n_fft, spectrum.real.dtype, spectrum.device)
        return torch.istft(spectrum, self.n_fft, self.hop, window=window, center=True, length=n)

    def mel(self, wave: Tensor) -> Tensor:
        """The natural logarithm of the mel magnitudes, (B, mels, T).

        Raises:
            ValueError: the wave is not (B, N) of real numbers, or empty; a triangle holds no frequency of the spectrum.
            ImportError: librosa is not installed.
        """
        filters, _ = _filters(self, wave.dtype, wave.device)
        return (filters @ self.stft(wave).abs()).clamp(min=self.floor).log()

    def magnitude(self, mel: Tensor) -> Tensor:
        """Magnitudes (B, F, T) with about that mel: the pseudo-inverse of the triangles, what is negative set to 0.

        Non-negative least squares (librosa's `mel_to_stft`) takes a hundred times as long, and the waves made of its
        magnitudes are as near to natural ones to three digits.

        Raises:
            ValueError: the mel is not (B, mels, T).
            ImportError: librosa is not installed.
        """
        self._expect(mel, self.mels, "a mel")
        _, inverse = _filters(self, mel.dtype, mel.device)
        return (inverse @ mel.exp()).clamp(min=0)

    def envelope(self, mel: Tensor) -> Tensor:
        r"""Smooth, positive magnitudes (B, F, T) with about that mel: what it says of them if nothing else is known.

        .. math:: P_{ft} = \frac{\sum_m M_{mf} \, e^{m_{mt}} / \sum_k M_{mk}}{\sum_m M_{mf}}

        and one step of `with_mel`, with which the pseudo-inverse's ringing is gone: of speech the logarithm of |X| / P
        has two thirds of the standard deviation that it has with `magnitude`. More steps sharpen it to peaks again.
        A frequency in no triangle is as its neighbour.

        Raises:
            ValueError: the mel is not (B, mels, T).
            ImportError: librosa is not installed.
        """
        self._expect(mel, self.mels, "a mel")
        filters, _ = _filters(self, mel.dtype, mel.device)
        total = filters.sum(0)[:, None]
        near = _nearest(total[:, 0] > 0)
        least = torch.finfo(mel.dtype).tiny
        spread = (filters.T @ (mel.exp() / filters.sum(1)[:, None])) / total.clamp(min=least)
        return self.with_mel(spread[:, near], mel, 1)[:, near]

    def with_mel(self, magnitude: Tensor, mel: Tensor, iterations: int = 20) -> Tensor:
        r"""The magnitudes brought nearer to those that have the mel, each by a factor, (B, F, T).

        .. math:: S_{ft} \leftarrow S_{ft} \, \frac{\sum_m M_{mf} \, e^{m_{mt}} / (M S)_{mt}}{\sum_m M_{mf}}

        Each step lowers the Kullback-Leibler divergence of M S from the mel magnitudes: expectation maximisation
        (Richardson 1972, Lucy 1974; Lee and Seung 2001, theorem 2). Frequencies in no triangle stay as they are.

        Raises:
            ValueError: a magnitude is negative or not finite, or a shape does not fit.
        """
        self._expect(magnitude, self.bins, "a magnitude")
        self._expect(mel, self.mels, "a mel")
        if magnitude.shape[::2] != mel.shape[::2]:
            raise ValueError(f"a mel {tuple(mel.shape)} does not fit magnitudes {tuple(magnitude.shape)}")
        if not bool((magnitude >= 0).all() and magnitude.isfinite().all()):
            raise ValueError("magnitudes must be finite and at least 0")
        filters, _ = _filters(self, magnitude.dtype, magnitude.device)
        total = filters.sum(0)[:, None]
        wanted, least = mel.exp(), torch.finfo(magnitude.dtype).tiny
        for _ in range(iterations):
            ratio = wanted / (filters @ magnitude).clamp(min=least)
            magnitude = torch.where(total > 0, magnitude * (filters.T @ ratio) / total.clamp(min=least), magnitude)
        return magnitude

    def griffin_lim(
        self,
        magnitude: Tensor,
        iterations: int = 32,
        momentum: float = 0.99,
        start: Tensor | None = None,
        seed: int = 0,
        n: int | None = None,
    ) -> Tensor:
        r"""A wave with about those magnitudes: the fast Griffin-Lim algorithm (Perraudin et al. 2013).

        .. math::
            c_k = G(S e^{i \arg t_{k-1}}), \qquad t_k = c_k + \alpha (c_k - c_{k-1})
            \;\propto\; c_k - \tfrac{\alpha}{1 + \alpha} c_{k-1}

        where G is `inverse` and then `stft`, S the magnitudes, alpha the momentum. Without iterations the wave is
        `inverse` of the magnitudes with the phases that it starts from. librosa's `griffinlim` gives the same numbers,
        but takes no phases to start from, and a third more time.

        Args:
            magnitude: (B, F, T), at least 0.
            momentum: 0 is the algorithm of Griffin and Lim (1984).
            start: phases in radians (B, F, T). Without them they are uniform: those of row k are a function of
                (seed, k), and its first frames do not depend on how many follow.
            n: samples to make, with T frames; (T - 1) hop without it.

        Returns:
            The wave (B, n). Nothing keeps it within [-1, 1].

        Raises:
            ValueError: a magnitude is negative or not finite, a shape does not fit, n samples do not have T frames,
                the iterations are negative, or the momentum is outside [0, 1].
        """
        self._expect(magnitude, self.bins, "a magnitude")
        if not bool((magnitude >= 0).all() and magnitude.isfinite().all()):
            raise ValueError("magnitudes must be finite and at least 0")
        if iterations < 0 or not 0 <= momentum <= 1:
            raise ValueError(
                f"iterations must be at least 0 and momentum in [0, 1], got {iterations} and {momentum}; "
                "above 1 the iteration may not converge"
            )
        if start is None:
            start = torch.stack([_phases(seed, k, magnitude.shape[1:]) for k in range(len(magnitude))])
        elif start.shape != magnitude.shape:
            raise ValueError(f"phases {tuple(start.shape)} do not fit magnitudes {tuple(magnitude.shape)}")
        n = (magnitude.shape[2] - 1) * self.hop if n is None else n
        spectrum = torch.polar(magnitude, start.to(magnitude))
        before = torch.zeros_like(spectrum)
        for _ in range(iterations):
            now = self.stft(self.inverse(spectrum, n))
            spectrum = magnitude * torch.sgn(now - momentum / (1 + momentum) * before)  # z / |z|, and 0 of 0
            before = now
        return self.inverse(spectrum, n)

    def _expect(self, frames: Tensor, rows: int, what: str) -> None:
        if frames.ndim != 3 or frames.shape[1] != rows or 0 in frames.shape:
            raise ValueError(f"{what} of this analysis has the shape (B, {rows}, T), got {tuple(frames.shape)}")


def _phases(seed: int, row: int, shape: torch.Size) -> Tensor:
    """Uniform phases (F, T) in float64, drawn frame by frame."""
    bins, frames = shape
    drawn = torch.rand(frames, bins, generator=stream("Griffin-Lim", seed, row), dtype=torch.float64)
    return 2 * math.pi * drawn.T


def _nearest(known: Tensor) -> Tensor:
    """For each place the nearest one that is known, itself if it is, (F,)."""
    places, there = torch.arange(len(known)), known.nonzero().flatten().cpu()
    return there[(places[:, None] - there).abs().argmin(1)].to(known.device)


@lru_cache(maxsize=16)
def _window(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept, and perhaps asked for again where there are gradients
        return torch.hann_window(n, dtype=torch.float64).to(device, dtype)


@lru_cache(maxsize=16)
def _filters(analysis: Analysis, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Slaney's triangles (mels, F) and their pseudo-inverse (F, mels)."""
    try:
        from librosa.filters import mel
    except ImportError:
        raise ImportError("mels need the library librosa: pip install 'kuosan[speech]'") from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Empty filters")  # said below, as an error
        array = mel(
            sr=analysis.rate,
            n_fft=analysis.n_fft,
            n_mels=analysis.mels,
            fmin=analysis.low,
            fmax=analysis.high,
            dtype=float,
        )
    with torch.inference_mode(False):  # kept, and perhaps asked for again where there are gradients
        filters = torch.from_numpy(array)
        inverse = torch.linalg.pinv(filters)
        ways = filters.to(device, dtype), inverse.to(device, dtype)
    empty = (filters.sum(1) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"mel {empty[0]} of {analysis.mels} is narrower than a frequency of n_fft {analysis.n_fft}: "
            "take fewer mels or a larger n_fft"
        )
    return ways
