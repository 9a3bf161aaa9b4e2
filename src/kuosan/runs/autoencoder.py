"""The run of an autoencoder: a ladder whose q is learned, drawn from in one go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kuosan.chain import Chain
from kuosan.image.data import to_levels
from kuosan.runs.run import Run, RunError, device
from kuosan.solvers import Noise


@dataclass(frozen=True)
class FromTheTop:
    """Ancestral sampling of a ladder: z_T from the prior, then each layer from the one above, then x."""

    how: dict[str, Any]


class AutoencoderRun(Run):
    """A trained (or half-trained) VAE or hierarchical VAE."""

    autoencoding = True

    @property
    def autoencoder(self) -> Chain:
        """The model with its averaged weights, ready to use."""
        return self.model

    # -- sampling -----------------------------------------------------------------------------------------------------

    def sampler(self, **settings: Any) -> FromTheTop:
        """Raises RunError for settings of sampling: there is one way to draw from an autoencoder."""
        given = [name for name, value in settings.items() if value is not None]
        if given:
            raise RunError(
                f"{self.folder} is an autoencoder, which is drawn from layer by layer: it has no {', '.join(given)}"
            )
        return FromTheTop({"solver": "layer by layer", "evaluations": 1})

    def batches(
        self, sampler: FromTheTop, seeds: Sequence[int], labels: Tensor | None = None, batch_size: int = 256
    ) -> Iterator[Tensor]:
        if labels is not None:
            raise RunError(f"{self.folder} was trained without classes: none can be asked for")
        for begin in range(0, len(seeds), batch_size):
            yield to_levels(self.draw_while_training(self.autoencoder, seeds[begin : begin + batch_size]), self.levels)

    def check(self, model: Chain) -> None:
        pass

    @torch.no_grad()
    def draw_while_training(self, model: Chain, seeds: Sequence[int]) -> Tensor:
        noise = Noise(seeds, model.model.noise_shape).draw()
        return model.generate(noise.to(device())).z[0].cpu()

    # -- measuring ----------------------------------------------------------------------------------------------------

    def chain(self, **settings: Any) -> tuple[Chain, dict[str, Any]]:
        given = [name for name, value in settings.items() if value]
        if given:
            raise RunError(f"{self.folder} is an autoencoder: its chain has no {', '.join(given)} to choose")
        return self.autoencoder, {"layers": self.autoencoder.length}

    def elbo_settings(self) -> dict[str, Any]:
        return {"estimator": "path", "analytic": True, "terms": "shared", "draws": self.recipe.evaluation.draws}
