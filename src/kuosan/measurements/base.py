"""What every report measures of a run: its facts, loss and quality; and what most do, its bound."""

from __future__ import annotations

import json
import math
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kuosan import figures
from kuosan.bound import Bound
from kuosan.progress import Progress

MOST_CLASSES = 20  # rows of samples


class Measurements(ABC):
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
        return found if found.get("step") == self.run.step and self.essential in found else None

    @property
    def essential(self) -> str:
        """What an evaluation is of no use without."""
        return "quality"

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
            "told": run.told,
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
        log = self.run.log()
        if not log:
            return None, None
        return figures.loss(*(np.array([record[key] for record in log]) for key in ("step", "loss")))

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


class BoundMeasurements(Measurements):
    """The measurements of a report that has the bound on log p(x) in it."""

    @property
    def essential(self) -> str:
        return self.run.medium.unit.key

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
