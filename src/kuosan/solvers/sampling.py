"""Sampling: one seed, one generator and one noise for each sample, in batches that come as they are done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from kuosan.denoiser import evaluating
from kuosan.prediction import Prediction
from kuosan.process import Grid, Process
from kuosan.seeds import stream
from kuosan.solvers.auto import Auto
from kuosan.solvers.correctors import Corrector
from kuosan.solvers.executor import Model, run
from kuosan.solvers.grids import Spacing
from kuosan.solvers.table import Solver, Table


class SamplingError(RuntimeError):
    """A sample that is not finite: says which, at which step, and what to try."""


class Noise:
    """Standard-normal draws in which sample k depends on seed k alone: not on its batch, not on the other samples.

    Args:
        seeds: one for each sample, 0 <= seed < 2^63.
        shape: of one sample.
        dtype: of the draws.
        purpose: another one has other draws of the same seeds.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        purpose: str = "sample",
    ):
        self._generators = [stream(purpose, seed) for seed in seeds]
        self._shape, self._dtype = tuple(shape), dtype

    def draw(self) -> Tensor:
        """The next draw of every sample, (B, *shape), on the CPU."""
        return torch.stack([torch.randn(self._shape, generator=g, dtype=self._dtype) for g in self._generators])


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
    repeated = sorted(seed for seed, times in Counter(seeds).items() if times > 1)
    if repeated:
        raise ValueError(f"every sample needs its own seed; repeated: {', '.join(map(str, repeated[:5]))}")
    return seeds


@torch.no_grad()
def sample_batches(
    denoiser: Model,
    shape: Sequence[int],
    table: Table,
    *,
    seeds: Sequence[int],
    condition: Tensor | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    corrector: Corrector | None = None,
    batch_size: int = 256,
    temperature: float = 1.0,
    begin: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Iterator[Tensor]:
    r"""The samples of :func:`sample` batch by batch, (<= batch_size, *shape) on the CPU, each when it is done.

    Args:
        begin: an x_0 of a sample's shape to begin with instead of nothing: at the table's first time, which is then
            earlier than 1, every sample is :math:`\alpha_t x_0 + \sigma_t\varepsilon` with noise of its own (Meng et
            al. 2022, SDEdit, arXiv 2108.01073).
        temperature: the standard deviation of the noise at the start is so many times the prior's. Below 1, samples
            are nearer to each other and to the likeliest; speech is often drawn so (Popov et al. 2021, Grad-TTS, arXiv
            2105.06337, section 3.4).

    Raises:
        ValueError: as :func:`sample`, or a temperature that is not positive.
        SamplingError: a sample is not finite.
    """
    seeds = check_seeds(seeds)
    if condition is not None and len(condition) != len(seeds):
        raise ValueError(f"one condition for each seed expected: {len(seeds)} seeds, {len(condition)} conditions")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if begin is not None and tuple(begin.shape) != tuple(shape):
        raise ValueError(f"samples have shape {tuple(shape)}, and what they begin with has {tuple(begin.shape)}")
    alpha, sigma = denoiser.process.at(Process.scales, table.times[0])
    start = temperature * denoiser.process.prior(table.times[0]).std.to(dtype)

    def drawn(part: slice, watch: Callable[[int, Tensor, Prediction], None] | None = None) -> Tensor:
        noise = Noise(seeds[part], shape, dtype)
        given = None if condition is None else condition[part].to(device)
        x_init = start * noise.draw() if begin is None else alpha * begin.to(dtype) + sigma * noise.draw()
        x_init = x_init.to(device)
        correct = None if corrector is None else corrector.on(denoiser, noise.draw, given)
        return run(table, denoiser, x_init, noise.draw, given, transform=transform, correct=correct, watch=watch)

    with evaluating(denoiser) if isinstance(denoiser, nn.Module) else nullcontext():
        for first in range(0, len(seeds), batch_size):
            part = slice(first, first + batch_size)
            x = drawn(part).cpu()
            if not bool(torch.isfinite(x).all()):
                drawn(part, _complain(seeds[part], table))  # the same again, looking at every step
                raise SamplingError("a sample is not finite, though every output was: the solver's steps are too long")
            yield x


def _complain(seeds: Sequence[int], table: Table) -> Callable[[int, Tensor, Prediction], None]:
    def watch(i: int, x: Tensor, prediction: Prediction) -> None:
        for what, tensor in (("state", x), ("model's output", prediction.value)):
            bad = (~torch.isfinite(tensor.flatten(1)).all(1)).nonzero().flatten().tolist()
            if bad:
                more = f" and {len(bad) - 1} more of its batch" if len(bad) > 1 else ""
                raise SamplingError(
                    f"seed {seeds[bad[0]]}{more}: the {what} is not finite at step {i + 1} of {table.evaluations}, "
                    f"t = {table.times[i]:.4g}. Try clipping x0 (clip = true), a lower guidance weight, float32 "
                    "instead of bfloat16, or a grid that starts under t = 1 or ends earlier"
                )

    return watch


def sample(
    denoiser: Model,
    shape: Sequence[int],
    *,
    seeds: Iterable[int],
    solver: Solver | None = None,
    steps: int | None = None,
    grid: Grid | Spacing | None = None,
    table: Table | None = None,
    condition: Tensor | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    corrector: Corrector | None = None,
    batch_size: int = 256,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Draw samples: number k is a function of (seed k, condition k, model, solver) and of nothing else.

    The noise is bit-identical whatever the batch; the value is too wherever the batch has the same shape, and otherwise
    to rounding (1e-5 relative in float32), since matrix kernels round differently by shape.

    Args:
        denoiser: a :class:`~kuosan.Denoiser`, or one wrapped in guidance, inpainting, a product, ...
        shape: of one sample.
        seeds: one for each sample, all different.
        solver: default :class:`~kuosan.solvers.Auto`.
        steps: of a grid that ``grid``, a spacing such as ``Karras()``, lays out (default: the solver's own); or
            ``grid`` is a :class:`~kuosan.Grid` of times; or a whole ``table`` replaces all three.
        condition: one for each sample, (B, ...).
        transform: of x0-hat, such as ``Clip()``.
        corrector: run before each evaluation, such as ``Langevin()``.
        batch_size: samples at once.
        temperature: of the noise at the start: see :func:`sample_batches`.
        progress: called with (done, all) after each batch.

    Returns:
        (B, *shape).

    Raises:
        ValueError: no seeds or repeated ones, steps out of range, or as many conditions as seeds are not given.
        SamplingError: a sample is not finite.
    """
    seeds = check_seeds(seeds)
    if table is None:
        table = (solver or Auto()).table(denoiser.process, grid, steps=steps)
    elif solver is not None or steps is not None or grid is not None:
        raise ValueError("a table already is a solver on a grid: drop solver, steps and grid")
    finished: list[Tensor] = []
    for x in sample_batches(
        denoiser,
        shape,
        table,
        seeds=seeds,
        condition=condition,
        transform=transform,
        corrector=corrector,
        batch_size=batch_size,
        temperature=temperature,
        dtype=dtype,
        device=device,
    ):
        finished.append(x)
        if progress is not None:
            progress(min(len(finished) * batch_size, len(seeds)), len(seeds))
    return torch.cat(finished)
