"""How tokens go from time t to an earlier time s, given what the denoiser says of x_0: one rule, one class."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.special import ndtr

from kuosan.categorical import Categorical
from kuosan.discrete.process import CategoricalProcess


@dataclass
class State:
    """Tokens on their way.

    Args:
        x: (B, L), the tokens x_t.
        scores: (B, L), what a rule remembers of each token: the log-probability that it had when it was drawn.
    """

    x: Tensor
    scores: Tensor


class TokenRule(ABC):
    """One step. It says first which tokens it will draw, and only of these the model is asked.

    The last step, to s = 0, is the same for all and not theirs: x_0 is drawn from what the denoiser says.
    """

    #: Only for a process whose jumps lead to a mask.
    needs_mask = False

    def places(self, process: CategoricalProcess, x: Tensor, t: float, s: float, draw: Callable[[], Tensor]) -> Tensor:
        """The tokens (B, L) that are drawn, bool: of masks a share (t - s) / t of the masked, otherwise all."""
        if process.mask is None:
            return torch.ones_like(x, dtype=torch.bool)
        return (x == process.mask) & (ndtr(draw()) < (t - s) / t)

    @abstractmethod
    def step(
        self,
        process: CategoricalProcess,
        law: Categorical,
        places: Tensor,
        state: State,
        t: float,
        s: float,
        draw: Callable[[], Tensor],
        held: Tensor,
    ) -> State:
        """The state at s.

        Args:
            law: of x_0 given x_t of the M tokens at ``places``, row by row.
            places: (B, L) bool; none of them held.
            draw: standard-normal numbers (B, L), fresh ones at each call.
            held: (B, L) bool, tokens that are not this rule's to change; what it returns there is not looked at.
        """


@dataclass(frozen=True)
class Ancestral(TokenRule):
    """x_s from p(x_s|x_t), the mean of q(x_s|x_t, x_0) under what the denoiser says (Austin et al. 2021, eq. 4).

    Of masks: each masked token is drawn with probability (t - s) / t, and then from the law of its x_0.
    """

    def step(self, process, law, places, state, t, s, draw, held):
        back = law if process.mask is not None else process.posterior(state.x[places], t, law, s)
        return State(_put(state.x, places, back.sample(draw()[places])), state.scores)


@dataclass(frozen=True)
class Euler(TokenRule):
    """Each token jumps to j with probability (t - s) times its rate: Euler's step of the jump process.

    Where the rates add up to more than a step can hold, they are scaled down. At time 1, where those of other processes
    than masks have no limit, this makes the first step a jump of every token to where the rates point just before it.
    Of masks, whose rates are the law of x_0 over t, it is :class:`Ancestral`.
    """

    def step(self, process, law, places, state, t, s, draw, held):
        if process.mask is not None:
            return Ancestral().step(process, law, places, state, t, s, draw, held)
        x = state.x[places]
        jumps = (t - s) * process.reverse_rates(x, min(t, 1 - 1e-6), law)
        jumps = jumps / jumps.sum(-1, keepdim=True).clamp_min(1)
        stays = 1 - jumps.sum(-1, keepdim=True)
        chances = jumps.scatter(-1, x.unsqueeze(-1), stays.clamp_min(0))
        return State(_put(state.x, places, Categorical.of(chances).sample(draw()[places])), state.scores)


@dataclass(frozen=True)
class Remasking(TokenRule):
    r"""Ancestral, but a token that was drawn may be masked again, and so be corrected (Wang et al. 2025,
    arXiv 2503.00307, eq. 6). As many tokens are masked at each time as without it; the more of them are drawn anew in
    one step, the less those know of each other.

    Args:
        share: of the largest probability of being masked again that they allow, :math:`\sigma \le
            \min(1, (1-\alpha_s)/\alpha_t)`; 0 is :class:`Ancestral`.
    """

    share: float = 0.2
    needs_mask = True

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must lie in 0 to 1, got {self.share}")

    def _sigma(self, t: float, s: float) -> float:
        return self.share * (min(1.0, s / (1 - t)) if t < 1 else 1.0)

    def places(self, process, x, t, s, draw):
        shown = (1 - s - (1 - self._sigma(t, s)) * (1 - t)) / t
        return (x == process.mask) & (ndtr(draw()) < shown)

    def step(self, process, law, places, state, t, s, draw, held):
        again = (state.x != process.mask) & (ndtr(draw()) < self._sigma(t, s))
        x = _put(state.x, places, law.sample(draw()[places]))
        return State(torch.where(again, process.mask, x), state.scores)


@dataclass(frozen=True)
class Confident(TokenRule):
    """Mask-predict (Ghazvininejad et al. 2019, arXiv 1904.09324): all masked tokens are drawn, then those of all tokens
    that had the least probability when they were drawn are masked again, so many that a share s is.

    Not a sampler of the model's law: it prefers what the model is sure of. The fewer rounds, the more it is needed.

    Args:
        noise: scale of Gumbel noise on the scores, times s: 0 keeps the surest tokens, more keeps others too.
    """

    noise: float = 0.0
    needs_mask = True

    def __post_init__(self):
        if not self.noise >= 0:
            raise ValueError(f"noise must be at least 0, got {self.noise}")

    def places(self, process, x, t, s, draw):
        return x == process.mask

    def step(self, process, law, places, state, t, s, draw, held):
        drawn = law.sample(draw()[places])
        x, scores = _put(state.x, places, drawn), _put(state.scores, places, law.log_prob(drawn))
        order = scores.double()
        if self.noise:
            gumbel = -torch.log(-torch.special.log_ndtr(draw().double()).clamp_max(-1e-300))
            order = order + self.noise * s * gumbel
        order = order.masked_fill(held, torch.inf)
        free = (~held).sum(1)
        rank = torch.argsort(torch.argsort(order, dim=1, stable=True), dim=1)
        return State(torch.where(rank < (free * s).round().unsqueeze(1), process.mask, x), scores)


def _put(x: Tensor, places: Tensor, values: Tensor) -> Tensor:
    return x.masked_scatter(places, values.to(x.dtype))


RULES: dict[str, type[TokenRule]] = {
    "ancestral": Ancestral,
    "euler": Euler,
    "remasking": Remasking,
    "confident": Confident,
}
