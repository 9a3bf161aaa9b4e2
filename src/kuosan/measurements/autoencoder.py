"""What a report measures of an autoencoder beside: its reconstructions, where its latents lead, and which it uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from kuosan.bound import Bound
from kuosan.chain import Chain
from kuosan.figures import bars
from kuosan.image.data import to_levels
from kuosan.kernels import Path
from kuosan.measurements.images import ImageMeasurements
from kuosan.runs import AutoencoderRun, device
from kuosan.seeds import stream

#: A latent is in use if its posterior mean varies more than this over examples (Burda et al. 2016, section 4).
ACTIVE = 0.01
TRAVERSED = (-3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
#: Latents that are traversed in each layer, the most active first.
MOST_TRAVERSED = 4
SHOWN = 10
#: Draws of all latents of an example, in each of two halves, for the means of its layers.
PATHS = 8


class Reconstructing(ImageMeasurements):
    """What is measured of a ladder whose last step is an autoencoder's: the bound along paths, and reconstructions."""

    run: Any  # an AutoencoderRun or a LatentRun

    def estimate(self, split: str) -> Bound:
        affordable = int(self.shares["bound"] / 2 * self.budget / self.cost)
        n = min(len(getattr(self.run.data, split)), len(self.run.data.held_out), self.run.recipe.evaluation.examples)
        n = min(n, max(32, affordable // 2))
        return self.run.bound(split, n, draws=max(1, min(16, affordable // n)))

    def about(self, bound: Bound) -> dict[str, Any]:
        return {"layers": self.run.autoencoder.length, "terms": "shared", "draws": bound.draws}

    @property
    def decoder(self) -> str:
        kind = (self.run.recipe.autoencoder or {}).get("decoder", "levels")
        if kind == "levels":
            return f"the network’s own probabilities of the {self.run.levels} levels"
        bins = "" if kind == "gaussian" else f", cut into {self.run.levels} bins"
        if kind == "mixture":
            return f"Gaussians whose weights, means and variances the network says{bins}"
        return f"a Gaussian whose mean and variance the network says{bins}"

    @torch.no_grad()
    def _path(self, n: int) -> tuple[Path, Tensor]:
        x, _ = self.run.examples("held_out", n)
        return self.run.autoencoder.path(x, generator=stream("report")), x

    @torch.no_grad()
    def _decoded(self, z: list[Tensor]) -> Tensor:
        """The mean of p(x|z), as levels."""
        law = self.run.autoencoder.model.down(0, tuple(z[1:]))
        return to_levels(law.mean.cpu(), self.run.levels)

    def reconstructions(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Held-out images, and what comes back from the latents of the first i layers, all above drawn from p."""
        path, x = self._path(SHOWN)
        model, length = self.run.autoencoder, self.run.autoencoder.length
        rows = [{"name": "image", "images": self.pictures_of(to_levels(x.cpu(), self.run.levels))}]
        error = {}
        for kept in range(1, length + 1):  # the layers from z_kept up are the image's own; what is below is p's mean
            z = list(path.z)
            for i in range(kept - 1, 0, -1):
                z[i] = model.model.down(i, tuple(z[i + 1 :])).mean
            levels = self._decoded(z)
            name = "all layers" if kept == 1 else f"z{kept} and above" if kept < length else f"z{kept} alone"
            rows.append({"name": name, "images": self.pictures_of(levels)})
            off = (levels.double() - to_levels(x.cpu(), self.run.levels).double()) / (self.run.levels - 1)
            error[name] = float((off**2).mean().sqrt())
        return {"shown": SHOWN, "rmse": error}, rows


class AutoencoderMeasurements(Reconstructing):
    """The measurements of an autoencoder's report."""

    run: AutoencoderRun
    kind = "An autoencoder"
    sections = (
        "facts",
        "samples",
        "loss",
        "bits_per_dim",
        "reconstructions",
        "units",
        "traversals",
        "neighbours",
    )
    shares: ClassVar[Mapping[str, float]] = {"samples": 0.3, "bound": 0.5}

    def one_evaluation(self, samples: int) -> None:
        self.run.sample(samples)

    @property
    def model_in_words(self) -> dict[str, str]:
        shown = ("layers", "latent", "inference", "skip", "posterior", "decoder")
        return {k: str(v) for k, v in (self.run.recipe.autoencoder or {}).items() if k in shown}

    def way_of_sampling(self) -> dict[str, Any]:
        return dict(self.run.sampler().how) | {"guidance": 0.0, "clip": False}

    # -- what the latents are -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def _variances(self) -> list[Tensor]:
        """Var_x E[z|x] of each latent of each layer: how much the mean of q varies over examples.

        As the covariance of the means along two halves of the paths: what a neighbour's noise puts into a mean is
        drawn anew in each, and leaves no trace.
        """
        x, _ = self.run.examples("held_out", 1000)
        generator = stream("report")
        halves = []
        for _ in range(2):
            paths = [self.run.autoencoder.path(x, generator=generator) for _ in range(PATHS)]
            laws = zip(*(path.laws[1:] for path in paths), strict=True)
            halves.append([torch.stack([law.mean.flatten(1) for law in layer]).mean(0) for layer in laws])
        centred = [[mean - mean.mean(0) for mean in half] for half in halves]
        return [(a * b).mean(0).clamp_min(0).cpu() for a, b in zip(*centred, strict=True)]

    def units(self) -> tuple[dict[str, Any], str]:
        variances = self._variances()
        layers = [{"layer": i, "size": len(v), "active": int((v > ACTIVE).sum())} for i, v in enumerate(variances, 1)]
        found: dict[str, Any] = {"threshold": ACTIVE, "layers": layers}
        names = [f"z{i}" for i in range(1, len(variances) + 1)]
        return found, bars([v.sort(descending=True).values.numpy() for v in variances], names, ACTIVE)

    @torch.no_grad()
    def traversals(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The image of p's own means with one latent moved, those of the largest variance in each layer."""
        model = self.run.autoencoder
        rows: list[dict[str, Any]] = []
        shapes, top = model.model.shapes, None
        if isinstance(model.model.prior(), Chain):  # drawn by a sampler: begin at the origin
            top = torch.zeros(1, *shapes[-1], device=device())
        size = model.model.noise_shape[0] - (0 if top is None else top.numel())
        start = model.generate(torch.zeros(1, size, device=device()), top=top)
        for layer, variance in enumerate(self._variances(), 1):
            for latent in variance.argsort(descending=True)[:MOST_TRAVERSED].tolist():
                if variance[latent] <= ACTIVE:
                    continue
                z: list[Any] = [one.repeat(len(TRAVERSED), *(1 for _ in one.shape[1:])) for one in start.z]
                law, moved = start.laws[layer], z[layer].view(len(TRAVERSED), -1)[:, latent]
                scale = torch.ones((), device=device()) if law is None else law.std[0].flatten()[latent]
                moved += torch.tensor(TRAVERSED).to(scale) * scale
                for i in range(layer - 1, 0, -1):
                    z[i] = model.model.down(i, tuple(z[i + 1 :])).mean
                name = f"z{layer}, {latent}"
                rows.append({"name": name, "setting": name, "images": self.pictures_of(self._decoded(z))})
        return {"values": list(TRAVERSED), "rows": len(rows)}, rows
