"""DDPM's own sampler: draw x_s from p(x_s | x_t), step by step, with a choice of reverse variance."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kuosan.solvers.noise import noise_of
from kuosan.solvers.table import Row, Solver
from kuosan.variance import MEASURED, OptimalVariance, check_variance


@dataclass(frozen=True)
class Ancestral(Solver):
    r"""Ancestral sampling (Ho et al. 2020, arXiv 2006.11239, algorithm 2), between any two times of a grid.

    .. math:: x_s = c_x x_t + c_0 \hat x_0 + T \sqrt{v}\, z

    with the coefficients of :meth:`Process.posterior <kuosan.Process.posterior>`; the last step is x0-hat itself.

    Args:
        variance: v is "beta_tilde", "beta", or "learned", between them where the network says; or the optimal one,
            measured (:class:`~kuosan.variance.OptimalVariance`); its names "optimal" and "optimal_per_dimension" are
            for recipes and commands, where the run has it.
        temperature: T; 0 walks along the means alone, which does worse (theory row 14).

    Raises:
        ValueError: an unknown variance or a negative temperature.
    """

    variance: str | OptimalVariance = "beta_tilde"
    temperature: float = 1.0

    def __post_init__(self):
        names = ("beta_tilde", "beta", "learned", *MEASURED)
        if not isinstance(self.variance, OptimalVariance) and self.variance not in names:
            raise ValueError(f"variance must be one of {', '.join(names)}, got {self.variance!r}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")

    def rows(self, process, grid):
        check_variance(self.variance)
        if isinstance(self.variance, OptimalVariance):
            self.variance.check(process)
        for t, s in grid.pairs():
            c_x, c_0, beta_tilde = (float(c) for c in process.posterior_coefficients(t, s))
            if s == 0:
                yield Row(t, x=c_x, m=c_0)
                continue
            if isinstance(self.variance, OptimalVariance):
                yield Row(t, x=c_x, m=c_0, **noise_of(self.temperature**2 * self.variance.reverse(t, s)))
                continue
            low = self.temperature * math.sqrt(beta_tilde)
            high = self.temperature * math.sqrt(float(process.step_coefficients(t, s)[1]))
            if self.variance == "learned":
                yield Row(t, x=c_x, m=c_0, z=low, z_upper=high if self.temperature else None)
            else:
                yield Row(t, x=c_x, m=c_0, z=low if self.variance == "beta_tilde" else high)
