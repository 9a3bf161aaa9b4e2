"""A run: a folder that explains itself. Train one from a recipe; load one and sample, evaluate or report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kuosan
from kuosan import recipe as recipes
from kuosan.build import make_denoiser, make_objective, make_solver
from kuosan.denoiser import Denoiser
from kuosan.fetch import to_stderr
from kuosan.image import data as image_data
from kuosan.image.data import Examples, ImageData, to_levels, to_pixels
from kuosan.image.judge import Judge
from kuosan.image.pictures import good_scale, save_png, sheet
from kuosan.likelihood import Bound, elbo
from kuosan.plain import plain
from kuosan.process import Grid
from kuosan.progress import Progress
from kuosan.recipe import Recipe, RecipeError
from kuosan.seeds import stream
from kuosan.solvers import ClassifierFree, Model, Solver, Table, sample
from kuosan.training.checkpoint import CheckpointStore
from kuosan.training.ema import load_parameters
from kuosan.training.loop import Trainer
from kuosan.training.processes import Processes, joined


class RunError(ValueError):
    """A folder that is not a run, or a run that cannot do what was asked."""


def read_data(recipe: Recipe) -> ImageData:
    """The data of a recipe, fetched or read."""
    section = recipe.data
    if section.folder is not None:
        assert section.size is not None
        data = image_data.folder(Path(section.folder).expanduser(), section.size, section.channels, section.held_out)
    elif section.name in image_data.NAMED:
        data = image_data.NAMED[section.name]()
    else:
        raise RecipeError(f"data.name: must be one of {', '.join(image_data.NAMED)}, got {section.name!r}")
    if section.conditional and data.classes is None:
        raise RecipeError(
            f"data.conditional: {data.name} has no classes; make a sub-folder for each, or set it to false"
        )
    return data


class _Source:
    """A data set's training images as the training loop reads them."""

    def __init__(self, examples: Examples, level_count: int, conditional: bool):
        self._examples, self._count, self._conditional = examples, level_count, conditional
        self.shape = tuple(examples.levels.shape[1:])

    def __len__(self) -> int:
        return len(self._examples)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        labels = self._examples.labels
        x_0 = to_pixels(self._examples.levels[index], self._count)
        return x_0, labels[index] if self._conditional and labels is not None else None


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(recipe: Recipe, folder: str | Path, command: str | None = None) -> Run:
    """Train a recipe in a folder, or go on with the training that the folder holds.

    Args:
        command: the command line that this is, to be kept with the run.

    Raises:
        RecipeError: the recipe does not fit its data.
        RunError: the folder holds the run of another recipe.
        TrainingError: the loss is not finite.
        Interrupted: stopped by the user, state saved.
    """
    folder = Path(folder)
    recipe = _with_whole_path(recipe)
    with joined() as processes:
        data = read_data(recipe)
        torch.manual_seed(stream("weights", recipe.seed).initial_seed())
        denoiser = make_denoiser(recipe, data.shape, data.level_count, len(data.classes or ()))
        objective = make_objective(recipe)
        # what sampling and measuring will need is refused now, not after training
        make_solver(recipe.sampling.solver).table(denoiser.process, steps=recipe.sampling.steps)
        denoiser.process.grid(recipe.evaluation.bound_steps)
        run = Run(folder, recipe, _info(recipe, data, denoiser, processes, command))
        if processes.first:
            _begin(run)
        trainer = Trainer(
            denoiser=denoiser,
            objective=objective,
            source=_Source(data.train, data.level_count, recipe.data.conditional),
            settings=recipe.training,
            seed=recipe.seed,
            store=run.store,
            log=folder / "metrics.jsonl",
            processes=processes,
            on_sample=lambda step: run.sheet_while_training(denoiser, step),
            device=_device(),
        )
        trainer.train()
        return run


def _info(
    recipe: Recipe, data: ImageData, denoiser: Denoiser, processes: Processes, command: str | None
) -> dict[str, Any]:
    return {
        "shape": list(data.shape),
        "levels": data.level_count,
        "classes": list(data.classes) if data.classes else None,
        "data": {
            "name": data.name,
            "train": len(data.train),
            "held_out": len(data.held_out),
            "licence": data.licence,
            "source": data.source,
            "notes": list(data.notes),
            "sha256": _data_hash(data),
        },
        "parameters": sum(p.numel() for p in denoiser.network.parameters()),
        "seed": recipe.seed,
        "processes": processes.size,
        "versions": {"kuosan": kuosan.__version__, "torch": version("torch"), "python": platform.python_version()},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {_device().type}",
        "command": command,
    }


def _begin(run: Run) -> None:
    """Write what the run is; a folder that already holds training of this recipe on this data keeps what it has."""
    folder = run.folder
    if run.store.steps():
        before = load(folder)
        if before.recipe.fingerprint() != run.recipe.fingerprint():
            raise RunError(f"{folder} holds the run of another recipe; choose another --out, or delete that folder")
        if before.info["data"]["sha256"] != run.info["data"]["sha256"]:
            raise RunError(f"{folder} was trained on other data: what it reads has changed since; choose another --out")
        return
    if folder.exists() and any(folder.iterdir()) and not (folder / "recipe.toml").exists():
        raise RunError(f"{folder} is not empty and not a run; choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "recipe.toml", run.recipe.to_toml())
    _write(folder / "run.json", json.dumps(run.info, indent=2, ensure_ascii=False))


def _write(path: Path, text: str) -> None:
    """The whole file or nothing of it."""
    aside = path.with_suffix(".new")
    aside.write_text(text, "utf-8")
    aside.replace(path)


def _with_whole_path(recipe: Recipe) -> Recipe:
    """The recipe with its folder of data as a path that is right from anywhere."""
    if recipe.data.folder is None:
        return recipe
    whole = str(Path(recipe.data.folder).expanduser().resolve())
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"folder": whole})})


def _data_hash(data: ImageData) -> str:
    digest = hashlib.sha256(repr((data.level_count, data.classes)).encode())
    for part in (data.train, data.held_out):
        for tensor in (part.levels, part.labels):
            digest.update(b"" if tensor is None else tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def load(folder: str | Path) -> Run:
    """A run from its folder.

    Raises:
        RunError: the folder is not a run.
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
    return Run(folder, recipes.read(folder / "recipe.toml"), info)


class Run:
    """A trained (or half-trained) model with everything that is needed to use it; made by :func:`load`."""

    def __init__(self, folder: Path, recipe: Recipe, info: dict[str, Any]):
        self.folder, self.recipe, self.info = folder, recipe, info
        self.store = CheckpointStore(folder / "checkpoints", recipe.fingerprint())

    # -- what it holds ------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.info["shape"])

    @property
    def levels(self) -> int:
        return self.info["levels"]

    @property
    def classes(self) -> tuple[str, ...] | None:
        return tuple(self.info["classes"]) if self.info["classes"] else None

    @property
    def conditional(self) -> bool:
        return self.recipe.data.conditional

    @cached_property
    def data(self) -> ImageData:
        """The data that it was trained on, read again."""
        return read_data(self.recipe)

    @cached_property
    def _judged_by(self) -> tuple[Judge | None, str]:
        kept = self.folder / "judge"
        if kept.is_dir():
            return Judge.load(kept), ""
        if self.classes is None:
            return None, "the images have no classes, and the judge is a classifier"
        try:
            to_stderr("training the judge of real images ...")
            judge = Judge.train(self.data)
        except (ValueError, ImportError) as error:  # a class of too few images; scikit-learn not installed
            return None, str(error)
        judge.save(kept)
        return judge, ""

    @property
    def judge(self) -> Judge | None:
        """The classifier of real images that judges samples; None where there cannot be one."""
        return self._judged_by[0]

    @property
    def why_no_judge(self) -> str:
        """Why there is no judge, in words; empty if there is one."""
        return self._judged_by[1]

    @cached_property
    def _trained(self) -> tuple[Denoiser, int, float]:
        checkpoint = self.store.load(groups=("weights", "ema"))
        if checkpoint is None:
            raise RunError(f"{self.folder} has no checkpoint yet: `kuosan train` goes on where it stopped")
        denoiser = make_denoiser(self.recipe, self.shape, self.levels, len(self.classes or ()))
        denoiser.network.load_state_dict(checkpoint.tensors["weights"])
        load_parameters(denoiser.network, checkpoint.tensors["ema"])
        denoiser.eval().to(_device())
        for p in denoiser.parameters():
            p.requires_grad_(False)
        return denoiser, checkpoint.step, checkpoint.state["seconds"]

    @property
    def denoiser(self) -> Denoiser:
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

    # -- sampling -----------------------------------------------------------------------------------------------------

    def class_of(self, name: str | int) -> int:
        """The index of a class by name or number.

        Raises:
            RunError: there is none such, or the model is unconditional.
        """
        if not self.conditional or self.classes is None:
            raise RunError(f"{self.folder} was trained without classes: none can be asked for")
        if str(name) in self.classes:
            return self.classes.index(str(name))
        raise RunError(f"there is no class {name!r}; there are {', '.join(self.classes)}")

    def model(self, guidance: float | None = None) -> Model:
        """The denoiser, guided if the weight is not 0 (default: the recipe's)."""
        guidance = self.recipe.sampling.guidance if guidance is None else guidance
        if guidance == 0:
            return self.denoiser
        if not self.conditional:
            raise RunError(f"{self.folder} was trained without classes: there is nothing to guide towards")
        return ClassifierFree(self.denoiser, guidance)

    def table(self, solver: Solver | None = None, steps: int | None = None, grid: Grid | None = None) -> Table:
        """The sampler as a table; what is not given is the recipe's."""
        solver = solver or make_solver(self.recipe.sampling.solver)
        if grid is None:
            return solver.table(self.denoiser.process, steps=self.recipe.sampling.steps if steps is None else steps)
        return solver.table(self.denoiser.process, grid)

    def labels_for(self, n: int) -> Tensor | None:
        """Classes in turn for n samples; None for an unconditional model."""
        return torch.arange(n) % len(self.classes) if self.conditional and self.classes else None

    def sample(
        self,
        count: int | None = None,
        *,
        seeds: Iterable[int] | None = None,
        labels: Tensor | None = None,
        solver: Solver | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        batch_size: int = 256,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Samples as levels, uint8 (N, C, H, W); number k depends on seed k and label k only.

        Args:
            count: how many; by default as many as there are seeds.
            seeds: default 0, 1, 2, ...
            labels: class of each, (N,); by default all classes in turn.
            solver, steps, guidance: default the recipe's.

        Raises:
            ValueError: no samples, a count and seeds that differ, repeated seeds, steps out of range.
        """
        if count is not None and count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if seeds is None and count is None:
            raise ValueError("give count, or seeds")
        seeds = list(range(count or 0) if seeds is None else seeds)
        if count is not None and count != len(seeds):
            raise ValueError(f"count is {count}, but there are {len(seeds)} seeds: one for each sample")
        labels = self.labels_for(len(seeds)) if labels is None else labels
        pixels = sample(
            self.model(guidance),
            self.shape,
            seeds=seeds,
            table=self.table(solver, steps),
            condition=labels,
            transform=self.transform,
            batch_size=batch_size,
            device=_device(),
            progress=progress,
        )
        return to_levels(pixels, self.levels)

    @property
    def transform(self) -> Callable[[Tensor], Tensor] | None:
        """What sampling does to every x0-hat."""
        return (lambda x: x.clamp(-1, 1)) if self.recipe.sampling.clip else None

    def sheet_while_training(self, denoiser: Denoiser, step: int) -> None:
        """64 samples of a model in training, as samples/step-....png; always the same seeds."""
        columns = len(self.classes) if self.conditional and self.classes else 8
        n = columns * (8 if columns <= 16 else 2)
        pixels = sample(
            denoiser,
            self.shape,
            seeds=range(n),
            table=make_solver(self.recipe.sampling.solver).table(
                denoiser.process, steps=min(20, self.recipe.sampling.steps)
            ),
            condition=self.labels_for(n),
            transform=self.transform,
            device=_device(),
        )
        picture = sheet(to_levels(pixels, self.levels), self.levels, columns, good_scale(self.shape))
        notes = {"seeds": f"0-{n - 1}", "step": step}
        save_png(picture, self.folder / "samples" / f"step-{step:08d}.png", notes)

    # -- measuring ----------------------------------------------------------------------------------------------------

    def bound(self, split: str = "held_out", examples: int | None = None, **settings: Any) -> Bound:
        """The bound on a split, "held_out" or "train", with the recipe's settings unless given: :func:`kuosan.elbo`."""
        section = self.recipe.evaluation
        part = getattr(self.data, split)
        n = min(len(part), section.examples if examples is None else examples)
        chosen = torch.randperm(len(part), generator=stream("evaluation"))[:n] if n < len(part) else torch.arange(n)
        options: dict[str, Any] = {"variance": section.variance, "terms": section.terms, "draws": section.draws}
        options |= settings
        if "grid" not in options:
            options.setdefault("steps", section.bound_steps)
        condition = part.labels[chosen].to(_device()) if self.conditional else None
        x_0 = to_pixels(part.levels[chosen], self.levels)
        return elbo(self.denoiser, x_0.to(_device()), condition, **options)

    def evaluate(self, guidance: float | None = None) -> dict[str, Any]:
        """The bound on held-out data and the quality of samples; written to evaluation.json.

        Args:
            guidance: of the samples; default the recipe's. The bound is the model's own, without guidance.

        Returns:
            A dictionary for JSON with ``bits_per_dim`` (total, standard_error, and each term) and ``quality`` (None for
            data without classes).
        """
        self.model(guidance)  # says now what is wrong with the weight, not after the bound
        section, bound = self.recipe.evaluation, self.bound(progress=Progress("bound: evaluation"))
        result: dict[str, Any] = {
            "run": str(self.folder),
            "step": self.step,
            "bits_per_dim": dataclasses.asdict(bound.bits_per_dim())
            | {
                "quantity": f"discrete bound on log2 P(x) over {self.levels} levels, per dimension",
                "split": "held_out",
                "examples": bound.total.numel(),
                "steps": len(bound.times),
                "variance": section.variance,
                "terms": section.terms,
                "draws": bound.draws,
                "evaluations_per_example": bound.evaluations,
            },
            "quality": self.quality(section.samples, guidance=guidance),
        }
        result = plain(result)
        _write(self.folder / "evaluation.json", json.dumps(result, indent=2, ensure_ascii=False))
        return result

    def quality(self, n: int, **settings: Any) -> Mapping[str, Any] | None:
        """What the judge says of n samples (seeds 0 to n - 1), beside what it says of real held-out images."""
        if self.judge is None:
            return None
        levels = self.sample(n, progress=Progress("samples"), **settings)
        judged = dataclasses.asdict(self.judge.quality(levels, self.labels_for(n)))
        guidance = settings.get("guidance")
        judged["guidance"] = self.recipe.sampling.guidance if guidance is None else guidance
        return judged | {"held_out": dataclasses.asdict(self.judge.reference)}
