"""The default solver: for a number of steps, the rule and grid that measured best."""

from __future__ import annotations

from dataclasses import dataclass

from kuosan.process import Grid
from kuosan.solvers.grids import LinearBetaTime
from kuosan.solvers.multistep import AdamsBashforth
from kuosan.solvers.table import Solver

#: From how many steps on order 4 was better than order 3, which bears the errors of trained networks better.
FOURTH_ORDER = 30


@dataclass(frozen=True)
class Auto(Solver):
    """Adams-Bashforth on eps - x0 along the rectified time, on the grid :class:`LinearBetaTime`.

    Its order is 3, 4 from 30 steps on, or the number of steps where there are fewer. The policy looks at the number of
    steps alone: both variable and clock mean the same under every process. It was chosen on the exact mixtures and the
    trained digits of ``benchmarks/``; docs/samplers.md has the tables.
    """

    spacing = LinearBetaTime()

    def rule(self, steps: int) -> Solver:
        """The rule that it takes for so many steps."""
        return AdamsBashforth(min(steps, 4 if steps >= FOURTH_ORDER else 3), "flow")

    def table(self, process, grid=None, *, steps=None):
        count = steps if steps is not None else len(grid) if isinstance(grid, Grid) else 1
        return self.rule(max(count, 1)).table(process, grid or (None if steps is None else self.spacing), steps=steps)

    def rows(self, process, grid):
        return self.rule(len(grid)).rows(process, grid)
