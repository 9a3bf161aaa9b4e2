"""A denoiser of tokens as a ladder: q is a categorical process, p its posterior with x_0 guessed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kuosan.categorical import Categorical
from kuosan.discrete.denoiser import CategoricalDenoiser
from kuosan.discrete.lengths import Padded, padded
from kuosan.discrete.process import CategoricalProcess
from kuosan.gaussian import per_example
from kuosan.kernels import Generative, Rung
from kuosan.process import Grid, expand
from kuosan.process_chain import ProcessChain, ProcessGuide
from kuosan.schedules import float64


class TokenReverse(Generative):
    """The reverse kernels of a denoiser on a grid as a p."""

    discrete = True

    def __init__(self, denoiser: CategoricalDenoiser, grid: Grid):
        super().__init__()
        self.denoiser, self.length = denoiser, len(grid)
        self.times = float64((0.0, *grid.times[::-1]))

    def prior(self, condition: Any = None) -> Categorical | Padded:
        return self.denoiser.prior(condition)

    def down(self, i: Rung, above: Sequence[Tensor], condition: Any = None) -> Categorical | Unmasked:
        if isinstance(i, int) and i == 0 and self.denoiser.process.mask is not None:
            return Unmasked(self.denoiser, above[0], self.times[1], condition)
        law = self.denoiser(above[0], self.times[i + 1], condition)
        if isinstance(i, int) and i == 0:
            return law
        return self.denoiser.process.posterior(above[0], self.times[i + 1], law, self.times[i])


@dataclass(frozen=True)
class Unmasked:
    """The decoder p(x_0 | x_t) under masks, which writes out V probabilities of tokens only where it is asked to."""

    denoiser: CategoricalDenoiser
    x_t: Tensor
    t: Tensor
    condition: Any

    @property
    def shape(self) -> torch.Size:
        return self.x_t.shape

    @property
    def mean(self) -> Tensor:
        return self.denoiser(self.x_t, self.t, self.condition).mean

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        return self.denoiser(self.x_t, self.t, self.condition).sample(noise, generator)

    def log_prob(self, x: Tensor) -> Tensor:
        return -self.denoiser.surprise(self.x_t, self.t, x, self.condition)


class CategoricalChain(ProcessChain):
    r"""A denoiser of tokens on a grid of K times, as a ladder with K rungs.

    The continuous form is the KL of two jump processes, the reverse of q given x_0 and the model's, in their rates
    (:meth:`CategoricalProcess.reverse_rates`; Campbell et al. 2022, arXiv 2205.14987, prop. 2):

    .. math:: \int \mathbb E\sum_j \Big[\hat R_q(x_t\to j)\log\frac{\hat R_q(x_t\to j)}{\hat R_p(x_t\to j)}
        - \hat R_q(x_t\to j) + \hat R_p(x_t\to j)\Big]\mathrm dt

    with a time drawn evenly. Of masks it is the cross-entropy of the masked tokens, divided by t (Sahoo et al. 2024,
    arXiv 2406.07524, eq. 10).

    Args:
        denoiser: the model.
        steps: K, on :meth:`CategoricalProcess.grid`; or give ``grid``.
        form: of :meth:`estimate`: "matching" or "continuous".

    Raises:
        ValueError: both or neither of steps and grid, or a grid that does not begin at time 1: from any other the
            masked tokens of q and p would not be the same.
    """

    model: TokenReverse

    def __init__(
        self,
        denoiser: CategoricalDenoiser,
        *,
        steps: int | None = None,
        grid: Grid | None = None,
        form: str = "matching",
    ):
        if not isinstance(denoiser, CategoricalDenoiser):
            raise ValueError(
                "a bound belongs to a model, not to a sampler: pass the CategoricalDenoiser, got "
                + type(denoiser).__name__
            )
        if (steps is None) == (grid is None):
            raise ValueError("give either steps= or grid=")
        if grid is None:
            assert steps is not None
            grid = CategoricalProcess.grid(steps)
        if grid.times[0] != 1:
            raise ValueError(f"the grid of a ladder of tokens begins at time 1, got {grid.times[0]}")
        super().__init__(ProcessGuide(denoiser.process, grid), TokenReverse(denoiser, grid), form)

    def between(self, s: Tensor, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """On the clock of time, which is that of the share of tokens that have jumped."""
        return s + u * (t - s), t - s

    def rate(self, x_t: Tensor, t: Tensor, x: Tensor, condition: Any = None) -> Tensor:
        """The divergence of the rates at x_t, or of masks the cross-entropy of the masked tokens, over t."""
        process, denoiser = self.guide.process, self.model.denoiser
        if process.mask is not None:  # each masked token has rates in sum 1/t, of q and of p: their difference is 0
            surprise = denoiser.surprise(x_t, t, x, condition)
            return per_example(expand(1 / t, surprise) * surprise)
        law = denoiser(x_t, t, condition)
        p = process.reverse_rates(x_t, t, law)
        q = process.reverse_rates(x_t, t, x, p.dtype)
        happens = q > 0  # rates that are 0 for q are of no account in the first part, and must not make it 0 / 0
        ratio = torch.where(happens, q / p.where(happens, 1.0), 1.0)
        return per_example((q * ratio.log() - q + p).sum(-1))

    def loss(
        self, x: Tensor, condition: Any = None, *, u: Tensor, noise: Tensor | None = None, earliest: float = 1e-3
    ) -> Tensor:
        """An estimate of minus the continuous bound from time 0 to 1, what it says of the length included; (B,), nats.

        Args:
            u: (B,), in [0, 1): which time.
            noise: as of :meth:`integral`.
            earliest: no time is under it.
        """
        start, end = torch.tensor([earliest, 1.0], dtype=torch.float64)
        matching = self.integral(start, end, u.double().cpu(), x, condition, noise)
        prior = self.model.prior(condition)
        if not isinstance(prior, Padded):
            return matching
        return matching - prior.log_length(padded(x, prior.padding))
