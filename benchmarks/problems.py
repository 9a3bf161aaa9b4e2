"""The problems of the comparisons: Gaussian mixtures, whose denoiser and probability-flow ODE are known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import kuosan as ks

SIGMA_MAX = 80.0
Denoise = Callable[[Tensor, float], Tensor]


class ByNoise:
    """The variance-exploding process whose time is its noise level: x_sigma = x_0 + sigma z."""

    @staticmethod
    def scales(sigma: float | Tensor) -> tuple[Tensor, Tensor]:
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        return torch.ones_like(sigma), sigma


def ring() -> ks.Mixture:
    """8 Gaussians of standard deviation .15 on a circle of radius 1.4."""
    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    return ks.Mixture([1.0] * 8, 1.4 * torch.stack([angle.cos(), angle.sin()], 1), [0.15**2] * 8)


def drawn(d: int, components: int, low: float, high: float, seed: int, even: bool = False) -> ks.Mixture:
    """A mixture at random: means N(0, I), axes at random, standard deviations along them log-uniform in [low, high].

    Args:
        even: all weights the same; otherwise they are in the ratio of exp(N(0, 1)).
    """
    g = torch.Generator().manual_seed(seed)
    means = torch.randn(components, d, generator=g, dtype=torch.float64)
    share = torch.randn(components, generator=g, dtype=torch.float64)
    position = torch.rand(components, d, generator=g, dtype=torch.float64)
    std = low * (high / low) ** position
    axes = torch.linalg.qr(torch.randn(components, d, d, generator=g, dtype=torch.float64)).Q
    covariances = torch.einsum("kij,kj,klj->kil", axes, std**2, axes)
    weights = torch.ones_like(share) if even else share.exp()
    return ks.Mixture(weights, means, 0.5 * (covariances + covariances.mT))


PROBLEMS: dict[str, Callable[[], ks.Mixture]] = {
    "ring-2d": ring,
    "gmm-16d": lambda: drawn(16, 6, 0.1, 0.6, seed=16, even=True),
    "drawn-2d": lambda: drawn(2, 5, 0.05, 0.5, seed=2),
    "drawn-8d": lambda: drawn(8, 10, 0.1, 0.8, seed=8),
    "drawn-64d": lambda: drawn(64, 3, 0.2, 1.0, seed=64),
}


def denoiser(mixture: ks.Mixture) -> Denoise:
    """(x, sigma) -> E[x_0 | x_0 + sigma z = x], exact."""
    return lambda x, sigma: mixture.posterior_mean(x, ByNoise(), sigma)


def start_and_end(
    mixture: ks.Mixture, n: int, seed: int = 0, tolerance: float = 1e-10, method: str = "DOP853"
) -> tuple[Tensor, Tensor]:
    r"""n points of N(0, 80^2 I) and where the probability-flow ODE takes them at sigma = 0, (n, d) float64.

    Solved by scipy as one system, in variables in which the path is nearly straight,

    .. math::
        u = \frac{\sigma}{1 + \sigma}, \qquad y = \frac{x}{1 + \sigma}, \qquad
        \frac{\mathrm dy}{\mathrm du} = \hat\varepsilon - \hat x_0, \qquad
        \hat\varepsilon = -\sigma\,\nabla\log p_\sigma(x), \quad \hat x_0 = x - \sigma\hat\varepsilon .
    """
    z = torch.randn(n, mixture.dimension, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    start = SIGMA_MAX * z

    def rate(u: float, y):
        sigma = u / (1 - u)
        x = torch.as_tensor(y).reshape(start.shape) * (1 + sigma)
        eps = -sigma * mixture.score(x, ByNoise(), sigma)
        return ((1 + sigma) * eps - x).reshape(-1).numpy()

    first = SIGMA_MAX / (1 + SIGMA_MAX)
    y = (start / (1 + SIGMA_MAX)).reshape(-1).numpy()
    answer = solve_ivp(rate, (first, 0.0), y, method=method, rtol=tolerance, atol=tolerance, t_eval=[0.0])
    assert answer.success, answer.message
    return start, torch.as_tensor(answer.y[:, -1].copy()).reshape(start.shape)
