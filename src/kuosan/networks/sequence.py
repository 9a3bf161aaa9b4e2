"""The transformer of sequences of vectors: a third way in and out around the blocks of the image transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from kuosan.networks.parts import Embedding, check_size, zeroed
from kuosan.networks.transformer import Block


class SequenceTransformer(nn.Module):
    """adaLN-zero transformer over L vectors of size D: every position sees every other one.

    Args:
        shape: (L, D) of one example.
        width, depth, heads: of the transformer.
        classes: 0 for an unconditional network.
        outputs: numbers returned for each position, such as the logits of V words; None for D, a vector.
        dropout: after each attention and each MLP.

    Raises:
        ValueError: a shape that is not (L, D), a width that heads do not divide, or no outputs.
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 256,
        depth: int = 4,
        heads: int = 4,
        classes: int = 0,
        outputs: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_size(width, depth)
        if heads < 1 or width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
        self.shape = tuple(shape)
        if len(self.shape) != 2 or min(self.shape) < 1:
            raise ValueError(f"sequences are (L, D), both at least 1, got shape {self.shape}")
        length, size = self.shape
        outputs = size if outputs is None else outputs
        if outputs < 1:
            raise ValueError(f"outputs must be at least 1, got {outputs}")
        self.embedding = Embedding(width, classes)
        self.first = nn.Linear(size, width)
        self.position = nn.Parameter(0.1 * torch.randn(1, length, width))
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.last = zeroed(nn.Linear(width, outputs))

    def forward(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        """(B, L, outputs) of vectors (B, L, D).

        Raises:
            ValueError: examples of another shape.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"this network was made for examples of shape {self.shape}, got {tuple(x.shape[1:])}")
        given = silu(self.embedding(t, condition))
        h = self.first(x) + self.position
        for block in self.blocks:
            h = block(h, given)
        return self.last(self.norm(h))
