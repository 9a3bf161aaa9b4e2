"""Which terms of a bound are evaluated, of which example, and with what weight, so that their sum is unbiased."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: all         every rung, each with latents of its own
#: shared      every rung along one path
#: random      one rung between the ends, at random
#: stratified  the same, the rungs of all examples and draws spread evenly
#: importance  the same, more often where a pilot found the terms to be large; rung 0 is drawn like the others
TERMS = ("all", "shared", "random", "stratified", "importance")
#: At most so many independent estimates are kept, to tell the noise of their mean.
REPLICATES = 8


def shares_of(draws: int) -> Tensor:
    """How many draws each replicate has."""
    count = min(draws, REPLICATES)
    return torch.tensor([len(part) for part in torch.arange(draws).tensor_split(count)])


@dataclass(frozen=True)
class Visits:
    """m terms to be evaluated, flat: rung, example, weight and replicate, each (m,)."""

    rung: Tensor
    example: Tensor
    weight: Tensor
    replicate: Tensor

    def __len__(self) -> int:
        return len(self.rung)

    def __getitem__(self, chosen: Tensor) -> Visits:
        return Visits(self.rung[chosen], self.example[chosen], self.weight[chosen], self.replicate[chosen])

    def batches(self, size: int, length: int, mixed: bool) -> Iterator[tuple[int | None, Tensor]]:
        """Which go together: those of rung 0, of rung T, and (None) all between or, unless ``mixed``, of each rung."""
        ends = (self.rung == 0) | (self.rung == length)
        kind = torch.where(ends, self.rung, -1) if mixed else self.rung
        for value in kind.unique().tolist():
            for chosen in (kind == value).nonzero().flatten().split(size):
                yield (None if value < 0 else value), chosen


def even(n: int, shares: Tensor, generator: torch.Generator) -> Tensor:
    """(draws * n,) points of [0, 1): in each replicate one in each of its even strata, an example's own spread too."""
    points = []
    for share in shares.tolist():
        stratum = torch.cat([torch.randperm(n, generator=generator) + j * n for j in range(share)])
        points.append((stratum + torch.rand(share * n, generator=generator, dtype=torch.float64)) / (share * n))
    return torch.cat(points)


def plan(
    terms: str, n: int, length: int, draws: int, generator: torch.Generator, chances: Tensor | None = None
) -> Visits:
    """The visits to the T + 1 rungs of n examples.

    Rung T, which takes no network, once in each draw; of the others what ``terms`` says: rung 0, the decoder, once in
    each draw too, but by chance like the rest if ``chances`` are given.

    Args:
        length: T.
        chances: (T,), of the rungs 0 to T - 1, for "importance".
    """
    shares = shares_of(draws)
    replicate = torch.arange(len(shares)).repeat_interleave(shares * n)
    example = torch.arange(n).repeat(draws)
    ones = torch.ones(len(example), dtype=torch.float64)
    rung, weight = [torch.full_like(example, length)], [ones]
    if chances is None:
        rung.append(torch.zeros_like(example))
        weight.append(ones)
    between = length - 1
    if terms == "all":
        rung.append(torch.arange(1, length).repeat_interleave(len(example)))
        weight.append(ones.repeat(between))
    elif chances is not None or between:
        if terms == "random":
            u = torch.rand(len(example), generator=generator, dtype=torch.float64)
        else:
            u = even(n, shares, generator)
        p = torch.full((between,), 1 / between, dtype=torch.float64) if chances is None else chances
        index = torch.searchsorted(p.cumsum(0), u, right=True).clamp_max(len(p) - 1)
        rung.append(index + (chances is None))
        weight.append(1 / p[index])
    flat = torch.cat(rung)
    times = len(flat) // len(example)
    return Visits(flat, example.repeat(times), torch.cat(weight), replicate.repeat(times))


@dataclass(frozen=True)
class Pilot:
    """A first look at how large the terms of rungs 0 to T - 1 are: cells of neighbouring rungs, some visits in each.

    Args:
        length: T.
        cells: how many cells of the rungs above 0, which is a cell by itself.
        visits: in each cell.
        floor: share of the chances that stays even, so that no rung is forgotten.
    """

    length: int
    cells: int = 24
    visits: int = 16
    floor: float = 0.1

    def plan(self, n: int, generator: torch.Generator) -> Visits:
        cell = self._cell()
        rung = []
        for c in range(int(cell[-1]) + 1):
            inside = (cell == c).nonzero().flatten()
            rung.append(inside[torch.randint(len(inside), (self.visits,), generator=generator)])
        flat = torch.cat(rung)
        example = torch.randint(n, (len(flat),), generator=generator)
        return Visits(flat, example, torch.ones(len(flat), dtype=torch.float64), torch.zeros_like(flat))

    def _cell(self) -> Tensor:
        """The cell of each rung from 0 to T - 1."""
        between = self.length - 1
        above = torch.arange(between) * min(self.cells, between) // max(between, 1)
        return torch.cat([torch.zeros(1, dtype=torch.int64), above + 1])

    def chances(self, visits: Visits, values: Tensor) -> Tensor:
        """(T,): in proportion to the root mean square of the terms in each cell, the best without strata."""
        cell = self._cell()
        where = cell[visits.rung]
        size = torch.zeros(int(cell[-1]) + 1, dtype=torch.float64).index_add_(0, where, values.double() ** 2).sqrt()
        chances = size[cell] if bool(size.sum() > 0) else torch.ones(len(cell), dtype=torch.float64)
        return (1 - self.floor) * chances / chances.sum() + self.floor / len(cell)
