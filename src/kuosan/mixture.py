"""A Gaussian mixture as data: its density, score, E[x0|x_t] and Cov[x0|x_t] are exact at every time of any process."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kuosan.denoiser import Denoiser
from kuosan.process import Process
from kuosan.schedules import Time, float64


class Mixture:
    r"""Data with the density :math:`p(x) = \sum_k w_k\,\mathcal N(x; \mu_k, \Sigma_k)`: the truth to check against.

    Under a process, x_t is the mixture of :math:`\mathcal N(\alpha_t\mu_k, \alpha_t^2\Sigma_k + \sigma_t^2 I)`, so
    nothing is approximated. Float64 throughout. Points have shape (..., d).

    Args:
        weights: (K,), positive; normalised.
        means: (K, d).
        covariances: (K, d, d); or (K, d), the diagonals; or (K,), the same variance in every direction.

    Raises:
        ValueError: shapes that do not fit, weights not positive, a covariance not symmetric positive definite.
    """

    def __init__(
        self,
        weights: Sequence[float] | Tensor,
        means: Sequence[Sequence[float]] | Tensor,
        covariances: Sequence[object] | Tensor,
    ):
        w, mu, cov = float64(weights), float64(means), float64(covariances)
        if w.ndim != 1 or mu.ndim != 2 or len(mu) != len(w):
            raise ValueError(f"weights (K,) and means (K, d) expected, got {tuple(w.shape)} and {tuple(mu.shape)}")
        if not bool((w > 0).all()):
            raise ValueError("every weight of a mixture must be positive")
        k, d = mu.shape
        if cov.shape == (k,):
            cov = cov[:, None].expand(k, d)
        if cov.shape == (k, d):
            cov = torch.diag_embed(cov)
        if cov.shape != (k, d, d) or not torch.allclose(cov, cov.mT):
            raise ValueError(f"covariances must be (K, d, d) and symmetric, (K, d) or (K,); got {tuple(cov.shape)}")
        self.weights, self.means, self.covariances = w / w.sum(), mu, cov
        self._values, self._axes = torch.linalg.eigh(cov)  # Sigma_k = axes diag(values) axes^T
        if not bool((self._values > 0).all()):
            raise ValueError("every covariance of a mixture must be positive definite")

    @property
    def dimension(self) -> int:
        return self.means.shape[1]

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n points, (n, d), float64."""
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.dimension, dtype=torch.float64, generator=generator) * self._values[which].sqrt()
        return self.means[which] + torch.einsum("nij,nj->ni", self._axes[which], z)

    def mean(self) -> Tensor:
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        centred = self.means - self.mean()
        return torch.einsum("k,kij->ij", self.weights, self.covariances) + (centred.mT * self.weights) @ centred

    def _components(self, x_t: Tensor, process: Process | None, t: Time):
        """For each component: log-weight + log-density at x_t, gap in its own axes, their variances; and alpha."""
        alpha, sigma = process.scales(t) if process is not None else (float64(1.0), float64(0.0))
        # t of shape () or (B,) meets x of shape (..., d): per component (..., K, d)
        alpha, sigma = (c.reshape(-1, *(1,) * x_t.ndim) if c.ndim else c for c in (alpha, sigma))
        x_t = x_t.double()
        gap = torch.einsum("kij,...ki->...kj", self._axes, x_t.unsqueeze(-2) - alpha * self.means)
        variance = alpha**2 * self._values + sigma**2
        log_density = -0.5 * (gap**2 / variance + variance.log() + math.log(2 * math.pi)).sum(-1)
        return log_density + self.weights.log(), gap, variance, alpha, sigma

    def log_prob(self, x: Tensor, process: Process | None = None, t: Time = 0.0) -> Tensor:
        """log p(x), or log q_t(x) under a process at time t; nats, of shape (...)."""
        return torch.logsumexp(self._components(x, process, t)[0], dim=-1)

    def score(self, x_t: Tensor, process: Process | None = None, t: Time = 0.0) -> Tensor:
        """The gradient of :meth:`log_prob`, (..., d)."""
        log_joint, gap, variance, _, _ = self._components(x_t, process, t)
        pulls = -torch.einsum("kij,...kj->...ki", self._axes, gap / variance)
        return (torch.softmax(log_joint, -1).unsqueeze(-1) * pulls).sum(-2)

    def _posteriors(self, x_t: Tensor, process: Process, t: Time) -> tuple[Tensor, Tensor, Tensor]:
        """Responsibilities (..., K), means (..., K, d) and variances along each component's axes (..., K, d)."""
        log_joint, gap, variance, alpha, sigma = self._components(x_t, process, t)
        pull = torch.einsum("kij,...kj->...ki", self._axes, alpha * self._values / variance * gap)
        return torch.softmax(log_joint, -1), self.means + pull, self._values * sigma**2 / variance

    def posterior_mean(self, x_t: Tensor, process: Process, t: Time) -> Tensor:
        """E[x_0 | x_t], (..., d): what a perfect denoiser says."""
        share, means, _ = self._posteriors(x_t, process, t)
        return (share.unsqueeze(-1) * means).sum(-2)

    def posterior_covariance(self, x_t: Tensor, process: Process, t: Time) -> Tensor:
        """Cov[x_0 | x_t], (..., d, d)."""
        share, means, variances = self._posteriors(x_t, process, t)
        mean = (share.unsqueeze(-1) * means).sum(-2)
        within = torch.einsum("kij,...kj,klj->...kil", self._axes, variances, self._axes)
        centred = means - mean.unsqueeze(-2)
        total = within + centred.unsqueeze(-1) * centred.unsqueeze(-2)
        return (share[..., None, None] * total).sum(-3)

    def denoiser(self, process: Process) -> Denoiser:
        """The perfect denoiser of this data under a process; x has shape (B, d)."""
        return Denoiser(_PosteriorMean(self, process), process, predicts="x0")

    def energy_denoiser(self, process: Process) -> Denoiser:
        """The same as an energy, E = -log q_t: ``denoiser.energy`` is exact, with its constant."""
        return Denoiser(_Energy(self, process), process, predicts="energy")


class _PosteriorMean(nn.Module):
    def __init__(self, mixture: Mixture, process: Process):
        super().__init__()
        self.mixture, self.process = mixture, process

    def forward(self, x_t: Tensor, t: Tensor, condition: object = None) -> Tensor:
        return self.mixture.posterior_mean(x_t, self.process, t).to(x_t.dtype)


class _Energy(_PosteriorMean):
    def forward(self, x_t: Tensor, t: Tensor, condition: object = None) -> Tensor:
        return -self.mixture.log_prob(x_t, self.process, t)
