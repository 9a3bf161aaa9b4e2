"""A scheduler of diffusers as a solver: the way of sampling that an imported pipeline had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn

from torch import Tensor

from kuosan.bridge.networks import read_json
from kuosan.bridge.schedulers import Scheduler, read_scheduler
from kuosan.process import Grid, Process
from kuosan.schedules import Schedule
from kuosan.solvers.grids import Spacing
from kuosan.solvers.table import Solver, Table


def schedule(config: str) -> Schedule:
    """That of the process of a scheduler's configuration, JSON.

    Raises:
        ValueError: no JSON, or what :func:`~kuosan.bridge.schedulers.read_scheduler` refuses.
    """
    return read_scheduler(read_json(config)).process.schedule


@dataclass(frozen=True)
class DiffusersSolver(Solver):
    """What a scheduler of diffusers does, step for step, with what it does to x0-hat and the noise it starts from.

    Args:
        config: of the scheduler, JSON with its ``_class_name``.
        eta: of DDIMScheduler: 1 is ancestral sampling.

    Raises:
        ValueError: no JSON, or what :func:`~kuosan.bridge.schedulers.read_scheduler` refuses.
    """

    config: str
    eta: float = 0.0

    def __post_init__(self):
        assert self.scheduler  # refuses a config that is not read

    def __str__(self) -> str:
        return f"diffusers' {self.scheduler.name}" + (f", eta {self.eta:g}" if self.eta else "")

    @cached_property
    def scheduler(self) -> Scheduler:
        return read_scheduler(read_json(self.config))

    @property
    def transform(self) -> Callable[[Tensor], Tensor] | None:  # type: ignore[override]
        return self.scheduler.transform

    def start(self, steps: int) -> float:
        return self.scheduler.start(steps)

    def rows(self, process: Process, grid: Grid) -> NoReturn:
        raise ValueError(
            "a scheduler of diffusers begins with noise and has times of its own: drop the grid and the image, or take "
            "another solver"
        )

    def table(self, process: Process, grid: Grid | Spacing | None = None, *, steps: int | None = None) -> Table:
        """Raises ValueError for a grid, or a process that is not the scheduler's."""
        if grid is not None or steps is None:
            self.rows(process, grid)  # type: ignore[arg-type]
        if process != self.scheduler.process:
            raise ValueError(f"{self} has tables for its own process, and this model's is another: take another solver")
        return self.scheduler.table(steps, eta=self.eta)
