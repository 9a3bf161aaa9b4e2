"""What all networks here share: how they are told the time and the class, and layers that start at zero."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn


def check_size(width: int, depth: int) -> None:
    """Raises ValueError for a network that nobody can have meant."""
    if not 1 <= width <= 2**16 or not 1 <= depth <= 1000:
        raise ValueError(f"width must lie in 1 to 65536 and depth in 1 to 1000, got {width} and {depth}")


M = TypeVar("M", bound=nn.Module)


def zeroed(layer: M) -> M:
    """The layer with all its parameters set to 0, so that at the start it adds nothing."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class Fourier(nn.Module):
    r"""x with :math:`\sin(2^n\pi x)` and :math:`\cos(2^n\pi x)` beside it along dimension 1, for n and for n - 1.

    What tells neighbouring levels apart (Kingma et al. 2021, arXiv 2107.00630, section 4.5: n = 8 and 7 for bytes).

    Args:
        n: of the finer of the two; 0 for x alone.
    """

    def __init__(self, n: int):
        super().__init__()
        if not 0 <= n <= 16:
            raise ValueError(f"fourier is the n of 2^n pi, 0 (none) to 16, got {n}")
        self.frequencies = () if n == 0 else (math.pi * 2 ** (n - 1), math.pi * 2**n)

    @property
    def factor(self) -> int:
        """How many times as much goes out as comes in."""
        return 1 + 2 * len(self.frequencies)

    def forward(self, x: Tensor) -> Tensor:
        waves = [wave(f * x.float()).to(x.dtype) for f in self.frequencies for wave in (torch.sin, torch.cos)]
        return torch.cat([x, *waves], dim=1)


class Embedding(nn.Module):
    """Fourier features of the time through a small MLP, plus a learned vector for each class.

    Args:
        width: size of the vector.
        classes: number of classes; 0 for none. A class of -1, or no condition at all, means "any".
        features: sine and cosine pairs, of wavelengths 4 down to 1/16 in geometric steps: fine enough for times in
            [0, 1], long enough for EDM's labels.
    """

    def __init__(self, width: int, classes: int = 0, features: int = 32):
        super().__init__()
        frequencies = 2 * math.pi * torch.logspace(-2, 4, features, base=2.0)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time = nn.Sequential(nn.Linear(2 * features, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = classes
        if classes:
            self.label = nn.Embedding(classes + 1, width)  # the last one is "any"
            nn.init.normal_(self.label.weight, std=0.5)

    def forward(self, t: Tensor, condition: object = None) -> Tensor:
        """(B, width) from t (B,) and classes (B,).

        Raises:
            ValueError: a condition for a network without classes, or a class that does not exist.
        """
        angles = t[:, None] * self.get_buffer("frequencies")
        vector = self.time(torch.cat([angles.cos(), angles.sin()], dim=1))
        if not self.classes:
            if condition is not None:
                raise ValueError("this network is unconditional: it has no classes to choose from")
            return vector
        if condition is None:
            condition = torch.full((len(t),), -1, device=t.device)
        assert isinstance(condition, Tensor)
        if condition.shape != t.shape:
            raise ValueError(f"one class for each of {len(t)} examples expected, got shape {tuple(condition.shape)}")
        if condition.min() < -1 or condition.max() >= self.classes:
            raise ValueError(
                f"classes are 0 to {self.classes - 1}, or -1 for any; got {sorted(set(condition.tolist()))}"
            )
        return vector + self.label(condition % (self.classes + 1))


class Block(nn.Module):
    """Attention and an MLP, each scaled, shifted and gated by what is given; at the start it does nothing."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zeroed(nn.Linear(width, 6 * width))
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, given: Tensor, hidden: Tensor | None = None) -> Tensor:
        """The next (B, N, width).

        Args:
            given: (B, width).
            hidden: bool, broadcastable to (B, heads, N, N): which positions, last, others do not look at.
        """
        scale_a, shift_a, gate_a, scale_m, shift_m, gate_m = self.modulation(given).unsqueeze(1).chunk(6, dim=-1)
        h = h + gate_a * self.dropout(self.attention(self.norm(h) * (1 + scale_a) + shift_a, hidden))
        return h + gate_m * self.dropout(self.mlp(self.norm(h) * (1 + scale_m) + shift_m))

    def attention(self, h: Tensor, hidden: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # written out: for a few dozen tokens on a CPU, faster to train than torch's (benchmarks/attention.py)
        scores = q * q.shape[-1] ** -0.5 @ k.mT
        if hidden is not None:
            scores = scores.masked_fill(hidden, -torch.inf)
        weights = torch.softmax(scores, dim=-1).to(v.dtype)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def of_ends(ended: Tensor, from_end: Tensor) -> tuple[Tensor, Tensor]:
    """What the positions of texts are told of how far the end is, and which ones attention does not look at.

    Args:
        ended: (B, n), bool: after the end.
        from_end: (L, width), a learned vector for each distance.

    Returns:
        (B, n, width), and bool (B, 1, 1, n).
    """
    left = (~ended).sum(1, keepdim=True) - torch.arange(1, ended.shape[1] + 1, device=ended.device)
    return from_end[left.clamp_min(0)], ended[:, None, None]
