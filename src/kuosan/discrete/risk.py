"""The choice of one text among several that were drawn for the same request: the one that is most like the others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence


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
