"""N-grams: the language model that a better one has to beat, with exact probabilities in a few seconds."""

import math
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor


class NGram:
    r"""An n-gram model with the interpolated smoothing of Witten and Bell (1991; Chen and Goodman 1999, section 2.5).

    .. math:: p(w | h) = \frac{c(h, w) + T(h) \, p(w | h')}{c(h) + T(h)}

    where c counts, T(h) is how many different tokens followed h, and h' is h without its oldest token. Below the
    unigrams is 1 / V. Contexts that were never seen are passed over. Before a text there is <pad>.

    The law is one of padded texts (N, L): a text shorter than L ends with one <pad>, which is predicted as any token;
    a text of L tokens ends because there is no more room, which costs nothing. So the probabilities of all padded
    texts sum to 1.

    Args:
        order: 1 for unigrams, 2 for bigrams, and so on.

    Raises:
        ValueError: the order is less than 1.
    """

    def __init__(self, order: int):
        if order < 1:
            raise ValueError(f"order must be at least 1 (unigrams), got {order}")
        self.order = order
        self._vocabulary = 0
        self._counts: Counter[tuple[int, ...]] = Counter()  # c(h, w), by (*h, w), of every length up to the order
        self._totals: Counter[tuple[int, ...]] = Counter()  # c(h)
        self._kinds: Counter[tuple[int, ...]] = Counter()  # T(h)

    def fit(self, tokens: Tensor, lengths: Tensor, vocabulary: int) -> "NGram":
        """Count; what was counted before is forgotten.

        Args:
            tokens: int64 (N, L), padded with 0.
            lengths: (N,), how many of them are text.
            vocabulary: how many ids there are, V: `Tokenizer.size`.

        Returns:
            This model.

        Raises:
            ValueError: there is no text; the shapes do not fit; an id is outside the vocabulary, or 0 inside a text.
        """
        if not len(tokens):
            raise ValueError("there are no texts to count")
        self._vocabulary, self._counts = vocabulary, Counter()
        for text in self._texts(tokens, lengths):
            for n in range(self.order):  # the first real token of each text stands at order - 1
                self._counts.update(tuple(text[i - n : i + 1]) for i in range(self.order - 1, len(text)))
        self._totals, self._kinds = Counter(), Counter()
        for gram, count in self._counts.items():
            self._totals[gram[:-1]] += count
            self._kinds[gram[:-1]] += 1
        return self

    def probability(self, context: tuple[int, ...], token: int) -> float:
        """p(token | context), of which the last order - 1 tokens matter; before a text they are 0."""
        if not self._vocabulary:
            raise ValueError("this n-gram has not counted anything yet: call fit first")
        p = 1 / self._vocabulary
        for n in range(min(self.order, len(context) + 1)):
            before = context[len(context) - n :]
            total = self._totals[before]
            if not total:
                break  # nor was any longer context seen
            kinds = self._kinds[before]
            p = (self._counts[(*before, token)] + kinds * p) / (total + kinds)
        return p

    def log_prob(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The log-probability of each text in nats, its end included where it is shorter than L; float64 (N,).

        Raises:
            ValueError: `fit` was not called; the shapes do not fit; an id is outside the vocabulary, or 0 in a text.
        """
        start = self.order - 1
        return torch.tensor(
            [
                math.fsum(
                    math.log(self.probability(tuple(text[i - start : i]), text[i])) for i in range(start, len(text))
                )
                for text in self._texts(tokens, lengths)
            ],
            dtype=torch.float64,
        )

    def perplexity(self, tokens: Tensor, lengths: Tensor) -> float:
        """exp of the mean nats per predicted token, where the end of a text shorter than L counts as one.

        Raises:
            ValueError: as `log_prob`, or there are no texts.
        """
        if not len(tokens):
            raise ValueError("there are no texts to measure")
        predicted = int(lengths.sum()) + int((lengths < tokens.shape[1]).sum())
        return math.exp(-float(self.log_prob(tokens, lengths).sum()) / predicted)

    def _texts(self, tokens: Tensor, lengths: Tensor) -> Iterator[list[int]]:
        """Each text, with order - 1 zeros before it, and one after it if it is shorter than L."""
        if not self._vocabulary:
            raise ValueError("this n-gram has not counted anything yet: call fit first")
        if tokens.ndim != 2 or lengths.shape != (len(tokens),):
            raise ValueError(
                f"expected tokens (N, L) and lengths (N,), got {tuple(tokens.shape)} and {tuple(lengths.shape)}"
            )
        start, longest = [0] * (self.order - 1), tokens.shape[1]
        for row, (ids, length) in enumerate(zip(tokens.tolist(), lengths.tolist(), strict=True)):
            if not 0 <= length <= longest:
                raise ValueError(f"text {row} has length {length}, and the tokens are {longest} wide")
            text = ids[:length]
            if text and not 0 < min(text) <= max(text) < self._vocabulary:
                raise ValueError(f"text {row} has an id outside 1 .. {self._vocabulary - 1}: {text}")
            yield [*start, *text, *([0] if length < longest else [])]
