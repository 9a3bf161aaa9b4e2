"""The one executor: it runs any table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kuosan.prediction import Prediction
from kuosan.process import Process
from kuosan.schedules import Time
from kuosan.solvers.table import Table


class Model(Protocol):
    """Whatever answers like a denoiser: a :class:`~kuosan.Denoiser`, or one wrapped in guidance."""

    @property
    def process(self) -> Process: ...

    def __call__(self, x_t: Tensor, t: Time, condition: object = None) -> Prediction: ...


@dataclass(frozen=True)
class _Step:
    """One row made ready: which tensors it adds up, in as few operations as there are terms."""

    t: float
    terms: tuple[tuple[int, int, float], ...]  # (0 state, 1 output, 2 noise; how many evaluations ago; coefficient)
    first: Tensor  # the first term's coefficient as a tensor: half the cost of a number
    draws: bool  # whether this row or a later one uses its noise
    ends: tuple[float, float] | None  # of the model's own standard deviation
    each: Tensor | None  # what the noise of each coordinate is multiplied by


def _plan(table: Table, like: Tensor) -> tuple[list[_Step], tuple[int, int, int]]:
    """The steps, and how many states, outputs and noises have to be kept."""
    depths = [max(len(part) for part in parts) for parts in zip(*(row.history() for row in table.rows), strict=True)]
    used = {i - k for i, row in enumerate(table.rows) for k, c in enumerate(row.history()[2]) if c}
    steps = []
    for i, row in enumerate(table.rows):
        x, m, z = row.history()
        parts = (x, m, z if row.z_upper is None else ())
        terms = [(which, k, c) for which, part in enumerate(parts) for k, c in enumerate(part) if c] or [(0, 0, 0.0)]
        ends = None if row.z_upper is None else (z[0], row.z_upper)
        first = torch.tensor(terms[0][2], dtype=like.dtype)
        each = None if row.z_each is None else row.z_each.to(like)
        if each is not None and each.shape != like.shape[1:]:
            raise ValueError(f"row {i} has noise for samples of shape {tuple(each.shape)}, not {tuple(like.shape[1:])}")
        steps.append(_Step(row.t, tuple(terms), first, i in used, ends, each))
    return steps, (max(depths[0], 1), max(depths[1], 1), max(depths[2], 1))


def _prepared(table: Table, process: Process, form: str, like: Tensor) -> tuple[list[_Step], tuple[int, int, int]]:
    """The plan of a table in a form, made once and kept with the table."""
    key = (form, like.dtype, like.device, like.shape[1:])
    kept = table.prepared.get(key)
    if kept is None or kept[0] is not process:
        kept = table.prepared[key] = (process, _plan(table.read_as(form, process), like))
    return kept[1]


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
        model: called as ``model(x_t, t, condition)``; x_t is its own to read until it returns, and then used again.
        x_init: (B, ...), at the table's first time.
        noise: returns the next noise, like ``x_init``; called only where a row has one.
        condition: passed on to the model.
        transform: applied to each x0-hat before it is used: clipping, thresholding, rounding.
        correct: applied as ``correct(x, t)`` to each state before it is evaluated: a corrector, such as Langevin's.
        watch: called as ``watch(i, X_i, prediction)`` after each evaluation.

    Returns:
        The last state, (B, ...): the data, if the table ends on it.

    Raises:
        ValueError: a table with noise, and no source of noise; a network that overwrites answers still needed.
    """
    if table.stochastic and noise is None:
        raise ValueError("this table is stochastic: it has no one trajectory; give it noise, or take an ODE solver")
    states: list[Tensor] = [x_init]  # these three newest first, as far back as a row still reaches
    outputs: list[Tensor] = []
    noises: list[Tensor] = []
    past = (states, outputs, noises)
    used: list[int] = []  # the memory of the outputs that are kept
    steps: list[_Step] = []
    form, depths, spare = "", (1, 1, 1), list[Tensor]()
    stochastic = table.stochastic
    for i, row in enumerate(table.rows):
        if correct is not None:
            states[0] = correct(states[0], row.t)
        x = states[0]
        prediction = model(x, row.t, condition)
        if transform is not None:
            prediction = prediction.with_x0(transform(prediction.x0))
        if watch is not None:
            watch(i, x, prediction)
        if not steps:
            form = prediction.form
            steps, depths = _prepared(table, model.process, form, x)
        step = steps[i]
        value = prediction.read(form)
        if depths[1] > 1:
            memory = value.untyped_storage().data_ptr()
            if memory in used:
                raise ValueError(
                    "the network answers in memory that still holds an earlier answer, which this solver looks back "
                    "at: let it return a new tensor each time (.clone())"
                )
            if memory == x.untyped_storage().data_ptr():
                value = value.clone()  # a network that returns its input, or a view of it: used again by the solver
                memory = value.untyped_storage().data_ptr()
            used.insert(0, memory)
            del used[depths[1] :]
        outputs.insert(0, value)
        if stochastic:
            fresh = noise().to(x) if step.draws else _NONE  # type: ignore[misc]
            noises.insert(0, fresh if step.each is None or not step.draws else fresh * step.each)
            del noises[depths[2] :]
        (which, k, _), *others = step.terms
        total = torch.mul(past[which][k], step.first, out=spare.pop() if spare else torch.empty_like(x))
        for which, k, c in others:
            total.add_(past[which][k], alpha=c)
        if step.ends is not None:
            total.addcmul_(_own_std(prediction, *step.ends), noises[0])
        states.insert(0, total)
        if len(states) > depths[0]:
            old = states.pop()
            if watch is None and correct is None and old is not x_init:
                spare.append(old)
        del outputs[depths[1] :]
    return states[0]


_NONE = torch.zeros(())  # keeps the place of a noise that nothing multiplies


def _own_std(prediction: Prediction, low: float, high: float) -> Tensor:
    """low^(1-f) high^f with the fraction f of the *variance* that the network says."""
    if prediction.variance_fraction is None:
        raise ValueError('variance="learned" needs a denoiser made with learned_variance=True')
    ratio = torch.log(torch.tensor(high / low, dtype=torch.float64)).item()
    return low * torch.exp(prediction.variance_fraction * ratio)
