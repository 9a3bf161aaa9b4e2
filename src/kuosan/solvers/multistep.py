"""Multistep solvers of the ODE: one evaluation per step, and a polynomial through the last outputs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kuosan.process import Process
from kuosan.solvers.grids import LinearBetaTime
from kuosan.solvers.table import Row, Solver
from kuosan.solvers.variables import CLOCKS, check_variable, output_scale, scale_at, to_data, weights


@dataclass(frozen=True)
class Multistep(Solver):
    """One evaluation in each step, and a corrector that costs none. A subclass gives ``row`` and ``outputs``.

    The corrector takes each step once more when the output at its end is known, with that output among the others. The
    corrected state is never evaluated: the correction is linear in the outputs, so that the next row takes it in.

    Args:
        order: how many outputs a step looks back at, once there are as many.
        corrector: False leaves the predictor alone.
    """

    order: int = 2
    corrector: bool = field(default=False, kw_only=True)
    spacing = LinearBetaTime()

    @abstractmethod
    def row(self, process: Process, nodes: Sequence[float], s: float) -> Row:
        """The step from nodes[0] to s, with the outputs at ``nodes``, newest first."""

    @abstractmethod
    def outputs(self, process: Process, nodes: Sequence[float], t: float, s: float) -> np.ndarray:
        """What the outputs at ``nodes``, s itself the first of them, weigh in the same step from t."""

    def carries(self, s: float) -> bool:
        """Whether the step to s carries the state on: a step to the data may be what the model said of it alone."""
        return True

    def rows(self, process, grid):
        correction = np.zeros(0)  # of X_i, by m_i, m_{i-1}, ...
        for i, (t, s) in enumerate(grid.pairs()):
            nodes = grid.times[max(0, i + 1 - self.order) : i + 1][::-1]
            row = self.row(process, nodes, s)
            x, m, _ = row.history()
            carried = x[0] if x and self.carries(s) else 0.0
            yield Row(t, x=row.x, m=tuple(added(m, carried * correction)))
            if self.corrector and s > 0:
                correction = added(self.outputs(process, (s, *nodes), t, s), [0.0, *(-c for c in m)])


def added(one: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> np.ndarray:
    """Of coefficients, the shorter ones with zeros at their end."""
    total = np.zeros(max(len(one), len(other)))
    total[: len(one)] += one
    total[: len(other)] += other
    return total


@dataclass(frozen=True)
class AdamsBashforth(Multistep):
    r"""Adams-Bashforth in any variable of the ODE (:mod:`kuosan.solvers.variables`).

    .. math:: x_s = \frac{g_s}{g_t} x_t + g_s \sum_j m_j \int_{w_t}^{w_s} \ell_j(p(w))\,\mathrm dw

    with the polynomial through the outputs of the last ``order`` evaluations. The first steps have lower order. Where
    that integral would leave noise at the data, in v and velocity, the step there is the end of a polynomial through
    the model's x0 (:func:`~kuosan.solvers.variables.to_data`); where its clock never reaches the data, in x0 or with
    ``log_snr``, the model's last x0.

    Args:
        order: 1 to 4 (1: DDIM, in every variable but velocity).
        variable: "flow" (eps - x0), "x0", "eps", "v", or "velocity" (of the schedule's own time).
        polynomial: in which clock: "own" (w itself), "log_snr" (with x0: an exponential integrator), "flow", "time"
            (with eps: DEIS, Zhang and Chen 2022, arXiv 2204.13902).
        corrector: each step again with the output at its end (Adams-Moulton, without evaluating once more: order + 1).

    Raises:
        ValueError: an order outside 1 to 4, an unknown variable or polynomial.
    """

    variable: str = "flow"
    polynomial: str = "own"

    def __post_init__(self):
        check_variable(self.variable)
        if self.order not in (1, 2, 3, 4):
            raise ValueError(f"Adams-Bashforth has order 1 to 4, got {self.order}")
        if self.polynomial not in CLOCKS:
            raise ValueError(f"polynomial must be in one of {', '.join(CLOCKS)}, got {self.polynomial!r}")

    @property
    def form(self) -> str:  # type: ignore[override]
        return self.variable

    @property
    def needs_signal(self) -> bool:
        return self.variable == "eps" or self.polynomial == "log_snr"

    def carries(self, s):
        return s > 0 or self.variable not in ("v", "velocity")

    def row(self, process, nodes, s):
        straight = self.variable in ("flow", "eps") or (self.variable == "x0" and self.polynomial in ("flow", "time"))
        if s == 0 and (not straight or self.polynomial == "log_snr"):
            smooth = self.variable in ("v", "velocity") and self.polynomial != "log_snr"
            return to_data(self.variable, process, *(nodes if smooth else nodes[:1]))
        scale = scale_at(self.variable, process, s) / scale_at(self.variable, process, nodes[0])
        return Row(nodes[0], x=scale, m=tuple(self.outputs(process, nodes, nodes[0], s)))

    def outputs(self, process, nodes, t, s):
        m = weights(self.variable, self.polynomial, process, nodes, t, s)
        return np.array(m) * [output_scale(self.variable, process, u) for u in nodes]


@dataclass(frozen=True)
class DEIS(AdamsBashforth):
    """Diffusion exponential integrator (Zhang and Chen 2022, arXiv 2204.13902): tAB-DEIS.

    Adams-Bashforth on the noise, with polynomials in the schedule's time; ``polynomial="own"`` is rhoAB-DEIS.
    """

    order: int = 3
    variable: str = "eps"
    polynomial: str = "time"
