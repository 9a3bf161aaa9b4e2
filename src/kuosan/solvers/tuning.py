r"""Tuning: gradient descent on a table's numbers and times against a fine solution of the same model.

A table of N evaluations is written in the flow variable, y = x / (alpha + sigma) and m = eps-hat - x0-hat, as

.. math:: y_{i+1} = y_i + d_i\,y_0 + (u_{i+1} - u_i) \sum_{j \le i} W_{ij} m_j,
    \qquad u = \sigma / (\alpha + \sigma), \quad u_N = 0,

so that every rule of the package is one choice of the times and of the lower triangle W (Shaul et al. 2024, arXiv
2403.01329, the non-stationary family), all of whose entries are of order one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kuosan.denoiser import evaluating
from kuosan.process import Process, expand
from kuosan.seeds import stream
from kuosan.solvers.executor import Model, run
from kuosan.solvers.grids import LinearBetaTime, Rectified, UniformLogSNR
from kuosan.solvers.multistep import AdamsBashforth
from kuosan.solvers.table import Row, Table
from kuosan.solvers.variables import clock_at, scale_at


class Tunable(nn.Module):
    """The times and weights of a deterministic table as parameters.

    Args:
        process: of the model.
        table: where to start, one evaluation for each step, the first at the process's last time.

    Raises:
        ValueError: a table with noise, or whose times do not fall.
    """

    def __init__(self, process: Process, table: Table):
        super().__init__()
        if table.stochastic:
            raise ValueError("only a table without noise can be tuned: it follows one trajectory")
        times = table.times
        if any(s >= t for t, s in itertools.pairwise(times)):
            raise ValueError("only a table that evaluates once in each step can be tuned; its times must fall")
        self.process, self.first = process, times[0]
        steps = torch.tensor(times, dtype=torch.float64) - torch.tensor([*times[1:], 0.0], dtype=torch.float64)
        self.lengths = nn.Parameter(steps.log())
        drift, weights = _numbers(process, table)
        self.drift, self.weights = nn.Parameter(drift), nn.Parameter(weights)

    def times(self) -> Tensor:
        """t_0 > t_1 > ... > t_N = 0, float64."""
        lengths = torch.softmax(self.lengths, 0) * self.first
        inner = self.first - lengths.cumsum(0)[:-1]
        ends = self.lengths.new_tensor([self.first])
        return torch.cat([ends, inner, ends * 0])

    def forward(
        self,
        model: Model,
        x: Tensor,
        condition: object = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Where the table takes x, (B, ...), with gradients to its numbers and times."""
        times = self.times()
        alpha, sigma = self.process.scales(times)
        total = alpha + sigma
        u = sigma / total
        weights = self.weights * (u[1:] - u[:-1])[:, None]
        y = x / expand(total[0], x)
        y_0, outputs = y, list[Tensor]()
        for i in range(len(times) - 1):
            t = times[i] if i else self.first  # a number: where there is no signal at all, models ask for one
            prediction = model(expand(total[i], y) * y, t, condition)
            if transform is not None:
                prediction = prediction.with_x0(transform(prediction.x0))
            outputs.append(prediction.flow)
            y = y + expand(self.drift[i], y) * y_0
            for j, output in enumerate(outputs):
                y = y + expand(weights[i, j], y) * output
        return y

    @torch.no_grad()
    def table(self) -> Table:
        """The numbers as they are now, as a table for the executor."""
        times = [min(t, 1.0) for t in self.times().tolist()]
        u = [clock_at("flow", self.process, t) for t in times]
        g = [scale_at("flow", self.process, t) for t in times]
        rows = []
        for i, t in enumerate(times[:-1]):
            m = [g[i + 1] * (u[i + 1] - u[i]) * float(self.weights[i, j]) for j in range(i, -1, -1)]
            x = [0.0] * (i + 1)
            x[0] += g[i + 1] / g[i]
            x[i] += g[i + 1] / g[0] * float(self.drift[i])
            rows.append(Row(t, x=tuple(x), m=tuple(m)))
        return Table(tuple(rows), "flow")


def _numbers(process: Process, table: Table) -> tuple[Tensor, Tensor]:
    """d and W of a table."""
    times = [*table.times, 0.0]
    u = torch.tensor([clock_at("flow", process, t) for t in times], dtype=torch.float64)
    g = torch.tensor([scale_at("flow", process, t) for t in times], dtype=torch.float64)
    a, b, _ = table.read_as("flow", process).dense()
    start = torch.cat([torch.ones(1, dtype=torch.float64), a * g[0] / g[1:]])
    outputs = torch.cat([torch.zeros(1, len(b), dtype=torch.float64), b / g[1:, None]])
    return start.diff(), outputs.diff(dim=0) / u.diff()[:, None]


def starts(process: Process, steps: int) -> Iterator[tuple[str, Table]]:
    """The fixed rules that tuning chooses its start from, by name."""
    spacings = {
        "linear_beta": LinearBetaTime(),
        "rectified": Rectified(),
        "rectified power=1.5": Rectified(power=1.5),
        "rectified shift=2": Rectified(shift=2.0),
        "log_snr last=0.03": UniformLogSNR(last=0.03),
        "log_snr last=0.1": UniformLogSNR(last=0.1),
    }
    for name, spacing in spacings.items():
        for order in range(2, min(steps, 4) + 1) if steps > 1 else (1,):
            table = AdamsBashforth(order, "flow").table(process, spacing, steps=steps)
            yield f"adams_bashforth order={order} variable=flow, {name}", table


@dataclass(frozen=True)
class Errors:
    """Distance to the fine solution, over fresh samples: RMSE per coordinate, and the median of each sample's own."""

    rmse: float
    median: float

    @classmethod
    def of(cls, x: Tensor, target: Tensor) -> Errors:
        squared = (x - target).double().flatten(1).square().mean(1)
        return cls(float(squared.mean().sqrt()), float(squared.sqrt().median()))


@dataclass(frozen=True)
class Tuned:
    """A tuned table and how it did on samples that neither tuning nor choosing had seen.

    Args:
        table: the best seen; the start itself, where nothing was better.
        start: the fixed rule that it began from, by name.
        errors, start_errors: of both.
        improved: whether the table is not the start.
    """

    table: Table
    start: str
    errors: Errors
    start_errors: Errors
    improved: bool


@dataclass(frozen=True)
class _Pairs:
    """Start points, their conditions, and where the fine solution of the same model takes them."""

    x: Tensor
    condition: Tensor | None
    end: Tensor

    def __getitem__(self, which: Tensor | slice) -> _Pairs:
        return _Pairs(self.x[which], None if self.condition is None else self.condition[which], self.end[which])

    def __len__(self) -> int:
        return len(self.x)


def tune(
    model: Model,
    shape: tuple[int, ...],
    steps: int,
    *,
    labels: Callable[[int], Tensor | None] | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    pairs: int = 2048,
    iterations: int = 1000,
    batch_size: int = 128,
    learning_rate: float = 0.01,
    fine: int = 100,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> Tuned:
    """Fit a table of so many evaluations to a model: the distance to a fine solution, by Adam on its times and numbers.

    It starts from the best of :func:`starts`, looks at fresh samples as it goes, keeps the best that it saw, and
    measures that on samples fresh again. The same arguments give the same table.

    Args:
        model: a denoiser, or one wrapped in guidance: the table is for that weight.
        shape: of one sample.
        steps: N, evaluations of the tuned table.
        labels: gives the conditions of n samples.
        transform: of x0-hat, as in sampling.
        pairs: samples to fit; a quarter as many to choose, and as many as that again to measure.
        iterations: of Adam, its learning rate falling to 0 along half a cosine.
        batch_size: samples of each iteration.
        fine: steps of the fine solution, of order 4.
        progress: called with (done, all, words).

    Raises:
        ValueError: steps, pairs, iterations or batch_size under 1, or fine not over steps.
    """
    if min(steps, pairs, iterations, batch_size) < 1:
        raise ValueError("steps, pairs, iterations and batch_size must be at least 1")
    if fine <= steps:
        raise ValueError(f"the fine solution must have more steps than the {steps} of the table, got {fine}")
    process = model.process
    say = progress or (lambda done, total, words: None)
    with evaluating(model) if isinstance(model, nn.Module) else nullcontext():
        reference = AdamsBashforth(4, "flow").table(process, LinearBetaTime(), steps=fine)
        generator = stream("tune", seed)
        start = process.prior(reference.times[0]).std.to(dtype)
        held_out = max(pairs // 4, 16)

        def draw(n: int, words: str) -> _Pairs:
            x = (start * torch.randn(n, *shape, generator=generator, dtype=dtype)).to(device)
            condition = None if labels is None else labels(n)
            condition = None if condition is None else condition.to(device)
            ends = []
            for first in range(0, n, 256):
                part = slice(first, first + 256)
                given = None if condition is None else condition[part]
                ends.append(run(reference, model, x[part], condition=given, transform=transform))
                say(min(first + 256, n), n, words)
            return _Pairs(x, condition, torch.cat(ends))

        def errors(table: Table, on: _Pairs) -> Errors:
            ends = []
            for first in range(0, len(on), 256):
                part = on[slice(first, first + 256)]
                ends.append(run(table, model, part.x, condition=part.condition, transform=transform))
            return Errors.of(torch.cat(ends), on.end)

        fit = draw(pairs, "fine solution, to fit")
        choose, fresh = (draw(held_out, f"fine solution, to {word}") for word in ("choose", "measure"))
        name, table = min(starts(process, steps), key=lambda one: errors(one[1], fit[slice(0, held_out)]).rmse)
        best, best_rmse = table, errors(table, choose).rmse
        tunable = Tunable(process, table)
        groups = [
            {"params": [tunable.weights, tunable.lengths], "lr": learning_rate},
            {"params": [tunable.drift], "lr": 0.1 * learning_rate},
        ]
        optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
        decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: 0.5 + 0.5 * math.cos(math.pi * i / iterations))
        look = max(iterations // 25, 1)
        for i in range(1, iterations + 1):
            batch = fit[torch.randint(len(fit), (batch_size,), generator=generator)]
            with torch.enable_grad():
                end = tunable(model, batch.x, batch.condition, transform)
                loss = (end - batch.end).square().mean().log()  # its gradient has the same size throughout
            if not bool(torch.isfinite(loss)):
                break  # diverged: what was best before is kept
            parameters = list(tunable.parameters())
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient  # and not that of the model's own parameters
            torch.nn.utils.clip_grad_norm_(tunable.parameters(), 1.0)
            optimiser.step()
            decay.step()
            if i % look == 0 or i == iterations:
                if not all(bool(torch.isfinite(p).all()) for p in tunable.parameters()):
                    break
                candidate = tunable.table()
                rmse = errors(candidate, choose).rmse
                if rmse < best_rmse:
                    best, best_rmse = candidate, rmse
                say(i, iterations, f"rmse {best_rmse:.4g}")
        before, after = errors(table, fresh), errors(best, fresh)
        if after.rmse >= before.rmse:
            best, after = table, before
        return Tuned(best, name, after, before, best is not table)
