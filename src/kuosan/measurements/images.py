"""What a report measures of images: their quality, and which training images the samples are near to."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kuosan import figures
from kuosan.bound import Bound
from kuosan.figures import Panel
from kuosan.image.captioned import CaptionedMedium
from kuosan.image.data import to_pixels
from kuosan.image.judge import Judge, nearest
from kuosan.measurements.base import MOST_CLASSES, BoundMeasurements
from kuosan.progress import Progress
from kuosan.runs import Run

#: Prompts that a report shows, and the guidance weights that it shows them at.
PROMPTS, WEIGHTS = 10, (0.0, 1.0, 2.0, 4.0)


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


def attribute_rows(quality: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each attribute and kind of combination: the share of samples that are right, and of real images."""
    rows = []
    for name, found in quality["attributes"].items():
        for key, words in (("seen", "combinations seen in training"), ("unseen", "combinations held out")):
            if found[key] is not None:
                real = quality["held_out"]["attributes"][name][key]
                rows.append({"name": name, "of": words, **found[key], "real": None if real is None else real["right"]})
    return rows


class ImageMeasurements(BoundMeasurements):
    """The measurements that every report of images has."""

    page = "report.html"

    def __init__(self, run: Any, budget: float):
        super().__init__(run, budget)
        self.yardstick = Yardstick(run, run.judge if isinstance(run.judge, Judge) else None)

    @property
    def captioned(self) -> bool:
        return isinstance(self.run.medium, CaptionedMedium)

    def facts(self) -> tuple[dict[str, Any], None]:
        found, _ = super().facts()
        if self.captioned and found["judge"]:
            found |= {"judge": False, "why_no_judge": "classifiers of what captions say stand in its place, above"}
        return found, None

    def quality(self) -> dict[str, Any] | None:
        return None if self.captioned else super().quality()

    def prompted(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Prompts against guidance weights, and which attributes samples have of those that were asked for."""
        run, shown = self.run, self.run.medium.prompts[:PROMPTS]
        weights = sorted({*WEIGHTS, float(run.recipe.sampling.guidance)}) if run.recipe.training.label_drop else [0.0]
        seeds = [i + PROMPTS * k for i in range(len(shown)) for k in range(2)]
        asked = [one for one in shown for _ in range(2)]
        drawn = [run.sample(seeds=seeds, prompt=asked, guidance=weight) for weight in weights]
        rows = []
        for i, prompt in enumerate(shown):
            images = [self.pictures_of(one[2 * i : 2 * i + 2]) for one in drawn]
            own = [s for _ in weights for s in seeds[2 * i : 2 * i + 2]]
            rows.append({"name": prompt, "seeds": own, "images": [picture for two in images for picture in two]})
        evaluated = (self.evaluation or {}).get("quality")
        if not evaluated or evaluated.get("guidance") != run.recipe.sampling.guidance:
            evaluated = self.judged
        found = [] if evaluated is None else attribute_rows(evaluated)
        return {"shown": 2 * len(weights) * len(shown), "weights": weights, "attributes": found}, rows

    @cached_property
    def drawn(self) -> Tensor:
        n = self.how_many(self.run.sampler().how["evaluations"])
        return self.run.sample(n, progress=Progress("samples"))

    def pictures_of(self, levels: Tensor) -> list[str]:
        return [figures.picture(one, self.run.levels) for one in levels]

    def samples(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        run, numbers = self.run, dict(self.way_of_sampling())
        if self.captioned:
            said, rows = self.prompted()
            return numbers | said, rows
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
