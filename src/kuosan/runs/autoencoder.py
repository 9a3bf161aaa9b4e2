"""The run of an autoencoder: a ladder whose q is learned, drawn from layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kuosan.autoencoders import ImageAutoencoder
from kuosan.build import make_solver
from kuosan.chain import Chain
from kuosan.diffusion import DiffusionChain
from kuosan.image.data import to_levels
from kuosan.runs.run import Run, RunError, device
from kuosan.seeds import stream
from kuosan.solvers import Noise, Solver, Table, sample


@dataclass(frozen=True)
class LayerByLayer:
    """Ancestral sampling of a ladder: z_T from the prior, then each layer from the one above, then x.

    Args:
        table: how z_T is drawn from a prior that is a diffusion model; None: from the standard normal.
        how: the same in words and numbers.
    """

    table: Table | None
    how: dict[str, Any]


@torch.no_grad()
def reconstruction(
    again: Callable[[Tensor], Tensor], x: Tensor, levels: int, shapes: Sequence[Sequence[int]]
) -> dict[str, float]:
    r"""How well codes say images: what comes back of them, rounded to levels, against the images.

    .. math:: \mathrm{PSNR} = -10 \log_{10} \frac{\text{mean squared error}}{(\text{highest} - \text{lowest level})^2}

    Args:
        again: images, as pixels, from their codes.
        x: (B, C, H, W), pixels.
        levels: of a value.
        shapes: of a code, in each layer.

    Returns:
        ``psnr`` in dB, of the mean squared error of all images; ``numbers`` of a code, of all layers; and how many
        ``times_fewer`` they are than those of an image.
    """
    error = 0.0
    for part in x.split(64):
        off = (to_levels(again(part).cpu(), levels).double() - to_levels(part.cpu(), levels).double()) / (levels - 1)
        error += float((off**2).flatten(1).mean(1).sum())
    numbers = sum(map(math.prod, shapes))
    psnr = -10 * math.log10(max(error / len(x), 1e-10))
    return {"psnr": psnr, "numbers": numbers, "times_fewer": math.prod(x.shape[1:]) / numbers}


class AutoencoderRun(Run):
    """A trained (or half-trained) VAE or hierarchical VAE, with or without a diffusion prior over its latents."""

    families = ("autoencoder",)

    @property
    def autoencoder(self) -> Chain:
        """The model with its averaged weights, ready to use."""
        return self.model

    # -- sampling -----------------------------------------------------------------------------------------------------

    def sampler(self, solver: Any = None, steps: int | None = None, **settings: Any) -> LayerByLayer:
        """How it is drawn from.

        Args:
            solver, steps: of a diffusion prior; default the recipe's.

        Raises:
            RunError: a setting that it does not have.
        """
        return self._sampler(self.autoencoder, solver, steps, **settings)

    def _sampler(self, model: Chain, solver: Any = None, steps: int | None = None, **settings: Any) -> LayerByLayer:
        prior = model.model.prior()
        asked = settings if isinstance(prior, DiffusionChain) else settings | {"solver": solver, "steps": steps}
        given = [name for name, value in asked.items() if value is not None]
        if given:
            raise RunError(f"{self.folder} is an autoencoder, drawn from layer by layer: it has no {', '.join(given)}")
        if not isinstance(prior, DiffusionChain):
            return LayerByLayer(None, {"solver": "layer by layer", "evaluations": 1})
        section = self.recipe.sampling
        rule = make_solver(section.solver if solver is None else solver) if not isinstance(solver, Solver) else solver
        table = rule.table(prior.guide.process, steps=section.steps if steps is None else steps)
        name = solver or section.solver
        words = name["kind"] if isinstance(name, dict) else type(rule).__name__
        return LayerByLayer(
            table, {"solver": f"{words} for z_T, then layer by layer", "evaluations": table.evaluations}
        )

    def batches(
        self, sampler: LayerByLayer, seeds: Sequence[int], labels: Tensor | None = None, batch_size: int | None = None
    ) -> Iterator[Tensor]:
        if labels is not None:
            raise RunError(f"{self.folder} was trained without classes: none can be asked for")
        batch_size = self.together(batch_size)
        for begin in range(0, len(seeds), batch_size):
            yield self.medium.outputs(self._draw(self.autoencoder, sampler, seeds[begin : begin + batch_size]))

    @torch.no_grad()
    def _draw(self, model: Chain, sampler: LayerByLayer, seeds: Sequence[int]) -> Tensor:
        noise = Noise(seeds, model.model.noise_shape, purpose="ladder").draw().to(device())
        top = None
        prior = model.model.prior()
        if sampler.table is not None and isinstance(prior, DiffusionChain):
            shape = model.model.shapes[-1]
            how: dict[str, Any] = {"seeds": seeds, "table": sampler.table, "device": device()}
            top = sample(prior.model.denoiser, shape, **how).to(device())
            noise = noise[:, math.prod(shape) :]
        return model.generate(noise, top=top).z[0].cpu()

    def check(self, model: Chain) -> None:
        self._sampler(model)

    def draw_while_training(self, model: Chain, seeds: Sequence[int]) -> Tensor:
        return self._draw(model, self._sampler(model), seeds)

    # -- measuring ----------------------------------------------------------------------------------------------------

    def chain(self, **settings: Any) -> tuple[Chain, dict[str, Any]]:
        given = [name for name, value in settings.items() if value]
        if given:
            raise RunError(f"{self.folder} is an autoencoder: its chain has no {', '.join(given)} to choose")
        n = self.autoencoder.length
        return self.autoencoder, {"layers": n, "form": f"{n} layer{'s' if n > 1 else ''}"}

    def reconstruction(self, x: Tensor) -> dict[str, float]:
        """With the mean of q where codes are images, and elsewhere with a draw of all layers."""
        model = self.autoencoder

        def again(part: Tensor) -> Tensor:
            if isinstance(model, ImageAutoencoder):
                return model.decode(model.encode(part).mean).mean
            return model.model.down(0, tuple(model.path(part, generator=stream("reconstruction")).z[1:])).mean

        return reconstruction(again, x, self.levels, model.model.shapes[1:])

    def elbo_settings(self, chain: Chain) -> dict[str, Any]:
        return {"estimator": "path", "analytic": True, "terms": "shared", "draws": self.recipe.evaluation.draws}
