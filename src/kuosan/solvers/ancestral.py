"""DDPM's own sampler: draw x_s from p(x_s | x_t), step by step, with a choice of reverse variance."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kuosan.solvers.table import Row, Solver


@dataclass(frozen=True)
class Ancestral(Solver):
    r"""Ancestral sampling (Ho et al. 2020, arXiv 2006.11239, algorithm 2), between any two times of a grid.

    .. math:: x_s = c_x x_t + c_0 \hat x_0 + T \sqrt{v}\, z

    with the coefficients of :meth:`Process.posterior <kuosan.Process.posterior>`; the last step is x0-hat itself.

    Args:
        variance: v is "beta_tilde", "beta", or "learned", between them where the network says.
        temperature: T; 0 walks along the means alone, which does worse (theory row 14).

    Raises:
        ValueError: an unknown variance or a negative temperature.
    """

    variance: str = "beta_tilde"
    temperature: float = 1.0

    def __post_init__(self):
        if self.variance not in ("beta_tilde", "beta", "learned"):
            raise ValueError(f"variance must be beta_tilde, beta or learned, got {self.variance!r}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")

    def rows(self, process, grid):
        for t, s in grid.pairs():
            c_x, c_0, beta_tilde = (float(c) for c in process.posterior_coefficients(t, s))
            if s == 0:
                yield Row(t, x=c_x, m=c_0)
                continue
            low = self.temperature * math.sqrt(beta_tilde)
            high = self.temperature * math.sqrt(float(process.step_coefficients(t, s)[1]))
            if self.variance == "learned":
                yield Row(t, x=c_x, m=c_0, z=low, z_upper=high if self.temperature else None)
            else:
                yield Row(t, x=c_x, m=c_0, z=low if self.variance == "beta_tilde" else high)
