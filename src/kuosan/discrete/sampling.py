"""Sampling tokens: one loop for every process and rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kuosan.categorical import Categorical
from kuosan.denoiser import evaluating
from kuosan.discrete.denoiser import CategoricalDenoiser
from kuosan.discrete.lengths import Lengths
from kuosan.discrete.process import CategoricalProcess
from kuosan.discrete.rules import Ancestral, State, TokenRule
from kuosan.process import Grid
from kuosan.schedules import Time
from kuosan.solvers import Noise, check_seeds


class TokenModel(Protocol):
    """A :class:`~kuosan.discrete.CategoricalDenoiser`, or one wrapped in guidance."""

    process: CategoricalProcess
    lengths: Lengths | None

    def at(self, x_t: Tensor, t: Time, condition: Any, places: Tensor) -> Categorical: ...


@dataclass(frozen=True)
class Drawn:
    """Samples, and what they cost.

    Args:
        tokens: (N, L) int64.
        evaluations: (N,) int64, of the model, for each.
        steps: of the grid.
    """

    tokens: Tensor
    evaluations: Tensor
    steps: int


@dataclass(frozen=True)
class Sharpened:
    """The law of each token raised to the power 1 / temperature; then only its likeliest states, of total ``nucleus``.

    (Holtzman et al. 2020, arXiv 1904.09751.) A token that is known stays known.

    Args:
        temperature: above 0; under 1 prefers what is likely.
        nucleus: above 0 and at most 1, which keeps all.
    """

    temperature: float = 1.0
    nucleus: float = 1.0

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if not 0 < self.nucleus <= 1:
            raise ValueError(f"nucleus must lie in (0, 1], got {self.nucleus}")

    def __call__(self, law: Categorical) -> Categorical:
        log_probs = torch.log_softmax(law.log_probs.double() / self.temperature, -1)
        if self.nucleus < 1:
            likeliest, places = log_probs.sort(-1, descending=True)
            before = likeliest.exp().cumsum(-1) - likeliest.exp()  # a state stays if those before it are not enough
            kept = torch.zeros_like(before, dtype=torch.bool).scatter(-1, places, before < self.nucleus)
            log_probs = torch.log_softmax(log_probs.masked_fill(~kept, -torch.inf), -1)
        return Categorical(log_probs)


class TokenGuidance(nn.Module):
    r"""Guided tokens: :math:`p \propto p(x_0|x_t,c)^{1+w}\, p(x_0|x_t)^{-w}`, w = 0 being no guidance.

    Each of its evaluations is two of the denoiser.

    Args:
        denoiser: trained with and without its condition.
        weight: w.
    """

    def __init__(self, denoiser: CategoricalDenoiser, weight: float):
        super().__init__()
        self.denoiser, self.weight = denoiser, weight

    @property
    def process(self) -> CategoricalProcess:
        return self.denoiser.process

    @property
    def lengths(self) -> Lengths | None:
        return self.denoiser.lengths

    def forward(self, x_t: Tensor, t: Time, condition: Any = None) -> Categorical:
        if condition is None:
            raise ValueError("classifier-free guidance guides towards a condition: none was given")
        return guided(self.denoiser(x_t, t, condition), self.denoiser(x_t, t), self.weight)

    def at(self, x_t: Tensor, t: Time, condition: Any, places: Tensor) -> Categorical:
        """As :meth:`CategoricalDenoiser.at`."""
        if condition is None:
            raise ValueError("classifier-free guidance guides towards a condition: none was given")
        given, free = (self.denoiser.at(x_t, t, one, places) for one in (condition, None))
        return guided(given, free, self.weight)


def guided(given: Categorical, free: Categorical, weight: float) -> Categorical:
    r""":math:`p \propto p(x|c)^{1+w}\, p(x)^{-w}`; what is impossible by either of them is as likely as given."""
    possible = (given.log_probs > -torch.inf) & (free.log_probs > -torch.inf)
    apart = torch.where(possible, given.log_probs - free.log_probs.where(possible, 0.0), 0.0)
    return Categorical(torch.log_softmax(given.log_probs + weight * apart, -1))


@torch.no_grad()
def sample_tokens(
    model: TokenModel,
    length: int,
    *,
    seeds: Iterable[int],
    steps: int | None = None,
    grid: Grid | None = None,
    rule: TokenRule | None = None,
    condition: Tensor | None = None,
    transform: Callable[[Categorical], Categorical] | None = None,
    known: Tensor | None = None,
    lengths: Tensor | None = None,
    cache: bool = True,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    watch: Callable[[int, Tensor], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Drawn:
    """Draw texts of so many tokens: number k is a function of (seed k, condition k, model, rule) and of nothing else.

    Args:
        model: a :class:`~kuosan.discrete.CategoricalDenoiser`, or one wrapped in guidance.
        length: L.
        seeds: one for each, all different.
        steps: on :meth:`CategoricalProcess.grid`; or ``grid``.
        rule: default :class:`~kuosan.discrete.rules.Ancestral`.
        condition: one for each, (N, ...).
        transform: of each law of x_0, such as :class:`Sharpened`.
        known: (N, L) or (L,) int64, the tokens that are given, and -1 where they are to be drawn. They are kept as they
            are. Under masks the model always sees them; under other processes as noisy as all else.
        lengths: (N,) int64, how many of the L tokens each text has, of a model that knows lengths. Default: drawn from
            their law, among those that have room for what is known. That law is of all texts: it is not told what the
            known tokens say of the length.
        cache: a step that draws no token of a text does not ask the model of it; otherwise it is asked nevertheless.
        batch_size: texts at once.
        watch: called with (step, x_s) of each batch.
        progress: called with (done, all).

    Raises:
        ValueError: no seeds or repeated ones, both or neither of steps and grid, a rule of masks for a process without
            one, known tokens of another shape or outside the vocabulary, lengths that leave no room for them or that
            the model does not know.
    """
    seeds = check_seeds(seeds)
    process, rule = model.process, rule or Ancestral()
    if (steps is None) == (grid is None):
        raise ValueError("give either steps= or grid=")
    if grid is None:
        assert steps is not None
        grid = process.grid(steps)
    if length < 1 or batch_size < 1:
        raise ValueError(f"length and batch_size must be at least 1, got {length} and {batch_size}")
    if rule.needs_mask and process.mask is None:
        raise ValueError(
            f"{type(rule).__name__} is of masked processes: under this one no token shows that it is noise"
        )
    if condition is not None and len(condition) != len(seeds):
        raise ValueError(f"one condition for each seed expected: {len(seeds)} seeds, {len(condition)} conditions")
    given = _checked(known, len(seeds), length, process)
    asked = _checked_lengths(lengths, given, length, model.lengths)
    tokens, counts = [], []
    with evaluating(model) if isinstance(model, nn.Module) else nullcontext():
        for first in range(0, len(seeds), batch_size):
            part = slice(first, first + batch_size)
            loop = _Loop(model, rule, transform, cache, device)
            noise = Noise(seeds[part], (length,), torch.float64, purpose="tokens")
            own = None if condition is None else condition[part].to(device)
            held = given[part].to(device)
            if model.lengths is not None:
                if asked is None:
                    n = model.lengths.of_seeds(seeds[part], own, least(held), length)
                else:
                    n = asked[part].to(device)
                held = held.masked_fill(torch.arange(length, device=device) >= n.unsqueeze(1), process.still or 0)
            # of its own, since whether any of a batch is held must not move what the others are drawn with
            blur = Noise(seeds[part], (length,), torch.float64, purpose="known")
            x, count = loop.run(grid, noise, blur, own, held, watch)
            tokens.append(x.cpu())
            counts.append(count.cpu())
            if progress is not None:
                progress(min(first + batch_size, len(seeds)), len(seeds))
    return Drawn(torch.cat(tokens), torch.cat(counts), len(grid))


def _checked(known: Tensor | None, n: int, length: int, process: CategoricalProcess) -> Tensor:
    if known is None:
        return torch.full((n, length), -1)
    if known.shape not in ((length,), (n, length)) or known.is_floating_point():
        raise ValueError(f"known must be whole numbers of shape ({length},) or ({n}, {length}), got {known.shape}")
    if known.min() < -1 or known.max() >= process.vocabulary:
        raise ValueError(
            f"known tokens are 0 to {process.vocabulary - 1}, or -1 for one to be drawn; got {int(known.min())} to "
            f"{int(known.max())}"
        )
    if process.still is not None and bool((known == process.still).any()):
        raise ValueError(f"token {process.still} is what follows the end: say lengths=, and nothing of it in known")
    return known.expand(n, length)


def least(known: Tensor) -> Tensor:
    """(N,), the shortest length that has room for what is known."""
    return ((known >= 0) * torch.arange(1, known.shape[1] + 1, device=known.device)).amax(1)


def _checked_lengths(lengths: Tensor | None, known: Tensor, length: int, law: Lengths | None) -> Tensor | None:
    if law is None:
        if lengths is not None:
            raise ValueError("lengths are asked of a model that does not know them: give length, which all texts have")
        return None
    if lengths is None:
        return None
    if lengths.shape != known.shape[:1] or lengths.is_floating_point():
        raise ValueError(f"lengths must be a whole number for each of {len(known)} texts, got {tuple(lengths.shape)}")
    if lengths.min() < 1 or lengths.max() > length:
        raise ValueError(f"lengths are 1 to {length}, got {int(lengths.min())} to {int(lengths.max())}")
    if bool((lengths < least(known)).any()):
        raise ValueError("a known token lies beyond the length that is asked for")
    return lengths


class _Loop:
    """One batch, from noise to text."""

    def __init__(self, model: TokenModel, rule: TokenRule, transform: Any, cache: bool, device: torch.device | str):
        self.model, self.rule, self.transform, self.cache, self.device = model, rule, transform, cache, device

    def run(
        self, grid: Grid, noise: Noise, blur: Noise, condition: Tensor | None, known: Tensor, watch: Any
    ) -> tuple[Tensor, Tensor]:
        process = self.model.process

        def draw() -> Tensor:
            return noise.draw().to(self.device)

        held = known >= 0
        first = draw()
        x = Categorical(process.prior().log_probs.to(self.device).expand(*first.shape, -1)).sample(first)
        state = State(x, torch.zeros_like(first))
        count = torch.zeros(len(x), dtype=torch.int64)
        for i, (t, s) in enumerate(grid.pairs()):
            state.x = self._show(process, known, held, state.x, t, lambda: blur.draw().to(self.device))
            last = s == 0
            if not last:
                places = self.rule.places(process, state.x, t, s, draw) & ~held
            else:
                places = ~held if process.mask is None else (state.x == process.mask) & ~held
            law = self._law(state.x, t, condition, places, count)
            if not last:
                state = self.rule.step(process, law, places, state, t, s, draw, held)
            else:
                state = State(state.x.masked_scatter(places, law.sample(draw()[places])), state.scores)
            if watch is not None:
                watch(i, torch.where(held, known, state.x))
        return torch.where(held, known, state.x), count

    @staticmethod
    def _show(
        process: CategoricalProcess, known: Tensor, held: Tensor, x: Tensor, t: float, draw: Callable[[], Tensor]
    ) -> Tensor:
        if not bool(held.any()):
            return x
        given = known.clamp_min(0)
        return torch.where(held, given if process.mask is not None else process.marginal(given, t).sample(draw()), x)

    def _law(self, x: Tensor, t: float, condition: Tensor | None, places: Tensor, count: Tensor) -> Categorical:
        """What the model says of the tokens that are drawn."""
        asked = places.any(1) if self.cache else torch.ones_like(places[:, 0])
        count += asked.cpu()
        if not bool(asked.any()):
            return Categorical(torch.zeros(0, self.model.process.states, device=x.device))
        own = None if condition is None else condition[asked]
        law = self.model.at(x[asked], t, own, places[asked])
        return law if self.transform is None else self.transform(law)


def expected_evaluations(length: int, steps: int) -> float:
    r"""Of :class:`~kuosan.discrete.rules.Ancestral` sampling of masks, on the even grid: :math:`K(1-(1-1/K)^L)`, for
    each of the L tokens is drawn in any of the K steps alike, and a step that draws none needs no model."""
    return steps * -math.expm1(length * math.log1p(-1 / steps)) if steps > 1 else 1.0
