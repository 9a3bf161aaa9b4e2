"""Autoencoders of diffusers as ladders of ours: codes for a diffusion model, and a law of the images they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kuosan.autoencoders.convolution import Decoding, ImageAutoencoder
from kuosan.bridge.networks import make_module, read_json
from kuosan.chain import Chain
from kuosan.decoders import DiscretisedGaussian
from kuosan.gaussian import Gaussian
from kuosan.kernels import Guide

#: The standard deviation of p(x | z) where nobody says: an error of 24 dB on [-1, 1], which is about what Stable
#: Diffusion's autoencoder has on photographs (23.4 dB on COCO 2017, says its model card).
STD = 0.125


class _Encoding(Guide):
    """q(z | x) of codes as they are diffused."""

    length = 1

    def __init__(self, autoencoder: Any, shift: float, scale: float):
        super().__init__()
        # in a list, so that it is not registered twice: it is the decoder's, whole
        self._autoencoder, self.shift, self.scale = [autoencoder], shift, scale

    def said(self, x: Tensor) -> Any:
        return self._autoencoder[0].encode(x)

    def up(self, i: Any, below: Sequence[Tensor], given: Any) -> Gaussian:
        said = self.said(below[0])
        if not hasattr(said, "latent_dist"):
            raise ValueError(
                "codes of a VQModel are entries of a code book, which a diffusion model of points gives no density: "
                "there is no bound on its images"
            )
        law = said.latent_dist
        return Gaussian((law.mean - self.shift) * self.scale, law.var * self.scale**2)


class _Decoder(nn.Module):
    """p(x | z): the decoded image with noise of one standard deviation, cut into the bins of the levels."""

    kind = "discretised"

    def __init__(self, autoencoder: Any, shape: Sequence[int], levels: int, std: float, shift: float, scale: float):
        super().__init__()
        self.autoencoder, self.shape, self.levels, self.std = autoencoder, tuple(shape), levels, std
        self.shift, self.scale = shift, scale

    def forward(self, z: Tensor) -> DiscretisedGaussian:
        mean = self.autoencoder.decode(z / self.scale + self.shift).sample
        return DiscretisedGaussian(mean, torch.full_like(mean, self.std**2), self.levels)


class DiffusersAutoencoder(ImageAutoencoder):
    r"""An ``AutoencoderKL`` or ``VQModel`` of diffusers, as latent diffusion has it (Rombach et al. 2022).

    Codes are z = (code - shift_factor) scaling_factor, and :math:`p(x \mid z)` is a Gaussian around the decoded image
    with one standard deviation, cut into levels. The best one is the root of the mean squared error of a decoded image.
    A VQModel's codes have no density: it is for sampling.

    Args:
        config: JSON with its ``_class_name``.
        shape: (C, H, W) of one example.
        levels: of the data.
        std: of p(x | z).
        prior: makes a chain in the standard normal's place, of codes.

    Raises:
        ValueError: a config that does not fit the shape, or a std that is not positive.
    """

    def __init__(
        self,
        config: str,
        shape: Sequence[int],
        levels: int,
        std: float = STD,
        prior: Callable[[tuple[int, ...]], Chain] | None = None,
    ):
        if not std > 0:
            raise ValueError(f"std is the standard deviation of an image around a decoded one, over 0, got {std}")
        autoencoder = make_module(read_json(config), ("AutoencoderKL", "VQModel"))
        had, (channels, height, width) = autoencoder.config, shape
        if (had["in_channels"], had["out_channels"]) != (channels, channels):
            raise ValueError(f"config: in_channels and out_channels must be {channels}, those of the images")
        factor = 2 ** (len(had["block_out_channels"]) - 1)
        if height % factor or width % factor:
            raise ValueError(f"config: an image of {height} x {width} is not divided by {factor}")
        for field in ("latents_mean", "latents_std"):
            if had.get(field) is not None:
                raise ValueError(
                    f"config: {field} is not read: scaling_factor and shift_factor say how codes are scaled"
                )
        code = (had.get("vq_embed_dim") or had["latent_channels"], height // factor, width // factor)
        shift, scale = float(had.get("shift_factor") or 0.0), float(had["scaling_factor"])
        law: Any = _Decoder(autoencoder, shape, levels, std, shift, scale)
        model = Decoding((law.shape, code), law, None if prior is None else prior(code))
        super().__init__(_Encoding(autoencoder, shift, scale), model)
        self.code = code

    @property
    def has_density(self) -> bool:
        """Whether there is a bound on images."""
        return type(self.model.decoder.autoencoder).__name__ == "AutoencoderKL"

    def encode(self, x: Tensor) -> Gaussian:
        """q(z | x) of images (B, C, H, W); of a VQModel the point itself, with variance 0."""
        if self.has_density:
            return super().encode(x)
        guide = self.guide
        code = (guide.said(x).latents - guide.shift) * guide.scale
        return Gaussian(code, torch.zeros_like(code))

    def rescale(self, codes: Tensor) -> tuple[float, float]:
        """Nothing: the config says how codes are scaled, and networks were trained on that. What they have is said."""
        return float(codes.mean()), float(codes.std())
