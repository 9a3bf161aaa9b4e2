"""Guidance: a wrapper around a denoiser that any solver accepts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kuosan.denoiser import Denoiser
from kuosan.prediction import Prediction
from kuosan.process import Process
from kuosan.schedules import Time


class ClassifierFree(nn.Module):
    r"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598, eq. 6), in x0 and so in every linear form.

    .. math:: \hat x_0 = \hat x_0(c) + w\,[\hat x_0(c) - \hat x_0(\varnothing)]

    w = 0 is the conditional model itself. (Many programs count from 1: their scale is 1 + w.) Both answers come from
    one evaluation of a doubled batch.

    Args:
        denoiser: a conditional denoiser that was trained with its condition dropped now and then.
        weight: w, at least -1.

    Raises:
        ValueError: a weight under -1 or not finite; sampling without a condition.
    """

    def __init__(self, denoiser: Denoiser, weight: float = 1.0):
        super().__init__()
        if not -1 <= weight < float("inf"):
            raise ValueError(f"a guidance weight is at least -1 (0: no guidance), got {weight}")
        self.denoiser, self.weight = denoiser, weight

    @property
    def process(self) -> Process:
        return self.denoiser.process

    def forward(self, x_t: Tensor, t: Time, condition: object = None) -> Prediction:
        if not isinstance(condition, Tensor):
            raise ValueError("guidance needs a condition for each sample: this model, or this call, has none")
        if self.weight == 0:
            return self.denoiser(x_t, t, condition)
        both = self.denoiser(
            torch.cat([x_t, x_t]),
            torch.cat([t, t]) if isinstance(t, Tensor) and t.ndim else t,
            torch.cat([condition, torch.full_like(condition, -1)]),  # -1 is "no class" to every network here
        )
        given, free = both.x0.chunk(2)
        own = both.variance_fraction  # of the conditional half: guidance moves the mean only
        fraction = None if own is None else own.chunk(2)[0]
        return Prediction(self.process, t, x_t, "x0", given + self.weight * (given - free), fraction)
