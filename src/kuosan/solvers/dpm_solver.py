r"""DPM-Solver, DPM-Solver++ and UniPC: exponential integrators in half the log-SNR, h = log(alpha / sigma).

All of them share one step of order 1 (it is DDIM) and correct it with differences D of the outputs. With the step
:math:`H = h_s - h_t` for outputs eps, and :math:`H = h_t - h_s` for outputs x0,

.. math:: x_s = k\,x_t - S\,[(e^H - 1)\,m_t + \dots], \qquad
    (k, S) = (\alpha_s/\alpha_t, \sigma_s) \text{ for eps}, \quad (\sigma_s/\sigma_t, \alpha_s) \text{ for x0}.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kuosan.process import Process
from kuosan.solvers.grids import LinearBetaTime
from kuosan.solvers.multistep import Multistep
from kuosan.solvers.table import Row, Solver
from kuosan.solvers.variables import half_log_snr, scale_at, to_data


@dataclass(frozen=True)
class ExponentialStep:
    """k, S, H and phi_1 = e^H - 1, phi_2 = phi_1/H - 1, phi_3 = (phi_1 - H)/H^2 - 1/2 of a step from t to s."""

    k: float
    S: float
    H: float

    @classmethod
    def between(cls, variable: str, process: Process, t: float, s: float) -> ExponentialStep:
        other = {"x0": "eps", "eps": "x0"}[variable]
        sign = 1 if variable == "eps" else -1
        k = scale_at(variable, process, s) / scale_at(variable, process, t)
        return cls(k, scale_at(other, process, s), sign * (half_log_snr(process, s) - half_log_snr(process, t)))

    def phi(self, order: int) -> float:
        r""":math:`\sum_{n \ge 0} H^{n+1} / (n + \text{order})!`, as a series where the closed form would cancel."""
        H = self.H
        if abs(H) < 0.5:
            return sum(H ** (n + 1) / math.factorial(n + order) for n in range(18))
        value = math.expm1(H)
        for n in range(1, order):
            value = value / H - 1 / math.factorial(n)
        return value


@dataclass(frozen=True)
class DPMSolver(Solver):
    r"""DPM-Solver (Lu et al. 2022, arXiv 2206.00927): polynomials of the noise in the log-SNR.

    Multistep, order 2 (arXiv 2211.01095, algorithm 2, here for either output), with
    :math:`D_1 = (m_t - m_{t'}) / r,\ r = (h_t - h_{t'}) / (h_s - h_t)` from the evaluation before:

    .. math:: x_s = k\,x_t - S\,(e^H - 1)\,(m_t + \tfrac12 D_1)

    and order 3 the exact integral of the parabola (its authors' code, and diffusers', halve the curvature: that has
    order 2). Singlestep, orders 2 and 3 (arXiv 2206.00927, algorithms 1 and 2), evaluates inside the step, at r = 1/2,
    or 1/3 and 2/3, of its log-SNR. The step to the data is the model's x0.

    Args:
        order: 1 to 3.
        multistep: differences from evaluations before; otherwise from ``order`` evaluations in each step.
        sde: the reverse SDE instead of the ODE (arXiv 2211.01095, appendix): multistep, order 1 or 2.

    Raises:
        ValueError: an order that there is not.
    """

    order: int = 2
    multistep: bool = True
    sde: bool = False
    form = "eps"
    spacing = LinearBetaTime()

    def __post_init__(self):
        if self.order not in (1, 2, 3):
            raise ValueError(f"DPM-Solver has order 1, 2 or 3, got {self.order}")
        if self.sde and (not self.multistep or self.order > 2):
            raise ValueError("DPM-Solver for the SDE is multistep and of order 1 or 2")

    @property
    def needs_signal(self) -> bool:
        return True

    def rows(self, process, grid):
        for i, (t, s) in enumerate(grid.pairs()):
            if s == 0:
                yield to_data(self.form, process, t)
            elif self.multistep:
                yield self._multistep_row(process, grid.times[max(0, i + 1 - self.order) : i + 1][::-1], s)
            else:
                yield from self._singlestep_rows(process, t, s)

    def _multistep_row(self, process, nodes: Sequence[float], s: float) -> Row:
        t, variable = nodes[0], self.form
        step = ExponentialStep.between(variable, process, t, s)
        h = [half_log_snr(process, u) for u in nodes]
        h_s = half_log_snr(process, s)
        if self.sde:
            return self._sde_row(process, t, s, step, (h[0] - h[1]) / (h_s - h[0]) if len(h) > 1 else None)
        m = np.zeros(len(nodes))
        m[0] = step.phi(1)
        if len(nodes) == 2:
            r = (h[0] - h[1]) / (h_s - h[0])
            m += 0.5 * step.phi(1) * np.array([1, -1]) / r
        elif len(nodes) == 3:
            r_0, r_1 = (h[0] - h[1]) / (h_s - h[0]), (h[1] - h[2]) / (h_s - h[0])
            first, second = np.array([1, -1, 0]) / r_0, np.array([0, 1, -1]) / r_1
            slope = first + r_0 / (r_0 + r_1) * (first - second)
            bend = (first - second) / (r_0 + r_1)
            m += step.phi(2) * slope + 2 * step.phi(3) * bend
        return Row(t, x=step.k, m=tuple(-step.S * m))

    def _sde_row(self, process, t: float, s: float, step: ExponentialStep, r: float | None) -> Row:
        _, sigma_s = process.at(Process.scales, s)
        double = math.expm1(2 * step.H)  # of the squared ratio of noise levels
        if self.form == "eps":
            k, weight, noise = step.k, 2 * math.expm1(step.H), sigma_s * math.sqrt(double)
        else:
            k, weight, noise = step.k * math.exp(step.H), double, sigma_s * math.sqrt(-double)
        m = (weight,) if r is None else (weight * (1 + 0.5 / r), -weight * 0.5 / r)
        return Row(t, x=k, m=tuple(-step.S * c for c in m), z=noise)

    def _singlestep_rows(self, process, t: float, s: float):
        def at(r: float) -> float:
            h_t, h_s = half_log_snr(process, t), half_log_snr(process, s)
            return float(process.schedule.time_of(2 * (h_t + r * (h_s - h_t))))

        whole = ExponentialStep.between(self.form, process, t, s)
        if self.order == 1:
            yield Row(t, x=whole.k, m=-whole.S * whole.phi(1))
        elif self.order == 2:
            middle = at(1 / 2)
            half = ExponentialStep.between(self.form, process, t, middle)
            yield Row(t, x=half.k, m=-half.S * half.phi(1))
            yield Row(middle, x=(0.0, whole.k), m=-whole.S * whole.phi(1))
        else:
            r_1, r_2 = 1 / 3, 2 / 3
            u_1, u_2 = at(r_1), at(r_2)
            one, two = (ExponentialStep.between(self.form, process, t, u) for u in (u_1, u_2))
            yield Row(t, x=one.k, m=-one.S * one.phi(1))
            c = r_2 / r_1 * two.phi(2)
            yield Row(u_1, x=(0.0, two.k), m=(-two.S * c, -two.S * (two.phi(1) - c)))
            c = whole.phi(2) / r_2
            yield Row(u_2, x=(0.0, 0.0, whole.k), m=(-whole.S * c, 0.0, -whole.S * (whole.phi(1) - c)))


@dataclass(frozen=True)
class DPMSolverPP(DPMSolver):
    __doc__ = (DPMSolver.__doc__ or "").replace(
        "DPM-Solver (Lu et al. 2022, arXiv 2206.00927): polynomials of the noise",
        "DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095): polynomials of x0",
    )
    form = "x0"


@dataclass(frozen=True)
class UniPC(Multistep):
    r"""UniPC (Zhao et al. 2023, arXiv 2302.04867): a predictor, and a corrector that costs no evaluation.

    With the outputs' differences :math:`D_k = (m_k - m_t)/r_k`, :math:`r_k = (h_k - h_t)/(h_s - h_t)` at the
    evaluations before and, for the corrector, at s itself (r = 1),

    .. math:: x_s = k\,x_t - S\,\Big[(e^H - 1)\,m_t + B(H) \sum_k \rho_k D_k\Big],
        \qquad \sum_k r_k^{\,n-1} \rho_k = \frac{n!\,\varphi_{n+1}(H)}{B(H)}, \quad n = 1, 2, \dots

    (eq. 3 and 5; where one difference is left, rho = 1/2.)

    Args:
        order: p, 1 to 4: of the predictor; the corrector makes it p + 1.
        b: B(H), "bh1" for H, "bh2" for e^H - 1.
        variable: "x0" or "eps".
        corrector: False leaves the predictor alone.

    Raises:
        ValueError: an unknown order, B or variable.
    """

    b: str = "bh2"
    variable: str = "x0"
    corrector: bool = field(default=True, kw_only=True)

    def __post_init__(self):
        if self.order not in (1, 2, 3, 4):
            raise ValueError(f"UniPC has order 1 to 4, got {self.order}")
        if self.b not in ("bh1", "bh2") or self.variable not in ("x0", "eps"):
            raise ValueError(f'b is "bh1" or "bh2" and variable "x0" or "eps", got {self.b!r} and {self.variable!r}')

    @property
    def form(self) -> str:  # type: ignore[override]
        return self.variable

    @property
    def needs_signal(self) -> bool:
        return True

    def row(self, process, nodes, s):
        if s == 0:
            return to_data(self.variable, process, nodes[0])
        k = ExponentialStep.between(self.variable, process, nodes[0], s).k
        return Row(nodes[0], x=k, m=tuple(self.outputs(process, nodes, nodes[0], s)))

    def outputs(self, process, nodes, t, s):
        step = ExponentialStep.between(self.variable, process, t, s)
        correct = nodes[0] == s  # the newest output is then that at the end of the step
        h_t, h_s = half_log_snr(process, t), half_log_snr(process, s)
        r = np.array([(half_log_snr(process, u) - h_t) / (h_s - h_t) for u in nodes if u != t])
        B = step.H if self.b == "bh1" else step.phi(1)
        n = np.arange(1, len(r) + 1)
        target = np.array([math.factorial(k) * step.phi(k + 1) / B for k in range(1, len(r) + 1)])
        rho = np.full(len(r), 0.5) if len(r) == 1 else np.linalg.solve(r ** (n[:, None] - 1), target)
        differences = B * rho / r
        m = np.insert(differences, int(correct), step.phi(1) - differences.sum())
        return -step.S * m
