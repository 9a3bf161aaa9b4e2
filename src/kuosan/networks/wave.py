"""Two networks over waveforms that are given a mel: DiffWave's stack of dilations, and WaveGrad's pyramid of rates.

Both are called with a wave (B, 1, N) and frames (B, M, N / hop): the k-th of them belongs to the samples from k hop up
to (k + 1) hop. Both are told the time by :class:`~kuosan.networks.parts.Embedding`. Under EDM preconditioning that is a
label of the noise level, which is what WaveGrad is conditioned on; under a table such as ``ddpm`` it is the step, which
is what DiffWave is conditioned on. Either network takes either.

Convolutions are padded with zeros at both ends: near the end of a crop, what is said is said of a crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool1d, leaky_relu, relu, silu

from kuosan.networks.frames import conditioned
from kuosan.networks.parts import Embedding, check_size, zeroed


class WaveNet(nn.Module):
    r"""DiffWave's residual network (Kong et al. 2021, arXiv 2009.09761, section 3 and figure 2).

    In layer l, with dilation :math:`d_l = 2^{l \bmod \text{cycle}}`, of a hidden wave h, the mel m at the wave's rate
    and the embedded time e:

    .. math::
        (a, b) = W_{d_l} * (h + U e) + V m, \qquad
        (r, s_l) = R (\tanh a \odot \operatorname{sigmoid} b), \qquad
        h \leftarrow \frac{h + r}{\sqrt 2}

    and the wave that is returned is a small network of :math:`\sum_l s_l / \sqrt{\text{depth}}`. Convolutions have
    3 taps and look both ways: a sample is told of :math:`\sum_l d_l` others on each side.

    The mel is brought to the wave's rate as in the paper, by two transposed convolutions over rows and time, each
    reaching from a frame into half of its neighbours: what a frame says fades into what the next one says instead of
    stepping, which repetition would leave for the layers to undo. They start as linear interpolation, and are 194
    weights at a hop of 256.

    The defaults are the paper's base size, 2,587,203 parameters; of the paper's 2.64 M, 32,768 are in its
    wider embedding of the step.

    Args:
        shape: (1, N) of a training example; any multiple of hop will do.
        channels: of every layer.
        depth: layers.
        cycle: layers after which the dilation is 1 again.
        given: rows M of the mel.
        hop: samples for each frame of it.
        outputs: waves returned.

    Raises:
        ValueError: a shape that is not (1, N) with N a multiple of hop, or an impossible size.
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: int = 64,
        depth: int = 30,
        cycle: int = 10,
        given: int = 80,
        hop: int = 256,
        outputs: int = 1,
    ):
        super().__init__()
        check_size(channels, depth)
        _check(shape, given, hop, outputs)
        if not 1 <= cycle <= 20:
            raise ValueError(f"cycle must lie in 1 to 20 (a dilation of 2^19), got {cycle}")
        self.given, self.hop = given, hop
        self.embedding = Embedding(8 * channels)
        self.frames = nn.ModuleList(_Smooth(factor) for factor in grouped(hop, 2))
        self.first = nn.Conv1d(1, channels, 1)
        self.layers = nn.ModuleList(_Layer(channels, 2 ** (i % cycle), given) for i in range(depth))
        self.summed = nn.Conv1d(channels, channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv1d):  # torch's own weights are so small that deep layers would hear nothing
                nn.init.kaiming_normal_(module.weight)
        self.last = zeroed(nn.Conv1d(channels, outputs, 1))

    def forward(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        """(B, outputs, N) of waves (B, 1, N), given a mel (B, M, N / hop).

        Raises:
            ValueError: waves of no whole number of frames, or a condition that does not go with them.
        """
        mel = conditioned(condition, self.given, len(x), _count(x, self.hop)).unsqueeze(1)
        for smooth in self.frames:
            mel = smooth(mel)
        told, h = silu(self.embedding(t)), relu(self.first(x))
        mel, total = mel.squeeze(1), torch.zeros_like(h)
        for layer in self.layers:
            h, skip = layer(h, told, mel)
            total = total + skip
        return self.last(relu(self.summed(total / math.sqrt(len(self.layers)))))


class _Smooth(nn.Module):
    """(B, 1, M, T) to (B, 1, M, factor T): each frame at the middle of its samples, fading into the next ones."""

    def __init__(self, factor: int):
        super().__init__()
        size, cut = 2 * factor + factor % 2, (factor + 1) // 2  # of an odd factor too, factor T samples come out
        self.over_time = nn.ConvTranspose2d(1, 1, (3, size), stride=(1, factor), padding=(1, cut))
        zeroed(self.over_time)  # of torch's own small weights two such layers would leave a fiftieth of the mel
        with torch.no_grad():
            self.over_time.weight[0, 0, 1] = 1 - (torch.arange(size) - (size - 1) / 2).abs() / factor

    def forward(self, mel: Tensor) -> Tensor:
        return leaky_relu(self.over_time(mel), 0.4)


class _Layer(nn.Module):
    def __init__(self, channels: int, dilation: int, given: int):
        super().__init__()
        self.step = nn.Linear(8 * channels, channels)
        self.mel = nn.Conv1d(given, 2 * channels, 1)
        self.dilated = nn.Conv1d(channels, 2 * channels, 3, padding=dilation, dilation=dilation)
        self.out = nn.Conv1d(channels, 2 * channels, 1)

    def forward(self, h: Tensor, told: Tensor, mel: Tensor) -> tuple[Tensor, Tensor]:
        """The next (B, channels, N), and what goes straight to the end."""
        a, b = (self.dilated(h + self.step(told)[..., None]) + self.mel(mel)).chunk(2, dim=1)
        residual, skip = self.out(a.tanh() * b.sigmoid()).chunk(2, dim=1)
        return (h + residual) / math.sqrt(2), skip


class WaveGrad(nn.Module):
    r"""WaveGrad's pyramid (Chen et al. 2021, arXiv 2009.00713, section 3 and figures 3 to 5).

    From the mel up to the wave in at most 5 steps, whose factors multiply to the hop. At each rate the way up is
    scaled and shifted (FiLM) by what the noisy wave, brought down to that rate, and the embedded time say:

    .. math:: u \leftarrow (1 + \gamma(w, e)) \odot u + \xi(w, e)

    The paper's gamma has no 1 before it; with weights that start small it is better to start near the identity.
    Repetition brings up and averages bring down: an average hears all the samples.

    The defaults are the paper's base size: layers as wide as there, for a hop of 256 = 4 4 4 2 2 instead of
    300 = 5 5 3 2 2, which changes no weight, and 80 rows instead of 128. They have 15,971,457 parameters, of which
    161,056 embed the time; the paper counts 15 M. A width of 32 makes 1 M of them.

    Args:
        shape: (1, N) of a training example; any multiple of hop will do.
        width: channels at the wave's own rate, a multiple of 4; lower rates have up to 6 times as many.
        given: rows M of the mel.
        hop: samples for each frame of it, at least 2.
        outputs: waves returned.

    Raises:
        ValueError: a shape that is not (1, N) with N a multiple of hop, or an impossible size.
    """

    def __init__(self, shape: Sequence[int], width: int = 128, given: int = 80, hop: int = 256, outputs: int = 1):
        super().__init__()
        check_size(width, 1)
        _check(shape, given, hop, outputs)
        if width % 4:
            raise ValueError(f"width must be a multiple of 4, got {width}")
        if hop < 2:
            raise ValueError(f"hop must be at least 2: of a hop of {hop} there is nothing to bring up")
        self.given, self.hop = given, hop
        factors = grouped(hop, 5)
        n = len(factors)
        ups = [6 * width, *(width * wider for wider in (4, 4, 2, 1, 1)[-n:])]
        downs = [width // 4, *ups[:1:-1]]
        dilations = ((1, 2, 1, 2), (1, 2, 1, 2), (1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8))[-n:]  # short at low rates
        self.embedding = Embedding(width)
        self.first = nn.Conv1d(1, downs[0], 5, padding=2)
        self.down = nn.ModuleList(
            _Down(c, wider, factor) for (c, wider), factor in zip(pairwise(downs), reversed(factors[1:]), strict=True)
        )
        self.films = nn.ModuleList(_FiLM(c, out, width) for c, out in zip(downs, reversed(ups[1:]), strict=True))
        self.mel = nn.Conv1d(given, ups[0], 3, padding=1)
        self.up = nn.ModuleList(
            _Up(c, out, factor, apart)
            for (c, out), factor, apart in zip(pairwise(ups), factors, dilations, strict=True)
        )
        for part in (self.first, self.down, self.mel, self.up):
            for module in part.modules():
                if isinstance(module, nn.Conv1d):  # nothing here is normalised, so nothing may shrink it
                    nn.init.orthogonal_(module.weight)
        self.last = zeroed(nn.Conv1d(ups[-1], outputs, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        """(B, outputs, N) of waves (B, 1, N), given a mel (B, M, N / hop).

        Raises:
            ValueError: waves of no whole number of frames, or a condition that does not go with them.
        """
        mel = conditioned(condition, self.given, len(x), _count(x, self.hop))
        told, waves = silu(self.embedding(t)), [self.first(x)]
        for down in self.down:
            waves.append(down(waves[-1]))
        films = [film(wave, told) for film, wave in zip(self.films, waves, strict=True)]
        h = self.mel(mel)
        for up, film in zip(self.up, reversed(films), strict=True):
            h = up(h, *film)
        return self.last(h)


class _FiLM(nn.Module):
    """What a wave at one rate and the time say of the way up: (scale, shift), each (B, out, N')."""

    def __init__(self, channels: int, out: int, told: int):
        super().__init__()
        self.first = nn.Conv1d(channels, channels, 3, padding=1)
        self.time = nn.Linear(told, channels)
        self.second = nn.Conv1d(channels, 2 * out, 3, padding=1)

    def forward(self, wave: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        h = leaky_relu(self.first(wave), 0.2) + self.time(told)[..., None]
        scale, shift = self.second(h).chunk(2, dim=1)
        return scale, shift


class _Down(nn.Module):
    """To a lower rate: three convolutions, and one of a single tap beside them."""

    def __init__(self, channels: int, out: int, factor: int):
        super().__init__()
        self.factor = factor
        self.beside = nn.Conv1d(channels, out, 1)
        self.main = nn.ModuleList(
            nn.Conv1d(channels if d == 1 else out, out, 3, padding=d, dilation=d) for d in (1, 2, 4)
        )

    def forward(self, h: Tensor) -> Tensor:
        h = avg_pool1d(h, self.factor)
        beside = self.beside(h)
        for convolution in self.main:
            h = convolution(leaky_relu(h, 0.2))
        return beside + h


class _Up(nn.Module):
    """To a higher rate: two pairs of dilated convolutions, each of the last three after the FiLM."""

    def __init__(self, channels: int, out: int, factor: int, dilations: Sequence[int]):
        super().__init__()
        self.factor = factor
        self.beside = nn.Conv1d(channels, out, 1)
        self.main = nn.ModuleList(
            nn.Conv1d(out if i else channels, out, 3, padding=d, dilation=d) for i, d in enumerate(dilations)
        )

    def forward(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        first, second, third, fourth = self.main
        beside = self.beside(h).repeat_interleave(self.factor, dim=2)  # in this order for less work: it has one tap
        h = first(leaky_relu(h, 0.2).repeat_interleave(self.factor, dim=2))
        h = beside + second(leaky_relu(h * (1 + scale) + shift, 0.2))
        inner = third(leaky_relu(h * (1 + scale) + shift, 0.2))
        return h + fourth(leaky_relu(inner * (1 + scale) + shift, 0.2))


def grouped(hop: int, most: int) -> list[int]:
    """At most so many factors of a hop, largest first: its primes, the two smallest multiplied until they are few."""
    factors, p = [], 2
    while hop > 1:
        while hop % p == 0:
            factors.append(p)
            hop //= p
        p += 1
    while len(factors) > most:
        factors = sorted([factors[0] * factors[1], *factors[2:]])
    return factors[::-1]


def _check(shape: Sequence[int], given: int, hop: int, outputs: int) -> None:
    if min(given, outputs) < 1 or not 1 <= hop <= 2**16:
        raise ValueError(
            f"given and outputs must be at least 1 and hop must lie in 1 to 65536, got {given}, {outputs} and {hop}"
        )
    if len(shape) != 2 or shape[0] != 1 or shape[1] < 1 or shape[1] % hop:
        raise ValueError(f"waves are (1, N), N a multiple of the hop of {hop} samples, got shape {tuple(shape)}")


def _count(x: Tensor, hop: int) -> int:
    """Frames of a wave (B, 1, N)."""
    if x.ndim != 3 or x.shape[1] != 1 or x.shape[2] < 1 or x.shape[2] % hop:
        raise ValueError(
            f"this network was made for waves (1, N), N a multiple of its hop of {hop}, got {tuple(x.shape[1:])}"
        )
    return x.shape[2] // hop
