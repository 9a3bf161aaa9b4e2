"""What a report measures of a diffusion model beside: its way from noise, its steps, solvers and temperature."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kuosan import figures
from kuosan.bound import Bound
from kuosan.image.data import to_levels, to_pixels
from kuosan.measurements.images import ImageMeasurements, most_compared
from kuosan.prediction import Prediction
from kuosan.process import expand
from kuosan.progress import Progress
from kuosan.runs import DiffusionRun
from kuosan.solvers import Ancestral, Auto, Noise
from kuosan.solvers import run as execute
from kuosan.variance import MEASURED

EVALUATIONS = (1, 2, 3, 5, 10, 20, 50, 100)
TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1)


class DiffusionMeasurements(ImageMeasurements):
    """The measurements of a diffusion model's report."""

    run: DiffusionRun
    kind = "A diffusion model"
    sections: tuple[str, ...] = (
        "facts",
        "samples",
        "way",
        "loss",
        "bits_per_dim",
        "evaluations",
        "solvers",
        "temperature",
        "neighbours",
    )
    shares: ClassVar[Mapping[str, float]] = {
        "samples": 0.15,
        "bound": 0.2,
        "evaluations": 0.3,
        "temperature": 0.35,
    }

    @property
    def longest(self) -> int:
        """The most steps that the model has."""
        schedule = self.run.denoiser.process.schedule
        return len(schedule) if hasattr(schedule, "__len__") else 10**9

    def one_evaluation(self, samples: int) -> None:
        self.run.sample(samples, solver=Ancestral(), steps=1)

    @property
    def model_in_words(self) -> dict[str, str]:
        recipe = self.run.recipe
        assert recipe.network is not None
        assert recipe.process is not None
        return {
            "network": recipe.network["kind"],
            "predicts": recipe.denoiser.predicts,
            "noise schedule": recipe.process["kind"],
        }

    def way_of_sampling(self) -> dict[str, Any]:
        sampling, how = self.run.recipe.sampling, self.run.sampler().how
        return {
            "solver": how["solver"] if how["solver"].startswith("tuned (") else _words(sampling.solver),
            "evaluations": how["evaluations"],
            "guidance": sampling.guidance,
            "clip": sampling.clip,
        }

    def seen(self, x: Tensor) -> Tensor:
        """States, or guesses of x_0, as pixels."""
        return x

    def way(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """One sample from noise to data with the recipe's solver, seed 0: what `kuosan sample` draws first."""
        run, sampler = self.run, self.run.sampler()
        model, table = sampler.model, sampler.table
        seen: list[tuple[float, Tensor, Tensor]] = []

        def watch(i: int, x: Tensor, prediction: Prediction) -> None:
            alpha, sigma = run.denoiser.process.scales(table.times[i])
            fitted = x / expand(alpha + sigma, x)
            state, guess = (figures.shades(self.seen(one)[0].cpu()) for one in (fitted, prediction.x0))
            seen.append((table.times[i], state, guess))

        device = next((p.device for p in run.denoiser.parameters()), torch.device("cpu"))
        noise = Noise([0], run.state_shape)
        labels = run.labels_for(1)
        x_init = (sampler.start * model.process.prior(table.times[0]).std.float() * noise.draw()).to(device)
        condition = None if labels is None else labels.to(device)
        correct = sampler.corrector.on(model, noise.draw, condition) if sampler.corrector else None
        how: dict[str, Any] = {"transform": sampler.transform, "correct": correct, "watch": watch}
        end = execute(table, model, x_init, noise.draw, condition, **how)[0].cpu()
        last = figures.shades(to_pixels(to_levels(self.seen(end[None])[0], run.levels), run.levels))
        seen.append((0.0, last, last))
        shown = [seen[i] for i in np.unique(np.linspace(0, len(seen) - 1, 10).round().astype(int))]
        frames = [seen[i] for i in np.unique(np.linspace(0, len(seen) - 1, 51).round().astype(int))]
        strip = {
            "states": [figures.picture(x, 256) for _, x, _ in shown],
            "guesses": [figures.picture(x_0, 256) for _, _, x_0 in shown],
            "film": figures.film([(x, x_0) for _, x, x_0 in frames]),
        }
        name = None if labels is None or not run.classes else run.classes[int(labels[0])]
        return {"seed": 0, "class": name, "times": [t for t, _, _ in shown], "frames": len(frames)}, strip

    def estimate(self, split: str) -> Bound:
        """With as many random times as the budget allows, spread evenly."""
        section, guided = self.run.recipe.evaluation, self.run.recipe.sampling.guidance != 0
        cost = self.cost / (2 if guided else 1)
        affordable = int(self.shares["bound"] / 2 * self.budget / cost)
        n = min(len(getattr(self.run.data, split)), len(self.run.data.held_out), section.examples)
        n = min(n, max(32, affordable // 2))
        return self.run.bound(split, n, terms="stratified", draws=max(1, min(128, affordable // n - 1)))

    def about(self, bound: Bound) -> dict[str, Any]:
        variance = self.run.recipe.evaluation.variance
        return {"steps": len(bound.times), "variance": variance, "terms": "stratified", "draws": bound.draws}

    def comparable(self, evaluated: Mapping[str, Any], bound: Bound) -> bool:
        found = (evaluated.get("steps"), evaluated.get("variance"), evaluated.get("grid", "even"))
        same = found == (len(bound.times), self.run.recipe.evaluation.variance, "even")
        return same and evaluated.get("examples", 0) >= len(bound.total)

    @property
    def decoder(self) -> str:
        if self.run.recipe.denoiser.predicts == "levels":
            return f"the network’s own probabilities of the {self.run.levels} levels"
        variance = "M_t, measured," if self.run.recipe.evaluation.variance in MEASURED else "σ²/α²,"
        return f"a Gaussian around x̂₀ of variance {variance} cut into {self.run.levels} bins"

    def curve(self, splits: Mapping[str, Bound]) -> tuple[dict[str, Any] | None, dict[str, str]]:
        return figures.terms(splits, self.run.denoiser.process)

    # -- sweeps -------------------------------------------------------------------------------------------------------

    def evaluations(self) -> tuple[dict[str, Any], dict[str, Any]]:
        settings = [k for k in EVALUATIONS if k <= self.longest]
        while len(settings) > 4 and 32 * sum(settings) * self.cost > self.shares["evaluations"] * self.budget:
            settings.pop()
        n = self.count("evaluations", sum(settings), least=32)
        sampling = self.run.recipe.sampling
        fixed = (
            sampling.solver["kind"] in ("auto", "tuned") and sampling.grid is None
        )  # not a tuned table here and there
        rule: dict[str, Any] = {"solver": Auto(tuned=False)} if fixed else {}
        tries, counts = [], []
        for steps in settings:
            try:
                counts.append(self.run.sampler(steps=steps, **rule).how["evaluations"])
            except ValueError:  # fewer steps than the solver's order
                continue
            tries.append({"steps": steps, **rule})
        found, pictures = self._sweep("evaluations", counts, tries, n, log=True)
        return found | {"solver": "auto" if fixed else _words(sampling.solver)}, pictures

    def solvers(self) -> tuple[dict[str, Any] | None, str | None]:
        """What `kuosan compare` found, if it was of this step."""
        try:
            found = json.loads((self.run.folder / "compare.json").read_text("utf-8"))
            picture = (self.run.folder / "compare.png").read_bytes()
        except (FileNotFoundError, ValueError):
            return None, None
        return (found, figures.uri(picture, "png")) if found.get("step") == self.run.step else (None, None)

    def temperature(self) -> tuple[dict[str, Any], dict[str, Any]]:
        lengths = [min(k, self.longest) for k in (100, 50, 20)]
        fitting = [k for k in lengths if self.count("temperature", k * len(TEMPERATURES), least=1) >= 250]
        steps = (fitting or lengths[-1:])[0]
        n = self.count("temperature", steps * len(TEMPERATURES), least=32)
        variance = self.run.recipe.sampling.solver.get("variance", "beta_tilde")
        tries = [{"solver": Ancestral(variance=variance, temperature=value), "steps": steps} for value in TEMPERATURES]
        found, pictures = self._sweep("temperature", TEMPERATURES, tries, n, log=False)
        return found | {"evaluations": steps, "variance": variance}, pictures

    def _sweep(
        self, name: str, settings: Sequence[float], tries: Sequence[Mapping[str, Any]], n: int, log: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draw the same n seeds with each solver and number of steps, and measure each set."""
        run, points, rows = self.run, [], []
        n = n if self.yardstick.judge else most_compared(run, n)
        labels = run.labels_for(n)
        progress = Progress(name)
        for done, (setting, how) in enumerate(zip(settings, tries, strict=True), 1):
            levels = run.sample(n, **how)
            points.append({name: setting} | self.yardstick(levels, labels))
            rows.append({"setting": setting, "images": self.pictures_of(levels[:12])})
            progress(done, len(settings))
        real = self.yardstick.of_real(points, n)
        if labels is None:
            real.pop("agreement", None)
        for point in points:
            point.pop("frechet_of_real", None)
        numbers = {"samples": n, "points": points, "real": real}
        label = {"evaluations": "network evaluations for each sample"}.get(name, name)
        plots = [
            figures.sweep_plot(panel, label, settings, points, real[panel.key], log) for panel in self.yardstick.panels
        ]
        return numbers, {"plots": plots, "rows": rows}


def _words(table: Mapping[str, Any]) -> str:
    """A solver's table in words: ddim, eta = 0.5."""
    return ", ".join([str(table["kind"]), *(f"{k} = {v}" for k, v in table.items() if k != "kind")])
