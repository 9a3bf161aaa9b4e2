"""A ladder whose q is a process on a grid of times: nothing of it is learned, and its rungs are all alike."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kuosan.chain import Chain
from kuosan.kernels import Generative, Guide, Place, Rung
from kuosan.process import Grid, expand
from kuosan.schedules import float64
from kuosan.visits import even


class ProcessGuide(Guide):
    """A process on a grid as a q, known up, down and at every rung.

    Args:
        process: the forward process, with its kernels ``step``, ``posterior`` and ``marginal``, and ``corrupt``.
        grid: its noisy times; rung i is the i-th of them from the data.
    """

    mixed = True
    process: Any

    def __init__(self, process: Any, grid: Grid):
        super().__init__()
        self.process, self.length = process, len(grid)
        #: (K + 1,): times[i] is that of rung i, times[0] = 0 the data's.
        self.times = float64((0.0, *grid.times[::-1]))

    def up(self, i: Rung, below: Sequence[Tensor], given: Any) -> Any:
        return self.process.step(below[0], self.times[i - 1], self.times[i])

    def posterior(self, i: Rung, above: Sequence[Tensor], given: Any) -> Any:
        if not above:
            return self.marginal(i, given)
        return self.process.posterior(above[0], self.times[i + 1], given, self.times[i])

    def marginal(self, i: Rung, given: Any) -> Any:
        return self.process.marginal(given, self.times[i])

    def corrupt(
        self, x: Tensor, t: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """x_t at any times (B,), drawn."""
        return self.process.corrupt(x, t, noise, generator)


class ProcessChain(Chain):
    """A ladder of K rungs on a process.

    ``elbo`` has one form more than other ladders have, "continuous": each step's KL is replaced by what it would be if
    the step were cut into infinitely many, with one time drawn in it.

    Args:
        guide, model: of one length.
        form: of :meth:`estimate`: "matching" or "continuous".

    Raises:
        ValueError: an unknown form.
    """

    guide: ProcessGuide
    estimators = (*Chain.estimators, "continuous")

    def __init__(self, guide: ProcessGuide, model: Generative, form: str = "matching"):
        if form not in ("matching", "continuous"):
            raise ValueError(f"form must be matching or continuous, got {form!r}")
        super().__init__(guide, model)
        self.form = form

    @property
    def times(self) -> Tensor:
        return self.guide.times[1:]

    def term(
        self,
        estimator: str,
        i: Rung,
        place: Place,
        analytic: frozenset[int] = frozenset(),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        if estimator != "continuous":
            return super().term(estimator, i, place, analytic, generator)
        if isinstance(i, int) and i in (0, self.length):
            return super().term("matching", i, place, analytic, generator)
        u = torch.rand(len(place.x), generator=generator, dtype=torch.float64)
        s, t = self.guide.times[i], self.guide.times[i + 1]
        return self.integral(s, t, u, place.x, place.condition, generator=generator)

    def integral(
        self,
        s: Tensor,
        t: Tensor,
        u: Tensor,
        x: Tensor,
        condition: Any = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """An estimate of the continuous cost from time s to t, (B,), nats.

        Args:
            u: (B,), in [0, 1): where between them its time lies.
            noise: standard-normal values of the shape of what the guide reads of x; None: drawn from ``generator``.
        """
        (time, width), given = self.between(s, t, u), self.guide.read(x, condition)
        cost = self.rate(self.guide.corrupt(given, time, noise, generator), time, given, condition)
        return self.known(s, t, given) + expand(width, cost) * cost

    @abstractmethod
    def between(self, s: Tensor, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The time at u between s and t, (B,), on the clock on which times are drawn, and how long s to t is on it."""

    @abstractmethod
    def rate(self, x_t: Tensor, t: Tensor, x: Tensor, condition: Any = None) -> Tensor:
        """The continuous cost at x_t in a unit of that clock, (B,), nats; less what is ``known`` of it."""

    def known(self, s: Tensor, t: Tensor, x: Tensor) -> Tensor | float:
        """What of the cost from s to t needs no draw, (B,)."""
        return 0.0

    def estimate(
        self,
        x: Tensor,
        condition: Any = None,
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        u: Tensor | None = None,
    ) -> Tensor:
        """One unbiased estimate of the bound, (B,), nats, through which gradients pass: both ends and one step.

        Args:
            noise: standard-normal values of the shape of what the guide reads of x; default: drawn.
            u: (B,), in [0, 1): which step, or which time; default: drawn, spread evenly over the batch.
        """
        generator = generator or torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        u = even(len(x), torch.tensor([1]), generator) if u is None else u.double().cpu()
        guide, last, between = self.guide, self.length, self.length - 1
        given = guide.read(x, condition)
        if noise is None:
            dtype = given.dtype if given.is_floating_point() else torch.float32
            noise = torch.randn(given.shape, generator=generator, dtype=dtype).to(x.device)
        total = -self.divergence(last, guide.marginal(last, given), (), condition)
        total = total - self.decoding(x, (guide.marginal(1, given).sample(noise),), condition)
        if not between:
            return total
        if self.form == "continuous":
            return total - self.integral(guide.times[1], guide.times[last], u, x, condition, noise)
        i = (u * between).long() + 1
        above = (guide.marginal(i + 1, given).sample(noise),)
        return total - between * self.divergence(i, guide.posterior(i, above, given), above, condition)
