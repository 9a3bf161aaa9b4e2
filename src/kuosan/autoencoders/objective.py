"""What autoencoders are trained on: minus the bound, with the two remedies against silence; or of its prior alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kuosan.chain import Chain
from kuosan.denoiser import evaluating
from kuosan.diffusion import DiffusionChain
from kuosan.objectives import SPREAD, Objective, Stratified, TimeSampler, Weighted, Weighting


@dataclass(frozen=True)
class Elbo(Objective):
    r"""Minus one estimate of the bound, nats per dimension: -log p(x|z) + beta sum of max(KL of each layer, free_bits).

    Args:
        warmup: steps over which beta rises from 0 to 1 (Sonderby et al. 2016, arXiv 1602.02282, section 2.3).
        free_bits: nats that each layer may use for nothing, of each example (Kingma et al. 2016, arXiv 1606.04934,
            eq. 15, where it is the mean of a batch: that would depend on who shares it). Where a KL has no closed form
            it is one draw of it that is held above this.
        beta: what the KL weighs after that: 1 is the bound; less, and codes say more of the image than is worth their
            nats (Higgins et al. 2017; 1e-6 in Rombach et al. 2022, arXiv 2112.10752, section 3.1).
    """

    warmup: int = 0
    free_bits: float = 0.0
    beta: float = 1.0
    times: TimeSampler = field(default=SPREAD, init=False)

    def __post_init__(self):
        if self.warmup < 0 or not self.free_bits >= 0:
            raise ValueError(f"warmup and free_bits are never negative, got {self.warmup} and {self.free_bits}")
        if not self.beta > 0:
            raise ValueError(f"beta is what the KL weighs and must be positive, got {self.beta}")

    def noise_shape(self, model: Chain, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the standard-normal numbers that one example takes: those of z_1, ..., z_T, and of a prior over z_T."""
        sizes = [math.prod(one) for one in model.model.shapes[1:]]
        return (sum(sizes) + (sizes[-1] if isinstance(model.model.prior(), DiffusionChain) else 0),)

    def __call__(
        self,
        model: Chain,
        x_0: Tensor,
        condition: object = None,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        step: int | None = None,
    ) -> Tensor:
        if noise is None:
            noise = torch.randn(len(x_0), *self.noise_shape(model, ()), generator=generator).to(x_0)
        shapes, prior, log_prior = model.model.shapes[1:], model.model.prior(), None
        if isinstance(prior, DiffusionChain):
            *parts, of_prior = _split(noise, (*shapes, shapes[-1]))
            log_prior = partial(prior.estimate, noise=of_prior, u=t)
        else:
            parts = _split(noise, shapes)
        decoding, *divergences = model.costs(model.path(x_0, condition, noise=parts), log_prior=log_prior)
        beta = self.beta * (1.0 if step is None or not self.warmup else min(1.0, (step + 1) / self.warmup))
        if self.free_bits:
            divergences = [one.clamp_min(self.free_bits) for one in divergences]
        return (decoding + beta * sum(divergences)) / x_0[0].numel()


_EVENLY = Stratified()


@dataclass(frozen=True)
class Latent(Objective):
    """The denoiser's error on codes of an autoencoder that stays as it is: latent diffusion's second stage.

    Args:
        weighting, times: of :class:`~kuosan.objectives.Weighted`.
    """

    weighting: Weighting
    times: TimeSampler = _EVENLY

    def noise_shape(self, model: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of one example: of the draw of its code, and of the denoiser's."""
        return (2 * model.code[0], *model.code[1:])

    def __call__(self, model, x_0, condition=None, *, t=None, noise=None, generator=None, step=None):
        if noise is None:
            noise = torch.randn(len(x_0), *self.noise_shape(model, ()), generator=generator).to(x_0)
        of_code, of_denoiser = noise.chunk(2, dim=1)
        with torch.no_grad(), evaluating(model.guide):
            code = model.encode(x_0).sample(of_code)
        denoise = Weighted(self.weighting, self.times)
        return denoise(model.denoiser, code, condition, t=t, noise=of_denoiser, generator=generator)


def _split(noise: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    parts = noise.split([math.prod(shape) for shape in shapes], dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]
