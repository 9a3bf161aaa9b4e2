"""The one executor that runs any table, and sampling: one seed, one generator and one noise for each sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
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


def _combine(parts: Iterable[tuple[float | Tensor, Tensor]]) -> Tensor:
    """Sum of coefficient times tensor, in as few operations as there are terms."""
    total: Tensor | None = None
    for coefficient, tensor in parts:
        if total is None:
            total = coefficient * tensor
        elif isinstance(coefficient, Tensor):
            total = torch.addcmul(total, coefficient, tensor)
        else:
            total = torch.add(total, tensor, alpha=coefficient)
    assert total is not None
    return total


@torch.no_grad()
def run(
    table: Table,
    model: Model,
    x_init: Tensor,
    noise: Callable[[], Tensor],
    condition: object = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    watch: Callable[[int, Tensor, Prediction], None] | None = None,
) -> Tensor:
    """Run a table: one model evaluation for each of its rows.

    Args:
        table: the sampler.
        model: called as ``model(x_t, t, condition)``.
        x_init: (B, ...), at the table's first time.
        noise: returns the next noise, like ``x_init``; called only where a row has one.
        condition: passed on to the model.
        transform: applied to each x0-hat before it is used: clipping, thresholding, rounding.
        watch: called as ``watch(i, X_i, prediction)`` after each evaluation.

    Returns:
        The last state, (B, ...): the data, if the table ends on it.
    """
    depths = [max(len(part) for part in parts) for parts in zip(*(row.history() for row in table.rows), strict=True)]
    depths[0] = max(depths[0], 1)  # the model sees the newest state whether or not a row does
    used = {i - k for i, row in enumerate(table.rows) for k, c in enumerate(row.history()[2]) if c}  # noises
    states: list[Tensor] = [x_init]
    outputs: list[Tensor] = []
    noises: list[Tensor] = []
    for i, (t, row) in enumerate(zip(table.times, table.rows, strict=True)):
        prediction = model(states[0], t, condition)
        if transform is not None:
            prediction = prediction.with_x0(transform(prediction.x0))
        if watch is not None:
            watch(i, states[0], prediction)
        outputs.insert(0, prediction.read(table.form))
        parts: list[tuple[float | Tensor, Tensor]] = []
        x, m, z = row.history()
        parts += [(c, states[k]) for k, c in enumerate(x) if c]
        parts += [(c, outputs[k]) for k, c in enumerate(m) if c]
        if i in used:
            noises.insert(0, noise().to(x_init))
        else:
            noises.insert(0, torch.zeros(()))  # keeps the places of the others; nothing multiplies it
        if row.z_upper is None:
            parts += [(c, noises[k]) for k, c in enumerate(z) if c]
        else:
            parts.append((_own_std(prediction, z[0], row.z_upper), noises[0]))
        states.insert(0, _combine(parts) if parts else torch.zeros_like(x_init))
        for kept, depth in zip((states, outputs, noises), depths, strict=True):
            del kept[depth:]  # no row reaches back further
    return states[0]


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
            finished.append(run(table, denoiser, x_init, noise.draw, given, transform).cpu())
            if progress is not None:
                progress(min(first + batch_size, len(seeds)), len(seeds))
    return torch.cat(finished)
