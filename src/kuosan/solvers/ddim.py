"""DDIM: one evaluation per step, exact where the data is one point, with a dial from the ODE to ancestral sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kuosan.solvers.table import Row, Solver


@dataclass(frozen=True)
class DDIM(Solver):
    r"""Denoising diffusion implicit model (Song et al. 2021, arXiv 2010.02502, eq. 12), for any alpha and sigma.

    .. math::
        x_s = \alpha_s \hat x_0 + \sigma_s \sqrt{1 - \eta^2 \tau}\,\hat\varepsilon + \sigma_s \eta \sqrt\tau\, z,
        \qquad \tau = 1 - \mathrm{SNR}_t / \mathrm{SNR}_s

    Args:
        eta: 0 follows the probability-flow ODE, 1 is ancestral sampling with variance beta-tilde.

    Raises:
        ValueError: eta is outside [0, 1].
    """

    eta: float = 0.0

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1] (0: ODE, 1: ancestral), got {self.eta}")

    def rows(self, process, grid):
        for t, s in grid.pairs():
            alpha_t, sigma_t = (float(c) for c in process.scales(t))
            alpha_s, sigma_s = (float(c) for c in process.scales(s))
            tau = float(process.noise_fraction(t, s))
            keep = sigma_s / sigma_t * math.sqrt(1 - self.eta**2 * tau)
            yield Row(t, x=keep, m=alpha_s - alpha_t * keep, z=sigma_s * self.eta * math.sqrt(tau))
