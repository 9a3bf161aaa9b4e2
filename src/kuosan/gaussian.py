"""Gaussian algebra: the one distribution that every rung of the ladder is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def per_example(x: Tensor) -> Tensor:
    """The sum over all dimensions but the first: nats per coordinate into nats per example."""
    return x.flatten(1).sum(1)


@dataclass(frozen=True)
class Gaussian:
    r"""A Gaussian with independent coordinates, :math:`\mathcal N(\text{mean}, \text{variance})`.

    Both fields are tensors that broadcast together; every answer is *per coordinate*, so that summing over the
    coordinates of an example gives nats per example. A variance of 0 is a point: it can be sampled and moved, and
    its KL to a proper Gaussian is infinite.

    Args:
        mean: any shape.
        variance: sigma squared, never negative; a shape that broadcasts with ``mean``.

    Raises:
        ValueError: the shapes do not broadcast.
    """

    mean: Tensor
    variance: Tensor

    def __post_init__(self):
        try:
            torch.broadcast_shapes(self.mean.shape, self.variance.shape)
        except RuntimeError:
            raise ValueError(
                f"mean {tuple(self.mean.shape)} and variance {tuple(self.variance.shape)} do not broadcast together"
            ) from None

    @property
    def shape(self) -> torch.Size:
        return torch.broadcast_shapes(self.mean.shape, self.variance.shape)

    @property
    def std(self) -> Tensor:
        return self.variance.sqrt()

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Reparameterised draw ``mean + std * noise``: gradients reach mean and variance.

        Args:
            noise: standard-normal values of this Gaussian's shape; drawn from ``generator`` when not given.
        """
        if noise is None:
            where = self.mean.device if generator is None else generator.device
            noise = torch.randn(self.shape, generator=generator, dtype=self.mean.dtype, device=where).to(
                self.mean.device
            )
        return self.mean + self.std * noise

    def log_prob(self, x: Tensor) -> Tensor:
        r""":math:`-\tfrac12 [\log 2\pi\sigma^2 + (x-\mu)^2/\sigma^2]` for each coordinate, nats."""
        return -0.5 * (math.log(2 * math.pi) + self.variance.log() + (x - self.mean) ** 2 / self.variance)

    def entropy(self) -> Tensor:
        r""":math:`\tfrac12 \log 2\pi e \sigma^2` for each coordinate, nats."""
        return (0.5 * (math.log(2 * math.pi) + 1 + self.variance.log())).expand(self.shape)

    def kl(self, other: Gaussian) -> Tensor:
        r""":math:`\log\frac{\sigma_2}{\sigma_1} + \frac{\sigma_1^2 + (\mu_1-\mu_2)^2}{2\sigma_2^2} - \frac12`, nats.

        Written as :math:`\tfrac12[r - 1 - \log r + (\mu_1-\mu_2)^2/\sigma_2^2]` with :math:`r = \sigma_1^2/\sigma_2^2`,
        which loses nothing when the two variances are nearly equal. The numerator's variance is that of the *first*
        Gaussian (docs/theory, erratum 2).
        """
        excess = (self.variance - other.variance) / other.variance  # r - 1
        # log r: near 1 by log1p; far below it as a difference of logs, where r - 1 has rounded r away
        far = self.variance.log() - other.variance.log()
        log_ratio = torch.where(excess > -0.5, torch.log1p(excess.clamp_min(-0.5)), far)
        return 0.5 * (excess - log_ratio + (self.mean - other.mean) ** 2 / other.variance)

    def cross_entropy(self, other: Gaussian) -> Tensor:
        r""":math:`-\mathbb E_{x\sim\text{self}}\log\text{other}(x)
        = \tfrac12 [\log 2\pi\sigma_2^2 + (\sigma_1^2 + (\mu_1-\mu_2)^2)/\sigma_2^2]` for each coordinate, nats."""
        spread = (self.variance + (self.mean - other.mean) ** 2) / other.variance
        return 0.5 * (math.log(2 * math.pi) + other.variance.log() + spread)

    def affine(self, scale: Tensor | float, shift: Tensor | float = 0.0, variance: Tensor | float = 0.0) -> Gaussian:
        """The law of ``scale * x + shift + noise`` where x has this law and the noise has the given variance."""
        return replace(self, mean=scale * self.mean + shift, variance=scale**2 * self.variance + variance)

    def __add__(self, other: Gaussian) -> Gaussian:
        """The law of the sum of two independent Gaussians."""
        return replace(self, mean=self.mean + other.mean, variance=self.variance + other.variance)

    def __mul__(self, other: Gaussian) -> Gaussian:
        """The normalised product of two densities: precisions add (completing the square)."""
        total = self.variance + other.variance
        mean = (self.mean * other.variance + other.mean * self.variance) / total
        return replace(self, mean=mean, variance=self.variance * other.variance / total)

    def given(self, y: Tensor, scale: Tensor | float, variance: Tensor | float) -> Gaussian:
        r"""Bayes' rule: the law of x after seeing :math:`y = \text{scale}\cdot x + \text{noise}`.

        Args:
            y: the observation.
            scale: the factor that x was multiplied by.
            variance: the variance of the noise on y.
        """
        total = scale**2 * self.variance + variance
        gain = scale * self.variance / total
        return replace(self, mean=self.mean + gain * (y - scale * self.mean), variance=self.variance * variance / total)
