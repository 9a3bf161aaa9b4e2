"""The transformer of tokens: another way in and out around the blocks of the image transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from kuosan.networks.parts import Embedding, check_size, zeroed
from kuosan.networks.transformer import Block


class TokenTransformer(nn.Module):
    """adaLN-zero transformer over tokens: every position sees every other one.

    Args:
        states: of the tokens that come in, the mask's among them.
        vocabulary: of the logits that go out.
        length: the most positions.
        width, depth, heads: of the transformer.
        classes: 0 for an unconditional network.
        dropout: after each attention and each MLP.

    Raises:
        ValueError: a width that heads do not divide, or no positions.
    """

    def __init__(
        self,
        states: int,
        vocabulary: int,
        length: int,
        width: int = 256,
        depth: int = 4,
        heads: int = 4,
        classes: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_size(width, depth)
        if heads < 1 or width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
        if length < 1 or not 2 <= vocabulary <= states:
            raise ValueError(f"need length >= 1 and 2 <= vocabulary <= states, got {length}, {vocabulary}, {states}")
        self.length = length
        self.embedding = Embedding(width, classes)
        self.token = nn.Embedding(states, width)
        nn.init.normal_(self.token.weight, std=0.5)
        self.position = nn.Parameter(0.1 * torch.randn(1, length, width))
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.last = zeroed(nn.Linear(width, vocabulary))

    def forward(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        """Logits (B, L, vocabulary) of tokens (B, L).

        Raises:
            ValueError: more positions than the network has.
        """
        if x.ndim != 2 or x.shape[1] > self.length:
            raise ValueError(f"this network reads texts (B, L) of at most {self.length} tokens, got {tuple(x.shape)}")
        given = silu(self.embedding(t, condition))
        h = self.token(x) + self.position[:, : x.shape[1]]
        for block in self.blocks:
            h = block(h, given)
        return self.last(self.norm(h))
