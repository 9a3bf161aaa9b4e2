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
from kuosan.discrete.process import CategoricalProcess
from kuosan.discrete.rules import Ancestral, State, TokenRule
from kuosan.process import Grid
from kuosan.schedules import Time
from kuosan.solvers import Noise, check_seeds


class TokenModel(Protocol):
    """A :class:`~kuosan.discrete.CategoricalDenoiser`, or one wrapped in guidance."""

    process: CategoricalProcess
    timed: bool

    def __call__(self, x_t: Tensor, t: Time, condition: Any = None) -> Categorical: ...


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
    def timed(self) -> bool:
        return self.denoiser.timed

    def forward(self, x_t: Tensor, t: Time, condition: Any = None) -> Categorical:
        if condition is None:
            raise ValueError("classifier-free guidance guides towards a condition: none was given")
        given, free = self.denoiser(x_t, t, condition).log_probs, self.denoiser(x_t, t).log_probs
        possible = (given > -torch.inf) & (free > -torch.inf)
        apart = torch.where(possible, given - free.where(possible, 0.0), 0.0)
        return Categorical(torch.log_softmax(given + self.weight * apart, -1))


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
        cache: of masks, a model that is not told the time is not asked twice of the same tokens.
        batch_size: texts at once.
        watch: called with (step, x_s) of each batch.
        progress: called with (done, all).

    Raises:
        ValueError: no seeds or repeated ones, both or neither of steps and grid, a rule of masks for a process without
            one, known tokens of another shape or outside the vocabulary.
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
    tokens, counts = [], []
    with evaluating(model) if isinstance(model, nn.Module) else nullcontext():
        for first in range(0, len(seeds), batch_size):
            part = slice(first, first + batch_size)
            loop = _Loop(model, rule, transform, cache and not model.timed and process.mask is not None, device)
            noise = Noise(seeds[part], (length,), torch.float64, purpose="tokens")
            x, count = loop.run(
                grid, noise, None if condition is None else condition[part].to(device), given[part].to(device), watch
            )
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
    return known.expand(n, length)


class _Loop:
    """One batch, from noise to text."""

    def __init__(self, model: TokenModel, rule: TokenRule, transform: Any, cache: bool, device: torch.device | str):
        self.model, self.rule, self.transform, self.cache, self.device = model, rule, transform, cache, device
        self._seen: Tensor | None = None
        self._said: Tensor | None = None

    def run(
        self, grid: Grid, noise: Noise, condition: Tensor | None, known: Tensor, watch: Any
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
            state.x = self._show(process, known, held, state.x, t, draw)
            law = self._law(state.x, t, condition, count)
            if s > 0:
                state = self.rule.step(process, law, state, t, s, draw, held)
            else:
                state = State(law.sample(draw()), state.scores)
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

    def _law(self, x: Tensor, t: float, condition: Tensor | None, count: Tensor) -> Categorical:
        """What the model says, asked only of the texts that it has not just been asked of."""
        if self._seen is None or not self.cache:
            said = self.model(x, t, condition).log_probs
            count += 1
        else:
            assert self._said is not None
            fresh = (x != self._seen).any(1)
            said = self._said.clone()
            if bool(fresh.any()):
                said[fresh] = self.model(x[fresh], t, None if condition is None else condition[fresh]).log_probs
            count += fresh.cpu()
        self._seen, self._said = x, said
        law = Categorical(said)
        return law if self.transform is None else self.transform(law)


def expected_evaluations(length: int, steps: int) -> float:
    r"""Of :class:`~kuosan.discrete.rules.Ancestral` sampling of masks with a cache, on the even grid:
    :math:`1 + (K-1)\,(1-(1-1/K)^L)`: a step is asked anew only if the one before it drew a token."""
    return 1 + (steps - 1) * -math.expm1(length * math.log1p(-1 / steps)) if steps > 1 else 1.0
