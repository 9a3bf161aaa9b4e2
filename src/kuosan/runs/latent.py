"""The run of a latent diffusion model: a diffusion model of an autoencoder's codes, and the autoencoder with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kuosan.autoencoders import ImageAutoencoder
from kuosan.chain import Chain
from kuosan.denoiser import Denoiser
from kuosan.fetch import to_stderr
from kuosan.image.data import to_levels
from kuosan.runs.autoencoder import reconstruction
from kuosan.runs.diffusion import DiffusionRun
from kuosan.runs.run import RunError, device
from kuosan.sampler import Sampler
from kuosan.seeds import stream

#: Training examples whose codes say how codes are scaled, and that the reverse variance is measured on.
MEASURED_ON = 4096


class LatentRun(DiffusionRun):
    """A trained (or half-trained) latent diffusion model: what is diffused are codes, what comes out are images.

    Solvers, tables and variances are of codes; the bound is of images: that of the autoencoder whose prior is the
    diffusion model.
    """

    families = ("latent",)
    has_ode = False

    @property
    def autoencoder(self) -> ImageAutoencoder:
        """The whole ladder with its averaged weights, ready to use."""
        return self.model

    @property
    def denoiser(self) -> Denoiser:
        """Of codes."""
        return self.autoencoder.denoiser

    @property
    def state_shape(self) -> tuple[int, ...]:
        return self.autoencoder.code

    def prepare(self, model: ImageAutoencoder) -> None:
        """Scale the codes of an autoencoder to mean 0 and variance 1 in each channel, over training examples."""
        mean, std = model.rescale(self._codes(model, *self._some(self.data.train))[0])
        to_stderr(f"codes are {' x '.join(map(str, model.code))}, of mean {mean:.2f} and standard deviation {std:.2f}")

    def _some(self, part: Any) -> tuple[Tensor, Tensor | None]:
        chosen = torch.randperm(self.medium.size(part), generator=stream("states"))[:MEASURED_ON]
        return self.medium.batch(part, chosen)

    @torch.no_grad()
    def _codes(self, model: ImageAutoencoder, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor | None]:
        generator = stream("codes")
        codes = [model.encode(part.to(device())).sample(generator=generator).cpu() for part in x.split(256)]
        return torch.cat(codes), condition

    def states(self, part: Any) -> tuple[Tensor, Tensor | None]:
        """Codes, one draw for each of some examples."""
        return self._codes(self.autoencoder, *self._some(part))

    @torch.no_grad()
    def state_of(self, picture: Tensor) -> Tensor:
        return self.autoencoder.encode(picture[None].to(device())).mean[0].cpu()

    def mask_of(self, mask: Tensor) -> Tensor:
        """A place of a code is held where all the pixels that it stands for are."""
        channels, *sides = self.state_shape
        of_cells = mask.all(0).unflatten(1, (sides[1], -1)).unflatten(0, (sides[0], -1))
        held = of_cells.all(3).all(1)
        if mask.any() and not held.any():
            a, b = (whole // part for whole, part in zip(mask.shape[1:], sides, strict=True))
            raise ValueError(f"a code stands for {a} x {b} pixels, and of no code all are held: hold a larger part")
        return held.expand(channels, -1, -1)

    def sampler(self, **settings: Any) -> Sampler:
        found = super().sampler(**settings)
        pictures = self.pictures(settings)
        held = (pictures["known"], pictures["mask"]) if "known" in pictures else None
        return dataclasses.replace(found, held=held)

    def check(self, model: ImageAutoencoder) -> None:  # type: ignore[override]
        super().check(model.denoiser)

    @torch.no_grad()
    def decoded(self, model: ImageAutoencoder, codes: Tensor) -> Tensor:
        """The mean image of each code, as pixels, on the CPU."""
        parts = [model.decode(part.to(device())).mean.cpu() for part in codes.split(256)]
        return torch.cat(parts)

    def kept(self, x: Tensor, sampler: Sampler) -> Tensor:
        pixels = self.decoded(self.autoencoder, x)
        if sampler.held is not None:  # codes hold a picture only as well as they say it
            known, mask = sampler.held
            pixels = torch.where(mask, known, pixels)
        return to_levels(pixels, self.levels)

    def draw_while_training(self, model: ImageAutoencoder, seeds: Sequence[int]) -> Tensor:  # type: ignore[override]
        return self.decoded(model, super().draw_while_training(model.denoiser, seeds))

    # -- measuring ----------------------------------------------------------------------------------------------------

    def chain(self, **settings: Any) -> tuple[Chain, dict[str, Any]]:  # type: ignore[override]
        """The autoencoder with the diffusion model as its prior: a bound on log P(x).

        Raises:
            RunError: a setting of a diffusion model of the images themselves.
        """
        given = [name for name, value in settings.items() if value]
        if given:
            raise RunError(f"{self.folder} is a latent diffusion model: its bound has no {', '.join(given)} to choose")
        return self.autoencoder, {"layers": 1, "form": "one layer, then continuous time"}

    def reconstruction(self, x: Tensor) -> dict[str, float]:
        model = self.autoencoder
        return reconstruction(lambda part: model.decode(model.encode(part).mean).mean, x, self.levels, [model.code])

    def elbo_settings(self, chain: Chain) -> dict[str, Any]:
        return {"estimator": "path", "analytic": True, "terms": "shared", "draws": self.recipe.evaluation.draws}
