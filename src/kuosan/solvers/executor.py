"""The one executor that runs any table, and sampling: one seed, one generator and one noise for each sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from kuosan.denoiser import evaluating
from kuosan.prediction import Prediction
from kuosan.process import Grid, Process
from kuosan.schedules import Time
from kuosan.seeds import stream
from kuosan.solvers.ddim import DDIM
from kuosan.solvers.table import Solver, Table


class Model(Protocol):
    """Whatever answers like a denoiser: a :class:`~kuosan.Denoiser`, or one wrapped in guidance."""

    @property
    def process(self) -> Process: ...

    def __call__(self, x_t: Tensor, t: Time, condition: object = None) -> Prediction: ...


class Noise:
    """Standard-normal draws in which sample k depends on seed k alone: not on its batch, not on the other samples.

    Args:
        seeds: one for each sample, 0 <= seed < 2^63.
        shape: of one sample.
        dtype: of the draws.
    """

    def __init__(self, seeds: Sequence[int], shape: Sequence[int], dtype: torch.dtype = torch.float32):
        self._generators = [stream("sample", seed) for seed in seeds]
        self._shape, self._dtype = tuple(shape), dtype

    def draw(self) -> Tensor:
        """The next draw of every sample, (B, *shape), on the CPU."""
        return torch.stack([torch.randn(self._shape, generator=g, dtype=self._dtype) for g in self._generators])


@dataclass(frozen=True)
class _Step:
    """One row made ready: which tensors it adds up, in as few operations as there are terms."""

    t: float
    terms: tuple[tuple[int, int, float], ...]  # (0 state, 1 output, 2 noise; how many evaluations ago; coefficient)
    first: Tensor  # the first term's coefficient as a tensor: half the cost of a number
    draws: bool  # whether this row or a later one uses its noise
    ends: tuple[float, float] | None  # of the model's own standard deviation


def _plan(table: Table, like: Tensor) -> tuple[list[_Step], tuple[int, int, int]]:
    """The steps, and how many states, outputs and noises have to be kept."""
    depths = [max(len(part) for part in parts) for parts in zip(*(row.history() for row in table.rows), strict=True)]
    used = {i - k for i, row in enumerate(table.rows) for k, c in enumerate(row.z) if c}
    steps = []
    for i, row in enumerate(table.rows):
        x, m, z = row.history()
        parts = (x, m, z if row.z_upper is None else ())
        terms = [(which, k, c) for which, part in enumerate(parts) for k, c in enumerate(part) if c] or [(0, 0, 0.0)]
        ends = None if row.z_upper is None else (row.z[0], row.z_upper)
        first = torch.tensor(terms[0][2], dtype=like.dtype)
        steps.append(_Step(row.t, tuple(terms), first, i in used, ends))
    return steps, (max(depths[0], 1), max(depths[1], 1), max(depths[2], 1))


@torch.no_grad()
def run(
    table: Table,
    model: Model,
    x_init: Tensor,
    noise: Callable[[], Tensor] | None = None,
    condition: object = None,
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
    correct: Callable[[Tensor, float], Tensor] | None = None,
    watch: Callable[[int, Tensor, Prediction], None] | None = None,
) -> Tensor:
    """Run a table: one model evaluation for each of its rows.

    The table is first turned into the form in which the model answers, so that an output is used as it comes; each row
    is then one operation for each of its terms, into memory that is used again.

    Args:
        table: the sampler.
        model: called as ``model(x_t, t, condition)``.
        x_init: (B, ...), at the table's first time.
        noise: returns the next noise, like ``x_init``; called only where a row has one.
        condition: passed on to the model.
        transform: applied to each x0-hat before it is used: clipping, thresholding, rounding.
        correct: applied as ``correct(x, t)`` to each state before it is evaluated: a corrector, such as Langevin's.
        watch: called as ``watch(i, X_i, prediction)`` after each evaluation.

    Returns:
        The last state, (B, ...): the data, if the table ends on it.

    Raises:
        ValueError: a table with noise, and no source of noise.
    """
    if table.stochastic and noise is None:
        raise ValueError("this table is stochastic: it has no one trajectory; give it noise, or take an ODE solver")
    states: list[Tensor] = [x_init]
    outputs: list[Tensor] = []
    noises: list[Tensor] = []
    steps: list[_Step] = []
    form, depths, spare = "", (1, 1, 1), list[Tensor]()
    for i in range(table.evaluations):
        if correct is not None:
            states[0] = correct(states[0], table.rows[i].t)
        x = states[0]
        prediction = model(x, table.rows[i].t, condition)
        if transform is not None:
            prediction = prediction.with_x0(transform(prediction.x0))
        if watch is not None:
            watch(i, x, prediction)
        if not steps:
            form = prediction.form
            steps, depths = _plan(table.read_as(form, model.process), x)
        step = steps[i]
        value = prediction.read(form)
        if value is x and depths[1] > 1:
            value = value.clone()  # a network that returns its input, whose memory will be used again
        outputs.insert(0, value)
        noises.insert(0, noise().to(x) if step.draws else _NONE)  # type: ignore[misc]
        past = (states, outputs, noises)
        which, k, _ = step.terms[0]
        total = torch.mul(past[which][k], step.first, out=spare.pop() if spare else torch.empty_like(x))
        for which, k, c in step.terms[1:]:
            total.add_(past[which][k], alpha=c)
        if step.ends is not None:
            total.addcmul_(_own_std(prediction, *step.ends), noises[0])
        states.insert(0, total)
        if len(states) > depths[0]:  # no row reaches back further
            old = states.pop()
            if watch is None and correct is None and old is not x_init:
                spare.append(old)
        del outputs[depths[1] :], noises[depths[2] :]
    return states[0]


_NONE = torch.zeros(())  # keeps the place of a noise that nothing multiplies


def _own_std(prediction: Prediction, low: float, high: float) -> Tensor:
    """low^(1-f) high^f with the fraction f of the *variance* that the network says."""
    if prediction.variance_fraction is None:
        raise ValueError('variance="learned" needs a denoiser made with learned_variance=True')
    ratio = torch.log(torch.tensor(high / low, dtype=torch.float64)).item()
    return low * torch.exp(prediction.variance_fraction * ratio)


def check_seeds(seeds: Iterable[int]) -> list[int]:
    """The seeds as a list.

    Raises:
        ValueError: there are none, one is not in [0, 2^63), or one is repeated (it would give the same sample twice).
    """
    given = list(seeds)
    seeds = [int(seed) for seed in given]
    if seeds != given:
        raise ValueError(f"a seed is a whole number, got {next(g for g in given if int(g) != g)}")
    if not seeds:
        raise ValueError("at least one seed is needed: there is one sample for each seed")
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise ValueError(f"a seed is a whole number from 0 to 2^63 - 1, got {seed}")
    repeated = sorted({seed for seed in seeds if seeds.count(seed) > 1}) if len(set(seeds)) < len(seeds) else []
    if repeated:
        raise ValueError(f"every sample needs its own seed; repeated: {', '.join(map(str, repeated[:5]))}")
    return seeds


@torch.no_grad()
def sample(
    denoiser: Model,
    shape: Sequence[int],
    *,
    seeds: Iterable[int],
    solver: Solver | None = None,
    steps: int | None = None,
    grid: Grid | None = None,
    table: Table | None = None,
    condition: Tensor | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 256,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw samples: number k is a function of (seed k, condition k, model, solver) and of nothing else.

    The noise is bit-identical whatever the batch; the value is too wherever the batch has the same shape, and otherwise
    to rounding, since matrix kernels round differently by shape.

    Args:
        denoiser: a :class:`~kuosan.Denoiser`, or one wrapped in guidance.
        shape: of one sample.
        seeds: one for each sample, all different.
        solver: default DDIM.
        steps: on the process's sampling grid; or ``grid``; or a whole ``table``, which then replaces solver and grid.
        condition: one for each sample, (B, ...).
        transform: of x0-hat, such as ``lambda x: x.clamp(-1, 1)``.
        batch_size: samples at once.
        progress: called with (done, all) after each batch.

    Returns:
        (B, *shape).

    Raises:
        ValueError: no seeds or repeated ones, steps out of range, or as many conditions as seeds are not given.
    """
    seeds = check_seeds(seeds)
    if table is None:
        table = (solver or DDIM()).table(denoiser.process, grid, steps=steps)
    elif solver is not None or steps is not None or grid is not None:
        raise ValueError("a table already is a solver on a grid: drop solver, steps and grid")
    if condition is not None and len(condition) != len(seeds):
        raise ValueError(f"one condition for each seed expected: {len(seeds)} seeds, {len(condition)} conditions")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    start = denoiser.process.prior(table.times[0]).std.to(dtype)
    finished = []
    with evaluating(denoiser) if isinstance(denoiser, nn.Module) else nullcontext():
        for first in range(0, len(seeds), batch_size):
            part = slice(first, first + batch_size)
            noise = Noise(seeds[part], shape, dtype)
            given = None if condition is None else condition[part].to(device)
            x_init = (start * noise.draw()).to(device)
            finished.append(run(table, denoiser, x_init, noise.draw, given, transform=transform).cpu())
            if progress is not None:
                progress(min(first + batch_size, len(seeds)), len(seeds))
    return torch.cat(finished)
