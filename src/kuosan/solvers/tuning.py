r"""Tuning: gradient descent on a table's numbers and times against a fine solution of the same model.

A table of N evaluations is written in the flow variable, y = x / (alpha + sigma) and m = eps-hat - x0-hat, as

.. math:: y_{i+1} = y_i + d_i\,y_0 + (u_{i+1} - u_i) \sum_{j \le i} W_{ij} m_j,
    \qquad u = \sigma / (\alpha + \sigma), \quad u_N = 0,

so that every rule of the package is one choice of the times and of the lower triangle W (Shaul et al. 2024, arXiv
2403.01329, the non-stationary family), all of whose entries are of order one.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kuosan.denoiser import evaluating
from kuosan.prediction import Prediction
from kuosan.process import Process, expand
from kuosan.schedules import Time
from kuosan.seeds import stream
from kuosan.solvers.executor import Model, run
from kuosan.solvers.grids import LinearBetaTime, Rectified, UniformLogSNR
from kuosan.solvers.multistep import AdamsBashforth
from kuosan.solvers.table import Row, Table
from kuosan.solvers.variables import clock_at, scale_at


class Tunable(nn.Module):
    r"""The times and numbers of a deterministic table as parameters.

    Row i is learned as :math:`\theta_i`, which weighs the outputs' differences, :math:`m_i, m_i - m_{i-1}` and so on up
    to the third of every age: neighbouring outputs are nearly the same, and descent on W itself would be slow.

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
        self.basis = _differences(len(times))
        self.theta = nn.Parameter(torch.linalg.solve(self.basis, _numbers(process, table).unsqueeze(-1)).squeeze(-1))

    def times(self) -> Tensor:
        """t_0 > t_1 > ... > t_N = 0, float64."""
        lengths = torch.softmax(self.lengths, 0) * self.first
        inner = self.first - lengths.cumsum(0)[:-1]
        ends = self.lengths.new_tensor([self.first])
        return torch.cat([ends, inner, ends * 0])

    def numbers(self) -> Tensor:
        """d and W, (N, 1 + N), with zeros where an output is still to come."""
        return (self.basis @ self.theta.unsqueeze(-1)).squeeze(-1).tril(1)

    def forward(
        self,
        model: Model,
        x: Tensor,
        condition: object = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Where the table takes x, (B, ...), with gradients to its numbers and times."""
        times, numbers = self.times(), self.numbers()
        alpha, sigma = self.process.scales(times)
        total = alpha + sigma
        u = sigma / total
        y = y_0 = x / expand(total[0], x)
        outputs = list[Tensor]()
        for i in range(len(times) - 1):
            t = times[i] if i else self.first  # a number: where there is no signal at all, models ask for one
            outputs.append(_output(model, expand(total[i], y) * y, t, condition, transform))
            y = y + expand(numbers[i, 0], y) * y_0
            for number, output in zip(numbers[i, 1:] * (u[i + 1] - u[i]), outputs, strict=False):
                y = y + expand(number, y) * output
        return y

    @torch.no_grad()
    def regress(
        self,
        model: Model,
        pairs: Pairs,
        transform: Callable[[Tensor], Tensor] | None = None,
        ridge: float = 1e-6,
    ) -> None:
        """Each row's numbers, one row after the other, by least squares to the fine solution at the row's end.

        A row sees where the rows before it really arrived, and so makes up for what they missed.

        Args:
            pairs: with their paths.
            ridge: towards the numbers as they were, relative to each one's own part in the sum of squares.
        """
        times = self.times().tolist()
        u, g = ([at("flow", self.process, t) for t in times] for at in (clock_at, scale_at))
        numbers = self.numbers()
        y = pairs.x / g[0]
        columns = [y.cpu().double().flatten()]
        for i, t in enumerate(times[:-1]):
            outputs = [
                _output(model, part.x, t, part.condition, transform)
                for part in dataclasses.replace(pairs, x=g[i] * y).batches()
            ]
            columns.append(torch.cat(outputs).cpu().double().flatten())
            a = torch.stack([columns[0], *((u[i + 1] - u[i]) * m for m in columns[1:])])
            own = slice(0, i + 2)
            missing = (pairs.on_path(u[i + 1]) - y).cpu().double().flatten() - numbers[i, own] @ a
            gram = a @ a.mT
            gram += ridge * torch.diag(gram.diagonal())
            numbers[i, own] += torch.linalg.solve(gram, a @ missing)
            y = y + (numbers[i, own] @ a).view_as(y).to(y)
        self.theta.copy_(torch.linalg.solve(self.basis, numbers.unsqueeze(-1)).squeeze(-1))

    @torch.no_grad()
    def table(self) -> Table:
        """The numbers as they are now, as a table for the executor."""
        times, numbers = [min(t, 1.0) for t in self.times().tolist()], self.numbers().tolist()
        u, g = ([at("flow", self.process, t) for t in times] for at in (clock_at, scale_at))
        rows = []
        for i, t in enumerate(times[:-1]):
            drift, *weights = numbers[i][: i + 2]
            m = [g[i + 1] * (u[i + 1] - u[i]) * w for w in reversed(weights)]
            x = [0.0] * (i + 1)
            x[0] += g[i + 1] / g[i]
            x[i] += g[i + 1] / g[0] * drift
            rows.append(Row(t, x=tuple(x), m=tuple(m)))
        return Table(tuple(rows), "flow")


def _output(
    model: Model, x: Tensor, t: Time, condition: object, transform: Callable[[Tensor], Tensor] | None
) -> Tensor:
    """eps-hat - x0-hat."""
    prediction = model(x, t, condition)
    return (prediction if transform is None else prediction.with_x0(transform(prediction.x0))).flow


def _numbers(process: Process, table: Table) -> Tensor:
    """d and W of a table, (N, 1 + N)."""
    times = [*table.times, 0.0]
    u = torch.tensor([clock_at("flow", process, t) for t in times], dtype=torch.float64)
    g = torch.tensor([scale_at("flow", process, t) for t in times], dtype=torch.float64)
    a, b, _ = table.read_as("flow", process).dense()
    start = torch.cat([torch.ones(1, dtype=torch.float64), a * g[0] / g[1:]])
    outputs = torch.cat([torch.zeros(1, len(b), dtype=torch.float64), b / g[1:, None]])
    return torch.cat([start.diff()[:, None], outputs.diff(dim=0) / u.diff()[:, None]], 1)


def _differences(n: int, order: int = 3) -> Tensor:
    """What theta is multiplied by to be (d_i, W_i0, ..., W_ii), (n, 1 + n, 1 + n): columns of signed binomials."""
    basis = torch.eye(1 + n, dtype=torch.float64).repeat(n, 1, 1)
    basis[:, 0, 0] = 0.1  # for descent to move the drift with a tenth of the speed
    for i in range(n):
        for k in range(i + 1):
            newest, depth = i - max(k - order, 0), min(k, order)
            basis[i, :, 1 + k] = 0
            for j in range(depth + 1):
                basis[i, 1 + newest - j, 1 + k] = (-1) ** j * math.comb(depth, j)
    return basis


def starts(process: Process, steps: int) -> Iterator[tuple[str, Table]]:
    """The fixed rules that tuning may start from, by name."""
    spacings = {
        "linear_beta": LinearBetaTime(),
        "linear_beta power=1": LinearBetaTime(power=1.0),
        "linear_beta shift=0.8": LinearBetaTime(0.8),
        "rectified": Rectified(),
        "rectified power=1.25": Rectified(power=1.25),
        "rectified power=1.5": Rectified(power=1.5),
        "rectified shift=2": Rectified(shift=2.0),
        "log_snr last=0.03": UniformLogSNR(last=0.03),
        "log_snr last=0.1": UniformLogSNR(last=0.1),
    }
    for name, spacing in spacings.items():
        for order, corrector in ((1, False),) if steps == 1 else ((2, False), (min(steps, 3), False), (2, True)):
            table = AdamsBashforth(order, corrector=corrector).table(process, spacing, steps=steps)
            yield f"adams_bashforth order={order}{' corrector=true' if corrector else ''}, {name}", table


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
        start: the best fixed rule, by name.
        errors, start_errors: of both.
        improved: whether the table is not the start.
    """

    table: Table
    start: str
    errors: Errors
    start_errors: Errors
    improved: bool


@dataclass(frozen=True)
class Pairs:
    r"""Start points, their conditions, and where the fine solution of the same model takes them.

    Args:
        x: (n, ...).
        condition: of each, (n,), or None.
        end: like x.
        u: the fine solution's times :math:`\sigma/(\alpha+\sigma)`, falling to 0, and
        y, m: its states over alpha + sigma and its outputs there, (len(u), n, ...); empty if the path is not kept.
    """

    x: Tensor
    condition: Tensor | None
    end: Tensor
    u: tuple[float, ...] = ()
    y: Tensor | None = None
    m: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, which: Tensor | slice) -> Pairs:
        """Some of them, without their paths."""
        return Pairs(self.x[which], None if self.condition is None else self.condition[which], self.end[which])

    @classmethod
    def joined(cls, parts: Sequence[Pairs]) -> Pairs:
        """One after the other; with their paths, if the first has one."""
        one = parts[0]
        condition = (
            None if one.condition is None else torch.cat([p.condition for p in parts if p.condition is not None])
        )
        y, m = (None if one.y is None else torch.cat([getattr(p, k) for p in parts], 1) for k in ("y", "m"))
        return cls(torch.cat([p.x for p in parts]), condition, torch.cat([p.end for p in parts]), one.u, y, m)

    def batches(self, size: int = 256) -> Iterator[Pairs]:
        for first in range(0, len(self), size):
            yield self[first : first + size]

    def on_path(self, u: float) -> Tensor:
        """The fine solution's y at u: a cubic through two of its states, with their slopes m."""
        assert self.y is not None
        assert self.m is not None
        k = min(max(bisect.bisect_left(self.u, -u, key=lambda v: -v), 1), len(self.u) - 1)
        h = self.u[k] - self.u[k - 1]
        r = (u - self.u[k - 1]) / h
        rise = self.y[k] - self.y[k - 1]
        bend = (1 - r) * (h * self.m[k - 1] - rise) - r * (h * self.m[k] - rise)
        return self.y[k - 1] + r * rise + r * (1 - r) * bend


#: The weight of the mean of the logarithms in the loss.
TYPICAL = 0.1

#: How many numbers the samples have together whose paths are kept for :meth:`Tunable.regress`: four samples at least.
KEPT = 2**18


def tune(
    model: Model,
    shape: tuple[int, ...],
    steps: int,
    *,
    labels: Callable[[int], Tensor | None] | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    temperature: float = 1.0,
    pairs: int = 1024,
    iterations: int = 300,
    batch_size: int = 64,
    learning_rate: float = 0.01,
    fine: int = 100,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int, str], None] | None = None,
) -> Tuned:
    r"""Fit a table of so many evaluations to a model: least squares row by row, then Adam on all numbers and times.

    Every grid of :func:`starts` is fitted by :meth:`Tunable.regress`, and Adam goes on from the best of them with the
    distance to the end of the fine solution,

    .. math:: \log\overline{\|e\|^2} + \tfrac1{10}\,\overline{\log\|e\|^2} .

    What did best on fresh samples by RMSE, the best fixed rule among them, is kept, and measured on samples fresh
    again. The same arguments give the same table.

    Args:
        model: a denoiser, or one wrapped in guidance: the table is for that weight.
        shape: of one sample.
        steps: N, evaluations of the tuned table.
        labels: gives the conditions of n samples.
        transform, temperature: of x0-hat, and of the noise at the start, as in sampling.
        pairs: samples to fit; a quarter as many to choose (16 at least), and as many as that again to measure.
        iterations: of Adam, its learning rate falling to 0 along half a cosine.
        batch_size: samples of each iteration.
        learning_rate: of Adam.
        fine: steps of the fine solution, of order 4.
        progress: called with (done, all, words).

    Raises:
        ValueError: steps, pairs, iterations or batch_size under 1, or fine not over steps and 3.
    """
    if min(steps, pairs, iterations, batch_size) < 1:
        raise ValueError("steps, pairs, iterations and batch_size must be at least 1")
    if fine <= max(steps, 3):
        raise ValueError(f"the fine solution, of order 4, must have more steps than the table's {steps}, got {fine}")
    process = model.process
    say = progress or (lambda done, total, words: None)
    generator = stream("tune", seed)
    held_out = max(pairs // 4, 16)
    with evaluating(model) if isinstance(model, nn.Module) else nullcontext():
        solve = Fine(model, transform, fine)
        start = temperature * process.prior(solve.table.times[0]).std.to(dtype)

        def draw(n: int, words: str, path: bool = False) -> Pairs:
            x = (start * torch.randn(n, *shape, generator=generator, dtype=dtype)).to(device)
            condition = None if labels is None else labels(n)
            condition = None if condition is None else condition.to(device)
            solved = []
            for batch in Pairs(x, condition, x).batches():
                solved.append(solve(batch, path))
                say(min(256 * len(solved), n), n, f"fine solution, to {words}")
            return Pairs.joined(solved)

        def rmse(table: Table, on: Pairs) -> float:
            return _errors(table, model, transform, on).rmse

        paths = draw(min(pairs, max(KEPT // math.prod(shape), 4)), "fit", path=True)
        more = pairs - len(paths)
        fit = Pairs.joined([paths[:], draw(more, "fit")]) if more else paths[:]
        choose, fresh = draw(held_out, "choose"), draw(held_out, "measure")

        fixed = dict(starts(process, steps))
        few = fit[:held_out]
        name = min(fixed, key=lambda one: rmse(fixed[one], few))
        fitted = []
        grids = {table.times: table for table in fixed.values()}
        for done, table in enumerate(grids.values(), 1):
            tunable = Tunable(process, table)
            tunable.regress(model, paths, transform)
            fitted.append((rmse(tunable.table(), few), tunable))
            say(done, len(grids), "grids, row by row")
        tunable = min(fitted, key=lambda one: one[0] if math.isfinite(one[0]) else math.inf)[1]
        candidates = [(rmse(table, choose), table) for table in (fixed[name], tunable.table())]
        look = max(iterations // 10, 1)
        for i in _descend(tunable, model, fit, transform, iterations, batch_size, learning_rate, generator):
            if i % look == 0 or i == iterations:
                table = tunable.table()
                candidates.append((rmse(table, choose), table))
                say(i, iterations, f"rmse {candidates[-1][0]:.4g}")
        best = min(candidates, key=lambda one: one[0])[1]
        before, after = (_errors(table, model, transform, fresh) for table in (fixed[name], best))
        if after.rmse >= before.rmse:
            best, after = fixed[name], before
        return Tuned(best, name, after, before, best is not fixed[name])


class Fine:
    """The fine solution: of order 4, on the default grid."""

    def __init__(self, model: Model, transform: Callable[[Tensor], Tensor] | None, steps: int):
        self.model, self.transform = model, transform
        self.table = AdamsBashforth(4).table(model.process, LinearBetaTime(), steps=steps)

    def __call__(self, pairs: Pairs, path: bool) -> Pairs:
        y, m = list[Tensor](), list[Tensor]()
        g = [scale_at("flow", self.model.process, t) for t in self.table.times]

        def watch(i: int, x: Tensor, prediction: Prediction) -> None:
            y.append(x / g[i])
            m.append(prediction.flow)

        end = run(
            self.table,
            self.model,
            pairs.x,
            condition=pairs.condition,
            transform=self.transform,
            watch=watch if path else None,
        )
        if not path:
            return Pairs(pairs.x, pairs.condition, end)
        u = (*(clock_at("flow", self.model.process, t) for t in self.table.times), 0.0)
        last = m[-1] + (m[-1] - m[-2]) * (u[-1] - u[-2]) / (u[-2] - u[-3])
        return Pairs(pairs.x, pairs.condition, end, u, torch.stack([*y, end]), torch.stack([*m, last]))


def _errors(table: Table, model: Model, transform: Callable[[Tensor], Tensor] | None, on: Pairs) -> Errors:
    ends = [run(table, model, part.x, condition=part.condition, transform=transform) for part in on.batches()]
    return Errors.of(torch.cat(ends), on.end)


def _descend(
    tunable: Tunable,
    model: Model,
    fit: Pairs,
    transform: Callable[[Tensor], Tensor] | None,
    iterations: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
) -> Iterator[int]:
    """Adam; yields the number of each iteration that is done, and ends early where it diverges."""
    parameters = [tunable.theta, tunable.lengths]
    optimiser = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.99))
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: 0.5 + 0.5 * math.cos(math.pi * i / iterations))
    for i in range(1, iterations + 1):
        batch = fit[torch.randint(len(fit), (batch_size,), generator=generator)]
        with torch.enable_grad():
            end = tunable(model, batch.x, batch.condition, transform)
            each = (end - batch.end).square().flatten(1).mean(1)
            # logarithms, so that the gradient keeps its size; the mean alone is decided by the few samples on the
            # border between two modes, and the mean of the logarithms speaks for all others
            loss = each.mean().log() + TYPICAL * each.clamp_min(1e-20).log().mean()
            gradients = torch.autograd.grad(loss, parameters)  # and not that of the model's own parameters
        if not all(bool(torch.isfinite(g).all()) for g in gradients):
            return
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(parameters, 1.0)  # one sample on a border can have a gradient of thousands
        optimiser.step()
        decay.step()
        yield i
