"""The transformer of sequences of vectors: a third way in and out around the blocks of the image transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from kuosan.networks.parts import Block, Embedding, check_size, of_ends, zeroed


class SequenceTransformer(nn.Module):
    """adaLN-zero transformer over up to L vectors of size D: every position sees every other one.

    Args:
        shape: (L, D) of the longest example.
        width, depth, heads: of the transformer.
        classes: 0 for an unconditional network.
        outputs: numbers returned for each position, such as the logits of V words; None for D, a vector.
        dropout: after each attention and each MLP.
        padding: a vector of nothing but 0 is no part of an example but fills it after its end. No position looks at
            it, however much there is of it, and the others are told how far they are from the end; what is said of
            padding is of no account.

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
        padding: bool = False,
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
        self.padding = padding
        if padding:
            self.from_end = nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.last = zeroed(nn.Linear(width, outputs))

    def forward(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        """(B, n, outputs) of vectors (B, n, D), n at most L.

        Raises:
            ValueError: examples of another shape, longer ones, or shorter ones of a network without padding.
        """
        length, size = self.shape
        n = x.shape[1] if x.ndim == 3 else 0
        if n < 1 or x.shape[2] != size or (n > length if self.padding else n != length):
            most = f"up to {length}" if self.padding else str(length)
            raise ValueError(f"this network was made for ({most}, {size}) vectors, got {tuple(x.shape[1:])}")
        given = silu(self.embedding(t, condition))
        h, hidden = self.first(x) + self.position[:, :n], None
        if self.padding:
            told, hidden = of_ends((x == 0).all(-1), self.from_end)
            h = h + told
        for block in self.blocks:
            h = block(h, given, hidden)
        return self.last(self.norm(h))
