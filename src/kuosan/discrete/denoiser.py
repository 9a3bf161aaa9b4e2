"""A network read as a denoiser of tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kuosan.categorical import Categorical
from kuosan.discrete.process import CategoricalProcess
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
    """

    def __init__(self, network: nn.Module, process: CategoricalProcess, timed: bool | None = None):
        super().__init__()
        self.network, self.process = network, process
        self.timed = process.mask is None if timed is None else timed

    def forward(self, x_t: Tensor, t: Time, condition: object = None) -> Categorical:
        """Raises ValueError if the network's output has the wrong shape."""
        time = float64(t if self.timed else 0.0).to(x_t.device)
        logits = self.network(x_t, time.float().expand(len(x_t)), condition)
        vocabulary = self.process.vocabulary
        if logits.shape != (*x_t.shape, vocabulary):
            raise ValueError(
                f"the network should have returned shape {(*x_t.shape, vocabulary)}, it returned {tuple(logits.shape)}"
            )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_probs = torch.log_softmax(logits + self._evidence(x_t, t, logits), dim=-1)
        impossible = log_probs.new_full((*x_t.shape, self.process.states - vocabulary), -torch.inf)
        return Categorical(torch.cat([log_probs, impossible], dim=-1))

    def _evidence(self, x_t: Tensor, t: Time, logits: Tensor) -> Tensor:
        """log q(x_t | x_0 = k) for each k, up to what is the same for all."""
        mask = self.process.mask
        if mask is None:
            return self.process.likelihood(x_t, 0.0, t, logits.dtype)[..., : self.process.vocabulary].log()
        # at every time the same, 1 included, where the general rule would have nothing to compare
        shown = (x_t != mask).unsqueeze(-1)
        here = torch.where(shown, x_t.unsqueeze(-1), 0)
        return torch.zeros_like(logits).masked_fill(shown, -torch.inf).scatter(-1, here, 0.0)
