"""What a report measures of a model of texts: samples, nats, control against fluency, rounds, lengths, what is new."""

from __future__ import annotations

import math
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from kuosan import figures
from kuosan.bound import Bound
from kuosan.discrete import Drawn
from kuosan.measurements.base import MOST_CLASSES, BoundMeasurements
from kuosan.progress import Progress
from kuosan.runs import AutoregressiveRun, DiscreteRun, TokenRun
from kuosan.runs.tokens import TokenSampler
from kuosan.text.judge import distinct
from kuosan.text.medium import ORDER, TextMedium, lengths_of
from kuosan.tokenizer import UNKNOWN

GUIDANCE = (0.0, 0.5, 1.0, 2.0)
NUCLEI = (1.0, 0.9)
ROUNDS = (1, 2, 4, 8, 20, 50)
#: Texts that are shown: of each class, and of a model without classes.
EACH_CLASS, OF_ANY = 3, 24
#: Of the way from noise: rows, and tokens of a text.
MOST_ROWS, MOST_TOKENS = 12, 64
#: Samples that are shown beside the training text that is most like them.
PAIRS = 10
#: What guidance multiplies the time of a step by, and what the sorting of a vocabulary does.
TWICE = 2.0

Pairs = frozenset[tuple[int, int]]


class Nearest:
    r"""Finds the training text that is most like another: by the Jaccard overlap of their pairs of neighbouring tokens.

    .. math:: J(a, b) = |P_a \cap P_b| / |P_a \cup P_b|

    The beginning and the end of a text are tokens too, so that a text of one token has pairs.
    """

    def __init__(self, tokens: Tensor, lengths: Tensor):
        where = defaultdict(list)
        sizes = []
        for i, pairs in enumerate(self._pairs(tokens, lengths)):
            sizes.append(len(pairs))
            for pair in pairs:
                where[pair].append(i)
        self._where = {pair: np.array(places) for pair, places in where.items()}
        self._sizes = np.array(sizes)

    @staticmethod
    def _pairs(tokens: Tensor, lengths: Tensor) -> list[Pairs]:
        texts = [[-1, *row[:n], -1] for row, n in zip(tokens.tolist(), lengths.tolist(), strict=True)]
        return [frozenset(pairwise(text)) for text in texts]

    def __call__(self, tokens: Tensor, lengths: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The largest overlap of each text with a training text, and which one that is."""
        overlaps, found = [], []
        for pairs in self._pairs(tokens, lengths):
            both = np.zeros(len(self._sizes))
            for pair in pairs:
                if pair in self._where:
                    both[self._where[pair]] += 1
            overlap = both / (self._sizes + len(pairs) - both)
            found.append(int(overlap.argmax()))
            overlaps.append(float(overlap.max()))
        return np.array(overlaps), np.array(found)


class TextMeasurements(BoundMeasurements):
    """The measurements of a report on a model of texts.

    Attributes:
        exact: whether its likelihood is log p itself and not a bound.
    """

    run: TokenRun
    page = "report-text.html"
    sections: tuple[str, ...] = ("facts", "samples", "loss", "nats_per_text", "control", "lengths", "neighbours")
    shares: ClassVar[Mapping[str, float]] = {"samples": 0.25, "bound": 0.25, "control": 0.5}
    exact: ClassVar[bool]
    nuclei: ClassVar[tuple[float, ...]] = NUCLEI

    def __init__(self, run: TokenRun, budget: float):
        super().__init__(run, budget)
        self.kind = run.kind[0].upper() + run.kind[1:]

    @property
    def steps(self) -> float:
        """Of the recipe's sampler, of one text: what a step costs is more than the network, so cached ones count."""
        return self.run.recipe.sampling.steps

    def price(self, sampler: TokenSampler) -> float:
        """What a text of a sampler takes, in evaluations of the network alone."""
        guided, cut = sampler.section.guidance != 0, sampler.section.nucleus < 1
        return self.steps * (TWICE if guided else 1) * (TWICE if cut else 1)

    def _draw(self, sampler: TokenSampler, n: int, **how: Any) -> Drawn:
        """As `kuosan sample` draws them: seeds 0 to n - 1, classes in turn."""
        return self.run.draw(sampler, range(n), **how)

    # -- facts and samples --------------------------------------------------------------------------------------------

    @property
    def model_in_words(self) -> dict[str, str]:
        recipe = self.run.recipe
        process, network = dict(recipe.process or {}), dict(recipe.network or {})
        return {
            "process": process.pop("kind") + "".join(f", {key} {value}" for key, value in process.items()),
            "network": network.pop("kind") + "".join(f", {key} {value}" for key, value in network.items()),
        }

    def facts(self) -> tuple[dict[str, Any], None]:
        found, _ = super().facts()
        accuracy = None if self.run.judge is None else self.run.judge.accuracy
        return found | {
            "tokens": self.run.medium.tokenizer.kind,
            "judge_accuracy": accuracy,
            "diffusion": not self.exact,
            "points": self.run.recipe.embedding is not None,
            "order": ORDER,
        }, None

    @cached_property
    def draws(self) -> Drawn:
        """Samples as `kuosan sample` draws them, and what they cost."""
        sampler = self.run.sampler()
        return self._draw(sampler, self.how_many(self.price(sampler)), progress=Progress("samples"))

    @property
    def drawn(self) -> Tensor:
        return self.draws.tokens

    def way_of_sampling(self) -> dict[str, Any]:
        sampler = self.run.sampler()
        section = sampler.section
        return {
            "solver": sampler.how["solver"].removesuffix("()").lower(),
            "steps": sampler.how.get("steps"),
            "evaluations": float(self.draws.evaluations.double().mean()),
            "guidance": section.guidance,
            "temperature": section.temperature,
            "nucleus": section.nucleus,
        }

    def samples(self) -> tuple[dict[str, Any], None]:
        """The first texts of each class, or of all; not chosen."""
        classes = self.run.classes if self.run.conditional else None
        if classes:
            each = max(1, min(EACH_CLASS if len(classes) > 4 else 2 * EACH_CLASS, len(self.drawn) // len(classes)))
            shown = range(min(len(classes), MOST_CLASSES, len(self.drawn)))
            seeds = [i + len(classes) * k for i in shown for k in range(each)]
        else:
            each, seeds = 0, list(range(OF_ANY))
        rows = [
            {
                "class": classes[seed % len(classes)] if classes else None,
                "seed": seed,
                "text": self.run.medium.words(self.drawn[seed]),
            }
            for seed in seeds
        ]
        return self.way_of_sampling() | {"shown": len(rows), "each": each, "rows": rows}, None

    # -- the bound ----------------------------------------------------------------------------------------------------

    def estimate(self, split: str) -> Bound:
        affordable = int(self.shares["bound"] / 2 * self.budget / self.cost) // 2  # of matching and reconstruction
        n = min(len(getattr(self.run.data, split)), len(self.run.data.held_out), self.run.recipe.evaluation.examples)
        n = min(n, max(32, affordable if self.exact else affordable // 4))
        return self.run.bound(split, n, draws=1 if self.exact else max(1, min(64, affordable // n)))

    def about(self, bound: Bound) -> dict[str, Any]:
        return self.run.chain()[1] | {"draws": bound.draws}

    def comparable(self, evaluated: Mapping[str, Any], bound: Bound) -> bool:
        return evaluated.get("form") == self.run.chain()[1]["form"] and super().comparable(evaluated, bound)

    def nats_per_text(self) -> tuple[dict[str, Any], str]:
        numbers, _ = self._bound()
        medium = self.run.medium
        for split in ("held_out", "train"):
            x = self.run.examples(split, numbers[split]["examples"])[0].cpu()
            numbers[split] = dict(numbers[split]) | medium.in_other_units(numbers[split]["total"], x)
        x = self.run.examples("held_out", numbers["held_out"]["examples"])[0].cpu()
        numbers["ngrams"] = [
            {"order": order, "name": name.partition(" ")[0], "total": total} | medium.in_other_units(total, x)
            for order, (name, total) in enumerate(medium.baselines(x).items(), 1)
        ]
        numbers["exact"] = self.exact
        bars = [(found["name"], found["total"], None) for found in numbers["ngrams"]]
        for split, name in (("held_out", "this model, held out"), ("train", "this model, training texts")):
            bars.append((name, numbers[split]["total"], numbers[split]["standard_error"]))
        return numbers, figures.code_lengths(bars, medium.unit.name)

    # -- how good samples are, in other ways of drawing them ----------------------------------------------------------

    def measure(self, tokens: Tensor, labels: Tensor | None) -> dict[str, Any]:
        """Success and fluency and variety of some texts: what tells one way of drawing them from another."""
        medium, lengths = self.run.medium, lengths_of(tokens)
        found: dict[str, Any] = {"agreement": None, "agreement_error": None}
        if medium.judge is not None and labels is not None:
            judged, _ = medium.judge.predict([medium.words(row) for row in tokens])
            share = float((judged == labels).double().mean())
            found = {"agreement": share, "agreement_error": math.sqrt(share * (1 - share) / len(tokens))}
        pairs = bool((lengths >= 2).any())
        return found | {
            "perplexity": medium.ngrams[ORDER].perplexity(tokens, lengths),
            "distinct_2": distinct(tokens, lengths, 2) if pairs else math.nan,
        }

    def measure_real(self, n: int) -> dict[str, Any]:
        """The same of as many real held-out texts, or all of them."""
        part, chosen = self.run.data.held_out, self.run.chosen("held_out", n)
        labels = part.labels[chosen] if self.run.conditional else None
        return self.measure(part.tokens[chosen], labels) | {"texts": len(chosen)}

    def control(self) -> tuple[dict[str, Any] | None, str | None]:
        """Guidance and nucleus: how often a text is of its class, and how plausible its words are."""
        run = self.run
        if not run.conditional or run.judge is None:
            return None, None
        weights = GUIDANCE if run.recipe.training.label_drop > 0 else GUIDANCE[:1]
        ways = [(weight, nucleus) for nucleus in self.nuclei for weight in weights]
        cut: list[dict[str, Any]] = [{} if nucleus == 1 else {"nucleus": nucleus} for _, nucleus in ways]
        samplers = [run.sampler(guidance=weight, **how) for (weight, _), how in zip(ways, cut, strict=True)]
        n = self.count("control", sum(map(self.price, samplers)), least=32)
        progress, points = Progress("control"), []
        for done, ((weight, nucleus), sampler) in enumerate(zip(ways, samplers, strict=True), 1):
            found = self.measure(self._draw(sampler, n).tokens, run.labels_for(n))
            points.append({"guidance": weight, "nucleus": nucleus} | found)
            progress(done, len(ways))
        real = self.measure_real(n)
        return {"samples": n, "points": points, "real": real}, figures.tradeoff(points, real, ORDER)

    # -- lengths, and what is new -------------------------------------------------------------------------------------

    def lengths(self) -> tuple[dict[str, Any], str]:
        numbers: dict[str, Any] = {}
        for name, lengths in (("samples", lengths_of(self.drawn)), ("held_out", self.run.data.held_out.lengths)):
            shares = lengths.bincount(minlength=self.run.shape[0] + 1).double() / len(lengths)
            numbers[name] = {"texts": len(lengths), "mean": float(lengths.double().mean()), "shares": shares.numpy()}
        ours, real = numbers["samples"]["shares"], numbers["held_out"]["shares"]
        numbers["apart"] = float(np.abs(ours - real).sum() / 2)
        return numbers, figures.lengths_plot(ours, real)

    def neighbours(self) -> tuple[dict[str, Any], None]:
        """How much samples share with a training text, beside as many real held-out texts."""
        medium, train = self.run.medium, self.run.data.train
        nearest = Nearest(train.tokens, train.lengths)
        overlap, index = nearest(self.drawn, lengths_of(self.drawn))
        chosen = self.run.chosen("held_out", len(self.drawn))
        held_out = self.run.data.held_out
        of_real, _ = nearest(held_out.tokens[chosen], held_out.lengths[chosen])
        assert self.judged is not None
        pairs = [
            {
                "seed": seed,
                "text": medium.words(self.drawn[seed]),
                "train": int(index[seed]),
                "nearest": medium.words(train.tokens[index[seed]]),
                "overlap": float(overlap[seed]),
            }
            for seed in range(min(PAIRS, len(self.drawn)))
        ]
        copied, real = self.judged["copied"], self.judged["held_out"]["copied"]
        error = math.sqrt(sum(p * (1 - p) / n for p, n in ((copied, len(self.drawn)), (real, len(chosen)))))
        return {
            "samples": len(self.drawn),
            "held_out": len(chosen),
            "train": len(train),
            "copied": copied,
            "copied_of_real": real,
            "copies": bool(copied - real > 3 * error),
            "overlap": float(np.median(overlap)),
            "overlap_of_real": float(np.median(of_real)),
            "first": pairs,
        }, None


class DiscreteMeasurements(TextMeasurements):
    """Of a diffusion model of tokens: also its way from noise, and how many rounds it needs."""

    run: DiscreteRun
    sections = (
        "facts",
        "samples",
        "way",
        "loss",
        "nats_per_text",
        "control",
        "rounds",
        "lengths",
        "neighbours",
    )
    shares: ClassVar[Mapping[str, float]] = {"samples": 0.15, "bound": 0.15, "control": 0.4, "rounds": 0.3}
    exact = False

    def one_evaluation(self, samples: int) -> None:
        self._draw(self.run.sampler(steps=1, guidance=0.0, nucleus=1.0), samples)

    @property
    def masked(self) -> bool:
        return self.run.model.model.denoiser.process.mask is not None

    def way(self) -> tuple[dict[str, Any], list[int]]:
        """One sample from noise to words: seed 0, which `kuosan sample` draws first."""
        run, medium = self.run, self.run.medium
        seen: list[Tensor] = []
        labels = run.labels_for(1)
        drawn = run.draw(run.sampler(), [0], labels, watch=lambda _, x: seen.append(x[0].cpu()))
        n = int(lengths_of(drawn.tokens)[0])
        rows, widths = rows_of_way(medium, seen, n, torch.full_like(seen[0], run.levels) if self.masked else seen[0])
        numbers = {
            "seed": 0,
            "class": None if labels is None or not run.classes else run.classes[int(labels[0])],
            "masked": self.masked,
            "steps": len(seen),
            "evaluations": int(drawn.evaluations[0]),
            "tokens": n,
            "left_to_right": n + (n < run.shape[0]),
            "text": medium.words(drawn.tokens[0]),
            "most_tokens": MOST_TOKENS,
            "rows": rows,
        }
        return numbers, widths

    def rounds(self) -> tuple[dict[str, Any], list[str]]:
        """Samples in fewer and more rounds, by each rule."""
        run, settings = self.run, list(ROUNDS)
        rules = ("ancestral", "confident") if self.masked else ("ancestral",)
        extra = self.price(run.sampler()) / self.steps * len(rules)
        while len(settings) > 4 and 32 * sum(settings) * extra * self.cost > self.shares["rounds"] * self.budget:
            settings.pop()
        n = self.count("rounds", sum(settings) * extra, least=32)
        progress, labels = Progress("rounds"), run.labels_for(n)
        found: list[dict[str, Any]] = []
        for rule in rules:
            points = []
            for steps in settings:
                drawn = self._draw(run.sampler(solver={"kind": rule}, steps=steps), n)
                cost = float(drawn.evaluations.double().mean())
                points.append({"steps": steps, "evaluations": cost} | self.measure(drawn.tokens, labels))
                progress(len(found) * len(settings) + len(points), len(rules) * len(settings))
            found.append({"rule": rule, "points": points})
        real = self.measure_real(n)
        success = (
            figures.Panel("distinct_2", "distinct pairs of words", share=True)
            if real["agreement"] is None
            else figures.Panel("agreement", "judged as the class asked for", "agreement_error", share=True)
        )
        fluency = figures.Panel("perplexity", f"perplexity, by {ORDER}-grams of real texts")
        plots = [figures.rules_plot(panel, "rounds", found, real[panel.key]) for panel in (success, fluency)]
        return {"samples": n, "rules": found, "real": real}, plots


class AutoregressiveMeasurements(TextMeasurements):
    """Of a model that writes from left to right."""

    run: AutoregressiveRun
    exact = True

    @property
    def steps(self) -> float:
        """One for each token and one for the end."""
        return float(self.run.data.train.lengths.double().mean()) + 1

    def one_evaluation(self, samples: int) -> None:
        """The last token of the longest text."""
        known = torch.full((self.run.shape[0],), UNKNOWN)
        known[-1] = -1
        self._draw(replace(self.run.sampler(guidance=0.0, nucleus=1.0), known=known), samples)


def rows_of_way(
    medium: TextMedium, seen: Sequence[Tensor], n: int, before: Tensor
) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows that show how a text of n tokens came about, and how wide each of its places is, in letters.

    Args:
        seen: the tokens (L,) after each step.
        before: and before them.
    """
    steps = [i for i in range(len(seen)) if i == 0 or bool((seen[i] != seen[i - 1]).any())]
    steps = [steps[i] for i in np.unique(np.linspace(0, len(steps) - 1, MOST_ROWS).round().astype(int))]
    rows: list[dict[str, Any]] = []
    for i in steps:
        words = [medium.words(token) for token in seen[i][:n, None]]
        rows.append({"step": i + 1, "tokens": words, "new": (seen[i] != before)[:n].tolist()})
        before = seen[i]
    columns = list(zip(*(row["tokens"] for row in rows), strict=True))[:MOST_TOKENS]
    return rows, [max(map(_width, column)) for column in columns]


def _width(word: str) -> int:
    """Of a word in a font whose letters are all as wide: Chinese characters are two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in word)
