"""Texts written from left to right: the law that a masked model is compared with, as a ladder without latents."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from kuosan.categorical import Categorical
from kuosan.chain import Chain
from kuosan.denoiser import evaluating
from kuosan.discrete.sampling import Drawn, guided
from kuosan.gaussian import Gaussian
from kuosan.kernels import Generative, Guide, Rung
from kuosan.networks.tokens import TokenTransformer
from kuosan.solvers import Noise, check_seeds


class Autoregressive(nn.Module):
    r"""The law of a text, token by token (Bengio et al. 2003, JMLR 3, section 1).

    .. math:: \log p(x) = \sum_{i=1}^{\min(n+1,\,L)} \log p(x_i|x_1,\dots,x_{i-1})

    of n tokens before the first ``end``. That one is predicted as any token, and all after it are ``end`` with
    certainty; a text of L tokens ends because there is no more room. So the probabilities of all padded texts (L,)
    sum to 1, as those of :class:`~kuosan.text.ngram.NGram`.

    Args:
        network: any causal module called as ``network(x, t, condition)`` with x (B, L) int64 and t (B,), which is 0: it
            returns logits (B, L, vocabulary), those of position i from x's positions 0 to i. It is shown the text
            one place to the right, after the state ``vocabulary``: that of a masked model's mask, so that the same
            :class:`~kuosan.networks.tokens.TokenTransformer` of ``vocabulary + 1`` states serves both.
        vocabulary: V.
        end: the token that ends a text and fills the rest.

    Attributes:
        longest: the most tokens of a text, if the network says so.

    Raises:
        ValueError: fewer than two tokens, an end that is none of them, a TokenTransformer that is not causal or of
            another vocabulary.
    """

    def __init__(self, network: nn.Module, vocabulary: int, end: int = 0):
        super().__init__()
        if not 0 <= end < vocabulary or vocabulary < 2:
            raise ValueError(f"end must be one of at least 2 tokens, got end {end} and vocabulary {vocabulary}")
        self.longest: int | None = None
        if isinstance(network, TokenTransformer):
            if not network.causal:
                raise ValueError("this network sees the tokens that it is to predict: make it with causal=True")
            states, predicted = network.token.num_embeddings, network.last.out_features
            if states <= vocabulary or predicted != vocabulary:
                raise ValueError(
                    f"a network of {vocabulary + 1} states and {vocabulary} predicted tokens expected (the state after "
                    f"the vocabulary's begins a text), got {states} and {predicted}"
                )
            self.longest = network.length
        self.network, self.vocabulary, self.end = network, vocabulary, end

    def log_prob(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """log p(x) of texts (B, L), (B,), nats; minus infinity where a token follows the end.

        Raises:
            ValueError: texts of another shape or longer than the network, tokens outside the vocabulary, not one
                condition for each text.
        """
        x = self._checked(x, condition)
        if not x.shape[1]:
            raise ValueError("texts (B, L) have room for at least one token, got L = 0")
        ended = (x == self.end).cumsum(1) > 0
        predicted = torch.cat([torch.ones_like(ended[:, :1]), ~ended[:, :-1]], dim=1)
        width = int(predicted.any(0).sum())  # beyond it all texts have ended: the network need not read there
        logits = self._logits(x[:, : width - 1], condition, predicted[:, :width])
        nats = -cross_entropy(logits, x[predicted], reduction="none")
        total = nats.new_zeros(x.shape).masked_scatter(predicted, nats).sum(1)
        return total.masked_fill((ended & (x != self.end)).any(1), -torch.inf)

    def next_law(self, x: Tensor, condition: Tensor | None = None) -> Categorical:
        """p(x_{n+1} | x_1, ..., x_n) of texts that begin as x (B, n), n >= 0: B laws of V states.

        Raises:
            ValueError: as :meth:`log_prob`, or no room for another token.
        """
        x = self._checked(x, condition, more=1)
        last = x.new_zeros(len(x), x.shape[1] + 1, dtype=torch.bool)
        last[:, -1] = True
        log_probs = torch.log_softmax(self._logits(x, condition, last), -1)
        certain = torch.full_like(log_probs[0], -torch.inf)
        certain[self.end] = 0
        return Categorical(torch.where((x == self.end).any(1, keepdim=True), certain, log_probs))

    def _logits(self, before: Tensor, condition: Tensor | None, only: Tensor) -> Tensor:
        """(M, V): what follows the beginnings (B, n), at those M of the n + 1 places where ``only`` is true."""
        start = before.new_full((len(before), 1), self.vocabulary)
        x, t = torch.cat([start, before], dim=1), torch.zeros(len(before), device=before.device)
        if isinstance(self.network, TokenTransformer):
            logits = self.network(x, t, condition, only=only)
        else:
            logits = self.network(x, t, condition)
            if logits.shape != (*x.shape, self.vocabulary):
                raise ValueError(
                    f"the network should have returned shape {(*x.shape, self.vocabulary)}, it returned "
                    f"{tuple(logits.shape)}"
                )
            logits = logits[only]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _checked(self, x: Tensor, condition: Tensor | None, more: int = 0) -> Tensor:
        if x.ndim != 2 or x.is_floating_point():
            raise ValueError(f"texts are whole numbers (B, L), got {x.dtype} of shape {tuple(x.shape)}")
        if x.numel() and (x.min() < 0 or x.max() >= self.vocabulary):
            raise ValueError(f"tokens are 0 to {self.vocabulary - 1}, got {int(x.min())} to {int(x.max())}")
        if self.longest is not None and x.shape[1] + more > self.longest:
            raise ValueError(f"this model is of texts of at most {self.longest} tokens, got {x.shape[1] + more}")
        if condition is not None and len(condition) != len(x):
            raise ValueError(f"one condition for each text expected: {len(x)} texts, {len(condition)} conditions")
        return x.long()


class NextToken(Protocol):
    """What texts can be drawn from: an :class:`Autoregressive`, or one wrapped in guidance."""

    vocabulary: int
    end: int
    longest: int | None

    def next_law(self, x: Tensor, condition: Tensor | None = None) -> Categorical: ...


class AutoregressiveGuidance(nn.Module):
    r"""Guided tokens: :math:`p \propto p(x_i|x_{<i},c)^{1+w}\, p(x_i|x_{<i})^{-w}` (Sanchez et al. 2023,
    arXiv 2306.17806), w = 0 being no guidance. Each of its evaluations is two of the model.

    Args:
        model: trained with and without its condition.
        weight: w.
    """

    def __init__(self, model: Autoregressive, weight: float):
        super().__init__()
        self.model, self.weight = model, weight
        self.vocabulary, self.end, self.longest = model.vocabulary, model.end, model.longest

    def next_law(self, x: Tensor, condition: Tensor | None = None) -> Categorical:
        """As :meth:`Autoregressive.next_law`; without a condition a ValueError."""
        if condition is None:
            raise ValueError("classifier-free guidance guides towards a condition: none was given")
        return guided(self.model.next_law(x, condition), self.model.next_law(x), self.weight)


# -- sampling ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_left_to_right(
    model: NextToken,
    length: int,
    *,
    seeds: Iterable[int],
    condition: Tensor | None = None,
    transform: Callable[[Categorical], Categorical] | None = None,
    prompt: Tensor | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Drawn:
    """Draw texts of at most so many tokens: number k is a function of (seed k, condition k, model) and of nothing else.

    The model is asked anew of a text for each of its tokens, its end included, and not once it has ended.

    Args:
        model: an :class:`Autoregressive`, or one wrapped in guidance.
        length: L.
        seeds: one for each, all different.
        condition: one for each, (N, ...).
        transform: of each token's law, such as :class:`~kuosan.discrete.Sharpened`.
        prompt: (n,) or (N, n) int64, how the texts begin.
        batch_size: texts at once.
        progress: called with (done, all).

    Returns:
        Texts (N, L), filled with the model's ``end``; the evaluations of each; L - n steps.

    Raises:
        ValueError: no seeds or repeated ones, no length or one that the model does not reach, not one condition for
            each seed, a prompt of another shape, longer than L, with tokens outside the vocabulary or an end.
    """
    seeds = check_seeds(seeds)
    if length < 1 or batch_size < 1:
        raise ValueError(f"length and batch_size must be at least 1, got {length} and {batch_size}")
    if model.longest is not None and length > model.longest:
        raise ValueError(f"this model is of texts of at most {model.longest} tokens, got {length}")
    if condition is not None and len(condition) != len(seeds):
        raise ValueError(f"one condition for each seed expected: {len(seeds)} seeds, {len(condition)} conditions")
    begun = _beginnings(prompt, len(seeds), length, model)
    tokens, counts = [], []
    with evaluating(model) if isinstance(model, nn.Module) else nullcontext():
        for first in range(0, len(seeds), batch_size):
            part = slice(first, first + batch_size)
            noise = Noise(seeds[part], (length,), torch.float64, purpose="tokens").draw().to(device)
            text, count = _write(
                model,
                begun[part].to(device),
                length,
                None if condition is None else condition[part].to(device),
                _by(noise, transform),
            )
            tokens.append(text.cpu())
            counts.append(count.cpu())
            if progress is not None:
                progress(min(first + batch_size, len(seeds)), len(seeds))
    return Drawn(torch.cat(tokens), torch.cat(counts), length - begun.shape[1])


def _beginnings(prompt: Tensor | None, n: int, length: int, model: NextToken) -> Tensor:
    if prompt is None:
        return torch.zeros(n, 0, dtype=torch.int64)
    if prompt.is_floating_point() or prompt.ndim not in (1, 2) or (prompt.ndim == 2 and len(prompt) != n):
        raise ValueError(f"prompt must be whole numbers of shape (n,) or ({n}, n), got {tuple(prompt.shape)}")
    if prompt.shape[-1] > length:
        raise ValueError(f"the prompt has {prompt.shape[-1]} tokens, and the text has room for {length}")
    if prompt.numel() and (prompt.min() < 0 or prompt.max() >= model.vocabulary):
        raise ValueError(f"tokens are 0 to {model.vocabulary - 1}, got {int(prompt.min())} to {int(prompt.max())}")
    if bool((prompt == model.end).any()):
        raise ValueError(f"a prompt with the token {model.end} in it has ended: there is nothing to be drawn")
    return prompt.long().expand(n, -1)


#: From the laws (m,) of the next token of the m texts that go on, their rows (m,) and the place i: the tokens (m,).
Choice = Callable[[Categorical, Tensor, int], Tensor]


def _by(noise: Tensor, transform: Callable[[Categorical], Categorical] | None = None) -> Choice:
    """Draws, by standard-normal values (B, L)."""
    return lambda law, rows, i: (law if transform is None else transform(law)).sample(noise[rows, i])


def _write(
    model: NextToken, begun: Tensor, length: int, condition: Tensor | None, choose: Choice
) -> tuple[Tensor, Tensor]:
    """(texts (B, length), evaluations (B,)) that begin as ``begun`` (B, n)."""
    text = begun.new_full((len(begun), length), model.end)
    text[:, : begun.shape[1]] = begun
    count = torch.zeros_like(text[:, 0])
    rows = torch.arange(len(text), device=text.device)
    for i in range(begun.shape[1], length):
        law = model.next_law(text[rows, :i], None if condition is None else condition[rows])
        text[rows, i] = choose(law, rows, i)
        count[rows] += 1
        rows = rows[text[rows, i] != model.end]
        if not len(rows):
            break
    return text, count


# -- the ladder --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """The law of B texts of at most L tokens: what an :class:`Autoregressive` says of whole texts.

    Args:
        model: whose law it is.
        batch: B.
        tokens: L.
        condition: one for each, (B, ...).
    """

    model: Autoregressive
    batch: int
    tokens: int
    condition: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """The likeliest next token, one after the other, (B, L): a law of texts has no other middle."""
        return self._written(lambda law, rows, i: law.mean)

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Texts (B, L), each token as :meth:`~kuosan.categorical.Categorical.sample` draws it.

        Args:
            noise: standard-normal values (B, L); drawn from ``generator`` when not given.
        """
        if noise is None:
            where = None if generator is None else generator.device
            noise = torch.randn(self.batch, self.tokens, generator=generator, device=where)
        return self._written(_by(noise.to(_device_of(self.model))))

    def log_prob(self, x: Tensor) -> Tensor:
        """Of texts (B, up to L), the rest of which is ``end``; (B,), nats: :meth:`Autoregressive.log_prob`."""
        room = self.tokens - x.shape[1]
        if room < 0:
            raise ValueError(f"these are texts of at most {self.tokens} tokens, got {x.shape[1]}")
        return self.model.log_prob(pad(x, (0, room), value=self.model.end), self.condition)

    @torch.no_grad()
    def _written(self, choose: Choice) -> Tensor:
        nothing = torch.zeros(self.batch, 0, dtype=torch.int64, device=_device_of(self.model))
        return _write(self.model, nothing, self.tokens, self.condition, choose)[0]


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _nothing(batch: int, device: torch.device) -> Gaussian:
    """A latent without coordinates: it has one value, of density 1."""
    zeros = torch.zeros(batch, 0, device=device)
    return Gaussian(zeros, zeros)


class NoLatents(Guide):
    """q of a ladder whose one latent is empty."""

    length = 1

    def up(self, i: Rung, below: Sequence[Tensor], given: Any) -> Gaussian:
        return _nothing(len(below[0]), below[0].device)


class LeftToRight(Generative):
    """p of a ladder whose one latent is empty: the decoder knows everything.

    Args:
        autoregressive: the decoder.
        tokens: L, of a text.
    """

    length = 1
    discrete = True

    def __init__(self, autoregressive: Autoregressive, tokens: int):
        super().__init__()
        self.autoregressive: Autoregressive = autoregressive
        self.shapes = ((tokens,), (0,))

    def prior(self, condition: Any = None) -> Gaussian:
        return _nothing(1, _device_of(self))

    def down(self, i: Rung, above: Sequence[Tensor], condition: Any = None) -> Texts:
        return Texts(self.autoregressive, len(above[0]), self.shapes[0][0], condition)


class AutoregressiveChain(Chain):
    r"""An autoregressive model as a ladder: with no latents, its bound is not a bound but log p(x) itself.

    .. math:: \log p(x) \ge \mathbb E_{q(z|x)} \log p(x|z) - \mathrm{KL}(q(z|x) \| p(z)) = \log p(x)
        \quad\text{with } z \in \mathbb R^0

    So it answers as every ladder does (``elbo``, ``estimate``, ``generate``), and
    :class:`~kuosan.autoencoders.objective.Elbo` trains it.

    Args:
        autoregressive: the model.
        tokens: L, of a text with what fills it; shorter ones pay for their end.

    Raises:
        ValueError: no tokens, or more than the network reads.
    """

    model: LeftToRight

    def __init__(self, autoregressive: Autoregressive, tokens: int):
        longest = autoregressive.longest
        if tokens < 1 or (longest is not None and tokens > longest):
            raise ValueError(f"texts have 1 to {'any number of' if longest is None else longest} tokens, got {tokens}")
        super().__init__(NoLatents(), LeftToRight(autoregressive, tokens))

    def loss(
        self, x: Tensor, condition: Any = None, *, u: Tensor, noise: Tensor | None = None, earliest: float = 0.0
    ) -> Tensor:
        """-log p(x), (B,), nats: what :class:`~kuosan.discrete.objective.TokenBound` asks for. Nothing is drawn."""
        model = self.model
        return -Texts(model.autoregressive, len(x), model.shapes[0][0], condition).log_prob(x)
