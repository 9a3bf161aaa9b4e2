"""Texts longer than a model's own: its window moves over the text, and each block is given what stands before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from kuosan.discrete.sampling import Drawn, TokenModel, sample_tokens
from kuosan.seeds import stream
from kuosan.solvers import check_seeds


def blocks_of(length: int, window: int, block: int | None = None) -> list[int]:
    """How many tokens each window writes: the first all that it holds, each next one a block, the last what is left.

    Args:
        block: default half a window.

    Raises:
        ValueError: no length, no window, or a block that is not of 1 token to a window's.
    """
    block = max(1, window // 2) if block is None else block
    if length < 1 or window < 1:
        raise ValueError(f"length and window must be at least 1 token, got {length} and {window}")
    if not 1 <= block <= window:
        raise ValueError(f"blocks have 1 to {window} tokens, all that a window of this model holds; got {block}")
    ends = [*range(min(window, length), length, block), length]
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def sample_blocks(
    model: TokenModel,
    length: int,
    *,
    seeds: Iterable[int],
    window: int,
    block: int | None = None,
    known: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
    **how: Any,
) -> Drawn:
    r"""Draw texts of just so many tokens, a block b at a time within a window of w (Han et al. 2023, arXiv 2210.17432;
    Arriola et al. 2025, arXiv 2503.09573).

    .. math:: p(x) = p(x_1, \dots, x_w) \prod_i p(x_{i+1}, \dots, x_{i+b} | x_{i+b-w+1}, \dots, x_i),
        \quad i = w, w+b, \dots

    The first window is written as a whole: nothing stands before it. All windows are full, so that no padding is drawn.
    The law is that of long texts as far as a token depends on no more than what its window still shows; of processes
    without a mask besides only nearly, since they see what is known as noisy as all else.

    Number k is a function of (seed k, condition k, model, rule, w, b) and of nothing else; a text of one window is what
    :func:`sample_tokens` draws of its seed. Each later block has a seed of its own, drawn from its text's.

    Args:
        model: a :class:`~kuosan.discrete.CategoricalDenoiser`, or one wrapped in guidance.
        length: L, of the texts.
        seeds: one for each, all different.
        window: w, at most what the model reads. To a model that knows lengths each window is a whole text.
        block: b, from 1 to w; default w // 2. Small ones see more of what is before them, and cost more.
        known: (N, L) or (L,) int64, the tokens that are given, and -1 where they are to be drawn; of those that are
            further on a block knows only what its window shows.
        progress: called with (done, all), of the windows of all texts.
        how: of :func:`sample_tokens`: steps or grid, rule, condition, transform, cache, batch_size, device, watch.

    Returns:
        Texts (N, L), what all windows together cost, and their steps.

    Raises:
        ValueError: no length, a window that the model does not reach, a block larger than it, known tokens of another
            shape; or as of :func:`sample_tokens`.
    """
    seeds = check_seeds(seeds)
    parts = blocks_of(length, window, block)
    if model.lengths is not None and window > model.lengths.longest:
        raise ValueError(f"a window of {window} tokens: this model reads at most {model.lengths.longest}")
    if known is not None and known.shape not in ((length,), (len(seeds), length)):
        raise ValueError(f"known must be of shape ({length},) or ({len(seeds)}, {length}), got {tuple(known.shape)}")
    text = torch.full((len(seeds), length), -1) if known is None else known.expand(len(seeds), -1).clone()
    evaluations, steps = torch.zeros(len(seeds), dtype=torch.int64), 0
    for i, end in enumerate(accumulate(parts)):
        shown = slice(max(0, end - window), end)
        width = end - shown.start
        drawn = sample_tokens(
            model,
            width,
            seeds=_own(seeds, i),
            known=text[:, shown],
            lengths=None if model.lengths is None else torch.full((len(seeds),), width),
            progress=None if progress is None else _over(progress, i * len(seeds), len(parts) * len(seeds)),
            **how,
        )
        text[:, shown] = drawn.tokens
        evaluations += drawn.evaluations
        steps += drawn.steps
    return Drawn(text, evaluations, steps)


def _own(seeds: Sequence[int], block: int) -> list[int]:
    """The seeds of a block: the texts' own of the first, and of each other as independent as another text's."""
    if block == 0:
        return list(seeds)
    # what a generator begins with has 63 bits, and its draws on the CPU only 32: of many texts two would be alike
    return [stream("block", seed, block).initial_seed() for seed in seeds]


def _over(progress: Callable[[int, int], None], before: int, total: int) -> Callable[[int, int], None]:
    return lambda done, _: progress(before + done, total)
