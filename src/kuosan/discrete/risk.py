"""The choice of one text among several that were drawn for the same request: the one that is most like the others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kuosan.discrete.lengths import PAD
from kuosan.seeds import stream


def bleu(candidate: Sequence[Hashable], reference: Sequence[Hashable], order: int = 4) -> float:
    r"""Smoothed BLEU of one text against one other, 0 to 1.

    .. math:: \min(1, e^{1 - r/c})\,\Big(m_1/n_1\prod_{n=2}^N \frac{m_n + 1}{n_n + 1}\Big)^{1/N}

    with c and r the lengths of candidate and reference, n_n the candidate's n-grams and m_n those of them that the
    reference has too, each counted no more often than there (Papineni et al. 2002; "plus one" from Lin and Och 2004).

    Args:
        order: N, the longest n-gram.

    Raises:
        ValueError: order is under 1.
    """
    if order < 1:
        raise ValueError(f"order is the longest n-gram, at least 1, got {order}")
    if not candidate or not reference:
        return float(not candidate and not reference)
    total = min(0.0, 1 - len(reference) / len(candidate))  # the brevity penalty's logarithm
    for n in range(1, order + 1):
        own, other = (Counter(tuple(t[i : i + n]) for i in range(len(t) - n + 1)) for t in (candidate, reference))
        matches, plus = sum((own & other).values()), int(n > 1)
        if not matches + plus:
            return 0.0
        total += math.log((matches + plus) / (sum(own.values()) + plus)) / order
    return math.exp(total)


def minimum_risk(samples: Sequence[Sequence[Hashable]], order: int = 4) -> int:
    r"""The index of the sample of least risk, :math:`\arg\min_i \sum_{j\ne i} (1 - \mathrm{BLEU}(y_i, y_j))`.

    Minimum Bayes risk decoding (Kumar and Byrne 2004) as in Diffusion-LM (Li et al. 2022, arXiv 2205.14217, section
    5.2): the samples stand for the law of answers, and negative :func:`bleu` is the loss. Of equal ones the first.

    Args:
        samples: texts as sequences of tokens or words, without their padding.
        order: of :func:`bleu`.

    Raises:
        ValueError: no samples, or an order under 1.
    """
    if not samples:
        raise ValueError("minimum risk chooses among samples: none were given")
    gain = [sum(bleu(one, other, order) for j, other in enumerate(samples) if j != i) for i, one in enumerate(samples)]
    return gain.index(max(gain))


def candidate_batches(
    seeds: Sequence[int], labels: Tensor | None, n: int, batch_size: int
) -> Iterator[tuple[list[int], Tensor | None]]:
    """Seeds and classes of n candidates for each text, one text after the other, about so many at once.

    The first candidate of each has the text's own seed.
    """
    texts = max(1, batch_size // n)
    for first in range(0, len(seeds), texts):
        own = seeds[first : first + texts]
        each = [seed if i == 0 else stream("candidate", seed, i).initial_seed() for seed in own for i in range(n)]
        yield each, None if labels is None else labels[first : first + texts].repeat_interleave(n)


def of_least_risk(tokens: Tensor, n: int) -> Tensor:
    """The choice of :func:`minimum_risk` among each n texts in a row, (N / n, L) of tokens (N, L), padded."""
    if n == 1:
        return tokens
    texts = [row[row != PAD].tolist() for row in tokens]
    return tokens[torch.tensor([i + minimum_risk(texts[i : i + n]) for i in range(0, len(texts), n)])]


def with_candidates(n: int, how: dict[str, Any]) -> dict[str, Any]:
    """What a sampler becomes that draws n candidates for each text: its fields ``candidates`` and ``how``.

    Raises:
        ValueError: n is under 1.
    """
    if n < 1:
        raise ValueError(f"candidates are at least 1 for each text, got {n}")
    return {"candidates": n, "how": how | {"candidates": n, "evaluations": n * how["evaluations"]}}
