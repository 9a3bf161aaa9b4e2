"""A network read as a denoiser of tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kuosan.categorical import Categorical
from kuosan.discrete.lengths import Lengths, Padded
from kuosan.discrete.process import CategoricalProcess
from kuosan.networks.tokens import TokenTransformer
from kuosan.schedules import Time, float64


class CategoricalDenoiser(nn.Module):
    r"""``denoiser(x_t, t, condition) -> Categorical``, the law of x_0 of each token.

    .. math:: p(x_0=k|x_t) \propto e^{\text{logit}_k}\, q(x_t|x_0=k)

    The network only has to say what the other tokens say of this one; what x_t itself says is known. So a token that is
    not masked is kept as it is, and of uniform noise the network need not learn how much to trust it.

    Args:
        network: any module called as ``network(x_t, t, condition)`` with x_t (B, ...) int64 and t (B,); it returns
            logits (B, ..., vocabulary).
        process: the forward process.
        timed: the network is told the time. Under masks it need not be: what the shown tokens say of the masked ones
            does not depend on it (Sahoo et al. 2024, arXiv 2406.07524, section 3.5), and a sampler may then keep what
            it was told. Default: told unless masked. A network that is not told sees t = 0.
        lengths: the law of the lengths of texts, for a process that has a still state, and only for one.

    Raises:
        ValueError: a still state without lengths, or lengths without it.
    """

    def __init__(
        self,
        network: nn.Module,
        process: CategoricalProcess,
        timed: bool | None = None,
        lengths: Lengths | None = None,
    ):
        super().__init__()
        if (process.still is None) != (lengths is None):
            raise ValueError("lengths are of a process with a still state, which fills the texts after their end")
        self.network, self.process, self.lengths = network, process, lengths
        self.timed = process.mask is None if timed is None else timed

    def prior(self, condition: Tensor | None = None) -> Categorical | Padded:
        """p(x_1)."""
        law = self.process.prior().log_probs
        token = Categorical(law.to(next(self.parameters(), law).device))
        if self.lengths is None or self.process.still is None:
            return token
        log_lengths = self.lengths.law(1 if condition is None else len(condition), condition)
        return Padded(log_lengths, token, self.process.still)

    def forward(self, x_t: Tensor, t: Time, condition: object = None) -> Categorical:
        """Raises ValueError if the network's output has the wrong shape."""
        logits = self.network(x_t, self._time(x_t, t), condition)
        self._check(logits, (*x_t.shape, self.process.vocabulary))
        return self._law(x_t, t, logits)

    def at(self, x_t: Tensor, t: Time, condition: object, places: Tensor) -> Categorical:
        """The laws of some tokens alone, M of them, row by row; of a large vocabulary they are most of the cost.

        Args:
            places: bool, of x_t's shape (B, L).
        """
        if isinstance(self.network, TokenTransformer):
            logits = self.network(x_t, self._time(x_t, t), condition, only=places)
        else:
            logits = self.network(x_t, self._time(x_t, t), condition)
            self._check(logits, (*x_t.shape, self.process.vocabulary))
            logits = logits[places]
        if isinstance(t, Tensor) and t.ndim:
            t = t.to(x_t.device)[:, None].expand(x_t.shape)[places]
        return self._law(x_t[places], t, logits)

    def surprise(self, x_t: Tensor, t: Time, x_0: Tensor, condition: object = None) -> Tensor:
        """-log p(x_0 | x_t) of each token under masks, (B, L), nats: 0 of one that is shown, if it is the same."""
        masked = torch.eq(x_t, -1 if self.process.mask is None else self.process.mask)
        lost = -self.at(x_t, t, condition, masked).log_prob(x_0[masked])
        shown = torch.zeros(x_t.shape, dtype=lost.dtype, device=lost.device).masked_fill(x_t != x_0, torch.inf)
        return shown.masked_scatter(masked, lost)

    def _time(self, x_t: Tensor, t: Time) -> Tensor:
        return float64(t if self.timed else 0.0).to(x_t.device).float().expand(len(x_t))

    @staticmethod
    def _check(logits: Tensor, shape: tuple[int, ...]) -> None:
        if logits.shape != shape:
            raise ValueError(f"the network should have returned shape {shape}, it returned {tuple(logits.shape)}")

    def _law(self, x_t: Tensor, t: Time, logits: Tensor) -> Categorical:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_probs = torch.log_softmax(logits + self._evidence(x_t, t, logits), dim=-1)
        impossible = log_probs.new_full((*x_t.shape, self.process.states - self.process.vocabulary), -torch.inf)
        return Categorical(torch.cat([log_probs, impossible], dim=-1))

    def _evidence(self, x_t: Tensor, t: Time, logits: Tensor) -> Tensor:
        """log q(x_t | x_0 = k) for each k, up to what is the same for all."""
        mask = self.process.mask
        if mask is None:
            return self.process.likelihood(x_t, 0.0, t, logits.dtype)[..., : self.process.vocabulary].log()
        # at every time the same, 1 included, where the general rule would have nothing to compare
        shown = (x_t != mask).unsqueeze(-1)
        here = torch.where(shown, x_t.unsqueeze(-1), 0)
        said = torch.zeros_like(logits)
        if self.process.still is not None:
            said[..., self.process.still] = -torch.inf
        return torch.where(shown, torch.full_like(said, -torch.inf).scatter(-1, here, 0.0), said)
