"""A convolutional network over frames, for speech: any number of them, each told of its neighbours and of the mel.

Frames have no position of their own: what is said of one depends only on what lies around it. So a network that learns
from crops serves whole sentences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from kuosan.networks.parts import Embedding, check_size, zeroed

#: Frames of the condition that its convolution sees at once.
SEEN = 7


class Frames(nn.Module):
    r"""adaLN-zero ConvNeXt blocks (Liu et al. 2022, arXiv 2201.03545; of audio Siuzdak 2023, arXiv 2306.00814).

    .. math:: h \leftarrow h + g \odot W_2 \operatorname{gelu}(W_1 ((1 + a) \odot \operatorname{norm}(k * h) + b))

    with a depthwise convolution k over time, and a scale a, a shift b and a gate g that are linear in the embedded time
    and 0 at the start. Every convolution is padded with zeros at both ends: what is said within
    depth (kernel - 1) / 2 + 3 frames of the end of a crop is said of a crop, and not of the sentence.

    Args:
        shape: (C, T) of a training example; T says nothing here, any T of at least 1 will do.
        width, depth: of the blocks.
        kernel: frames that a block sees at once, odd.
        expansion: how many times as wide a block is inside.
        given: rows M of the condition; 0 for an unconditional network.
        outputs: numbers returned for each value, stacked along dimension 1.
        dropout: at the end of each block.

    Raises:
        ValueError: a shape that is not (C, T), an even kernel, or an impossible size.
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 512,
        depth: int = 8,
        kernel: int = 7,
        expansion: int = 3,
        given: int = 0,
        outputs: int = 1,
        dropout: float = 0.0,
    ):
        super().__init__()
        check_size(width, depth)
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"frames are (C, T), both at least 1, got shape {tuple(shape)}")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, so that a frame has as many before it as after it, got {kernel}")
        if expansion < 1 or outputs < 1 or given < 0:
            raise ValueError(
                f"expansion and outputs must be at least 1 and given at least 0, got {expansion}, {outputs} and {given}"
            )
        self.channels, self.given = shape[0], given
        self.embedding = Embedding(width)
        self.first = nn.Linear(self.channels, width)
        if given:
            self.condition = nn.Conv1d(given, width, SEEN, padding=SEEN // 2)
        self.blocks = nn.ModuleList(Block(width, kernel, expansion, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.last = zeroed(nn.Linear(width, outputs * self.channels))

    def forward(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        """(B, outputs * C, T) of frames (B, C, T), given a condition (B, M, T).

        Raises:
            ValueError: frames of another size, or a condition that does not go with them.
        """
        if x.ndim != 3 or x.shape[1] != self.channels or x.shape[2] < 1:
            raise ValueError(f"this network was made for ({self.channels}, T) frames, got {tuple(x.shape[1:])}")
        told = silu(self.embedding(t))
        # the sum that blocks add to stays as exact as x, whatever the products inside them are computed in
        h = self.first(x.transpose(1, 2)).to(x.dtype)
        if self.given:
            h = h + self.condition(conditioned(condition, self.given, len(x), x.shape[2])).transpose(1, 2)
        elif condition is not None:
            raise ValueError("this network is unconditional: it takes no frames of a condition")
        for block in self.blocks:
            h = block(h, told)
        return self.last(self.norm(h)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, width: int, kernel: int, expansion: int, dropout: float):
        super().__init__()
        # an image one row high: torch convolves (B, T, width) as it lies only in two dimensions, 3 times as fast
        self.over_time = nn.Conv2d(width, width, (1, kernel), padding=(0, kernel // 2), groups=width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zeroed(nn.Linear(width, 3 * width))
        self.inner = nn.Sequential(
            nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width), nn.Dropout(dropout)
        )

    def forward(self, h: Tensor, told: Tensor) -> Tensor:
        """The next (B, T, width), told (B, width)."""
        scale, shift, gate = self.modulation(told).unsqueeze(1).chunk(3, dim=-1)
        with torch.autocast(h.device.type, enabled=False):  # of a depthwise convolution bfloat16 makes a slower one
            near = self.over_time(h.transpose(1, 2).unsqueeze(2)).squeeze(2).transpose(1, 2)
        return h + gate * self.inner(self.norm(near) * (1 + scale) + shift)


def conditioned(condition: object, rows: int, batch: int, frames: int) -> Tensor:
    """The condition, if it is (B, M, T) numbers that go with the examples; ValueError if not."""
    wanted = (batch, rows, frames)
    if condition is None:
        raise ValueError(f"this network needs a condition of shape {wanted}, got none")
    if not isinstance(condition, Tensor) or not condition.is_floating_point():
        found = condition.dtype if isinstance(condition, Tensor) else type(condition).__name__
        raise ValueError(f"the condition must be a tensor of real numbers of shape {wanted}, got {found}")
    if tuple(condition.shape) != wanted:
        raise ValueError(f"the condition must have shape {wanted} (B, rows, frames), got {tuple(condition.shape)}")
    return condition
