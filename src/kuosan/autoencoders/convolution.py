"""A VAE of convolutions, whose latents are a smaller image: the codes that latent diffusion draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from kuosan.autoencoders.heads import Decoder, gaussian
from kuosan.autoencoders.hierarchy import UnderPrior
from kuosan.chain import Chain
from kuosan.denoiser import Denoiser
from kuosan.diffusion import DiffusionChain
from kuosan.gaussian import Gaussian
from kuosan.kernels import Guide, Law
from kuosan.networks.parts import check_size, zeroed
from kuosan.process import Process


class Residual(nn.Module):
    """Two 3x3 convolutions beside the identity; before training they add nothing."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(2))
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.second = zeroed(nn.Conv2d(width, width, 3, padding=1))

    def forward(self, h: Tensor) -> Tensor:
        inside = self.first(silu(self.norms[0](h)))
        return h + self.second(self.dropout(silu(self.norms[1](inside))))


class Pyramid(nn.Module):
    """Images (B, C, H, W) to (B, outputs, H / factor, W / factor), or the other way, halving or doubling in steps.

    Args:
        inputs, outputs: channels.
        factor: a power of two.
        up: from small to large.
        width: channels at full size, a multiple of 8; at half size twice as many, below four times.
        depth: residual blocks at each size.
        deep: more of them at the smallest size, where they are cheapest and see most.
        dropout: in each of them.
    """

    def __init__(
        self, inputs: int, outputs: int, factor: int, up: bool, width: int, depth: int, deep: int, dropout: float
    ):
        super().__init__()
        check_size(width, depth + deep)
        if min(depth, deep) < 0:
            raise ValueError(f"depth and deep are never negative, got {depth} and {deep}")
        if width % 8:
            raise ValueError(f"width must be a multiple of 8, got {width}")
        widths = [width * min(4, 2**i) for i in range(factor.bit_length())]
        if up:
            widths.reverse()
        self.first = nn.Conv2d(inputs, widths[0], 3, padding=1)
        parts: list[nn.Module] = []
        for i, channels in enumerate(widths):
            if i:
                before = widths[i - 1]
                parts += (
                    [nn.Conv2d(before, 4 * channels, 1), nn.PixelShuffle(2)]
                    if up
                    else [nn.PixelUnshuffle(2), nn.Conv2d(4 * before, channels, 1)]
                )
            smallest = i == (0 if up else len(widths) - 1)
            parts += [Residual(channels, dropout) for _ in range(depth + deep * smallest)]
        self.blocks = nn.Sequential(*parts)
        self.norm = nn.GroupNorm(8, widths[-1])
        self.last = nn.Conv2d(widths[-1], outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(silu(self.norm(self.blocks(self.first(x)))))


class Scale(nn.Module):
    """How codes are scaled, for each channel: z = (what the network says - shift) / scale."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("shift", torch.zeros(channels, 1, 1))
        self.register_buffer("scale", torch.ones(channels, 1, 1))

    def set(self, shift: Tensor, scale: Tensor) -> None:
        self.get_buffer("shift").copy_(shift.view(-1, 1, 1))
        self.get_buffer("scale").copy_(scale.view(-1, 1, 1))


class Encoding(Guide):
    """q(z | x) = N(mean, variance) of a code, from a pyramid."""

    length = 1

    def __init__(self, network: nn.Module, channels: int):
        super().__init__()
        self.network, self.scaling = network, Scale(channels)

    def up(self, i: Any, below: Sequence[Tensor], given: Any) -> Gaussian:
        law, scale = gaussian(self.network(below[0])), self.scaling.get_buffer("scale")
        return Gaussian((law.mean - self.scaling.get_buffer("shift")) / scale, law.variance / scale**2)


class Decoding(UnderPrior):
    """p(x | z), and a p(z) that is standard normal or another chain's."""

    def down(self, i: Any, above: Sequence[Tensor], condition: Any = None) -> Law:
        return self.decoder(above[0])


class Upwards(nn.Module):
    """A code to the numbers of a law, flat, in the order in which :class:`Decoder` wants them."""

    def __init__(self, network: nn.Module, code: int, channels: int, last: bool):
        super().__init__()
        self.network, self.scaling, self.channels, self.last = network, Scale(code), channels, last

    def forward(self, z: Tensor) -> Tensor:
        raw = self.network(z * self.scaling.get_buffer("scale") + self.scaling.get_buffer("shift"))
        return (raw.unflatten(1, (self.channels, -1)).movedim(2, -1) if self.last else raw).flatten(1)


class ImageAutoencoder(Chain):
    """A ladder of one layer whose codes are images too: what a latent diffusion model is made of.

    Attributes:
        code: the shape of z.
    """

    code: tuple[int, ...]
    guide: Any
    model: Any

    @property
    def denoiser(self) -> Denoiser:
        """Of codes: the one in the prior.

        Raises:
            ValueError: the prior is the standard normal.
        """
        prior = self.model.prior()
        if not isinstance(prior, DiffusionChain):
            raise ValueError("the codes of this autoencoder are standard normal: there is no denoiser of them")
        return prior.model.denoiser

    @property
    def process(self) -> Process | None:
        """By which codes are diffused, if they are."""
        return self.denoiser.process if isinstance(self.model.prior(), DiffusionChain) else None

    def encode(self, x: Tensor) -> Gaussian:
        """q(z | x) of images (B, C, H, W)."""
        return self.guide.up(1, (x,), None)

    def decode(self, z: Tensor) -> Law:
        """p(x | z) of codes (B, *code)."""
        return self.model.down(0, (z,))

    def rescale(self, codes: Tensor) -> tuple[float, float]:
        """Scale codes for a diffusion model, as these (N, *code) ask for; says the mean and the deviation they had."""
        raise NotImplementedError


class ConvolutionalAutoencoder(ImageAutoencoder):
    """The autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752, section 3.1), as a ladder of one
    layer: its bound is one on log P(x), and the decoder's law stands where the paper has a perceptual loss.

    Args:
        shape: (C, H, W) of one example.
        levels: of the data.
        channels: of a code.
        factor: how many times smaller than the image a code is on each side: a power of two that divides both.
        decoder: "levels", "mixture", "discretised", "shared" or "gaussian", the law of each value of the image.
        width, depth, deep, dropout: of :class:`Pyramid`.
        prior: makes a chain in the standard normal's place, of codes.

    Attributes:
        code: (channels, H / factor, W / factor), the shape of z.

    Raises:
        ValueError: an unknown decoder, or sizes that do not go together.
    """

    guide: Encoding
    model: Decoding

    def __init__(
        self,
        shape: Sequence[int],
        levels: int,
        channels: int = 4,
        factor: int = 4,
        decoder: str = "mixture",
        width: int = 32,
        depth: int = 1,
        deep: int = 0,
        dropout: float = 0.0,
        prior: Callable[[tuple[int, ...]], Chain] | None = None,
    ):
        if len(shape) != 3:
            raise ValueError(f"convolutions are of images (C, H, W), got shape {tuple(shape)}")
        c, h, w = shape
        if factor < 2 or factor & (factor - 1) or h % factor or w % factor:
            raise ValueError(f"factor must be a power of two that divides {h} x {w} pixels, got {factor}")
        if channels < 1:
            raise ValueError(f"a code has at least one channel, got {channels}")
        code, network = (channels, h // factor, w // factor), (width, depth, deep, dropout)
        law = Decoder(
            decoder,
            shape,
            levels,
            lambda n, last: Upwards(Pyramid(channels, n * c, factor, True, *network), channels, c, last),
        )
        guide = Encoding(Pyramid(c, 2 * channels, factor, False, *network), channels)
        super().__init__(guide, Decoding((law.shape, code), law, None if prior is None else prior(code)))
        self.code = code

    def rescale(self, codes: Tensor) -> tuple[float, float]:
        """Let codes like these have mean 0 and variance 1 in each channel: what is encoded and decoded is the same.

        Args:
            codes: (N, *code), as they were encoded before.

        Returns:
            What they had, over all channels.
        """
        scalings = [part for part in self.modules() if isinstance(part, Scale)]  # of the way in, and of the way out
        shift, scale = (scalings[0].get_buffer(name).flatten().cpu() for name in ("shift", "scale"))
        channels = codes.detach().transpose(0, 1).flatten(1)
        std = channels.std(1).clamp_min(1e-6) * scale
        mean = shift + channels.mean(1) * scale
        for one in scalings:
            one.set(mean, std)
        return float(channels.mean()), float(channels.std())
