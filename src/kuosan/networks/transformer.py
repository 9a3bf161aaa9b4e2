"""A transformer with adaptive layer norm, and the convolutional patches through which it reads and writes images.

Strokes and edges want convolution, shapes want attention: images enter and leave through a few 3x3 convolutions at half
their resolution, and a transformer over patches decides between them what the picture is of.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle, silu

from kuosan.networks.captions import Captions
from kuosan.networks.parts import Block, Embedding, Fourier, check_size, zeroed


class Transformer(nn.Module):
    """adaLN-zero transformer (Peebles and Xie 2023, arXiv 2212.09748) over the patches of an image.

    Args:
        shape: (C, H, W) of one example.
        patch: side of a patch in pixels, even or 1; divides H and W.
        width, depth, heads: of the transformer.
        channels: of the convolutions, at half resolution, or at the full one where a patch is 1 pixel.
        classes: 0 for an unconditional network.
        outputs: numbers returned for each value: 1; 2 for a learned variance, stacked along dimension 1; L for levels,
            as one more dimension (``stack_last``).
        stack_last: whether several outputs make a last dimension or multiply dimension 1.
        dropout: after each attention and each MLP.
        fourier: :class:`~kuosan.networks.parts.Fourier` features of the input; 0 for none.
        reader: of captions, such as :class:`~kuosan.networks.captions.Reader`: what it says of each word stands before
            the patches as one more token that they look at, and what it says of the whole is told with the time.

    Raises:
        ValueError: a shape that patches do not divide, or a width that heads do not divide.
    """

    def __init__(
        self,
        shape: Sequence[int],
        patch: int = 4,
        width: int = 192,
        depth: int = 5,
        heads: int = 4,
        channels: int = 64,
        classes: int = 0,
        outputs: int = 1,
        stack_last: bool = False,
        dropout: float = 0.0,
        fourier: int = 0,
        reader: nn.Module | None = None,
    ):
        super().__init__()
        check_size(width, depth)
        if heads < 1 or width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
        self.shape, self.outputs, self.stack_last = tuple(shape), outputs, stack_last
        self.embedding = Embedding(width, classes)
        self.captions = None if reader is None else Captions(reader, width)
        self.patches = Patches(self.shape, patch, channels, width, outputs, fourier)
        self.position = nn.Parameter(0.02 * torch.randn(1, self.patches.count, width))
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"this network was made for examples of shape {self.shape}, got {tuple(x.shape[1:])}")
        if self.captions is None:
            given, hidden = silu(self.embedding(t, condition)), None
            tokens, skip = self.patches.enter(x, given)
            tokens = tokens + self.position
        else:
            words, ended, whole = self.captions(condition, len(x))
            given = silu(self.embedding(t) + whole)
            tokens, skip = self.patches.enter(x, given)
            tokens = torch.cat([words.to(tokens.dtype), tokens + self.position], dim=1)
            hidden = torch.cat([ended, ended.new_zeros(len(x), self.patches.count)], dim=1)[:, None, None]
        for block in self.blocks:
            tokens = block(tokens, given, hidden)
        out = self.patches.leave(tokens[:, -self.patches.count :], skip, given)
        if self.stack_last:
            return out.unflatten(1, (self.shape[0], self.outputs)).movedim(2, -1)
        return out


class Patches(nn.Module):
    """An image to patch tokens and back, with a convolution block on both sides and a skip.

    The convolutions are at half resolution; where a patch is one pixel, as of codes, which are small already, at the
    full one.

    Args:
        shape: (C, H, W).
        patch: side in pixels, even or 1.
        channels: of the convolutions.
        width: of the tokens, and of what is given.
        outputs: images that leave for one that enters.
        fourier: features of what enters.
    """

    def __init__(self, shape: tuple[int, ...], patch: int, channels: int, width: int, outputs: int, fourier: int):
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"patches are of images (C, H, W), got shape {shape}")
        c, h, w = shape
        if patch < 1 or (patch % 2 and patch > 1) or h % patch or w % patch:
            raise ValueError(f"patch must be even or 1 and divide the image's {h} x {w} pixels, got {patch}")
        if channels < 8 or channels % 8:
            raise ValueError(f"channels must be a multiple of 8, got {channels}")
        self.fold = min(patch, 2)
        self.factor, self.grid = patch // self.fold, (h // patch, w // patch)
        self.count = self.grid[0] * self.grid[1]
        self.fourier = Fourier(fourier)
        self.first = nn.Conv2d(self.fold**2 * c * self.fourier.factor, channels, 3, padding=1)
        self.before = ConvBlock(channels, width)
        self.down = nn.Conv2d(channels, width, self.factor, stride=self.factor)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, channels * self.factor**2)
        self.after = ConvBlock(channels, width)
        self.last_norm = nn.GroupNorm(8, channels)
        self.last = zeroed(nn.Conv2d(channels, self.fold**2 * c * outputs, 3, padding=1))

    def enter(self, x: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """(tokens (B, N, width), skip (B, channels, H / fold, W / fold))."""
        skip = self.before(self.first(pixel_unshuffle(self.fourier(x), self.fold)), given)
        return self.down(skip).flatten(2).transpose(1, 2), skip

    def leave(self, tokens: Tensor, skip: Tensor, given: Tensor) -> Tensor:
        """(B, outputs * C, H, W)."""
        patches = self.up(self.norm(tokens)).transpose(1, 2).unflatten(2, self.grid)
        h = self.after(pixel_shuffle(patches, self.factor) + skip, given)
        return pixel_shuffle(self.last(silu(self.last_norm(h))), self.fold)


class ConvBlock(nn.Module):
    """Two 3x3 convolutions around a scale and shift by what is given; at the start it does nothing."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulation = nn.Linear(width, 2 * channels)
        self.second = zeroed(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, h: Tensor, given: Tensor) -> Tensor:
        scale, shift = self.modulation(given)[:, :, None, None].chunk(2, dim=1)
        return h + self.second(silu(self.first(silu(self.norm(h))) * (1 + scale) + shift))
