"""What a model of tokens is trained on: its bound."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kuosan.objectives import SPREAD, Objective, TimeSampler, draw


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
        noise = noise[:, : x_0.shape[1]]  # a batch of short texts may come without padding that all of them have
        return model.loss(x_0, condition, u=u, noise=noise, earliest=self.earliest)
