"""Which frames each symbol of a text lasts: the best monotone alignment, found exactly."""

import numpy as np
import torch
from torch import Tensor


def durations(score: Tensor, texts: Tensor, frames: Tensor) -> Tensor:
    r"""How many frames each symbol lasts on the best monotone path (Glow-TTS: Kim et al. 2020, arXiv 2005.11129).

    Their algorithm 1: the path

    .. math::
        \max_a \sum_{t=0}^{T-1} s_{a(t), t}, \qquad a(0) = 0, \quad a(T-1) = L - 1, \quad a(t+1) - a(t) \in \{0, 1\}

    found by dynamic programming, in float64, over the best sum of paths that are at symbol l in frame t,

    .. math:: Q_{l,t} = \max(Q_{l-1, t-1}, Q_{l, t-1}) + s_{l,t}

    and back from the end along the choices that were made; of two equal ones the path stays. No gradient flows.

    Args:
        score: (B, L, T), the log-likelihood of frame t under symbol l; what is beyond the lengths is not looked at.
        texts: int (B,), how many symbols each text has, at most L.
        frames: int (B,), how many frames each has, at most T.

    Returns:
        int64 (B, L): at least 1 within a text, with the sum of its frames, and 0 beyond.

    Raises:
        ValueError: the shapes do not fit, a length is out of range, a text has more symbols than frames, or a score
            within the lengths is not finite.
    """
    _expect(score, texts, frames)
    batch, symbols, length = score.shape
    within_text = torch.arange(symbols) < texts.cpu()[:, None]
    within_frames = torch.arange(length) < frames.cpu()[:, None]
    known = score.detach().double().cpu().masked_fill(~(within_text[:, :, None] & within_frames[:, None]), 0.0)
    if bad := (~known.isfinite().flatten(1).all(1)).nonzero().flatten().tolist():
        raise ValueError(f"the scores of text {bad[0]} are not finite")
    s = known.permute(2, 0, 1).contiguous().numpy()  # (T, B, L)
    best = np.full((batch, symbols + 1), -np.inf)  # Q of one frame, after a column that no path comes from
    best[:, 1] = s[0, :, 0]
    came = np.empty((length, batch, symbols), dtype=bool)  # from the symbol before
    for k in range(1, length):
        before, same = best[:, :-1], best[:, 1:]
        np.greater(before, same, out=came[k])
        best[:, 1:] = np.maximum(before, same) + s[k]
    found = np.zeros((batch, symbols), dtype=np.int64)
    rows, at, lasting = np.arange(batch), texts.cpu().numpy() - 1, frames.cpu().numpy()
    for k in range(length - 1, -1, -1):
        in_time = k < lasting
        found[rows, at] += in_time
        if k:
            at = at - (came[k, rows, at] & in_time)
    return torch.from_numpy(found).to(score.device)


def path(durations: Tensor) -> Tensor:
    """The alignment as a picture: float32 (B, L, T), 1 where symbol l lasts in frame t, else 0.

    Args:
        durations: int (B, L); T is the greatest sum.

    Raises:
        ValueError: the durations are not integers (B, L), or negative.
    """
    _expect_durations(durations)
    ends = durations.cumsum(1)[:, :, None]
    t = torch.arange(int(durations.sum(1).max()), device=durations.device)
    return ((ends - durations[:, :, None] <= t) & (t < ends)).float()


def expand(values: Tensor, durations: Tensor) -> Tensor:
    """Each symbol's column, repeated as long as it lasts: (B, D, T), zeros after the end; gradients flow to the values.

    Args:
        values: (B, D, L).
        durations: int (B, L); T is the greatest sum.

    Raises:
        ValueError: the shapes do not fit, or the durations are not integers or negative.
    """
    _expect_durations(durations)
    if values.ndim != 3 or (values.shape[0], values.shape[2]) != durations.shape:
        raise ValueError(
            f"values {tuple(values.shape)} do not fit durations {tuple(durations.shape)}: (B, D, L), (B, L)"
        )
    ends = durations.cumsum(1)
    lasting = ends[:, -1:]
    t = torch.arange(int(lasting.max()), device=durations.device).expand(len(durations), -1).contiguous()
    symbol = torch.searchsorted(ends, t, right=True).clamp(max=durations.shape[1] - 1)  # how many have ended by t
    repeated = values.gather(2, symbol[:, None].expand(-1, values.shape[1], -1))  # exact, as a product with TF32 is not
    return repeated.where((t < lasting)[:, None], 0.0)


def _expect(score: Tensor, texts: Tensor, frames: Tensor) -> None:
    if score.ndim != 3 or not score.is_floating_point() or not score.numel():
        raise ValueError(f"score should be (B, L, T) of real numbers, got {tuple(score.shape)} of {score.dtype}")
    for lengths, what, most in ((texts, "texts", score.shape[1]), (frames, "frames", score.shape[2])):
        if lengths.shape != score.shape[:1] or not _integers(lengths):
            raise ValueError(
                f"{what} should be integers ({len(score)},), got {tuple(lengths.shape)} of {lengths.dtype}"
            )
        if int(lengths.min()) < 1 or int(lengths.max()) > most:
            raise ValueError(f"{what} must lie in 1 .. {most}, as score is {tuple(score.shape)}: {lengths.tolist()}")
    for k, (symbols, lasting) in enumerate(zip(texts.tolist(), frames.tolist(), strict=True)):
        if symbols > lasting:
            raise ValueError(
                f"text {k} has {symbols} symbols but {lasting} frames: each symbol needs a frame at least; "
                "leave it out, or use a shorter hop"
            )


def _expect_durations(durations: Tensor) -> None:
    if durations.ndim != 2 or not durations.numel() or not _integers(durations):
        raise ValueError(f"durations should be integers (B, L), got {tuple(durations.shape)} of {durations.dtype}")
    if int(durations.min()) < 0:
        raise ValueError("durations must not be negative")


def _integers(x: Tensor) -> bool:
    return not x.is_floating_point() and not x.is_complex() and x.dtype != torch.bool
