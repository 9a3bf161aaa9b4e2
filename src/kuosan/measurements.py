"""What a report measures of a run: each section's numbers and pictures, within a budget of time."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kuosan import figures
from kuosan.bound import Bound
from kuosan.figures import Panel
from kuosan.image.data import to_levels, to_pixels
from kuosan.image.judge import Judge, nearest
from kuosan.prediction import Prediction
from kuosan.process import expand
from kuosan.progress import Progress
from kuosan.run import Run
from kuosan.solvers import Ancestral, Auto, Noise
from kuosan.solvers import run as execute

EVALUATIONS = (1, 2, 3, 5, 10, 20, 50, 100)
TEMPERATURES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0, 1.1)
SHARES = {"samples": 0.15, "bound": 0.2, "evaluations": 0.3, "temperature": 0.35}  # of the time budget
#: Of the page, in its order.
SECTIONS = (
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
MOST_CLASSES = 20  # rows of samples


@dataclass(frozen=True)
class Yardstick:
    """What is measured of samples: what the judge says, or without one what can be said of images alone."""

    run: Run
    judge: Judge | None

    @property
    def panels(self) -> tuple[Panel, Panel]:
        if self.judge is None:
            return (
                Panel("nearest", "median distance to the nearest training image"),
                Panel("contrast", "mean difference of neighbouring pixels"),
            )
        asked = ("agreement", "judged as the class asked for")
        return (
            Panel("confident", "share that the judge is 90 % sure of", "confident_error", True, asked),
            Panel("frechet", "Fréchet distance in the judge’s features"),
        )

    def __call__(self, levels: Tensor, labels: Tensor | None) -> dict[str, Any]:
        if self.judge is not None:
            found = asdict(self.judge.quality(levels, labels))
            kept = ("confident", "confident_error", "frechet", "frechet_of_real", "agreement", "agreement_error")
            return {key: found[key] for key in kept} | {"largest_class": max(found["classes"].values())}
        distances, _ = nearest(levels, self.run.data.train.levels, self.run.levels)
        x = to_pixels(levels, self.run.levels)
        contrast = torch.cat([x.diff(dim=-1).abs().flatten(), x.diff(dim=-2).abs().flatten()]).mean()
        return {"nearest": float(distances.median()), "contrast": float(contrast)}

    def of_real(self, points: Sequence[Mapping[str, Any]], count: int) -> dict[str, Any]:
        """The same of real held-out images: for the Frechet distance of as many, since it falls with their number."""
        if self.judge is None:
            return self(self.run.data.held_out.levels[: _most_compared(self.run, count)], None)
        real = asdict(self.judge.reference)
        real |= {"frechet": points[0]["frechet_of_real"], "largest_class": max(real["classes"].values())}
        return {key: real[key] for key in ("confident", "frechet", "largest_class", "agreement")}


def _most_compared(run: Run, count: int) -> int:
    """How many images can be compared with all training images in some seconds, of ``count``."""
    return max(8, min(count, int(1e10 / run.data.train.levels.numel())))


class Measurements:
    """The measurements of one report, each a section's numbers and pictures."""

    def __init__(self, run: Run, budget: float):
        self.run, self.budget = run, budget
        self.yardstick = Yardstick(run, run.judge)
        self.cost = self._seconds_per_evaluation()
        schedule = run.denoiser.process.schedule
        self.longest = len(schedule) if hasattr(schedule, "__len__") else 10**9
        self.evaluation = self._evaluation()

    def everything(self) -> tuple[dict[str, Any], dict[str, Any]]:
        numbers: dict[str, Any] = {}
        pictures: dict[str, Any] = {}
        for section in SECTIONS:
            numbers[section], pictures[section] = getattr(self, section)()
        numbers["quality"], numbers["provenance"] = self.quality(), self.provenance()
        return numbers, pictures

    def _evaluation(self) -> dict[str, Any] | None:
        """What `kuosan evaluate` wrote, if it was of this step."""
        try:
            found = json.loads((self.run.folder / "evaluation.json").read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return found if found.get("step") == self.run.step and "bits_per_dim" in found else None

    # -- how much can be afforded -------------------------------------------------------------------------------------

    def _seconds_per_evaluation(self) -> float:
        """What one network evaluation of one sample takes, at the batch size that samples are drawn in."""
        batch, seconds = 4, 0.0
        self.run.sample(2, solver=Ancestral(), steps=1)  # the first call is always slow
        while True:
            begun = time.monotonic()
            self.run.sample(batch, solver=Ancestral(), steps=1)
            seconds = time.monotonic() - begun
            if seconds > 0.02 * self.budget or batch >= 256:
                return max(seconds, 1e-6) / batch
            batch *= 4

    def _count(self, section: str, evaluations: int, least: int, most: int = 1000) -> int:
        """How many samples a section can have if each takes that many evaluations."""
        affordable = int(SHARES[section] * self.budget / self.cost / evaluations)
        return max(least, min(most, affordable))

    # -- sections, in the page's order --------------------------------------------------------------------------------

    def facts(self) -> tuple[dict[str, Any], None]:
        run, info, recipe = self.run, self.run.info, self.run.recipe
        return {
            "name": run.folder.resolve().name,
            "data": info["data"],
            "shape": run.shape,
            "levels": run.levels,
            "classes": run.classes,
            "conditional": run.conditional,
            "network": recipe.network["kind"],
            "parameters": info["parameters"],
            "predicts": recipe.denoiser.predicts,
            "process": recipe.process["kind"],
            "objective": recipe.objective["kind"],
            "step": run.step,
            "steps": recipe.training.steps,
            "batch_size": recipe.training.batch_size,
            "training_seconds": run.seconds,
            "judge": self.yardstick.judge is not None,
            "why_no_judge": self.run.why_no_judge,
        }, None

    @cached_property
    def drawn(self) -> Tensor:
        """Samples as `kuosan sample` draws them, seeds 0, 1, 2, ..."""
        steps = self.run.recipe.sampling.steps
        rows = min(len(self.run.classes), MOST_CLASSES) if self.run.conditional and self.run.classes else 8
        n = self._count("samples", steps, least=max(64, 2 * rows))
        return self.run.sample(n, progress=Progress("samples"))

    def _pictures(self, levels: Tensor) -> list[str]:
        return [figures.picture(one, self.run.levels) for one in levels]

    def samples(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        run, sampling, how = self.run, self.run.recipe.sampling, self.run.sampler().how
        numbers: dict[str, Any] = {
            "solver": how["solver"] if how["solver"].startswith("tuned (") else _words(sampling.solver),
            "evaluations": how["evaluations"],
            "guidance": sampling.guidance,
            "clip": sampling.clip,
        }
        if not (run.conditional and run.classes):
            rows = [{"name": "", "seeds": list(range(64)), "images": self._pictures(self.drawn[:64])}]
            return numbers | {"shown": 64}, rows
        count = len(run.classes)
        columns = min(12, len(self.drawn) // count)
        rows = []
        for index, name in enumerate(run.classes[:MOST_CLASSES]):
            seeds = [index + count * column for column in range(columns)]
            rows.append({"name": name, "seeds": seeds, "images": self._pictures(self.drawn[seeds])})
        return numbers | {"shown": columns * len(rows)}, rows

    def way(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """One sample from noise to data with the recipe's solver, seed 0: what `kuosan sample` draws first."""
        run, sampler = self.run, self.run.sampler()
        model, table = sampler.model, sampler.table
        seen: list[tuple[float, Tensor, Tensor]] = []

        def watch(i: int, x: Tensor, prediction: Prediction) -> None:
            alpha, sigma = run.denoiser.process.scales(table.times[i])
            fitted = x / expand(alpha + sigma, x)
            seen.append((table.times[i], figures.shades(fitted[0].cpu()), figures.shades(prediction.x0[0].cpu())))

        device = next((p.device for p in run.denoiser.parameters()), torch.device("cpu"))
        noise = Noise([0], run.shape)
        labels = run.labels_for(1)
        x_init = (model.process.prior(table.times[0]).std.float() * noise.draw()).to(device)
        condition = None if labels is None else labels.to(device)
        correct = sampler.corrector.on(model, noise.draw, condition) if sampler.corrector else None
        how: dict[str, Any] = {"transform": sampler.transform, "correct": correct, "watch": watch}
        end = execute(table, model, x_init, noise.draw, condition, **how)[0].cpu()
        last = figures.shades(to_pixels(to_levels(end, run.levels), run.levels))
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

    def loss(self) -> tuple[dict[str, Any] | None, str | None]:
        log = self.run.folder / "metrics.jsonl"
        steps, losses = [], []
        for line in log.read_text("utf-8").splitlines() if log.is_file() else []:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break  # the last line of a killed run
            steps.append(record["step"])
            losses.append(record["loss"])
        if not losses:
            return None, None
        return figures.loss(np.array(steps), np.array(losses))

    def _estimate(self, split: str) -> Bound:
        """The bound on a split with as many random times as the budget allows, spread evenly."""
        section, guided = self.run.recipe.evaluation, self.run.recipe.sampling.guidance != 0
        cost = self.cost / (2 if guided else 1)
        affordable = int(SHARES["bound"] / 2 * self.budget / cost)
        n = min(len(getattr(self.run.data, split)), len(self.run.data.held_out), section.examples)
        n = min(n, max(32, affordable // 2))
        return self.run.bound(split, n, terms="stratified", draws=max(1, min(128, affordable // n - 1)))

    def bits_per_dim(self) -> tuple[dict[str, Any], dict[str, str]]:
        run, section = self.run, self.run.recipe.evaluation
        progress = Progress("bound")
        splits: dict[str, Bound] = {}
        for done, split in enumerate(("held_out", "train"), 1):
            splits[split] = self._estimate(split)
            progress(done, 2, split.replace("_", "-"))
        numbers: dict[str, Any] = {}
        for split, bound in splits.items():
            numbers[split] = asdict(bound.bits_per_dim()) | {
                "examples": len(bound.total),
                "steps": len(bound.times),
                "variance": section.variance,
                "terms": "stratified",
                "draws": bound.draws,
            }
        evaluated = (self.evaluation or {}).get("bits_per_dim", {})
        found = (evaluated.get("steps"), evaluated.get("variance"), evaluated.get("grid", "even"))
        comparable = found == (len(splits["train"].times), section.variance, "even")
        if comparable:  # the same bound as of the training images
            numbers["held_out"] = evaluated
        by_level = run.recipe.denoiser.predicts == "levels"
        numbers["from_evaluation"] = comparable
        numbers["estimate"] = {"examples": len(splits["held_out"].total), "draws": splits["held_out"].draws}
        numbers["decoder"] = (
            f"the network’s own probabilities of the {run.levels} levels"
            if by_level
            else f"a Gaussian around x̂₀ of variance σ²/α², cut into {run.levels} bins"
        )
        numbers["gap"] = numbers["held_out"]["total"] - numbers["train"]["total"]
        error = math.hypot(*(numbers[split]["standard_error"] for split in ("held_out", "train")))
        numbers["overfits"] = bool(numbers["gap"] > 3 * error)  # False if an error is not known
        numbers["curve"], pictures = figures.terms(splits, run.denoiser.process)
        return numbers, pictures

    # -- sweeps -------------------------------------------------------------------------------------------------------

    def evaluations(self) -> tuple[dict[str, Any], dict[str, Any]]:
        settings = [k for k in EVALUATIONS if k <= self.longest]
        while len(settings) > 4 and 32 * sum(settings) * self.cost > SHARES["evaluations"] * self.budget:
            settings.pop()
        n = self._count("evaluations", sum(settings), least=32)
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
        fitting = [k for k in lengths if self._count("temperature", k * len(TEMPERATURES), least=1) >= 250]
        steps = (fitting or lengths[-1:])[0]
        n = self._count("temperature", steps * len(TEMPERATURES), least=32)
        variance = self.run.recipe.sampling.solver.get("variance", "beta_tilde")
        tries = [{"solver": Ancestral(variance=variance, temperature=value), "steps": steps} for value in TEMPERATURES]
        found, pictures = self._sweep("temperature", TEMPERATURES, tries, n, log=False)
        return found | {"evaluations": steps, "variance": variance}, pictures

    def _sweep(
        self, name: str, settings: Sequence[float], tries: Sequence[Mapping[str, Any]], n: int, log: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draw the same n seeds with each solver and number of steps, and measure each set."""
        run, points, rows = self.run, [], []
        n = n if self.yardstick.judge else _most_compared(run, n)
        labels = run.labels_for(n)
        progress = Progress(name)
        for done, (setting, how) in enumerate(zip(settings, tries, strict=True), 1):
            levels = run.sample(n, **how)
            points.append({name: setting} | self.yardstick(levels, labels))
            rows.append({"setting": setting, "images": self._pictures(levels[:12])})
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

    # -- what the samples are near to ---------------------------------------------------------------------------------

    def neighbours(self) -> tuple[dict[str, Any], dict[str, Any]]:
        run = self.run
        train, held_out = run.data.train.levels, run.data.held_out.levels
        ours = self.drawn[: _most_compared(run, len(self.drawn))]
        real = held_out[: _most_compared(run, len(held_out))]
        distance, index = nearest(ours, train, run.levels)
        of_real, _ = nearest(real, train, run.levels)
        limit = float(torch.quantile(of_real, 0.05))
        quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
        numbers: dict[str, Any] = {
            "samples": len(ours),
            "held_out": len(real),
            "train": len(train),
            "quantiles": [
                {"quantile": float(q), "samples": float(a), "held_out": float(b)}
                for q, a, b in zip(
                    quantiles, torch.quantile(distance, quantiles), torch.quantile(of_real, quantiles), strict=True
                )
            ],
            "copies": int((distance == 0).sum()),
            "copies_of_real": int((of_real == 0).sum()),
            "nearer_than_95_percent_of_held_out": float((distance <= limit).double().mean()),
        }
        numbers["conclusion"] = figures.conclusion(numbers)
        pairs = {}
        for name, chosen in (("first", range(10)), ("nearest", distance.argsort()[:10].tolist())):
            numbers[name] = [{"seed": k, "train": int(index[k]), "distance": float(distance[k])} for k in chosen]
            chosen = list(chosen)
            pairs[name] = list(zip(self._pictures(ours[chosen]), self._pictures(train[index[chosen]]), strict=True))
        return numbers, pairs | {"plot": figures.distances_plot(distance.numpy(), of_real.numpy())}

    # -- the rest -----------------------------------------------------------------------------------------------------

    def quality(self) -> dict[str, Any] | None:
        if self.yardstick.judge is None:
            return None
        evaluated = (self.evaluation or {}).get("quality")
        if evaluated and evaluated.get("guidance") == self.run.recipe.sampling.guidance:
            return dict(evaluated) | {"from_evaluation": True}
        found = asdict(self.yardstick.judge.quality(self.drawn, self.run.labels_for(len(self.drawn))))
        return found | {"held_out": asdict(self.yardstick.judge.reference), "from_evaluation": False}

    def provenance(self) -> dict[str, Any]:
        run, info = self.run, self.run.info
        trained = (
            info["command"] or f"kuosan train {run.folder / 'recipe.toml'} --out AGAIN"
        )  # none: trained from Python
        versions = dict(info["versions"])
        for name in ("numpy", "matplotlib", "scikit-learn"):
            try:
                versions[name] = version(name)
            except PackageNotFoundError:
                continue
        return {
            "commands": [
                trained,
                f"kuosan sample {run.folder}",
                f"kuosan evaluate {run.folder}",
                f"kuosan report {run.folder}",
            ],
            "seed": info["seed"],
            "processes": info.get("processes", 1),
            "machine": info["machine"],
            "report_machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "versions": versions,
            "budget": self.budget,
            "seconds_per_evaluation": self.cost,
            "written": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        }


def _words(table: Mapping[str, Any]) -> str:
    """A solver's table in words: ddim, eta = 0.5."""
    return ", ".join([str(table["kind"]), *(f"{k} = {v}" for k, v in table.items() if k != "kind")])
