"""The law of a token: probabilities of V states. The second kind of law that a ladder's rungs may have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.special import ndtr


@dataclass(frozen=True)
class Categorical:
    """Independent tokens, each with its own probabilities of V states.

    Args:
        log_probs: (..., V), normalised over the last dimension; minus infinity where a state is impossible.
    """

    log_probs: Tensor

    @classmethod
    def of(cls, weights: Tensor) -> Categorical:
        """From weights (..., V), never negative, which are normalised. The gradient of a weight of 0 is 0."""
        chances = weights / weights.sum(-1, keepdim=True)
        possible = chances > 0
        return cls(torch.where(possible, chances.where(possible, 1.0).log(), -torch.inf))

    @property
    def shape(self) -> torch.Size:
        """Of the tokens."""
        return self.log_probs.shape[:-1]

    @property
    def states(self) -> int:
        """V."""
        return self.log_probs.shape[-1]

    @property
    def mean(self) -> Tensor:
        """The likeliest state of each token: a law of states has no other middle."""
        return self.log_probs.argmax(-1)

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The state at which the cumulative probabilities pass Phi(noise), int64; no gradient passes.

        In float64, and one number for each token: the same law as Gumbel noise on every state, without its cost.

        Args:
            noise: standard-normal values of the tokens' shape; drawn from ``generator`` when not given.
        """
        if noise is None:
            where = self.log_probs.device if generator is None else generator.device
            noise = torch.randn(self.shape, generator=generator, device=where).to(self.log_probs.device)
        return pick(self.log_probs.detach().double().exp(), ndtr(noise.double()).expand(self.shape))[0]

    def log_prob(self, x: Tensor) -> Tensor:
        """log-probability of the states x, int64, of each token, nats.

        Raises:
            ValueError: a state that is not one.
        """
        if x.numel() and (x.min() < 0 or x.max() >= self.states):
            raise ValueError(f"tokens are states 0 to {self.states - 1}, got {int(x.min())} to {int(x.max())}")
        return self.log_probs.expand(*x.shape, self.states).gather(-1, x.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        r""":math:`-\sum_k p_k\log p_k` of each token, nats."""
        return -_mean_of(self.log_probs, self.log_probs)

    def kl(self, other: Categorical) -> Tensor:
        r""":math:`\sum_k p_k\log\frac{p_k}{q_k}` of each token, nats; infinite where the other says never."""
        return _mean_of(self.log_probs, self.log_probs) - _mean_of(self.log_probs, other.log_probs)


def pick(chances: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The state at which the cumulative chances pass u, and how far into its share u lies: uniform again, if u is.

    Args:
        chances: (..., V), or (V,) for all alike; float64, never negative; their sum counts as 1.
        u: (...), float64, 0 to 1.

    Returns:
        States (...), int64, never one of chance 0, and places within them (...), 0 to 1.
    """
    sums = chances.cumsum(-1)
    # under the whole sum, so that a state of chance 0 is reached neither from below nor from above
    place = (u.clamp(0, 1 - 2**-52) * sums[..., -1]).unsqueeze(-1)
    state = torch.searchsorted(sums, place, right=True).clamp_max(chances.shape[-1] - 1)
    share, end = (one[state] if one.ndim == 1 else one.gather(-1, state) for one in (chances, sums))
    return state.squeeze(-1), ((place - end + share) / share).squeeze(-1).clamp(0, 1)


def _mean_of(log_probs: Tensor, values: Tensor) -> Tensor:
    """The mean of values under the law; what never happens does not count, whatever its value."""
    log_probs, values = torch.broadcast_tensors(log_probs, values)
    possible = log_probs > -torch.inf
    return (log_probs.exp() * values.where(possible, torch.zeros_like(values))).sum(-1)
