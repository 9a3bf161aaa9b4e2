"""What a denoiser of tokens is trained on: its continuous bound."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kuosan.discrete.chain import CategoricalChain
from kuosan.objectives import SPREAD, Objective, TimeSampler, draw


@dataclass(frozen=True)
class TokenBound(Objective):
    r"""Minus the continuous bound from time 0 to 1, of one time for each example, nats per token.

    Of masks: :math:`-\frac1t \sum_{\text{masked}} \log p(x_0|x_t)`, divided by the length (Sahoo et al. 2024,
    arXiv 2406.07524, eq. 10). Times are spread evenly over the batch.

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
        model: CategoricalChain,
        x_0: Tensor,
        condition: object = None,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        step: int | None = None,
    ) -> Tensor:
        u, noise, _ = draw(self.times, model.guide.process, x_0, t, noise, generator)
        ends = torch.tensor([self.earliest, 1.0], dtype=torch.float64)
        return model.integral(ends[0], ends[1], u.double().cpu(), x_0, condition, noise) / x_0[0].numel()
