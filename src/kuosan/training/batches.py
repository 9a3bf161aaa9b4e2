"""Which examples, times and noise step k sees: a function of (seed, k) alone, cut into equal parts for processes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kuosan.objectives import TimeSampler
from kuosan.process import Process
from kuosan.seeds import stream


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n: int) -> Tensor:
    return torch.randperm(n, generator=stream("order", seed, epoch))


def indices(seed: int, step: int, batch_size: int, n: int) -> Tensor:
    """The examples of step ``step`` (from 0), whole batch: every epoch visits each example once, shuffled anew."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return torch.stack([_order(seed, position // n, n)[position % n] for position in positions])


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step, for the whole batch."""

    index: Tensor
    t: Tensor
    weight: Tensor
    noise: Tensor
    keep_label: Tensor

    def part(self, rows: slice) -> Draws:
        return Draws(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


def draws(
    seed: int,
    step: int,
    batch_size: int,
    n: int,
    shape: tuple[int, ...],
    times: TimeSampler,
    process: Process | None,
    label_drop: float,
) -> Draws:
    """The draws of a step. Every process makes all of them and uses its part, so that their number changes nothing."""
    t, weight = times.sample(process, batch_size, stream("times", seed, step))
    return Draws(
        index=indices(seed, step, batch_size, n),
        t=t,
        weight=weight,
        noise=torch.randn(batch_size, *shape, generator=stream("noise", seed, step)),
        keep_label=torch.rand(batch_size, generator=stream("labels", seed, step)) >= label_drop,
    )
