"""The acoustic model of text to speech: phonemes to a mel, by monotonic alignment and flow matching (Matcha-TTS)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kuosan.denoiser import EDM, Denoiser
from kuosan.networks.frames import Block
from kuosan.networks.parts import check_size
from kuosan.objectives import Objective, Plain, Stratified, TimeSampler, Weighted, Weighting, draw
from kuosan.process import Process
from kuosan.speech.alignment import durations, expand
from kuosan.speech.phonemes import PAD, SYMBOLS

_PAD = SYMBOLS.index(PAD)
_OF_FLOW, _EVENLY = Plain("flow"), Stratified()


class Encoder(nn.Module):
    """Of each symbol of a text the mean mel, and the logarithm of how many frames it lasts.

    ConvNeXt blocks over symbols. What stands after the end of a text is 0 throughout, so that a text is read alike
    whatever it is padded to.

    Args:
        mels: rows of a mel.
        width, depth: of the blocks; half as many, two at least, tell the durations.
        kernel: symbols that a block sees at once, odd.
        dropout: of each block.
    """

    def __init__(self, mels: int, width: int = 192, depth: int = 4, kernel: int = 5, dropout: float = 0.1):
        super().__init__()
        check_size(width, depth)
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {kernel}")
        self.width = width
        self.symbols = nn.Embedding(len(SYMBOLS), width, padding_idx=_PAD)
        self.blocks = nn.ModuleList(Block(width, kernel, 3, dropout) for _ in range(depth))
        self.mean = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, mels))
        self.timing = nn.ModuleList(Block(width, kernel, 3, dropout) for _ in range(max(2, depth // 2)))
        self.lasting = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))
        for block in (*self.blocks, *self.timing):
            nn.init.constant_(block.modulation.bias[2 * width :], 1.0)  # nothing modulates them: open from the start

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(means (B, M, L), log-durations (B, L)) of symbols (B, L), padded with 0.

        Raises:
            ValueError: not whole numbers (B, L), or one that is no symbol.
        """
        if ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
            raise ValueError(f"texts are whole numbers (B, L), got {tuple(ids.shape)} of {ids.dtype}")
        if int(ids.min()) < 0 or int(ids.max()) >= len(SYMBOLS):
            raise ValueError(f"symbols are 0 to {len(SYMBOLS) - 1}, got {int(ids.min())} to {int(ids.max())}")
        there = (ids != _PAD)[..., None]
        h = self.symbols(ids)
        still = h.new_zeros(len(ids), self.width)
        for block in self.blocks:
            h = block(h, still) * there
        mean = (self.mean(h) * there).transpose(1, 2)
        h = h.detach()  # durations follow the alignment; they do not pull at it
        for block in self.timing:
            h = block(h, still) * there
        return mean, self.lasting(h)[..., 0]


class Acoustic(Denoiser):
    r"""A denoiser of mels that is told mu, the mean mel of the symbol that each frame belongs to.

    Which frame belongs to which symbol is found while training, by the alignment that makes the mel likeliest under
    N(mu, 1) (:func:`~.alignment.durations`); of a new text it is what the encoder says (Mehta et al. 2024, Matcha-TTS,
    arXiv 2309.03199; Kim et al. 2020, Glow-TTS, arXiv 2005.11129).

    Args:
        network, process, predicts, preconditioning: of :class:`~kuosan.Denoiser`; the network is told (B, M, T).
        encoder: of texts.
    """

    def __init__(
        self, network: nn.Module, process: Process, predicts: str, preconditioning: EDM | None, encoder: Encoder
    ):
        super().__init__(network, process, predicts, preconditioning)
        self.encoder = encoder

    def around(self, network: nn.Module) -> Acoustic:
        return Acoustic(network, self.process, self.predicts, self.preconditioning, self.encoder)

    def align(self, mean: Tensor, x_0: Tensor, ids: Tensor) -> Tensor:
        """How many frames each symbol lasts, int64 (B, L), of mels (B, M, T) padded with columns of 0."""
        with torch.no_grad(), torch.autocast(x_0.device.type, enabled=False):
            mean, x_0 = mean.float(), x_0.float()
            score = mean.mT @ x_0 - 0.5 * mean.square().sum(1)[..., None] - 0.5 * x_0.square().sum(1)[:, None]
            return durations(score, (ids != _PAD).sum(1), lasting(x_0))

    def told(self, ids: Tensor, speed: float = 1.0, frames: int | None = None) -> tuple[Tensor, Tensor]:
        """(mu (B, M, T), durations (B, L)) of texts.

        Args:
            ids: (B, L), padded with 0.
            speed: 2 is twice as fast as the voice speaks by itself.
            frames: how many frames a text is to have, of a single one; in the place of the speed.

        Raises:
            ValueError: a speed that is not positive, fewer frames than symbols, or frames for several texts.
        """
        if not speed > 0:
            raise ValueError(f"speed must be positive, got {speed}")
        mean, log_durations = self.encoder(ids)
        wanted = log_durations.exp() / speed * (ids != _PAD)
        if frames is not None:
            if len(ids) != 1:
                raise ValueError(f"so many frames are asked of one text, got {len(ids)}")
            if frames < int((ids != _PAD).sum()):
                raise ValueError(f"{frames} frames are too few for {int((ids != _PAD).sum())} symbols")
            wanted = wanted * frames / wanted.sum()
        lasts = whole(wanted, ids != _PAD, frames)
        return expand(mean, lasts), lasts


def lasting(x_0: Tensor) -> Tensor:
    """How many frames stand before the padding of mels (B, M, T), whose columns are 0: (B,)."""
    at = torch.arange(1, x_0.shape[2] + 1, device=x_0.device)
    return ((x_0 != 0).any(1) * at).amax(1)


def whole(wanted: Tensor, there: Tensor, total: int | None = None) -> Tensor:
    """Durations as whole numbers, int64 (B, L), at least 1 where a symbol is there.

    The ends of symbols are rounded, not their durations, whose errors would add up.

    Args:
        wanted: (B, L), at least 0.
        total: the sum of each row; without it, what it rounds to, or one for each symbol where that is more.
    """
    found = []
    for row, real in zip(wanted.double().clamp_min(0).where(there, 0.0), there, strict=True):
        ends = row.cumsum(0).round().long()
        least, symbols = real.long().cumsum(0), int(real.sum())
        last = max(int(ends[-1]), symbols) if total is None else total
        ends = torch.maximum(ends - least, torch.zeros_like(ends)).cummax(0).values + least
        after = symbols - least  # that are still to come, each with a frame of its own
        ends = torch.minimum(ends, last - after)
        ends = torch.where(real & (after == 0), torch.full_like(ends, last), ends).cummax(0).values
        found.append(ends.diff(prepend=ends.new_zeros(1)) * real)
    return torch.stack(found)


@dataclass(frozen=True)
class TextToSpeech(Objective):
    r"""The loss of an :class:`Acoustic` model: of the means, of the durations, and of the denoiser.

    .. math::
        \frac1{2 M T} \sum_t \|m_t - \mu_{a(t)}\|^2 + \frac1L \sum_l (\log d_l - \log \hat d_l)^2
        + w(t) \|x_0 - \hat x_0\|^2

    for each text, with the best alignment a, and d its durations; the denoiser sees a window of ``frames`` of the
    recording laid end to end with itself.

    Args:
        weighting, times: of the denoiser's error: see :class:`~kuosan.objectives.Weighted`.
        frames: of a window; of a run, that of its data.
    """

    weighting: Weighting = _OF_FLOW
    times: TimeSampler = _EVENLY
    frames: int = 96

    def __post_init__(self):
        if self.frames < 1:
            raise ValueError(f"a window has at least 1 frame, got {self.frames}")

    def noise_shape(self, model: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[0], self.frames + 1  # the last column says where the window begins

    def __call__(self, model, x_0, condition=None, *, t=None, noise=None, generator=None, step=None):
        if condition is None:
            raise ValueError("text to speech needs the texts")
        if noise is None:
            empty = x_0.new_zeros(len(x_0), *self.noise_shape(model, tuple(x_0.shape[1:])))
            noise = draw(self.times, model.process, empty, t, None, generator)[1]  # t, with its weight, is drawn below
        mean, log_durations = model.encoder(condition)
        n, there = lasting(x_0), condition != _PAD
        x_0 = x_0[..., : int(n.max())]
        lasts = model.align(mean, x_0, condition)
        mu = expand(mean, lasts)
        within = torch.arange(x_0.shape[2], device=x_0.device) < n[:, None]
        of_means = 0.5 * ((x_0 - mu).square().mean(1) * within).sum(1) / n
        error = (log_durations - lasts.clamp_min(1).log()).square() * there
        of_durations = error.sum(1) / there.sum(1)
        uniform = 0.5 * (1 + torch.erf(noise[:, 0, -1] / math.sqrt(2)))
        begin = (uniform * n).long().clamp_max(n - 1)
        index = (begin[:, None] + torch.arange(self.frames, device=x_0.device)) % n[:, None]
        index = index[:, None].expand(-1, x_0.shape[1], -1)
        denoise = Weighted(self.weighting, self.times)
        told, seen = mu.gather(2, index), x_0.gather(2, index)
        return of_means + of_durations + denoise(model, seen, told, t=t, noise=noise[..., :-1], generator=generator)
