"""What models of texts are trained on: of tokens their bound, of words as points CDCD's loss or Diffusion-LM's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kuosan.discrete.embedding import EmbeddingDenoiser, noised
from kuosan.discrete.lengths import Padded, padded
from kuosan.objectives import SPREAD, Objective, Stratified, TimeSampler, draw
from kuosan.process import expand


class TokenLadder(Protocol):
    """A ladder of tokens that says what it is trained on."""

    def loss(
        self, x: Tensor, condition: Any = None, *, u: Tensor, noise: Tensor | None = None, earliest: float
    ) -> Tensor: ...


@dataclass(frozen=True)
class TokenBound(Objective):
    r"""Minus the bound, nats for each text: the model's own ``loss``, of one time for each.

    Of masks: :math:`-\frac1t \sum_{\text{masked}} \log p(x_0|x_t)` (Sahoo et al. 2024, arXiv 2406.07524, eq. 10), and
    -log p(n) of the length n. Times are spread evenly over the batch.

    Args:
        earliest: no time is under it: there the rates, and with them the noise of the estimate, have no bound.
    """

    earliest: float = 1e-3
    times: TimeSampler = field(default=SPREAD, init=False)

    def __post_init__(self):
        if not 0 < self.earliest < 1:
            raise ValueError(f"earliest must lie in (0, 1), got {self.earliest}")

    def __call__(
        self,
        model: TokenLadder,
        x_0: Tensor,
        condition: object = None,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        step: int | None = None,
    ) -> Tensor:
        u, noise, _ = draw(self.times, None, x_0, t, noise, generator)
        return model.loss(x_0, condition, u=u, noise=cut(noise, x_0), earliest=self.earliest)


def cut(noise: Tensor | None, x_0: Tensor) -> Tensor | None:
    """The noise of what there is: a batch of short texts may come without padding that all of them have."""
    return None if noise is None else noise[:, : x_0.shape[1]]


def _of_each_place(denoiser: EmbeddingDenoiser, x_0: Tensor, cost: Tensor, condition: Any) -> Tensor:
    """(B,): what the words (B, n) cost, and their number, divided by the places of the longest text."""
    if denoiser.lengths is None:
        return cost.mean(1)
    log_length = Padded(denoiser.lengths.law(len(x_0), condition), None).log_length(padded(x_0))
    return (cost.sum(1) - log_length.to(cost)) / denoiser.lengths.longest


@dataclass(frozen=True)
class DiffusionLM(Objective):
    r"""Diffusion-LM's loss: the squared error of x0-hat, and the rounding (Li et al. 2022, arXiv 2205.14217, eq. 2).

    .. math:: \tfrac1{LD}\,\mathbb E\,\|e(w) - \hat x_0(x_t, t)\|^2
        - \tfrac1L\,\mathbb E\,\log p\big(w \,\big|\, e(w) + \mathrm{SNR}^{-1/2} z\big) - \tfrac1L \log p(n)

    The model is the :class:`EmbeddingDenoiser` itself, its network and its points. Rounding takes no network: it is
    :meth:`WordEmbedding.law`, and keeps the points apart, which the squared error alone would draw together. The
    paper's term at time 1 is the same for all points of one norm: there is nothing to learn from it.

    Args:
        log_snr: of the noise at which words are told apart: the less, the farther. At 0 the law is the paper's softmax
            of :math:`E^\top x`; its own noise there is smaller, which keeps the points less far apart.
        times: of the squared error.
    """

    log_snr: float = 0.0
    times: TimeSampler = field(default_factory=Stratified)

    def __post_init__(self):
        if not math.isfinite(self.log_snr):
            raise ValueError(f"log_snr is of some noise and some signal: finite, got {self.log_snr}")

    def noise_shape(self, model: EmbeddingDenoiser, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(L, D)."""
        return (*shape, model.embedding.size)

    def __call__(self, denoiser, x_0, condition=None, *, t=None, noise=None, generator=None, step=None):
        embedding, vectors = denoiser.embedding, denoiser.embedding(x_0)
        t, noise, weight = draw(self.times, denoiser.process, vectors, t, cut(noise, x_0), generator)
        prediction = denoiser(noised(denoiser.process, vectors, t, noise), t, condition)
        error = ((prediction.x0 - vectors) ** 2).mean(-1)
        error = error if weight is None else error * expand(weight.to(error), error)
        near = (vectors + math.exp(-0.5 * self.log_snr) * noise).masked_fill(padded(vectors).unsqueeze(-1), 0.0)
        return _of_each_place(
            denoiser, x_0, error - embedding.law(near, math.exp(self.log_snr)).log_prob(x_0), condition
        )


@dataclass(frozen=True)
class WordCrossEntropy(Objective):
    """-log p(w | x_t) and -log p(n) for each place, nats: CDCD's loss (Dieleman et al. 2022, arXiv 2211.15089).

    The model is the :class:`EmbeddingDenoiser` itself, with ``predicts="words"``. The points learn from it too, and
    move apart where that tells words from each other.
    """

    times: TimeSampler = field(default_factory=Stratified)

    def noise_shape(self, model: EmbeddingDenoiser, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(L, D)."""
        return (*shape, model.embedding.size)

    def __call__(self, denoiser, x_0, condition=None, *, t=None, noise=None, generator=None, step=None):
        if denoiser.predicts != "words":
            raise ValueError(f'cross-entropy needs a denoiser with predicts="words", not {denoiser.predicts!r}')
        vectors = denoiser.embedding(x_0)
        t, noise, weight = draw(self.times, denoiser.process, vectors, t, cut(noise, x_0), generator)
        prediction = denoiser(noised(denoiser.process, vectors, t, noise), t, condition)
        surprise = -denoiser.rounding(prediction).log_prob(x_0)
        surprise = surprise if weight is None else surprise * expand(weight.to(surprise), surprise)
        return _of_each_place(denoiser, x_0, surprise, condition)
