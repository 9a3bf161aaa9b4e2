"""What a bound or a likelihood says of a batch: nats for each example, bits per dimension, and how sure both are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BitsPerDim:
    """The negative bound in bits per dimension, averaged over examples, term by term."""

    total: float
    standard_error: float
    monte_carlo_error: float
    reconstruction: float
    prior: float
    matching: float


def error_of_mean(values: Tensor) -> Tensor:
    """The standard error of the mean over the first dimension; NaN of a single value, whose spread is unknown."""
    if len(values) < 2:
        return torch.full_like(values[0], math.nan)
    return values.std(0) / math.sqrt(len(values))


@dataclass(frozen=True)
class Bound:
    """An estimate of a lower bound on log p(x), for each of B examples, in nats.

    Args:
        reconstruction: E log p(x | z_1, ...), (B,).
        prior: what the last rung takes from it, (B,): KL(q(z_T|.) || p(z_T)).
        matching: (T-1, B). Row i - 1 is what rung i takes from it: E KL(q(z_i|z_{i+1},x) || p(z_i|z_{i+1})), or its
            share in another form of the bound. Drawn terms are unbiased, and zero where nothing was drawn.
        times: the places of the T rungs, increasing: of a diffusion model, its noisy times.
        dimensions: coordinates of one example.
        draws: how many times the estimate was repeated.
        evaluations: of the model's kernels, for each example.
        discrete: whether the data is discrete (a log-probability) or continuous (a log-density).
        replicates: (R, B): ``total`` estimated R times, each with a share of the draws.
        shares: (R,): the draws in each.
    """

    reconstruction: Tensor
    prior: Tensor
    matching: Tensor
    times: Tensor
    dimensions: int
    draws: int
    evaluations: float
    discrete: bool
    replicates: Tensor
    shares: Tensor

    def _noise(self, replicates: Tensor) -> Tensor:
        """The standard error of the mean of replicates (R, ...), whose variances are inverse to their shares."""
        if len(replicates) < 2:
            return torch.full_like(replicates[0], math.nan)
        shares = self.shares.double().reshape(-1, *(1,) * (replicates.ndim - 1))
        mean = (shares * replicates).sum(0) / self.draws
        variance = (shares * (replicates - mean) ** 2).sum(0) / (len(replicates) - 1)  # of a single draw
        return (variance / self.draws).sqrt()

    @property
    def total(self) -> Tensor:
        """reconstruction - prior - sum of matching, (B,), nats: the bound on log p(x)."""
        return self.reconstruction - self.prior - self.matching.sum(0)

    @property
    def nats(self) -> Tensor:
        """``total``."""
        return self.total

    @property
    def standard_error(self) -> float:
        """Of the mean of ``total``, if the examples are a sample: their spread and the draws' noise together, nats.

        NaN for a single example, whose spread is unknown.
        """
        return float(error_of_mean(self.total))

    @property
    def monte_carlo_error(self) -> float:
        """Of the mean of ``total`` over just these examples: the draws' noise alone, nats; NaN of a single draw."""
        return float(self._noise(self.replicates.mean(1)))

    @property
    def example_error(self) -> Tensor:
        """The draws' noise in the total of each example, (B,), nats; NaN of a single draw."""
        return self._noise(self.replicates)

    def bits_per_dim(self) -> BitsPerDim:
        unit = math.log(2) * self.dimensions
        return BitsPerDim(
            total=float(-self.total.mean() / unit),
            standard_error=self.standard_error / unit,
            monte_carlo_error=self.monte_carlo_error / unit,
            reconstruction=float(-self.reconstruction.mean() / unit),
            prior=float(self.prior.mean() / unit),
            matching=float(self.matching.sum(0).mean() / unit),
        )


@dataclass(frozen=True)
class Likelihood:
    """An estimate of log p(x), or of a tighter bound on it, for each of B examples, in nats.

    Args:
        log_prob: (B,).
        example_error: (B,), the noise of each estimate; 0 where nothing was drawn, NaN where it is unknown.
        dimensions: coordinates of one example.
        evaluations: of the network, for each example.
        quantity: what it is, in words.
    """

    log_prob: Tensor
    example_error: Tensor
    dimensions: int
    evaluations: float
    quantity: str

    @property
    def nats(self) -> Tensor:
        """``log_prob``."""
        return self.log_prob

    @property
    def bits_per_dim(self) -> float:
        return float(-self.log_prob.mean()) / (math.log(2) * self.dimensions)

    @property
    def standard_error(self) -> float:
        """Of ``bits_per_dim``, if the examples are a sample; NaN for a single one."""
        return float(error_of_mean(self.log_prob)) / (math.log(2) * self.dimensions)

    @property
    def monte_carlo_error(self) -> float:
        """Of ``bits_per_dim`` over just these examples: the noise of the estimates alone."""
        of_mean = float((self.example_error**2).sum().sqrt()) / len(self.log_prob)
        return of_mean / (math.log(2) * self.dimensions)


class Tally:
    """Adds up terms of T + 1 rungs and B examples as they are evaluated.

    Args:
        rungs: T + 1.
        examples: B.
        shares: (R,), the draws in each replicate.
    """

    def __init__(self, rungs: int, examples: int, shares: Tensor):
        self.terms = torch.zeros(rungs, examples, dtype=torch.float64)
        self.replicates = torch.zeros(len(shares), examples, dtype=torch.float64)
        self.shares, self.draws = shares, int(shares.sum())

    def add(self, rung: Tensor, example: Tensor, replicate: Tensor, value: Tensor) -> None:
        """value (m,): what each visit takes from the bound of its example, times its weight."""
        value = value.detach().double().cpu()
        self.terms.view(-1).index_add_(0, rung * self.terms.shape[1] + example, value / self.draws)
        own = value / self.shares[replicate]
        self.replicates.view(-1).index_add_(0, replicate * self.replicates.shape[1] + example, -own)

    def bound(self, times: Tensor, dimensions: int, evaluations: float, discrete: bool) -> Bound:
        rungs = self.terms
        rest = (times, dimensions, self.draws, evaluations, discrete, self.replicates, self.shares)
        return Bound(-rungs[0], rungs[-1], rungs[1:-1], *rest)
