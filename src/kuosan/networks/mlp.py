"""A residual MLP with adaptive layer norm: enough for points, mixtures and 8x8 digits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kuosan.networks.parts import Embedding, Fourier, check_size, zeroed


class MLP(nn.Module):
    """Residual blocks over the flattened example, each modulated by time and class.

    Args:
        shape: of one example, without the batch.
        width, depth: of the blocks.
        classes: 0 for an unconditional network.
        outputs: numbers returned for each coordinate: 1; 2 for a learned variance, stacked along dimension 1; L for
            levels, as one more dimension (``stack_last``).
        stack_last: whether several outputs make a last dimension or multiply dimension 1.
        dropout: in every block.
        fourier: :class:`~kuosan.networks.parts.Fourier` features of the input; 0 for none.

    Raises:
        ValueError: an impossible width or depth.
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 512,
        depth: int = 4,
        classes: int = 0,
        outputs: int = 1,
        stack_last: bool = False,
        dropout: float = 0.0,
        fourier: int = 0,
    ):
        super().__init__()
        check_size(width, depth)
        self.shape, self.outputs, self.stack_last = tuple(shape), outputs, stack_last
        size = math.prod(self.shape)
        self.embedding = Embedding(width, classes)
        self.fourier = Fourier(fourier)
        self.enter = nn.Linear(size * self.fourier.factor, width)
        self.blocks = nn.ModuleList(_Block(width, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.leave = zeroed(nn.Linear(width, size * outputs))

    def forward(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"this network was made for examples of shape {self.shape}, got {tuple(x.shape[1:])}")
        given = self.embedding(t, condition)
        h = self.enter(self.fourier(x.flatten(1)))
        for block in self.blocks:
            h = block(h, given)
        out = self.leave(self.norm(h))
        if self.stack_last:
            return out.reshape(len(x), *self.shape, self.outputs)
        return out.reshape(len(x), self.shape[0] * self.outputs, *self.shape[1:])


class _Block(nn.Module):
    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zeroed(nn.Linear(width, 3 * width))
        self.inner = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )

    def forward(self, h: Tensor, given: Tensor) -> Tensor:
        scale, shift, gate = self.modulation(torch.nn.functional.silu(given)).chunk(3, dim=-1)
        return h + gate * self.inner(self.norm(h) * (1 + scale) + shift)
