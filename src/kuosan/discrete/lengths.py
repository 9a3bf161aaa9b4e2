"""How long texts are: the law of what padding leaves of a text, and of padded noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.special import ndtr

from kuosan.categorical import Categorical, pick
from kuosan.solvers import Noise

#: The token that fills a text after its end, in every vocabulary.
PAD = 0
#: A length's logit is this times its parameter: Adam moves each parameter by about the learning rate, and a histogram
#: should be learned long before a network is.
QUICK = 10.0


def padded(x: Tensor, padding: int = PAD) -> Tensor:
    """Where padding stands in texts, bool (B, L): that token of tokens (B, L), the vector 0 of vectors (B, L, D)."""
    return (x == 0).all(-1) if x.is_floating_point() else x == padding


class Lengths(nn.Module):
    """p(n | class), n from 1 to L: a histogram, learned with the network by the bound, whose prior term it is.

    Args:
        longest: L.
        classes: 0 for none; a class of -1, or no condition, means "any".

    Raises:
        ValueError: no length, or fewer than no classes.
    """

    def __init__(self, longest: int, classes: int = 0):
        super().__init__()
        if longest < 1 or classes < 0:
            raise ValueError(f"lengths are of at least one token, for 0 or more classes; got {longest} and {classes}")
        self.logits = nn.Parameter(torch.zeros(classes + 1, longest))

    @property
    def longest(self) -> int:
        """L."""
        return self.logits.shape[1]

    def law(self, n: int, condition: Tensor | None = None, weight: float = 1.0) -> Tensor:
        r"""log p of the lengths 1 to L of n texts, (n, L).

        Args:
            condition: (n,).
            weight: w of :math:`p(n)\,p(c|n)^w \propto p(n)^{1-w}\,p(n|c)^w`, which control asks for.
        """
        rows = len(self.logits)
        which = torch.full((n,), -1, device=self.logits.device) if condition is None or rows == 1 else condition
        laws = torch.log_softmax(QUICK * self.logits.float(), -1)
        found = laws[which % rows]
        return found if weight == 1 else torch.log_softmax((1 - weight) * laws[-1] + weight * found, -1)

    def draw(
        self,
        u: Tensor,
        condition: Tensor | None = None,
        least: Tensor | int = 1,
        most: int = 2**31,
        weight: float = 1.0,
    ) -> Tensor:
        """A length for each u (B,), uniform in [0, 1), among those from ``least`` to ``most``.

        Args:
            condition, weight: of :meth:`law`.

        Raises:
            ValueError: a least length that no text has.
        """
        least = torch.as_tensor(least, device=u.device).expand(u.shape)
        if int(least.max()) > min(most, self.longest):
            raise ValueError(
                f"the longest text has {min(most, self.longest)} tokens, and {int(least.max())} are asked for"
            )
        n = torch.arange(1, self.longest + 1, device=u.device)
        allowed = (n >= least.unsqueeze(-1)) & (n <= most)
        law = self.law(len(u), condition, weight).double().masked_fill(~allowed, -torch.inf)
        return pick(torch.softmax(law, -1), u)[0] + 1  # normalised before exp: all that is allowed may be very unlikely

    def of_seeds(self, seeds: Sequence[int], condition: Tensor | None = None, *how: Any, **more: Any) -> Tensor:
        """As :meth:`draw`: a length for each seed (B,), a function of it and of nothing that is drawn beside it."""
        u = ndtr(Noise(seeds, (), torch.float64, purpose="length").draw())
        return self.draw(u.to(self.logits.device), condition, *how, **more)


class Padded:
    """Texts of lengths with a law, each token up to the end with the same law of its own, and padding after it.

    Args:
        log_lengths: (B, L), of the lengths 1 to L, or (1, L).
        token: the law of one token, or of the vector of one.
        padding: what stands after the end; of vectors it is always 0.
    """

    def __init__(self, log_lengths: Tensor, token: Any, padding: int = PAD):
        self.log_lengths, self.token, self.padding = log_lengths, token, padding

    def log_length(self, hidden: Tensor) -> Tensor:
        """log p(n) of texts whose padding stands here, (B, up to L), bool; (B,), nats; of what is no text -infinity."""
        n = (~hidden).sum(1)
        proper = (n > 0) & ~(hidden[:, :-1] & ~hidden[:, 1:]).any(1)
        found = self.log_lengths.expand(len(hidden), -1).gather(1, (n - 1).clamp_min(0).unsqueeze(1)).squeeze(1)
        return found.masked_fill(~proper, -torch.inf)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of texts (B, up to L, ...), (B,), nats; of an empty one, or one with tokens after padding,
        -infinity."""
        hidden = padded(x, self.padding)
        tokens = self.token.log_prob(x).flatten(2).sum(-1) if x.is_floating_point() else self.token.log_prob(x)
        length = self.log_length(hidden)
        return length + tokens.masked_fill(hidden, 0.0).sum(1).to(length)

    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """Texts (B, L)."""
        n = Categorical(self.log_lengths).sample(generator=generator) + 1
        rows, longest = self.log_lengths.shape
        tokens = Categorical(self.token.log_probs.expand(rows, longest, -1)).sample(generator=generator)
        return self._of_length(tokens, n)

    @property
    def mean(self) -> Tensor:
        """The likeliest token, as often as is likeliest, (B, L)."""
        rows, longest = self.log_lengths.shape
        return self._of_length(self.token.mean.expand(rows, longest), self.log_lengths.argmax(1) + 1)

    def _of_length(self, tokens: Tensor, n: Tensor) -> Tensor:
        return tokens.masked_fill(torch.arange(tokens.shape[1], device=tokens.device) >= n.unsqueeze(1), self.padding)
