"""A sampler as a table of numbers: what each step does with the states, model outputs and noises it has seen so far."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kuosan.prediction import FORMS, conversion
from kuosan.process import Grid, Process
from kuosan.solvers.grids import Spacing, UniformTime

Coefficients = float | tuple[float, ...]


def _history(value: Coefficients) -> tuple[float, ...]:
    """Coefficients newest first, without trailing zeros."""
    numbers = [float(v) for v in (value if isinstance(value, tuple) else (value,))]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


@dataclass(frozen=True)
class Row:
    """Evaluate at t, then X_{i+1} = sum x_k X_{i-k} + sum m_k m_{i-k} + sum z_k z_{i-k}: numbers, newest first.

    Args:
        t: time of this evaluation, at X_i.
        x: coefficients of the states X_i, X_{i-1}, ...; one number stands for X_i alone.
        m: of the model's outputs m_i, m_{i-1}, ..., in the table's form.
        z: of the noises z_i, z_{i-1}, ...; a noise that nothing multiplies is never drawn.
        z_upper: where the model says its own variance, z is its lower end and this its upper end: the coefficient is
            interpolated between them on a log scale.
        z_each: where coordinates differ in their noise: what z_i is multiplied by when it is drawn, of one sample's
            shape, with mean square 1. Rows that differ in nothing else compare as equal.
    """

    t: float
    x: Coefficients = 0.0
    m: Coefficients = 0.0
    z: Coefficients = 0.0
    z_upper: float | None = None
    z_each: Tensor | None = field(default=None, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "t", float(self.t))
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
        rows: one for each evaluation.
        form: what the model's output is read as: "x0", "eps", "score", "v", "velocity" or "flow".

    Raises:
        ValueError: no rows, a row that reaches back before the start, an unknown form, a time outside (0, 1], or a
            coefficient that is not finite.
    """

    rows: tuple[Row, ...]
    form: str = "x0"
    #: The executor's: the rows made ready for a form and a kind of tensor.
    prepared: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "rows", tuple(self.rows))
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")
        if not self.rows:
            raise ValueError("a table has at least one row")
        for i, row in enumerate(self.rows):
            if not 0 < row.t <= 1:
                raise ValueError(f"row {i} evaluates at time {row.t}; times lie in (0, 1]")
            for part in row.history():
                if len(part) > i + 1:
                    raise ValueError(f"row {i} reaches {len(part)} evaluations back, but only {i + 1} have happened")
                if row.z_upper is not None and not (row.z and abs(row.z_upper) < float("inf")):
                    raise ValueError(f"row {i} holds a coefficient that is not finite, or z_upper without z")
                if row.z_each is not None and not bool(row.z_each.isfinite().all()):
                    raise ValueError(f"row {i} holds a coefficient that is not finite in z_each")
                if not all(abs(c) < float("inf") for c in part):
                    raise ValueError(f"row {i} holds a coefficient that is not finite: {part}")

    @property
    def times(self) -> tuple[float, ...]:
        """t_i of each evaluation."""
        return tuple(row.t for row in self.rows)

    @property
    def evaluations(self) -> int:
        return len(self.rows)

    @property
    def stochastic(self) -> bool:
        return any(row.z or row.z_upper for row in self.rows)

    def read_as(self, form: str, process: Process) -> Table:
        """The same sampler with the model's outputs read in another form.

        With F = p x + q G, every F_j of the past brings p X_j along: the states' coefficients change too.
        """
        if form == self.form:
            return self
        change = conversion(form, self.form)
        if form in ("eps", "score") and float(process.alpha(self.times[0])) == 0:
            raise ValueError(
                f"at t = {self.times[0]:g} there is no signal, and a model that predicts {form} says nothing of x0: "
                "start the grid under it"
            )
        rows: list[Row] = []
        for i, row in enumerate(self.rows):
            x, m, _ = row.history()
            pq = [process.at(change, self.rows[i - k].t) for k in range(len(m))]
            states = [0.0] * max(len(x), len(m))
            for k in range(len(states)):
                old = x[k] if k < len(x) else 0.0
                new = m[k] * pq[k][0] if k < len(m) else 0.0
                # what should cancel does: a step that ends on data leaves nothing of the state
                states[k] = old + new if abs(old + new) > 1e-13 * abs(old) else 0.0
            m = tuple(c * q for c, (_, q) in zip(m, pq, strict=True))
            rows.append(replace(row, x=tuple(states), m=m))
        return Table(tuple(rows), form)

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists, from which :meth:`from_json` makes the same table, bit for bit.

        Raises:
            ValueError: a row whose noise is not a number.
        """
        if any(row.z_each is not None or row.z_upper is not None for row in self.rows):
            raise ValueError("only a table of plain numbers can be written")
        rows = [{"t": row.t, "x": list(row.x), "m": list(row.m), "z": list(row.z)} for row in self.rows]  # type: ignore[arg-type]
        return {"form": self.form, "rows": rows}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Table:
        rows = [Row(row["t"], tuple(row["x"]), tuple(row["m"]), tuple(row["z"])) for row in data["rows"]]
        return cls(tuple(rows), data["form"])

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
    order = 1  # of a solver of the ODE: a grid must have at least as many steps
    spacing: Spacing = UniformTime()  # of its grid, where none is given
    transform: Callable[[Tensor], Tensor] | None = None  # of x0-hat, where it has one of its own: in the place of clip

    @property
    def needs_signal(self) -> bool:
        """Whether its formula has 1 / alpha or log-SNR in it, and cannot begin where there is no signal at all."""
        return self.form == "eps"

    def start(self, steps: int) -> float:
        """The standard deviation of the noise that its tables begin with, where the prior's is 1."""
        return 1.0

    @abstractmethod
    def rows(self, process: Process, grid: Grid) -> Iterable[Row]:
        """The table's rows, float64, in the order of the evaluations."""

    @torch.no_grad()
    def table(self, process: Process, grid: Grid | Spacing | None = None, *, steps: int | None = None) -> Table:
        """The table on a grid; or on one of ``steps`` steps, laid out by a spacing (default: the solver's own).

        Raises:
            ValueError: neither a grid nor steps, or both; fewer steps than the solver's order.
        """
        if (steps is None) == (not isinstance(grid, Grid)):
            raise ValueError("give either a grid of times or steps=")
        if not isinstance(grid, Grid):
            assert steps is not None
            grid = (grid or self.spacing).grid(process, steps)
        if self.needs_signal and float(process.alpha(grid.times[0])) == 0:
            # noise alone says nothing of x0 (the rectified flow at t = 1): a thousandth of signal does
            grid = Grid((float(process.schedule.time_of(-2 * math.log(1000.0))), *grid.times[1:]))
        if len(grid) < self.order:
            raise ValueError(f"{self} has order {self.order}: it needs at least as many steps, got {len(grid)}")
        return Table(tuple(self.rows(process, grid)), self.form)
