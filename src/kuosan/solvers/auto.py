"""The default solver: for a number of steps, the rule and grid that measured best."""

from __future__ import annotations

from dataclasses import dataclass

from kuosan.solvers.grids import LinearBetaTime
from kuosan.solvers.multistep import AdamsBashforth
from kuosan.solvers.table import Solver

#: From how many steps on the corrector helps, and from how many order 4 does.
CORRECTED, FOURTH_ORDER = 10, 30


@dataclass(frozen=True)
class Auto(Solver):
    """Adams-Bashforth on eps - x0 along the rectified time, on the grid :class:`LinearBetaTime`.

    Order 3 (or the number of steps, where there are fewer); from 10 steps on with the corrector, and from 30 on of
    order 4, which with fewer steps magnifies the errors of trained networks. The policy looks at the number of steps
    alone: variable, clock and grid mean the same under every process. It was chosen on the exact mixtures and the
    trained digits of ``benchmarks/``; docs/samplers.md has the tables.

    Args:
        tuned: whether the table that was tuned to a run for this number of steps, if there is one, takes its place.
    """

    tuned: bool = True
    form = "flow"
    spacing = LinearBetaTime()

    def rule(self, steps: int) -> Solver:
        """The rule that it takes for so many steps."""
        if steps >= FOURTH_ORDER:
            return AdamsBashforth(4, corrector=True)
        return AdamsBashforth(max(1, min(steps, 3)), corrector=steps >= CORRECTED)

    def rows(self, process, grid):
        return self.rule(len(grid)).rows(process, grid)
