"""What the mathematical tests share: one schedule of each kind, and mixtures whose every answer is known."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings
from torch import nn

import kuosan as ks
from kuosan import schedules
from kuosan.variance import OptimalVariance
from quadrature import mean_squared_error

torch.set_num_threads(1)
settings.register_profile("same every time", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("same every time")

#: One of each kind.
ALL_SCHEDULES = {
    "linear_beta": schedules.LinearBeta(),
    "cosine": schedules.Cosine(),
    "sqrt": schedules.Sqrt(),
    "ve": schedules.VE(),
    "sub_vp": schedules.SubVP(),
    "rectified_flow": schedules.RectifiedFlow(),
    "ddpm_table": schedules.linear_beta_table(1000),
    "alpha_bar_table": schedules.from_alpha_bar([math.cos(0.02 + 1.5 * i / 40) ** 2 for i in range(1, 41)]),
    "log_snr_line": schedules.from_log_snr(lambda t: 10 - 18 * t),
}

#: Which of them are tables of steps instead of curves.
TABLES = ("ddpm_table", "alpha_bar_table")


def named(*names):
    """Parameters for pytest: these schedules (all, if none is named), each under its name."""
    return [pytest.param(ALL_SCHEDULES[name], id=name) for name in names or ALL_SCHEDULES]


def elbo(denoiser, x_0, condition=None, *, steps=None, grid=None, variance="beta_tilde", decoder_variance=None, **how):
    """The bound of a denoiser on a grid, in one call."""
    chain = ks.DiffusionChain(denoiser, steps=steps, grid=grid, variance=variance, decoder_variance=decoder_variance)
    return chain.elbo(x_0, condition, **how)


@pytest.fixture(scope="session", params=named())
def schedule(request):
    return request.param


@pytest.fixture(scope="session")
def process(schedule):
    return ks.Process(schedule)


@dataclass(frozen=True)
class Line:
    """A 1-D mixture as plain numbers, for truths that must not come from the code under test."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    variances: tuple[float, ...]

    def mixture(self):
        return ks.Mixture(self.weights, [[m] for m in self.means], self.variances)


@pytest.fixture(scope="session")
def oracle():
    """The mixture whose bounds are tabulated in test_diffusion.py."""
    return Line((0.35, 0.65), (-0.6, 0.5), (0.01, 0.04))


@pytest.fixture(scope="session")
def optimal(oracle):
    """The optimal variance of the oracle's exact denoiser on DDPM's table: M_t of all its steps by quadrature."""
    errors = [mean_squared_error(oracle, step) for step in range(1, 1001)]
    return OptimalVariance(
        ks.Process(ALL_SCHEDULES["ddpm_table"]),
        torch.arange(1, 1001).double() / 1000,
        torch.tensor(errors, dtype=torch.float64),
    )


@pytest.fixture(scope="session")
def ring():
    """Eight Gaussians of standard deviation 0.15 on a circle of radius 1.4."""
    angles = [2 * math.pi * k / 8 for k in range(8)]
    return ks.Mixture([1.0] * 8, [[1.4 * math.cos(a), 1.4 * math.sin(a)] for a in angles], [0.15**2] * 8)


@pytest.fixture(scope="session")
def tilted():
    """Three dimensions, two components, full covariances: nothing is diagonal, so no transpose goes unseen."""
    first = [[0.30, 0.10, -0.05], [0.10, 0.20, 0.08], [-0.05, 0.08, 0.25]]
    second = [[0.10, -0.04, 0.02], [-0.04, 0.40, 0.15], [0.02, 0.15, 0.15]]
    return ks.Mixture([0.4, 0.6], [[-0.5, 0.3, 0.1], [0.6, -0.2, -0.4]], [first, second])


@pytest.fixture
def dice():
    """A fresh generator, always the same."""
    return torch.Generator().manual_seed(20)


# -- discrete data whose truth can be enumerated ---------------------------------------------------------------------

#: Of one number of five levels, and of two numbers of three.
PMF = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05], dtype=torch.float64)
PAIR_PMF = torch.tensor([[0.30, 0.05, 0.05], [0.02, 0.20, 0.03], [0.05, 0.05, 0.25]], dtype=torch.float64)


class LogPrior(nn.Module):
    """One coordinate: the exact logits are the log prior, since the denoiser adds the likelihood itself."""

    def forward(self, x, t, condition=None):
        return PMF.log().expand(*x.shape, 5)


class PairLogits(nn.Module):
    """Two dependent coordinates: logits of each are log sum over the other of p(a, b) N(x_other; alpha b, sigma^2)."""

    def __init__(self, process):
        super().__init__()
        self.process = process

    def forward(self, x, t, condition=None):
        alpha, sigma = (c[:, None, None] for c in self.process.scales(t))
        values = torch.linspace(-1, 1, 3, dtype=torch.float64)
        evidence = -0.5 * ((x[..., None] - alpha * values) / sigma) ** 2  # (B, 2, 3)
        first = torch.logsumexp(PAIR_PMF.log() + evidence[:, 1, None, :], -1)
        second = torch.logsumexp(PAIR_PMF.T.log() + evidence[:, 0, None, :], -1)
        return torch.stack([first, second], 1)
