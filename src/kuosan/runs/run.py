"""A run: a folder that explains itself. What every kind of model has in common: its data, samples and bound."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from kuosan import recipe as recipes
from kuosan.bound import Bound, Likelihood
from kuosan.build import make_model
from kuosan.chain import Chain
from kuosan.medium import Medium, Unit, medium_of
from kuosan.plain import plain
from kuosan.progress import Progress
from kuosan.recipe import Recipe
from kuosan.seeds import stream
from kuosan.solvers import check_seeds
from kuosan.training.checkpoint import CheckpointStore
from kuosan.training.ema import load_parameters

#: Of log P(x).
MEASURES = ("bound", "importance", "ode")
SPLITS = ("held_out", "train")
#: Kinds of model, in words.
FAMILIES = {
    "diffusion": "a diffusion model",
    "vocoder": "a vocoder",
    "tts": "a model of text to speech",
    "autoencoder": "an autoencoder",
    "latent": "a latent diffusion model",
    "embedding": "a diffusion model of words as points",
    "tokens": "a diffusion model of tokens",
    "autoregressive": "an autoregressive model",
}


class RunError(ValueError):
    """A folder that is not a run, or a run that cannot do what was asked."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def write(path: Path, text: str) -> None:
    """The whole file or nothing of it."""
    aside = path.with_suffix(".new")
    aside.write_text(text, "utf-8")
    aside.replace(path)


def write_examples(path: Path, names: Sequence[str], found: Mapping[str, Bound | Likelihood], unit: Unit) -> None:
    """One line for each example: its name, and of each measure log p in nats, its noise, and the cost in a unit."""
    columns = ["example", *(f"{m}_{what}" for m in found for what in ("nats", "error", unit.key))]
    lines = [",".join(columns)]
    for i, name in enumerate(names):
        quoted = '"' + name.replace('"', '""') + '"' if set(name) & set(',"') else name
        values = [
            number
            for one in found.values()
            for number in (
                float(one.nats[i]),
                float(one.example_error[i]),
                float(-one.nats[i] * unit.of_bits(one.dimensions) / (math.log(2) * one.dimensions)),
            )
        ]
        lines.append(",".join([quoted, *(f"{value:.8g}" for value in values)]))
    write(path, "\n".join(lines) + "\n")


class Sampling(Protocol):
    """A model made ready to be sampled in one way."""

    @property
    def how(self) -> dict[str, Any]:
        """The way in words and numbers, for records."""
        ...


class Run(ABC):
    """A trained (or half-trained) model with everything that is needed to use it; made by :func:`kuosan.load`."""

    #: Of which kinds of model: of :attr:`Recipe.family`.
    families: ClassVar[tuple[str, ...]] = ()
    #: Whether a probability-flow ODE gives a likelihood of its data.
    has_ode: ClassVar[bool] = False
    #: What `evaluate` measures where nobody says, beside the quality of samples.
    usual: ClassVar[tuple[str, ...]] = ("bound",)
    #: Samples that are drawn together.
    at_once: ClassVar[int] = 256

    def __init__(self, folder: Path, recipe: Recipe, info: dict[str, Any], data: Any = None):
        self.folder, self.recipe, self.info = folder, recipe, info
        self.medium: Medium = medium_of(recipe.data)(recipe.data, info, folder, data)
        self.store = CheckpointStore(folder / "checkpoints", recipe.fingerprint())

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """The run of a folder, of the kind that this class is of.

        Raises:
            RunError: the folder is not a run, or one of another kind.
        """
        folder = Path(folder)
        for name in ("recipe.toml", "run.json"):
            if not (folder / name).is_file():
                what = "there is no such folder" if not folder.is_dir() else f"it has no {name}"
                raise RunError(f"{folder} is not a run: {what}. `kuosan train` makes one")
        try:
            info = json.loads((folder / "run.json").read_text("utf-8"))
            missing = {"shape", "levels", "classes", "data", "parameters", "seed", "versions"} - info.keys()
        except (ValueError, AttributeError) as error:
            raise RunError(f"{folder / 'run.json'} is damaged: {error}") from None
        if missing:
            raise RunError(f"{folder / 'run.json'} is damaged: it lacks {', '.join(sorted(missing))}")
        recipe = recipes.read(folder / "recipe.toml")
        if recipe.family not in cls.families:
            raise RunError(f"{folder} is the run of {FAMILIES[recipe.family]}, which has no such thing")
        return cls(folder, recipe, info)

    # -- what it holds ------------------------------------------------------------------------------------------------

    @property
    def kind(self) -> str:
        """Of model, in words."""
        return FAMILIES[self.recipe.family]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.medium.shape

    @property
    def levels(self) -> int:
        return self.medium.levels

    @property
    def classes(self) -> tuple[str, ...] | None:
        told = self.info["classes"] and self.recipe.data.captions is None  # a caption is told in the place of a class
        return tuple(self.info["classes"]) if told else None

    @property
    def conditional(self) -> bool:
        return self.recipe.data.told

    @property
    def told(self) -> str:
        """What a conditional model is told, in a word."""
        return "class" if self.recipe.data.captions is None else "caption"

    @property
    def data(self) -> Any:
        """The data that it was trained on, read again."""
        return self.medium.data

    @property
    def judge(self) -> Any:
        """The judge of samples, trained on real data; None where there cannot be one."""
        return self.medium.judge

    @property
    def why_no_judge(self) -> str:
        """Why there is no judge, in words; empty if there is one."""
        return self.medium.why_no_judge

    @cached_property
    def _trained(self) -> tuple[nn.Module, int, float]:
        checkpoint = self.store.load(groups=("weights", "ema"))
        if checkpoint is None:
            raise RunError(f"{self.folder} has no checkpoint yet: `kuosan train` goes on where it stopped")
        model = make_model(self.recipe, self.shape, self.levels, len(self.classes or ()))
        model.load_state_dict(checkpoint.tensors["weights"])
        load_parameters(model, checkpoint.tensors["ema"])
        model.eval().to(device())
        for p in model.parameters():
            p.requires_grad_(False)
        return model, checkpoint.step, checkpoint.state["seconds"]

    @property
    def model(self) -> Any:
        """The model with its averaged weights, ready to use."""
        return self._trained[0]

    @property
    def step(self) -> int:
        """How many training steps its weights have had."""
        return self._trained[1]

    @property
    def seconds(self) -> float:
        """How long it was trained, in seconds."""
        return self._trained[2]

    def log(self, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
        """What training wrote down line by line, of each step; nothing where there is no such file."""
        path, found = self.folder / file, []
        for line in path.read_text("utf-8").splitlines() if path.is_file() else []:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                break  # the last line of a killed run
        return found

    # -- sampling -----------------------------------------------------------------------------------------------------

    def class_of(self, name: str | int) -> int:
        """The index of a class by name or number.

        Raises:
            RunError: there is none such, or the model is unconditional.
        """
        if not self.conditional or self.classes is None:
            instead = "; give a prompt" if self.conditional else ""
            raise RunError(f"{self.folder} was trained without classes: none can be asked for{instead}")
        if str(name) in self.classes:
            return self.classes.index(str(name))
        raise RunError(f"there is no class {name!r}; there are {', '.join(self.classes)}")

    def labels_for(self, n: int) -> Tensor | None:
        """Classes in turn for n samples; None for an unconditional model."""
        return torch.arange(n) % len(self.classes) if self.conditional and self.classes else None

    def labels_of(self, sampler: Any, n: int) -> Tensor | None:
        """What n samples are told where nobody says: what the sampler was made for, or else :meth:`labels_for`."""
        return self.labels_for(n)

    def usual_count(self, sampler: Any) -> int:
        """How many samples there are where nobody says."""
        return 16

    def share(self, sampler: Any, places: Sequence[int]) -> Any:
        """The sampler of one process among several, which draws the samples of these places."""
        return sampler

    @abstractmethod
    def sampler(self, **settings: Any) -> Sampling:
        """The model with all else that sampling takes; what is not given is the recipe's."""

    @abstractmethod
    def batches(
        self, sampler: Any, seeds: Sequence[int], labels: Tensor | None = None, batch_size: int | None = None
    ) -> Iterator[Tensor]:
        """The samples of :meth:`sample` batch by batch, as they are done.

        Args:
            batch_size: default ``at_once``.
        """

    def together(self, batch_size: int | None) -> int:
        """How many samples are drawn together: so many, or ``at_once``. Raises ValueError for less than 1."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        return self.at_once if batch_size is None else batch_size

    def prepare(self, model: Any) -> None:
        """What a model has to be told of the training data before it is trained."""

    @abstractmethod
    def check(self, model: Any) -> None:
        """Refuses, before training, what sampling and measuring will not be able to do."""

    @abstractmethod
    def draw_while_training(self, model: Any, seeds: Sequence[int]) -> Tensor:
        """Samples of a model in training, as a model draws them, cheaply."""

    def sheet_while_training(self, model: nn.Module, step: int) -> None:
        """64 samples of a model in training, in samples/step-...; always the same seeds."""
        columns = len(self.classes) if self.conditional and self.classes else 8
        n = columns * (8 if columns <= 16 else 2)
        samples = self.medium.outputs(self.draw_while_training(model, range(n)))
        notes = {"seeds": f"0-{n - 1}", "step": step}
        self.medium.sheet(samples, self.folder / "samples" / f"step-{step:08d}", columns, notes)

    def names(self, sampler: Any, seeds: Sequence[int], labels: Tensor | None) -> list[str]:
        """Of the files of samples."""
        said = ["".join(f"-{words}" for words in one.values()) for one in self.asked(sampler, labels, len(seeds))]
        plain = [re.sub(r"[^\w.-]+", "-", words).rstrip("-")[:60] for words in said]
        return [f"seed-{seed:06d}{name}" for seed, name in zip(seeds, plain, strict=True)]

    def asked(self, sampler: Any, labels: Tensor | None, n: int) -> list[dict[str, str]]:
        """What each of n samples was asked to be, for records: its class, or nothing."""
        if not self.classes or labels is None:
            return [{} for _ in range(n)]
        return [{"class": self.classes[int(label)]} for label in labels]

    def columns(self, sampler: Any, labels: Tensor | None) -> int | None:
        """Of a page of samples: one for each class; None: as many as look well."""
        return len(self.classes) if self.conditional and self.classes and labels is not None else None

    def sheet(
        self, sampler: Any, samples: Sequence[Path], columns: int | None, path: Path, notes: Mapping[str, Any]
    ) -> Path:
        """The files of samples as one page to look at."""
        return self.medium.sheet(samples, path, columns, notes)

    def sample(
        self,
        count: int | None = None,
        *,
        seeds: Iterable[int] | None = None,
        labels: Tensor | None = None,
        batch_size: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        **settings: Any,
    ) -> Tensor:
        """Samples: levels of images, uint8 (N, C, H, W), or tokens of texts, int64 (N, L).

        Number k depends on seed k and label k only.

        Args:
            count: how many; by default as many as there are seeds.
            seeds: default 0, 1, 2, ...
            labels: class of each, (N,), or tokens of its caption, (N, L); by default all classes, or kept captions, in
                turn.
            batch_size: samples at once; default ``at_once``.
            progress: called with (done, all) after each batch.
            settings: solver, steps, grid, guidance, ...: of :meth:`sampler`.

        Raises:
            ValueError: no samples, a count and seeds that differ, repeated seeds, an impossible setting.
        """
        if count is not None and count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if seeds is None and count is None:
            raise ValueError("give count, or seeds")
        seeds = list(range(count or 0) if seeds is None else seeds)
        if count is not None and count != len(seeds):
            raise ValueError(f"count is {count}, but there are {len(seeds)} seeds: one for each sample")
        check_seeds(seeds)
        done, batches = 0, []
        for batch in self.batches(self.sampler(**settings), seeds, labels, batch_size):
            batches.append(batch)
            done += len(batch)
            if progress is not None:
                progress(done, len(seeds))
        return torch.cat(batches)

    # -- measuring ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def chain(self, **settings: Any) -> tuple[Chain, dict[str, Any]]:
        """The model as a ladder, and in words how; settings of its own kind that are None are the recipe's."""

    def chosen(self, split: str = "held_out", most: int | None = None) -> Tensor:
        """Which examples of a split are measured, at most so many; always the same ones."""
        length = self.medium.size(getattr(self.data, split))
        n = min(length, self.recipe.evaluation.examples if most is None else most)
        return torch.randperm(length, generator=stream("evaluation"))[:n] if n < length else torch.arange(n)

    def examples(self, split: str = "held_out", most: int | None = None) -> tuple[Tensor, Tensor | None]:
        """x_0 and conditions of the examples of :meth:`chosen`, of the split "held_out" or "train"."""
        part, chosen = getattr(self.data, split), self.chosen(split, most)
        x_0, condition = self.medium.batch(part, chosen)
        return x_0.to(device()), None if condition is None else condition.to(device())

    def bound(self, split: str = "held_out", examples: int | None = None, **settings: Any) -> Bound:
        """The bound on a split, "held_out" or "train", with the recipe's settings unless given.

        Args:
            settings: of :meth:`chain` and of :meth:`kuosan.Chain.elbo`.
        """
        of_elbo = ("estimator", "terms", "analytic", "draws", "seed", "batch_size", "progress")
        how = {name: settings.pop(name) for name in of_elbo if settings.get(name) is not None}
        chain, _ = self.chain(**settings)
        return chain.elbo(*self.examples(split, examples), **self.elbo_settings(chain) | how)

    @abstractmethod
    def elbo_settings(self, chain: Chain) -> dict[str, Any]:
        """How the recipe wants the bound of a chain to be estimated."""

    def reconstruction(self, x: Tensor) -> dict[str, float] | None:
        """How well codes say examples, of a model that has codes: of an autoencoder of images; else None."""
        return None

    def by_ode(
        self,
        x: Tensor,
        condition: Tensor | None,
        draws: int = 2,
        *,
        tolerance: float = 1e-5,
        divergence: str = "rademacher",
        dequantisation: str = "noise",
    ) -> Likelihood:
        """A bound on log P(x) by the probability-flow ODE, from the prior at its end: of diffusion models."""
        raise RunError(f"{self.folder} has no probability-flow ODE that is of its data: it is {self.kind}")

    def likelihoods(
        self,
        x: Tensor,
        condition: Tensor | None,
        measures: Sequence[str],
        *,
        importance: int = 64,
        draws: int | None = None,
        ode: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> dict[str, Bound | Likelihood]:
        """Each measure of log P(x): "bound", "importance" (weighted, of so many paths), "ode".

        Args:
            draws: repeats of the bound and of the ODE's; default the recipe's, and 2: one would not tell its noise.
            ode: settings of :meth:`by_ode`.
            settings: of :meth:`chain`.
        """
        if ode and "ode" not in measures:
            raise ValueError("ode= is how the ODE is solved, and it is not among the measures")
        if "ode" in measures and not self.has_ode:
            raise RunError(f"{self.folder} has no probability-flow ODE that is of its data: it is {self.kind}")
        chain = self.chain(**settings)[0] if set(measures) - {"ode"} else None
        more = {} if draws is None else {"draws": draws}
        found: dict[str, Bound | Likelihood] = {}
        for name in measures:
            if name not in MEASURES:
                raise ValueError(f"a measure is one of {', '.join(MEASURES)}, got {name!r}")
            if name == "ode":
                found[name] = self.by_ode(x, condition, 2 if draws is None else draws, **(ode or {}))
                continue
            assert chain is not None
            if name == "bound":
                progress = Progress("bound: terms")
                found[name] = chain.elbo(x, condition, **self.elbo_settings(chain) | more, progress=progress)
            else:
                progress = Progress("importance: paths")
                found[name] = chain.importance_weighted(x, condition, samples=importance, progress=progress)
        return found

    def evaluate(
        self,
        measures: Sequence[str] | None = None,
        *,
        quality: bool = True,
        split: str = "held_out",
        files: Sequence[str | Path] | None = None,
        examples: int | None = None,
        importance: int = 64,
        draws: int | None = None,
        ode: Mapping[str, Any] | None = None,
        guidance: float | None = None,
        unconditional: bool = False,
        **settings: Any,
    ) -> dict[str, Any]:
        """Measures of log P(x), in the unit of the medium and for each example, and the quality of samples.

        Written to evaluation.json (of held-out data) and evaluation.csv, or to files named after the split or "files".

        Args:
            measures: of "bound", "importance" and "ode"; default the bound, and of speech none.
            quality: of samples too.
            split: "held_out" or "train".
            files: your own (pictures, or folders of them; files of texts), in the place of a split.
            examples: at most so many of a split; default the recipe's.
            importance, draws, ode, settings: of :meth:`likelihoods`. Guidance, solvers and tables have no part in it:
                the likelihood is the model's, not a sampler's.
            guidance: of the samples; default the recipe's.
            unconditional: a conditional model is not told the classes of the examples.

        Returns:
            A dictionary for JSON: ``likelihoods``, each measure by name; ``bits_per_dim`` of images, ``nats_per_text``
            of texts, which is the bound with each of its terms; ``quality`` (None for images without classes);
            ``examples``, the file with one line for each.
        """
        measures = self.usual if measures is None else measures
        if not measures and (settings or ode or unconditional):
            raise RunError(f"{', '.join(settings) or 'that'} is of a likelihood, and none is measured: ask for one")
        asked = {} if guidance is None else {"guidance": guidance}
        self.sampler(**asked)  # says now what is wrong with the weight, not after the bound
        for name, value in (("examples", examples), ("importance", importance), ("draws", draws)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        names: list[str]
        if files is None:
            if split not in SPLITS:
                raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
            x, condition = self.examples(split, examples)
            names, where = [str(i) for i in self.chosen(split, examples).tolist()], split
            if unconditional:
                if not self.conditional or self.recipe.training.label_drop == 0:
                    raise RunError(f"{self.folder} never trained both with and without a {self.told}")
                condition = None
        else:
            if self.conditional and self.recipe.training.label_drop == 0:
                raise RunError(
                    f"{self.folder} never trained without a {self.told}, and these {self.medium.many} have none"
                )
            names, x = self.medium.read_files(files)
            x, condition, where = x.to(device()), None, "files"
        found = self.likelihoods(x, condition, measures, importance=importance, draws=draws, ode=ode, **settings)
        name = "evaluation" + ("" if where == "held_out" else f"-{where}") + ("-unconditional" if unconditional else "")
        path = self.folder / f"{name}.json"
        result: dict[str, Any] = {"run": str(self.folder), "step": self.step, "split": where}
        result["scored"] = len(x) if found else 0
        if self.conditional and condition is None:
            result["condition"] = f"told no {self.told}"
        chain, how = self.chain(**settings) if "bound" in found or "importance" in found else (None, {})
        how = how if chain is None else how | {"terms": self.elbo_settings(chain).get("terms", "shared")}
        result["likelihoods"] = {name: self._in_unit(value, how, x) for name, value in found.items()}
        result["baselines"] = self.medium.baselines(x.cpu())
        unit = self.medium.unit
        result["unit"] = {"name": unit.name, "key": unit.key}
        if "bound" in found:
            bound = found["bound"]
            assert isinstance(bound, Bound)
            scale, terms = unit.of_bits(bound.dimensions), dataclasses.asdict(bound.bits_per_dim())
            result[unit.key] = {name: scale * v for name, v in terms.items()} | result["likelihoods"]["bound"]
        if "bound" in found and (codes := self.reconstruction(x)) is not None:
            result["reconstruction"] = codes
        if quality:
            result["quality"] = self.quality(self.recipe.evaluation.samples, **asked)
        if found:
            result["examples"] = str(path.with_suffix(".csv"))
            write_examples(path.with_suffix(".csv"), names, found, unit)
        result = plain(result | {"file": str(path)})
        write(path, json.dumps(result, indent=2, ensure_ascii=False))
        return result

    def _in_unit(self, value: Bound | Likelihood, how: dict[str, Any], x: Tensor) -> dict[str, Any]:
        if isinstance(value, Bound):
            bits = value.bits_per_dim()
            total, error, monte_carlo = bits.total, bits.standard_error, bits.monte_carlo_error
            what = f"log P(x) over {self.levels} levels" if value.discrete else "log p(x), a density"
            quantity = f"bound on {what}, in {self.medium.unit.name}"
            how = how | {"draws": value.draws}
        else:
            total, error, monte_carlo = value.bits_per_dim, value.standard_error, value.monte_carlo_error
            quantity = value.quantity
            how = {key: said for key, said in how.items() if key != "terms"}
        scale = self.medium.unit.of_bits(value.dimensions)
        return how | {
            "total": scale * total,
            "standard_error": scale * error,
            "monte_carlo_error": scale * monte_carlo,
            "quantity": quantity,
            **self.medium.in_other_units(scale * total, x.cpu()),
            "examples": len(value.nats),
            "evaluations_per_example": value.evaluations,
        }

    def quality(self, n: int, **settings: Any) -> Mapping[str, Any] | None:
        """What can be said of n samples (seeds 0 to n - 1), beside the same of real held-out examples."""
        samples = self.sample(n, progress=Progress("samples"), **settings)
        judged = self.medium.quality(samples, self.labels_for(n))
        if judged is None:
            return None
        return judged | {"guidance": settings.get("guidance", self.recipe.sampling.guidance)}
