r"""The forward process of tokens: at random moments each jumps, by itself, to a state that a law of jumps picks.

All categorical diffusion is this one process with another law: to a mask, and it is absorbed (D3PM's absorbing state,
MDLM); to any state alike (uniform); or by any stochastic matrix. Its clock is the chance that a token has not jumped,

.. math:: \alpha_t = 1 - t, \qquad q(x_t|x_s) = \exp\!\Big(\log\tfrac{1-s}{1-t}\,(J - I)\Big)

No other clock is needed: the continuous bound does not depend on it, and a grid of times is any schedule of it (the
schedules of D3PM, Austin et al. 2021, arXiv 2107.03006, and of MDLM, Sahoo et al. 2024, arXiv 2406.07524, are grids).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.special import ndtr

from kuosan.categorical import Categorical, pick
from kuosan.process import Grid, expand
from kuosan.schedules import Time, float64

#: A matrix of jumps is exponentiated for each example of a batch: vocabularies larger than this want a law.
LARGEST_MATRIX = 256


class CategoricalProcess:
    r"""Tokens that jump by the law J until nothing is left of the data.

    Times are numbers or tensors of shape () or (B,), ``s <= t``, 0: data; tokens are int64 (B, ...), of V states.

    Args:
        jump: (V,), the law of where a token jumps to, wherever it was: then
            :math:`q(x_t|x_s) = a\,\delta_{x_s} + (1-a)\,J` with :math:`a = \alpha_t/\alpha_s`. Or (V, V), a row for
            each state that it jumps from.
        vocabulary: the data's states are the first so many; default all of them.
        still: a state of the data that never jumps, and that nothing jumps to: what fills a text after its end. Where
            it stands, and so how long the text is, shows at every time; its law is the prior's (:class:`Lengths
            <kuosan.discrete.Lengths>`). Only with a law of jumps, not a matrix.

    Raises:
        ValueError: not a law; a matrix with more than one stationary law, or too large a one; a still state that is
            jumped to or not of the vocabulary.
    """

    def __init__(self, jump: Tensor, vocabulary: int | None = None, still: int | None = None):
        jump = float64(jump)
        if jump.ndim not in (1, 2) or (jump.ndim == 2 and jump.shape[0] != jump.shape[1]) or len(jump) < 2:
            raise ValueError(f"jump must be of shape (V,) or (V, V), V at least 2, got {tuple(jump.shape)}")
        if bool((jump < 0).any()) or not torch.allclose(jump.sum(-1), torch.ones(()).double(), atol=1e-9):
            raise ValueError("jump must be probabilities: never negative, of sum 1 (of each row of a matrix)")
        if jump.ndim == 2 and len(jump) > LARGEST_MATRIX:
            raise ValueError(
                f"a matrix of jumps may have at most {LARGEST_MATRIX} states, got {len(jump)}; if all rows are alike, "
                "pass one of them"
            )
        self.states = len(jump)
        self.vocabulary = self.states if vocabulary is None else vocabulary
        if not 2 <= self.vocabulary <= self.states:
            raise ValueError(f"vocabulary must lie in 2 to {self.states}, got {vocabulary}")
        if still is not None and (jump.ndim == 2 or not 0 <= still < self.vocabulary or jump[still] > 0):
            raise ValueError(
                f"a still state is one of the vocabulary that a law of jumps (V,) never jumps to, got {still}"
            )
        self.jump, self.still = jump, still
        self.stationary = jump if jump.ndim == 1 else _stationary(jump)

    @classmethod
    def masked(cls, vocabulary: int, still: int | None = None) -> CategoricalProcess:
        """Every jump is to the mask, the state after the vocabulary's, from which nothing returns."""
        return cls(one_hot(torch.tensor(vocabulary), vocabulary + 1).double(), vocabulary, still)

    @classmethod
    def uniform(cls, vocabulary: int, still: int | None = None) -> CategoricalProcess:
        """Every jump is to any token of the vocabulary alike, but for a still one."""
        jump = torch.ones(vocabulary, dtype=torch.float64)
        if still is not None and 0 <= still < vocabulary:
            jump[still] = 0
        return cls(jump / jump.sum(), still=still)

    @property
    def mask(self) -> int | None:
        """The state to which every jump leads, if there is one and the data never take it: it shows what is noise."""
        certain = (self.jump == 1).nonzero().flatten().tolist() if self.jump.ndim == 1 else []
        return certain[0] if certain and certain[0] >= self.vocabulary else None

    @staticmethod
    def grid(steps: int) -> Grid:
        """Times 1, 1 - 1/K, ..., 1/K: the same share of the tokens jumps in every step.

        Raises:
            ValueError: fewer than one step.
        """
        if not 1 <= steps <= 10**6:
            raise ValueError(f"steps must lie in 1 to a million, got {steps}")
        return Grid(tuple(i / steps for i in range(steps, 0, -1)))

    def prior(self) -> Categorical:
        """The law of a token at time 1, if it is not still."""
        return Categorical.of(self.stationary)

    # -- kernels ------------------------------------------------------------------------------------------------------

    def step(self, x_s: Tensor, s: Time, t: Time) -> Categorical:
        """q(x_t | x_s)."""
        return Categorical.of(self._forward(self._point(x_s), s, t))

    def marginal(self, x_0: Tensor, t: Time) -> Categorical:
        """q(x_t | x_0)."""
        return self.step(x_0, 0.0, t)

    def corrupt(
        self, x_0: Tensor, t: Time, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """A draw of q(x_t | x_0). Where all rows of J are alike, without writing out V probabilities for each token.

        Args:
            noise: standard-normal values of x_0's shape; drawn from ``generator`` when not given.
        """
        if self.jump.ndim == 2:
            return self.marginal(x_0, t).sample(noise, generator)
        if noise is None:
            where = x_0.device if generator is None else generator.device
            noise = torch.randn(x_0.shape, generator=generator, dtype=torch.float64, device=where)
        u = ndtr(noise.double().to(x_0.device))
        kept, jumped = (expand(share, u) for share in self._shares(0.0, t))
        # how far u went beyond what is kept is uniform again, and picks the state that is jumped to
        beyond = ((u - kept) / jumped.clamp_min(1e-300)).clamp(0, 1)
        stays = u < kept if self.still is None else (u < kept) | (x_0 == self.still)
        return torch.where(stays, x_0, pick(self.jump.to(u), beyond)[0])

    def likelihood(self, x_t: Tensor, s: Time, t: Time, dtype: torch.dtype = torch.float64) -> Tensor:
        """q(x_t | x_s = k) for every state k, (..., V)."""
        return self._backward(self._point(x_t, dtype), s, t)

    def posterior(self, x_t: Tensor, t: Time, x_0: Tensor | Categorical, s: Time) -> Categorical:
        r"""q(x_s | x_t, x_0); of a law of x_0, given x_t, instead of a known one, its mean :math:`p(x_s|x_t)`.

        .. math:: q(x_s=j|x_t) \propto q(x_t|x_s=j)\sum_k q(x_s=j|x_0=k)\,\frac{p(x_0=k|x_t)}{q(x_t|x_0=k)}

        (Austin et al. 2021, eq. 4.) An x_0 that could not have become x_t does not count; if none could, it is NaN.
        """
        p_0 = x_0.log_probs.exp() if isinstance(x_0, Categorical) else self._point(x_0)
        weights = self._over_likelihood(p_0, x_t, t)
        return Categorical.of(self._forward(weights, 0.0, s) * self.likelihood(x_t, s, t, p_0.dtype))

    def reverse_rates(
        self, x_t: Tensor, t: Time, x_0: Tensor | Categorical, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        r"""Jumps from x_t to each other state, a unit of time, as time runs from noise to data, (..., V).

        .. math:: \hat R(x_t\to j) = \frac{J_{j,x_t}}{1-t}\sum_k p(x_0=k|x_t)\,\frac{q(x_t=j|x_0=k)}{q(x_t|x_0=k)}

        (Campbell et al. 2022, arXiv 2205.14987, prop. 3.) Of an x_0 that is known, in ``dtype``.
        """
        p_0 = x_0.log_probs.exp() if isinstance(x_0, Categorical) else self._point(x_0, dtype)
        ratios = self._forward(self._over_likelihood(p_0, x_t, t), 0.0, t)
        jump = self.jump.to(p_0)
        into = jump[x_t].unsqueeze(-1) if jump.ndim == 1 else jump.T[x_t]
        rates = ratios * (expand(1 / (1 - float64(t)), ratios) * into)
        return rates.scatter(-1, x_t.unsqueeze(-1), 0.0)

    # -- how weights over the states move -----------------------------------------------------------------------------

    def _point(self, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        if x.dtype != torch.int64 or (x.numel() and (x.min() < 0 or x.max() >= self.states)):
            raise ValueError(f"tokens are whole numbers from 0 to {self.states - 1}, int64; got {x.dtype} {x}")
        return torch.zeros(*x.shape, self.states, dtype=dtype, device=x.device).scatter_(-1, x.unsqueeze(-1), 1)

    def _over_likelihood(self, p_0: Tensor, x_t: Tensor, t: Time) -> Tensor:
        chance = self.likelihood(x_t, 0.0, t, p_0.dtype)
        inverse = torch.where(chance > 0, 1 / chance, 0.0)  # through which no gradient passes: it holds no p_0
        return p_0 * inverse

    def _forward(self, weights: Tensor, s: Time, t: Time) -> Tensor:
        """sum_k weights_k q(x_t = j | x_s = k), (..., V)."""
        if self.jump.ndim == 1:
            kept, jumped = (expand(share, weights) for share in self._shares(s, t))
            moving = weights.sum(-1, keepdim=True)
            if self.still is not None:
                moving = moving - weights[..., self.still].unsqueeze(-1)
            return self._but_still(kept * weights + jumped * moving * self.jump.to(weights), weights)
        return _apply(weights, self._matrix(s, t).to(weights))

    def _backward(self, weights: Tensor, s: Time, t: Time) -> Tensor:
        """sum_j q(x_t = j | x_s = k) weights_j, (..., V)."""
        if self.jump.ndim == 1:
            kept, jumped = (expand(share, weights) for share in self._shares(s, t))
            arriving = (weights * self.jump.to(weights)).sum(-1, keepdim=True)
            return self._but_still(kept * weights + jumped * arriving, weights)
        return _apply(weights, self._matrix(s, t).mT.to(weights))

    def _but_still(self, moved: Tensor, weights: Tensor) -> Tensor:
        if self.still is None:
            return moved
        at = torch.full((*moved.shape[:-1], 1), self.still, device=moved.device)
        return moved.scatter(-1, at, weights.gather(-1, at))

    @staticmethod
    def _shares(s: Time, t: Time) -> tuple[Tensor, Tensor]:
        """alpha_t / alpha_s, the chance of no jump between, and the chance of one, neither by subtraction; float64."""
        s, t = float64(s).cpu(), float64(t).cpu()
        if not bool(((s >= 0) & (s <= t) & (s < 1) & (t <= 1)).all()):
            raise ValueError(f"a kernel goes from s to a later time t, 0 <= s <= t <= 1, s < 1; got {s} and {t}")
        return (1 - t) / (1 - s), (t - s) / (1 - s)

    def _matrix(self, s: Time, t: Time) -> Tensor:
        """(V, V) or (B, V, V): q(x_t | x_s)."""
        kept, _ = self._shares(s, t)
        jumps = -torch.log(kept.clamp_min(1e-300))
        found = torch.matrix_exp(jumps[..., None, None] * (self.jump - torch.eye(self.states).double()))
        return torch.where((kept > 0)[..., None, None], found, self.stationary.expand_as(found)).clamp_min(0)


def _apply(weights: Tensor, matrix: Tensor) -> Tensor:
    """weights (B, ..., V) times a matrix (V, V), or one for each example (B, V, V)."""
    return weights @ matrix if matrix.ndim == 2 else torch.einsum("b...k,bkj->b...j", weights, matrix)


def _stationary(jump: Tensor) -> Tensor:
    """The law that J leaves as it is.

    Raises:
        ValueError: there are several, so that what is left at time 1 would depend on the data.
    """
    values, vectors = torch.linalg.eig(jump.T)
    fixed = ((values - 1).abs() < 1e-9).nonzero().flatten()
    if len(fixed) != 1:
        raise ValueError(
            f"the matrix of jumps leaves {len(fixed)} laws as they are: time 1 would still know which part of the "
            "states the data was in; connect them"
        )
    law = vectors[:, fixed[0]].real
    return (law / law.sum()).clamp_min(0)
