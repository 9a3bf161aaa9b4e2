"""What every report measures of a run: its facts, loss, bound and quality; and of images, what samples are near to."""

from __future__ import annotations

import json
import math
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kuosan import figures
from kuosan.bound import Bound
from kuosan.figures import Panel
from kuosan.image.data import to_pixels
from kuosan.image.judge import Judge, nearest
from kuosan.progress import Progress
from kuosan.runs import Run

MOST_CLASSES = 20  # rows of samples


class RunMeasurements(ABC):
    """The measurements of one report of any run, each a section's numbers and pictures.

    Attributes:
        kind: of the model, as a sentence begins.
        page: the template that shows them.
        sections: their names.
        shares: of the time budget.
    """

    kind: str
    page: ClassVar[str]
    sections: tuple[str, ...]
    shares: ClassVar[Mapping[str, float]]

    def __init__(self, run: Any, budget: float):
        self.run, self.budget = run, budget
        self.cost = self._seconds_per_evaluation()
        self.evaluation = self._evaluation()

    def everything(self) -> tuple[dict[str, Any], dict[str, Any]]:
        numbers: dict[str, Any] = {}
        pictures: dict[str, Any] = {}
        for section in self.sections:
            numbers[section], pictures[section] = getattr(self, section)()
        numbers["quality"], numbers["provenance"] = self.quality(), self.provenance()
        return numbers, pictures

    def _evaluation(self) -> dict[str, Any] | None:
        """What `kuosan evaluate` wrote, if it was of this step."""
        try:
            found = json.loads((self.run.folder / "evaluation.json").read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return found if found.get("step") == self.run.step and self.run.medium.unit.key in found else None

    # -- how much can be afforded -------------------------------------------------------------------------------------

    @abstractmethod
    def one_evaluation(self, samples: int) -> None:
        """The cheapest thing that takes one evaluation of the network for each of so many samples."""

    def _seconds_per_evaluation(self) -> float:
        """What one network evaluation of one sample takes, at the batch size that samples are drawn in."""
        batch, seconds = 4, 0.0
        self.one_evaluation(2)  # the first call is always slow
        while True:
            begun = time.monotonic()
            self.one_evaluation(batch)
            seconds = time.monotonic() - begun
            if seconds > 0.02 * self.budget or batch >= 256:
                return max(seconds, 1e-6) / batch
            batch *= 4

    def count(self, section: str, evaluations: float, least: int, most: int = 1000) -> int:
        """How many samples a section can have if each takes that many evaluations."""
        affordable = int(self.shares[section] * self.budget / self.cost / evaluations)
        return max(least, min(most, affordable))

    # -- sections, in the page's order --------------------------------------------------------------------------------

    @property
    @abstractmethod
    def model_in_words(self) -> dict[str, str]:
        """What the model is, name by name, for the table of facts."""

    def facts(self) -> tuple[dict[str, Any], None]:
        run, info, recipe = self.run, self.run.info, self.run.recipe
        return {
            "name": run.folder.resolve().name,
            "data": info["data"],
            "one": run.medium.one,
            "many": run.medium.many,
            "shape": run.shape,
            "levels": run.levels,
            "classes": run.classes,
            "conditional": run.conditional,
            "kind": self.kind,
            "model": self.model_in_words,
            "parameters": info["parameters"],
            "objective": recipe.objective["kind"],
            "step": run.step,
            "steps": recipe.training.steps,
            "batch_size": recipe.training.batch_size,
            "training_seconds": run.seconds,
            "judge": run.judge is not None,
            "why_no_judge": self.run.why_no_judge,
        }, None

    @property
    @abstractmethod
    def drawn(self) -> Tensor:
        """Samples as `kuosan sample` draws them, seeds 0, 1, 2, ..."""

    @cached_property
    def judged(self) -> dict[str, Any] | None:
        """What can be said of their quality."""
        return self.run.medium.quality(self.drawn, self.run.labels_for(len(self.drawn)))

    def how_many(self, evaluations: float) -> int:
        """How many samples the page's first section has, if each takes that many evaluations."""
        rows = min(len(self.run.classes), MOST_CLASSES) if self.run.conditional and self.run.classes else 8
        return self.count("samples", evaluations, least=max(64, 2 * rows))

    @abstractmethod
    def way_of_sampling(self) -> dict[str, Any]:
        """How samples are drawn: solver, evaluations, guidance."""

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

    @abstractmethod
    def estimate(self, split: str) -> Bound:
        """The bound on a split, as well as the budget allows."""

    @abstractmethod
    def about(self, bound: Bound) -> dict[str, Any]:
        """How a bound was estimated: terms, draws, and what else its table shows."""

    def comparable(self, evaluated: Mapping[str, Any], bound: Bound) -> bool:
        """Whether what `kuosan evaluate` found is the same bound."""
        return evaluated.get("examples", 0) >= len(bound.total)

    def _bound(self) -> tuple[dict[str, Any], dict[str, Bound]]:
        """The bound on both splits, in the medium's unit, and whether training examples take less than new ones."""
        progress, unit = Progress("bound"), self.run.medium.unit
        splits: dict[str, Bound] = {}
        for done, split in enumerate(("held_out", "train"), 1):
            splits[split] = self.estimate(split)
            progress(done, 2, split.replace("_", "-"))
        numbers: dict[str, Any] = {}
        for split, bound in splits.items():
            scale = unit.of_bits(bound.dimensions)
            terms = {name: scale * value for name, value in asdict(bound.bits_per_dim()).items()}
            numbers[split] = terms | {"examples": len(bound.total)} | self.about(bound)
        evaluated = (self.evaluation or {}).get(unit.key, {})
        comparable = self.comparable(evaluated, splits["train"])
        if comparable:  # the same bound as of the training examples
            numbers["held_out"] = evaluated
        numbers["from_evaluation"] = comparable
        numbers["estimate"] = {"examples": len(splits["held_out"].total), "draws": splits["held_out"].draws}
        numbers["gap"] = numbers["held_out"]["total"] - numbers["train"]["total"]
        errors = [numbers[split]["standard_error"] for split in ("held_out", "train")]
        error = math.hypot(*(math.nan if one is None else one for one in errors))  # unknown of a single example
        numbers["overfits"] = bool(numbers["gap"] > 3 * error)  # False if an error is not known
        return numbers, splits

    # -- the rest -----------------------------------------------------------------------------------------------------

    def quality(self) -> dict[str, Any] | None:
        evaluated = (self.evaluation or {}).get("quality")
        if evaluated and evaluated.get("guidance") == self.run.recipe.sampling.guidance:
            return dict(evaluated) | {"from_evaluation": True}
        return None if self.judged is None else dict(self.judged) | {"from_evaluation": False}

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
            return self(self.run.data.held_out.levels[: most_compared(self.run, count)], None)
        real = asdict(self.judge.reference)
        real |= {"frechet": points[0]["frechet_of_real"], "largest_class": max(real["classes"].values())}
        return {key: real[key] for key in ("confident", "frechet", "largest_class", "agreement")}


def most_compared(run: Run, count: int) -> int:
    """How many images can be compared with all training images in some seconds, of ``count``."""
    return max(8, min(count, int(1e10 / run.data.train.levels.numel())))


class Measurements(RunMeasurements):
    """The measurements that every report of images has."""

    page = "report.html"

    def __init__(self, run: Any, budget: float):
        super().__init__(run, budget)
        self.yardstick = Yardstick(run, run.judge)

    @cached_property
    def drawn(self) -> Tensor:
        n = self.how_many(self.run.sampler().how["evaluations"])
        return self.run.sample(n, progress=Progress("samples"))

    def pictures_of(self, levels: Tensor) -> list[str]:
        return [figures.picture(one, self.run.levels) for one in levels]

    def samples(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        run, numbers = self.run, dict(self.way_of_sampling())
        if not (run.conditional and run.classes):
            rows = [{"name": "", "seeds": list(range(64)), "images": self.pictures_of(self.drawn[:64])}]
            return numbers | {"shown": 64}, rows
        count = len(run.classes)
        columns = min(12, len(self.drawn) // count)
        rows = []
        for index, name in enumerate(run.classes[:MOST_CLASSES]):
            seeds = [index + count * column for column in range(columns)]
            rows.append({"name": name, "seeds": seeds, "images": self.pictures_of(self.drawn[seeds])})
        return numbers | {"shown": columns * len(rows)}, rows

    @property
    @abstractmethod
    def decoder(self) -> str:
        """The decoder of the last step, in words."""

    def curve(self, splits: Mapping[str, Bound]) -> tuple[dict[str, Any] | None, dict[str, str]]:
        """Where the bits are spent: numbers and plots."""
        return None, {}

    def bits_per_dim(self) -> tuple[dict[str, Any], dict[str, str]]:
        numbers, splits = self._bound()
        curve, pictures = self.curve(splits)
        return numbers | {"decoder": self.decoder, "curve": curve}, pictures

    # -- what the samples are near to ---------------------------------------------------------------------------------

    def neighbours(self) -> tuple[dict[str, Any], dict[str, Any]]:
        run = self.run
        train, held_out = run.data.train.levels, run.data.held_out.levels
        ours = self.drawn[: most_compared(run, len(self.drawn))]
        real = held_out[: most_compared(run, len(held_out))]
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
            pairs[name] = list(zip(self.pictures_of(ours[chosen]), self.pictures_of(train[index[chosen]]), strict=True))
        return numbers, pairs | {"plot": figures.distances_plot(distance.numpy(), of_real.numpy())}
