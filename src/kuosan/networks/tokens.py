"""The transformer of tokens: another way in and out around the blocks of the image transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from kuosan.networks.parts import Block, Embedding, check_size, of_ends, zeroed


class TokenTransformer(nn.Module):
    """adaLN-zero transformer over tokens: every position sees every other one or, if causal, those before it.

    Args:
        states: of the tokens that come in, the mask's among them.
        vocabulary: of the logits that go out.
        length: the most positions.
        width, depth, heads: of the transformer.
        classes: 0 for an unconditional network.
        dropout: after each attention and each MLP.
        causal: the logits of position i depend on tokens 0, ..., i alone.
        padding: a token that is no part of a text but fills it after its end. No position looks at it, however much
            there is of it, and the others are told how far they are from the end; what is said of padding is of no
            account.

    Raises:
        ValueError: a width that heads do not divide, no positions, or a padding that is no token.
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
        causal: bool = False,
        padding: int | None = None,
    ):
        super().__init__()
        check_size(width, depth)
        if heads < 1 or width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
        if length < 1 or not 2 <= vocabulary <= states:
            raise ValueError(f"need length >= 1 and 2 <= vocabulary <= states, got {length}, {vocabulary}, {states}")
        if padding is not None and not 0 <= padding < states:
            raise ValueError(f"padding is one of {states} states, got {padding}")
        self.length, self.causal, self.padding = length, causal, padding
        self.embedding = Embedding(width, classes)
        self.token = nn.Embedding(states, width)
        nn.init.normal_(self.token.weight, std=0.5)
        self.position = nn.Parameter(0.1 * torch.randn(1, length, width))
        if padding is not None:
            self.from_end = nn.Parameter(0.1 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.last = zeroed(nn.Linear(width, vocabulary))

    def forward(self, x: Tensor, t: Tensor, condition: object = None, only: Tensor | None = None) -> Tensor:
        """Logits (B, L, vocabulary) of tokens (B, L).

        Args:
            only: (B, L) bool, M of them true: the logits (M, vocabulary) of these positions alone, row by row. Of a
                large vocabulary the logits are most of the cost.

        Raises:
            ValueError: more positions than the network has, or ``only`` of another shape.
        """
        if x.ndim != 2 or x.shape[1] > self.length:
            raise ValueError(f"this network reads texts (B, L) of at most {self.length} tokens, got {tuple(x.shape)}")
        if only is not None and (only.shape != x.shape or only.dtype != torch.bool):
            raise ValueError(f"only must be bool of shape {tuple(x.shape)}, got {only.dtype} of {tuple(only.shape)}")
        given = silu(self.embedding(t, condition))
        n = x.shape[1]
        h, hidden = self.token(x) + self.position[:, :n], None
        if self.causal:  # (Vaswani et al. 2017, arXiv 1706.03762, section 3.2.3)
            hidden = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        if self.padding is not None:
            told, ended = of_ends(x == self.padding, self.from_end)
            h, hidden = h + told, ended if hidden is None else hidden | ended
        for block in self.blocks:
            h = block(h, given, hidden)
        return self.last(self.norm(h if only is None else h[only]))
