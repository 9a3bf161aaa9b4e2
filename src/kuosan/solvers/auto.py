"""The default solver: for a number of steps, the rule and grid that measured best."""

from __future__ import annotations

from dataclasses import dataclass

from kuosan.process import Grid
from kuosan.solvers.grids import LinearBetaTime, Spacing
from kuosan.solvers.multistep import AdamsBashforth
from kuosan.solvers.table import Solver

#: From how many steps on order 4 was better than order 3, which bears the errors of trained networks better.
FOURTH_ORDER = 20


@dataclass(frozen=True)
class Auto(Solver):
    """Adams-Bashforth on eps - x0 along the rectified time, on the grid :class:`LinearBetaTime`.

    Order 3 (or the number of steps, where there are fewer) with shift 0.5; from 20 steps on order 4 with shift 0.8. The
    policy looks at the number of steps alone: both variable and clock mean the same under every process. It was chosen
    on the exact mixtures and the trained digits of ``benchmarks/``; docs/samplers.md has the tables.

    Args:
        tuned: whether the table that was tuned to a run for this number of steps, if there is one, takes its place.
    """

    tuned: bool = True

    def rule(self, steps: int) -> tuple[Solver, Spacing]:
        """The rule and the spacing that it takes for so many steps."""
        if steps >= FOURTH_ORDER:
            return AdamsBashforth(4, "flow"), LinearBetaTime(0.8)
        return AdamsBashforth(max(1, min(steps, 3)), "flow"), LinearBetaTime(0.5)

    def table(self, process, grid=None, *, steps=None):
        count = steps if steps is not None else len(grid) if isinstance(grid, Grid) else 1
        rule, spacing = self.rule(count)
        return rule.table(process, grid or (None if steps is None else spacing), steps=steps)

    def rows(self, process, grid):
        return self.rule(len(grid))[0].rows(process, grid)
