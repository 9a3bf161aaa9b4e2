"""From a reverse variance to the noise of a row, and from the name of a measured variance to what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from kuosan.solvers.table import Solver
from kuosan.variance import MEASURED, Choice

AnySolver = TypeVar("AnySolver", bound=Solver)


def measured(solver: AnySolver, look_up: Callable[[str], Choice]) -> AnySolver:
    """The solver; if its variance is the name of one that has to be measured, with what ``look_up`` says it is."""
    name = getattr(solver, "variance", None)
    if not isinstance(name, str) or name not in MEASURED:
        return solver
    return replace(solver, variance=look_up(name))  # type: ignore[type-var]


def noise_of(variance: Tensor | float) -> dict[str, Any]:
    """A row's z for noise of this variance: a number, and z_each beside it if the coordinates differ."""
    if not isinstance(variance, Tensor) or variance.ndim == 0:
        return {"z": math.sqrt(float(variance))}
    scale = math.sqrt(float(variance.mean()))
    return {"z": scale, "z_each": variance.sqrt() / scale} if scale else {"z": 0.0}
