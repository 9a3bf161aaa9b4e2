"""DDIM: one evaluation per step, exact where the data is one point, with a dial from the ODE to ancestral sampling."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kuosan.solvers.noise import noise_of
from kuosan.solvers.table import Row, Solver
from kuosan.variance import MEASURED, OptimalVariance, check_variance


@dataclass(frozen=True)
class DDIM(Solver):
    r"""Denoising diffusion implicit model (Song et al. 2021, arXiv 2010.02502, eq. 12, for any alpha and sigma).

    .. math::
        x_s = \alpha_s \hat x_0 + \sigma_s \sqrt{1 - \eta^2 \tau}\,\hat\varepsilon + \sqrt v\, z,
        \qquad v = \sigma_s^2 \eta^2 \tau, \qquad \tau = 1 - \mathrm{SNR}_t / \mathrm{SNR}_s

    That v is right if x_0 were known. With the optimal variance the error M_t of x0-hat is made up for,
    :math:`v = \sigma_s^2\eta^2\tau + (\alpha_s - \alpha_t \tfrac{\sigma_s}{\sigma_t}\sqrt{1 - \eta^2\tau})^2 M_t`
    (Analytic-DDIM: Bao et al. 2022, arXiv 2201.06503, theorem 1): x_s then has the second moment that it should have.
    The last step draws no noise.

    Args:
        eta: 0 follows the probability-flow ODE, 1 is ancestral sampling.
        variance: "beta_tilde", the v above; or the optimal one, measured
            (:class:`~kuosan.variance.OptimalVariance`), which is noise for any eta, 0 included; or its names, for
            recipes and commands.

    Raises:
        ValueError: eta is outside [0, 1], or an unknown variance.
    """

    eta: float = 0.0
    variance: str | OptimalVariance = "beta_tilde"

    def __post_init__(self):
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must lie in [0, 1] (0: ODE, 1: ancestral), got {self.eta}")
        names = ("beta_tilde", *MEASURED)
        if not isinstance(self.variance, OptimalVariance) and self.variance not in names:
            raise ValueError(f"variance must be one of {', '.join(names)}, got {self.variance!r}")

    def rows(self, process, grid):
        check_variance(self.variance)
        if isinstance(self.variance, OptimalVariance):
            self.variance.check(process)
        for t, s in grid.pairs():
            alpha_t, sigma_t = (float(c) for c in process.scales(t))
            alpha_s, sigma_s = (float(c) for c in process.scales(s))
            tau = float(process.noise_fraction(t, s))
            keep = sigma_s / sigma_t * math.sqrt(1 - self.eta**2 * tau)
            m = alpha_s - alpha_t * keep
            if isinstance(self.variance, OptimalVariance) and s > 0:
                own = (sigma_s * self.eta) ** 2 * tau
                yield Row(t, x=keep, m=m, **noise_of(own + m**2 * self.variance.mean_squared_error(t)))
            else:
                yield Row(t, x=keep, m=m, z=sigma_s * self.eta * math.sqrt(tau))
