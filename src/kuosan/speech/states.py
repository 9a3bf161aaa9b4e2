r"""What of a wave is diffused when its mel is given: log-magnitudes, a complex spectrum, or the wave itself.

All three are relative to what the mel alone says, the magnitudes P of :meth:`Analysis.envelope`: where speech is like
noise of that energy they have mean 0 and variance 1, and noise added to them has the shape of the energy. That is the
prior of PriorGrad (Lee et al. 2022, arXiv 2106.06406): a process whose noise has the diagonal covariance s^2 is the
ordinary process of x / s,

.. math::
    q(x_t | x_0) = N(\alpha x_0, \sigma^2 \operatorname{diag}(s^2)) \iff
    q(x_t / s \,|\, x_0 / s) = N(\alpha x_0 / s, \sigma^2),

its loss is the ordinary one there, and every solver, table and bound serves it as it is.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kuosan.speech.analysis import Analysis

#: Magnitudes are not told apart below it: of 16-bit recordings what is less is rounding.
LEAST = 1e-3
#: Of the magnitudes of Gaussian noise, which are Rayleigh's: root mean square over mean; and of their logarithm, in
#: nats, the logarithm of the mean above the mean, and the standard deviation.
RMS = 2 / math.sqrt(math.pi)
BELOW = 0.5772156649015329 / 2 - math.log(RMS)
SCATTER = math.pi / math.sqrt(24)
#: Times that magnitudes are brought nearer to the mel that was given.
NEARER = 20
#: What log-mels are told to a network as: (m + 5) / 3 lies about in [-2, 2].
MEAN, SPREAD = -5.0, 3.0


def told(mel: Tensor) -> Tensor:
    """A log-mel at about unit scale, as networks are told it; :func:`untold` is the inverse."""
    return (mel - MEAN) / SPREAD


def untold(x: Tensor) -> Tensor:
    """The log-mel of what :func:`told` gives."""
    return x * SPREAD + MEAN


@dataclass(frozen=True)
class State(ABC):
    """One way to diffuse a wave, given its mel; the state has one column for each frame, or hop samples for each.

    Args:
        analysis: the constants of the mel.
    """

    analysis: Analysis
    #: Seconds of a wave that can be made in one piece.
    longest: ClassVar[float] = 600.0

    @abstractmethod
    def shape(self, frames: int) -> tuple[int, ...]:
        """Of the state of a wave of so many frames."""

    @abstractmethod
    def encode(self, wave: Tensor, mel: Tensor) -> Tensor:
        """The states of waves (B, N) with mels (B, M, T)."""

    @abstractmethod
    def decode(self, x: Tensor, mel: Tensor, n: int, iterations: int = 32) -> Tensor:
        """The waves (B, n) of states.

        Args:
            iterations: of Griffin-Lim, where phases have to be found.
        """

    def window(self, frames: int) -> int:
        """How many samples :meth:`cut` needs for so many frames."""
        return (frames - 1 + 2 * self.reach) * self.analysis.hop

    @property
    def reach(self) -> int:
        """Frames whose windows reach beyond the end of a wave."""
        return -(-self.analysis.n_fft // (2 * self.analysis.hop))

    def cut(self, wave: Tensor) -> tuple[Tensor, Tensor]:
        """States and mels of windows (B, N) out of longer waves: those of frames that lie within them."""
        mel = self.analysis.mel(wave)
        x, frames = self.encode(wave, mel), slice(self.reach, mel.shape[2] - self.reach)
        each = x.shape[2] // mel.shape[2]  # samples of the state for each frame
        return x[..., frames.start * each : frames.stop * each], mel[..., frames]


class Magnitude(State):
    r"""Log-magnitudes, whose phases fast Griffin-Lim finds.

    .. math:: x = \frac{\log \max(|X|, \delta) - \log \max(P, \delta) + c}{s}, \qquad \delta = 10^{-3}

    (B, F, T), with c and s that bring noise to mean 0 and variance 1. On the way back the magnitudes are first brought
    to the mel that was given (:meth:`Analysis.with_mel`): it is known, and what was drawn meets it about only.
    """

    def shape(self, frames: int) -> tuple[int, ...]:
        return (self.analysis.bins, frames)

    def encode(self, wave: Tensor, mel: Tensor) -> Tensor:
        return (_log(self.analysis.stft(wave).abs()) - _log(self.analysis.envelope(mel)) + BELOW) / SCATTER

    def decode(self, x: Tensor, mel: Tensor, n: int, iterations: int = 32) -> Tensor:
        magnitude = (x * SCATTER - BELOW + _log(self.analysis.envelope(mel))).exp()
        return self.analysis.griffin_lim(self.analysis.with_mel(magnitude, mel, NEARER), iterations, n=n)


class Spectrum(State):
    r"""The complex spectrum in parts, relative to the root mean square that P stands for, (B, 2 F, T).

    .. math:: x = \sqrt{\pi / 2} \, (\operatorname{Re} X, \operatorname{Im} X) / \max(P, \delta)
    """

    def shape(self, frames: int) -> tuple[int, ...]:
        return (2 * self.analysis.bins, frames)

    def encode(self, wave: Tensor, mel: Tensor) -> Tensor:
        X = self.analysis.stft(wave) / self._scale(mel)
        return math.sqrt(2) * torch.cat([X.real, X.imag], dim=1)

    def decode(self, x: Tensor, mel: Tensor, n: int, iterations: int = 32) -> Tensor:
        real, imaginary = (x / math.sqrt(2)).chunk(2, dim=1)
        return self.analysis.inverse(torch.complex(real, imaginary) * self._scale(mel), n)

    def _scale(self, mel: Tensor) -> Tensor:
        return RMS * self.analysis.envelope(mel).clamp_min(LEAST)


class Wave(State):
    r"""The wave itself, divided by what the mel says of its energy, x = w / s, (B, 1, T hop).

    .. math:: s_t^2 = \frac{4}{\pi} \, \frac{2 \sum_f P_{ft}^2}{n \sum_k w_k^2}, \qquad s \ge 10^{-3}

    by Parseval, with the window w of n samples; between frames s is linear.
    """

    longest = 120.0  # a network at the rate of the wave takes some 40 MB for each second

    def shape(self, frames: int) -> tuple[int, ...]:
        return (1, frames * self.analysis.hop)

    def encode(self, wave: Tensor, mel: Tensor) -> Tensor:
        scale = self._scale(mel)
        return (torch.nn.functional.pad(wave, (0, scale.shape[1] - wave.shape[1])) / scale)[:, None]

    def decode(self, x: Tensor, mel: Tensor, n: int, iterations: int = 32) -> Tensor:
        return (x[:, 0] * self._scale(mel))[:, :n]

    def _scale(self, mel: Tensor) -> Tensor:
        """s, (B, T hop)."""
        energy = 2 * self.analysis.envelope(mel).square().sum(1) / (self.analysis.n_fft * self.analysis.window_energy)
        s = (RMS * energy.sqrt()).clamp_min(1e-3)
        hop = self.analysis.hop
        ahead = torch.cat([s[:, 1:], s[:, -1:]], dim=1)
        part = torch.arange(hop, dtype=s.dtype, device=s.device) / hop
        return (s[..., None] + (ahead - s)[..., None] * part).flatten(1)


def _log(magnitude: Tensor) -> Tensor:
    return magnitude.clamp_min(LEAST).log()


#: By the name that recipes know.
STATES: dict[str, type[State]] = {"magnitude": Magnitude, "spectrum": Spectrum, "wave": Wave}
