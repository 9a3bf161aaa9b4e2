"""Solvers of the reverse SDE: Euler-Maruyama, and EDM's Heun with churn."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kuosan.process import Grid, Process
from kuosan.solvers.ancestral import Ancestral
from kuosan.solvers.table import Row, Solver
from kuosan.solvers.variables import clock_at, scale_at, time_at, to_data


def _drift_and_diffusion(process: Process, t):
    return process.schedule.log_rates(t)[0], process.diffusion(t)


@dataclass(frozen=True)
class EulerMaruyama(Solver):
    r"""Euler-Maruyama on the reverse SDE (Song et al. 2021, arXiv 2011.13456, eq. 6), of VP, VE, sub-VP or any other.

    .. math:: x_s = x_t - (t - s)\,[f(t)\,x_t - g(t)^2\,\nabla\log q_t(x_t)] + g(t)\sqrt{t - s}\; z

    The last step is the model's x0. Where there is no signal at all the SDE has no bound (f is infinite at the start of
    the rectified flow); that one step is drawn from the exact kernel instead.
    """

    def rows(self, process, grid):
        for t, s in grid.pairs():
            alpha, sigma = process.at(Process.scales, t)
            if s == 0 or alpha == 0:
                yield next(iter(Ancestral().rows(process, Grid((t, s)) if s else Grid((t,)))))
                continue
            f, g = process.at(_drift_and_diffusion, t)
            pull = (t - s) * (g / sigma) ** 2  # the score is (alpha x0 - x_t) / sigma^2
            yield Row(t, x=1 - (t - s) * f - pull, m=pull * alpha, z=g * math.sqrt(t - s))


@dataclass(frozen=True)
class EDMHeun(Solver):
    r"""EDM's stochastic sampler (Karras et al. 2022, arXiv 2206.00364, algorithm 2), for any alpha and sigma.

    In x / alpha with the noise level rho = sigma / alpha: before each step noise is added that raises rho to
    :math:`\hat\rho = \rho\,(1 + \gamma)`, :math:`\gamma = \min(\text{churn}/N, \sqrt2 - 1)`; then one step of Heun from
    rho-hat, of Euler to the data.

    Args:
        churn: how much noise, over all N steps; 0 is the ODE.
        low, high: the noise levels between which it is added.
        inflate: the standard deviation of the noise that is added.

    Raises:
        ValueError: a negative churn or inflate, or low over high.
    """

    churn: float = 40.0
    low: float = 0.05
    high: float = 50.0
    inflate: float = 1.003
    form = "eps"
    order = 2

    def __post_init__(self):
        if not (self.churn >= 0 and self.inflate >= 0 and 0 <= self.low <= self.high):
            raise ValueError(f"need churn >= 0, inflate >= 0 and 0 <= low <= high, got {self}")

    def rows(self, process, grid):
        top = clock_at("eps", process, grid.times[0])
        gamma = min(self.churn / len(grid), math.sqrt(2) - 1)

        def raised(t: float) -> tuple[float, float]:
            """(rho-hat, its time); at the first time there is nothing above."""
            rho = clock_at("eps", process, t)
            if not self.low <= rho <= self.high or rho * (1 + gamma) > top or gamma == 0:
                return rho, t
            return rho * (1 + gamma), time_at("eps", process, rho * (1 + gamma))

        rho_hat, t_hat = clock_at("eps", process, grid.times[0]), grid.times[0]
        for _, s in grid.pairs():
            if s == 0:
                yield to_data(self.form, process, t_hat)
                return
            alpha_hat, alpha_s = scale_at("eps", process, t_hat), scale_at("eps", process, s)
            rho_s = clock_at("eps", process, s)
            yield Row(t_hat, x=alpha_s / alpha_hat, m=alpha_s * (rho_s - rho_hat))
            rho_next, s_hat = raised(s)
            alpha_next = scale_at("eps", process, s_hat)
            half = 0.5 * alpha_next * (rho_s - rho_hat)
            noise = alpha_next * self.inflate * math.sqrt(max(rho_next**2 - rho_s**2, 0.0))
            yield Row(s, x=(0.0, alpha_next / alpha_hat), m=(half, half), z=noise)
            rho_hat, t_hat = rho_next, s_hat
