"""A sampler as a table of numbers: what each step does with the states, model outputs and noises it has seen so far."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kuosan.prediction import FORMS
from kuosan.process import Grid, Process

Coefficients = float | tuple[float, ...]


def _history(value: Coefficients) -> tuple[float, ...]:
    """Coefficients newest first, without trailing zeros."""
    numbers = [float(v) for v in (value if isinstance(value, tuple) else (value,))]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


@dataclass(frozen=True)
class Row:
    """One update, X_{i+1} = sum x_k X_{i-k} + sum m_k m_{i-k} + sum z_k z_{i-k}: numbers, newest first.

    Args:
        x: coefficients of the states X_i, X_{i-1}, ...; one number stands for X_i alone.
        m: of the model's outputs m_i, m_{i-1}, ..., in the table's form.
        z: of the noises z_i, z_{i-1}, ...; a noise that nothing multiplies is never drawn.
        z_upper: where the model says its own variance, z is its lower end and this its upper end: the coefficient is
            interpolated between them on a log scale.
    """

    x: Coefficients = 0.0
    m: Coefficients = 0.0
    z: Coefficients = 0.0
    z_upper: float | None = None

    def __post_init__(self):
        for name in ("x", "m", "z"):
            object.__setattr__(self, name, _history(getattr(self, name)))

    def history(self) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
        return self.x, self.m, self.z  # type: ignore[return-value]


@dataclass(frozen=True)
class Table:
    r"""A sampler for one process and one grid: for evaluation i at time t_i,

    .. math::
        m_i = \text{model}(X_i, t_i), \qquad
        X_{i+1} = a_i X_0 + \sum_{j\le i} B_{ij} m_j + \sum_{j\le i} C_{ij} z_j

    (Shaul et al. 2024, arXiv 2403.01329.) The rows hold the recurrence, which is sparse; :meth:`dense` unrolls it.

    Args:
        times: t_i of each evaluation, float64.
        rows: one for each evaluation.
        form: what the model's output is read as: "x0", "eps", "score", "v" or "velocity".

    Raises:
        ValueError: another number of rows than of times, a row that reaches back before the start, an unknown form, or
            a coefficient that is not finite.
    """

    times: tuple[float, ...]
    rows: tuple[Row, ...]
    form: str = "x0"

    def __post_init__(self):
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")
        if len(self.times) != len(self.rows) or not self.rows:
            raise ValueError(f"a table has one row for each time; got {len(self.rows)} rows, {len(self.times)} times")
        for i, row in enumerate(self.rows):
            for part in row.history():
                if len(part) > i + 1:
                    raise ValueError(f"row {i} reaches {len(part)} evaluations back, but only {i + 1} have happened")
                if row.z_upper is not None and not (row.z and abs(row.z_upper) < float("inf")):
                    raise ValueError(f"row {i} holds a coefficient that is not finite, or z_upper without z")
                if not all(abs(c) < float("inf") for c in part):
                    raise ValueError(f"row {i} holds a coefficient that is not finite: {part}")

    @property
    def evaluations(self) -> int:
        return len(self.times)

    @property
    def stochastic(self) -> bool:
        return any(row.z or row.z_upper for row in self.rows)

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """(a, B, C) of the formula above, float64, of shapes (N,), (N, N), (N, N)."""
        n = self.evaluations
        a = torch.zeros(n + 1, dtype=torch.float64)  # entry i belongs to X_i
        a[0] = 1
        b, c = (torch.zeros(n + 1, n, dtype=torch.float64) for _ in range(2))
        for i, row in enumerate(self.rows):
            x, m, z = row.history()
            for k, value in enumerate(x):
                a[i + 1] += value * a[i - k]
                b[i + 1] += value * b[i - k]
                c[i + 1] += value * c[i - k]
            for k, value in enumerate(m):
                b[i + 1, i - k] += value
            for k, value in enumerate(z):
                c[i + 1, i - k] += value
        return a[1:], b[1:], c[1:]

    @property
    def a(self) -> Tensor:
        return self.dense()[0]

    @property
    def B(self) -> Tensor:
        return self.dense()[1]

    @property
    def C(self) -> Tensor:
        return self.dense()[2]


class Solver(ABC):
    """A rule that turns a process and a grid into a :class:`Table`. A subclass gives ``rows``."""

    form = "x0"

    @abstractmethod
    def rows(self, process: Process, grid: Grid) -> Iterable[Row]:
        """The table's rows, float64, one for each evaluation."""

    def table(self, process: Process, grid: Grid | None = None, *, steps: int | None = None) -> Table:
        """The table on a grid, or on the process's sampling grid of ``steps``.

        Raises:
            ValueError: both or neither of grid and steps.
        """
        if (grid is None) == (steps is None):
            raise ValueError("give either a grid or steps=")
        if grid is None:
            assert steps is not None
            grid = process.sampling_grid(steps)
        return Table(grid.times, tuple(self.rows(process, grid)), self.form)
