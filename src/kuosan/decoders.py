"""Decoders of discrete data: laws over L even levels of [-1, 1] that sample and score themselves as a Gaussian does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.special import log_ndtr, ndtr, ndtri

from kuosan.categorical import Categorical, pick
from kuosan.gaussian import Gaussian


def level_of(x: Tensor, levels: int) -> Tensor:
    """The index, 0 to L - 1, of values on the L even levels of [-1, 1].

    Raises:
        ValueError: a value that is not one of them.
    """
    index = (x + 1) * (levels - 1) / 2
    if not bool(((index - index.round()).abs() < 0.01).all()) or x.abs().max() > 1 + 1e-6:
        raise ValueError(f"discrete data must lie on the {levels} even levels of [-1, 1]; this does not")
    return index.round().long()


def discretised_gaussian_log_prob(x: Tensor, mean: Tensor, variance: Tensor, levels: int) -> Tensor:
    r"""log-probability of a level under a Gaussian cut into bins, in nats for each coordinate.

    .. math:: \log\left[\Phi\!\left(\tfrac{x+h-\mu}{\sigma}\right) - \Phi\!\left(\tfrac{x-h-\mu}{\sigma}\right)\right],
        \qquad h = \tfrac1{L-1}

    The first bin begins at minus infinity and the last ends at infinity, so that the levels' probabilities sum to 1
    (Ho et al. 2020, arXiv 2006.11239, eq. 13). In log space: 30 standard deviations away it is still finite.

    Args:
        x: values on the levels of [-1, 1].
        mean, variance: broadcastable with x.
        levels: L, at least 2.

    Raises:
        ValueError: a value of x that is not one of the levels.
    """
    level_of(x, levels)  # says what is wrong with data off the levels
    half = 1 / (levels - 1)
    std = variance.sqrt()
    low, high = (x - half - mean) / std, (x + half - mean) / std
    # an open end is 40 standard deviations and more beyond the other border and the mean: nothing is left beyond it
    low = torch.where(x <= -1 + half, -1.5 * high.abs() - 40, low)
    high = torch.where(x >= 1 - half, 1.5 * low.abs() + 40, high)
    # (low, high) has the probability of (-high, -low): take the one in the lower tail, where log_ndtr is exact
    flip = low + high > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    below, above = log_ndtr(low), log_ndtr(high)
    return above + torch.log(-torch.expm1(below - above))


@dataclass(frozen=True)
class DiscretisedGaussian:
    """A Gaussian cut into the bins of L levels: :func:`discretised_gaussian_log_prob`.

    Args:
        mean, variance: of the Gaussian, for each coordinate.
        levels: L, at least 2.
    """

    mean: Tensor
    variance: Tensor
    levels: int

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The level in whose bin a draw of the Gaussian falls; no gradient passes."""
        steps = self.levels - 1
        return (
            (Gaussian(self.mean, self.variance).sample(noise, generator).clamp(-1, 1) + 1) * (steps / 2)
        ).round() * (2 / steps) - 1

    def log_prob(self, x: Tensor) -> Tensor:
        """log-probability of the levels x, for each coordinate, nats."""
        return discretised_gaussian_log_prob(x, self.mean, self.variance, self.levels)


@dataclass(frozen=True)
class DiscretisedMixture:
    """K Gaussians cut into bins and weighed (of logistics: Salimans et al. 2017, arXiv 1701.05517, eq. 2).

    Where levels are many, 3 K numbers for each coordinate say nearly what a law over all of them can.

    Args:
        log_weights: (..., K), normalised over the last dimension.
        components: with means and variances of that shape.
    """

    log_weights: Tensor
    components: DiscretisedGaussian

    @property
    def mean(self) -> Tensor:
        """That of the Gaussians before they are cut, each kept within [-1, 1]."""
        return (self.log_weights.exp() * self.components.mean.clamp(-1, 1)).sum(-1)

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The component at which the cumulative weights pass u = Phi(noise), and a level of it; no gradient passes.

        How far u went into the component's share is uniform again, and picks the level.

        Args:
            noise: standard-normal values of the data's shape; drawn from ``generator`` when not given.
        """
        weights = self.log_weights.detach().double().softmax(-1)
        u = ndtr(_standard_normal(noise, weights[..., 0], generator).double())
        chosen, inside = pick(weights, u)
        of = self.components
        chosen, inside = chosen.unsqueeze(-1), inside.unsqueeze(-1).clamp(1e-12, 1 - 1e-12)
        mean, variance = (part.detach().gather(-1, chosen) for part in (of.mean, of.variance))
        return DiscretisedGaussian(mean, variance, of.levels).sample(ndtri(inside).to(mean)).squeeze(-1)

    def log_prob(self, x: Tensor) -> Tensor:
        """log-probability of the levels x, for each coordinate, nats."""
        return torch.logsumexp(self.log_weights + self.components.log_prob(x.unsqueeze(-1)), -1)


@dataclass(frozen=True)
class Levels:
    """Any law over the levels, each coordinate by itself.

    Args:
        log_probs: (..., L), normalised over the last dimension.
        values: the L levels.
    """

    log_probs: Tensor
    values: Tensor

    @property
    def mean(self) -> Tensor:
        return (self.log_probs.exp() * self.values).sum(-1)

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The level at which the cumulative chances pass Phi(noise); no gradient passes.

        Args:
            noise: standard-normal values of the data's shape; drawn from ``generator`` when not given.
        """
        return self.values[Categorical(self.log_probs).sample(noise, generator)]

    def log_prob(self, x: Tensor) -> Tensor:
        """log-probability of the levels x, for each coordinate, nats.

        Raises:
            ValueError: a value of x that is not one of the levels.
        """
        return Categorical(self.log_probs).log_prob(level_of(x, len(self.values)))


def _standard_normal(noise: Tensor | None, like: Tensor, generator: torch.Generator | None) -> Tensor:
    if noise is not None:
        return noise
    where = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=where).to(like.device)
