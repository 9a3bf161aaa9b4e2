"""What a report measures of a latent diffusion model: what it does of both, its diffusion and its autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kuosan.bound import Bound
from kuosan.measurements.autoencoder import Reconstructing
from kuosan.measurements.diffusion import DiffusionMeasurements
from kuosan.runs import LatentRun


class LatentMeasurements(Reconstructing, DiffusionMeasurements):
    """The measurements of a latent diffusion model's report."""

    run: LatentRun
    kind = "A latent diffusion model"
    sections = (
        "facts",
        "samples",
        "way",
        "loss",
        "bits_per_dim",
        "reconstructions",
        "evaluations",
        "solvers",
        "temperature",
        "neighbours",
    )

    @property
    def model_in_words(self) -> dict[str, str]:
        return super().model_in_words | {"codes": " x ".join(map(str, self.run.state_shape))}

    def seen(self, x: Tensor) -> Tensor:
        return self.run.decoded(self.run.autoencoder, x)

    def comparable(self, evaluated: Mapping[str, Any], bound: Bound) -> bool:
        return evaluated.get("examples", 0) >= len(bound.total)

    def curve(self, splits: Mapping[str, Bound]) -> tuple[None, dict[str, str]]:
        return None, {}
