"""Runge-Kutta solvers of the ODE: several evaluations per step, in any of its variables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kuosan.schedules import Table as Discrete
from kuosan.solvers.grids import LinearBetaTime
from kuosan.solvers.table import Row, Solver
from kuosan.solvers.variables import JUMPS, check_variable, clock_at, output_scale, scale_at, time_at, to_data


@dataclass(frozen=True)
class Tableau:
    """Butcher's: stage k is at clock w_t + c_k (w_s - w_t) and takes the k outputs before it times a_k; b ends it."""

    a: Sequence[Sequence[float]]
    b: Sequence[float]

    @property
    def c(self) -> list[float]:
        return [sum(row) for row in self.a]


EULER = Tableau([[]], [1.0])
MIDPOINT = Tableau([[], [1 / 2]], [0.0, 1.0])
HEUN = Tableau([[], [1.0]], [1 / 2, 1 / 2])
HEUN3 = Tableau([[], [1 / 3], [0.0, 2 / 3]], [1 / 4, 0.0, 3 / 4])
RK4_TABLEAU = Tableau([[], [1 / 2], [0.0, 1 / 2], [0.0, 0.0, 1.0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6])


@dataclass(frozen=True)
class _RungeKutta(Solver):
    r"""A Runge-Kutta method on dy/dw = m in a variable of the ODE (:mod:`kuosan.solvers.variables`).

    .. math:: y_k = y_t + \Delta w \sum_{l<k} a_{kl} m_l, \qquad y_s = y_t + \Delta w \sum_k b_k m_k

    A method that evaluates at the end of its step would meet sigma = 0 in the last one, where the model says nothing;
    there another takes its place, of one order less, which is enough for the order of the whole; and where its stages
    would lie before the earliest noisy time, the model's x0.

    Args:
        variable: "flow" (eps - x0), "x0", "eps", "v", or "velocity" (of the schedule's own time). In x0, whose clock
            never reaches the data, and in v and velocity, which would leave noise there, the last step is the end of
            the model's x0 (:func:`~kuosan.solvers.variables.to_data`).

    Raises:
        ValueError: an unknown variable.
    """

    variable: str = "flow"
    spacing = LinearBetaTime()
    tableau: ClassVar[Tableau] = EULER
    last: ClassVar[Tableau] = EULER

    def __post_init__(self):
        check_variable(self.variable)

    @property
    def form(self) -> str:  # type: ignore[override]
        return self.variable

    def rows(self, process, grid):
        for i, (t, s) in enumerate(grid.pairs()):
            if s == 0 and self.variable in JUMPS:
                reach = 2 if self.order == 4 and self.variable != "x0" else 1
                nodes = grid.times[max(0, i + 1 - reach) : i + 1][::-1]
                yield to_data(self.variable, process, *nodes, apart=len(self.tableau.b))
            else:
                yield from _step(self.variable, self.tableau if s else self.last, process, t, s)


def _step(variable: str, tableau: Tableau, process, t: float, s: float):
    w_t, w_s = clock_at(variable, process, t), clock_at(variable, process, s)
    times = [t, *(time_at(variable, process, w_t + c * (w_s - w_t)) if c < 1 else s for c in tableau.c[1:])]
    earliest = 1 / len(process.schedule) if isinstance(process.schedule, Discrete) else process.schedule.t_min
    if s == 0 and times[-1] < earliest:
        yield to_data(variable, process, t)
        return
    scales = [output_scale(variable, process, u) for u in times]
    for k, time in enumerate(times):
        end = k + 1 == len(times)
        weights = tableau.b if end else tableau.a[k + 1]
        to = scale_at(variable, process, s if end else times[k + 1])
        m = [to * (w_s - w_t) * c * scale for c, scale in zip(weights, scales, strict=False)]
        x = (0.0,) * k + (to / scale_at(variable, process, t),)  # from where the step began
        yield Row(time, x=x, m=tuple(m[::-1]))


@dataclass(frozen=True)
class Euler(_RungeKutta):
    __doc__ = _RungeKutta.__doc__
    variable: str = "velocity"


@dataclass(frozen=True)
class Midpoint(_RungeKutta):
    __doc__ = _RungeKutta.__doc__
    order = 2
    tableau = last = MIDPOINT


@dataclass(frozen=True)
class Heun(_RungeKutta):
    __doc__ = _RungeKutta.__doc__
    order = 2
    tableau = HEUN


@dataclass(frozen=True)
class RK4(_RungeKutta):
    __doc__ = _RungeKutta.__doc__
    order = 4
    tableau, last = RK4_TABLEAU, HEUN3
