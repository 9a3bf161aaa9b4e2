"""A run: a folder that explains itself. Load one and sample, tune, evaluate or report."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kuosan import recipe as recipes
from kuosan.bound import Bound
from kuosan.build import make_denoiser, make_solver
from kuosan.denoiser import Denoiser
from kuosan.diffusion import DiffusionChain
from kuosan.fetch import to_stderr
from kuosan.image import data as image_data
from kuosan.image.data import ImageData, to_levels, to_pixels
from kuosan.image.judge import Judge
from kuosan.image.pictures import good_scale, save_png, sheet
from kuosan.optimal import measure, weights_fingerprint
from kuosan.plain import plain
from kuosan.process import Grid
from kuosan.progress import Progress
from kuosan.recipe import Recipe, RecipeError
from kuosan.sampler import Sampler, Settings, TunedTables, sampler
from kuosan.seeds import stream
from kuosan.solvers import Solver, Tuned, UniformTime, sample, sample_batches, tune
from kuosan.solvers.noise import measured
from kuosan.training.checkpoint import CheckpointStore
from kuosan.training.ema import load_parameters
from kuosan.trajectory import trajectory
from kuosan.variance import MEASURED, Choice, OptimalVariance, VarianceError


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


def unmeasured_solver(recipe: Recipe) -> Solver:
    """The recipe's solver; a variance that is measured of the trained model is beta-tilde until then."""
    kind = recipe.sampling.solver
    solver = make_solver({"kind": "auto"} if kind.get("kind") == "tuned" else kind)
    return measured(solver, lambda name: "beta_tilde")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def write(path: Path, text: str) -> None:
    """The whole file or nothing of it."""
    aside = path.with_suffix(".new")
    aside.write_text(text, "utf-8")
    aside.replace(path)


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
        denoiser.eval().to(device())
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

    # -- the optimal reverse variance ---------------------------------------------------------------------------------

    @cached_property
    def optimal_variance(self) -> OptimalVariance:
        """The best reverse variance that does not depend on x_t, for each coordinate; ``.scalar`` for all of them.

        Measured once, on training data and without guidance, and kept in variance.safetensors; measured again if the
        weights are others.
        """
        path, denoiser = self.folder / "variance.safetensors", self.denoiser
        if path.is_file():
            try:
                kept = OptimalVariance.load(path, denoiser.process)
            except VarianceError as error:
                to_stderr(f"{error}; measuring again")
            else:
                if kept.fingerprint == weights_fingerprint(denoiser):
                    return kept
                to_stderr(f"{path} was measured of other weights; measuring again")
        data = self.data.train
        x_0 = to_pixels(data.levels, self.levels).to(device())
        condition = data.labels.to(device()) if self.conditional and data.labels is not None else None
        draws = 2048 if x_0[0].numel() <= 256 else 512  # the mean over many coordinates needs fewer
        found = measure(denoiser, x_0, condition, draws=draws, progress=Progress("optimal variance: times"))
        found.save(path)
        return found

    def variance(self, choice: Choice) -> Choice:
        """A choice of reverse variance; what has to be measured, "optimal" or "optimal_per_dimension", measured."""
        if not isinstance(choice, str) or choice not in MEASURED:
            return choice
        return self.optimal_variance.scalar if choice == "optimal" else self.optimal_variance

    def trajectory(self, steps: int, variance: str = "optimal") -> Grid:
        """The best times for so many steps, by the bound: :func:`kuosan.trajectory.trajectory`.

        Args:
            variance: of the chain: "optimal", "optimal_per_dimension", "beta" or "beta_tilde".
        """
        optimal = self.optimal_variance if variance == "optimal_per_dimension" else self.optimal_variance.scalar
        rule = "optimal" if variance in MEASURED else variance
        return trajectory(self.denoiser.process, optimal, steps, variance=rule)

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

    @property
    def tuned(self) -> TunedTables:
        """The tables that were tuned to this run."""
        return TunedTables(self.folder)

    def sampler(self, **settings: Any) -> Sampler:
        """The model, table and all else that sampling takes; what is not given is the recipe's.

        Args:
            settings: keys of the recipe's section ``sampling``; solver, grid and corrector may be objects too. The
                solver {"kind": "tuned"} is the table that `kuosan tune` made; the grid {"kind": "trajectory"} is that
                of the best bound. Beside them: weak, another run or its folder, that guidance leads away from; known,
                a picture or its pixels (C, H, W) in [-1, 1], and mask, bool and True where it is held, or a picture
                that is white where it is drawn anew; corrections, of inpainting.

        Raises:
            ValueError: an unknown setting or an impossible value.
        """
        grid = settings.get("grid") or (None if settings.get("solver") else self.recipe.sampling.grid)
        if isinstance(grid, Mapping) and grid.get("kind") == "trajectory":
            if len(grid) > 1:
                raise RecipeError(f"sampling.grid: trajectory has no settings, got {', '.join(grid.keys() - {'kind'})}")
            settings["grid"] = self.trajectory(settings.get("steps") or self.recipe.sampling.steps)
        chosen = self._settings(settings)
        if chosen.solver is not None:
            chosen = dataclasses.replace(chosen, solver=measured(chosen.solver, self.variance))
        found = sampler(chosen, self.denoiser, self.conditional, self.tuned, to_stderr)
        for name in ("weak", "known", "mask"):  # of files and folders, the names too
            given = settings.get(name)
            if isinstance(given, Run | str | Path):
                found.how[name] = str(given.folder if isinstance(given, Run) else given)
        return found

    def _settings(self, given: Mapping[str, Any]) -> Settings:
        """The recipe's settings with those given, other runs loaded and pictures read."""
        found = dict(given)
        if weak := given.get("weak"):
            other = weak if isinstance(weak, Run) else load(weak)
            if other.shape != self.shape:
                raise RunError(f"{other.folder} makes samples of shape {other.shape}, {self.folder} of {self.shape}")
            if self.conditional and (not other.conditional or other.classes != self.classes):
                raise RunError(f"{other.folder} was not trained with the classes of {self.folder}")
            found["weak"] = other.denoiser
        if isinstance(known := given.get("known"), str | Path):
            found["known"] = image_data.read_picture(known, self.shape, self.levels)
        if isinstance(mask := given.get("mask"), str | Path):
            white = image_data.read_picture(mask, (1, *self.shape[1:]), 2)
            found["mask"] = (white < 0).expand(self.shape)
        return Settings.of(self.recipe.sampling, **found)

    def tune(self, steps: int, *, settings: Mapping[str, Any] | None = None, **how: Any) -> tuple[Tuned, Path]:
        """Fit a table of so many evaluations to this run and keep it: :func:`kuosan.solvers.tune`.

        Args:
            settings: of sampling, such as guidance, that the table is for; default the recipe's.
            how: pairs, iterations, batch_size, learning_rate, fine, seed, progress.
        """
        chosen = self._settings(dict(settings or {}) | {"steps": steps})
        if chosen.known is not None:
            raise ValueError("a table is tuned without anything held: drop known and mask")
        found = tune(
            chosen.model(self.denoiser, self.conditional),
            self.shape,
            steps,
            labels=self.labels_for,
            transform=chosen.transform,
            device=device(),
            **how,
        )
        return found, self.tuned.save(found, steps, self.tuned.fingerprint(self.denoiser, chosen))

    def labels_for(self, n: int) -> Tensor | None:
        """Classes in turn for n samples; None for an unconditional model."""
        return torch.arange(n) % len(self.classes) if self.conditional and self.classes else None

    def sample(
        self,
        count: int | None = None,
        *,
        seeds: Iterable[int] | None = None,
        labels: Tensor | None = None,
        batch_size: int = 256,
        progress: Callable[[int, int], None] | None = None,
        **settings: Any,
    ) -> Tensor:
        """Samples as levels, uint8 (N, C, H, W); number k depends on seed k and label k only.

        Args:
            count: how many; by default as many as there are seeds.
            seeds: default 0, 1, 2, ...
            labels: class of each, (N,); by default all classes in turn.
            batch_size: samples at once.
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
        done, batches = 0, []
        for batch in self.batches(self.sampler(**settings), seeds, labels, batch_size):
            batches.append(batch)
            done += len(batch)
            if progress is not None:
                progress(done, len(seeds))
        return torch.cat(batches)

    def batches(
        self, sampler: Sampler, seeds: Sequence[int], labels: Tensor | None = None, batch_size: int = 256
    ) -> Iterator[Tensor]:
        """The samples of :meth:`sample` batch by batch, as they are done."""
        for pixels in sample_batches(
            sampler.model,
            self.shape,
            sampler.table,
            seeds=seeds,
            condition=self.labels_for(len(seeds)) if labels is None else labels,
            transform=sampler.transform,
            corrector=sampler.corrector,
            batch_size=batch_size,
            device=device(),
        ):
            yield to_levels(pixels, self.levels)

    def sheet_while_training(self, denoiser: Denoiser, step: int) -> None:
        """64 samples of a model in training, as samples/step-....png; always the same seeds."""
        columns = len(self.classes) if self.conditional and self.classes else 8
        n = columns * (8 if columns <= 16 else 2)
        pixels = sample(
            denoiser,
            self.shape,
            seeds=range(n),
            table=unmeasured_solver(self.recipe).table(denoiser.process, steps=min(20, self.recipe.sampling.steps)),
            condition=self.labels_for(n),
            transform=Settings.of(self.recipe.sampling, grid=UniformTime()).transform,
            device=device(),
        )
        picture = sheet(to_levels(pixels, self.levels), self.levels, columns, good_scale(self.shape))
        notes = {"seeds": f"0-{n - 1}", "step": step}
        save_png(picture, self.folder / "samples" / f"step-{step:08d}.png", notes)

    # -- measuring ----------------------------------------------------------------------------------------------------

    def bound(self, split: str = "held_out", examples: int | None = None, **settings: Any) -> Bound:
        """The bound on a split, "held_out" or "train", with the recipe's settings unless given.

        Args:
            settings: of :class:`kuosan.DiffusionChain` and of its ``elbo``.
        """
        section = self.recipe.evaluation
        part = getattr(self.data, split)
        n = min(len(part), section.examples if examples is None else examples)
        chosen = torch.randperm(len(part), generator=stream("evaluation"))[:n] if n < len(part) else torch.arange(n)
        options: dict[str, Any] = {"variance": section.variance, "terms": section.terms, "draws": section.draws}
        options |= settings
        ladder = {name: options.pop(name) for name in ("variance", "grid", "steps") if name in options}
        ladder["variance"] = self.variance(ladder["variance"])
        if "grid" not in ladder:
            ladder.setdefault("steps", section.bound_steps)
        condition = part.labels[chosen].to(device()) if self.conditional else None
        x_0 = to_pixels(part.levels[chosen], self.levels)
        return DiffusionChain(self.denoiser, **ladder).elbo(x_0.to(device()), condition, **options)

    def evaluate(
        self,
        guidance: float | None = None,
        *,
        variance: str | None = None,
        bound_steps: int | None = None,
        on_trajectory: bool = False,
    ) -> dict[str, Any]:
        """The bound on held-out data and the quality of samples; written to evaluation.json.

        Args:
            guidance: of the samples; default the recipe's. The bound is the model's own, without guidance.
            variance: of the bound's reverse steps, such as "optimal"; default the recipe's.
            bound_steps: K of the bound; default the recipe's.
            on_trajectory: the bound on the best K times instead of evenly spread ones.

        Returns:
            A dictionary for JSON with ``bits_per_dim`` (total, standard_error, and each term) and ``quality`` (None for
            data without classes).
        """
        self.sampler(guidance=guidance)  # says now what is wrong with the weight, not after the bound
        section = self.recipe.evaluation
        steps, variance = section.bound_steps if bound_steps is None else bound_steps, variance or section.variance
        searched = variance if variance in ("beta", "beta_tilde", "optimal_per_dimension") else "optimal"
        grid: dict[str, Any] = {"grid": self.trajectory(steps, searched)} if on_trajectory else {"steps": steps}
        bound = self.bound(variance=variance, **grid, progress=Progress("bound: evaluation"))
        result: dict[str, Any] = {
            "run": str(self.folder),
            "step": self.step,
            "bits_per_dim": dataclasses.asdict(bound.bits_per_dim())
            | {
                "quantity": f"discrete bound on log2 P(x) over {self.levels} levels, per dimension",
                "split": "held_out",
                "examples": bound.total.numel(),
                "steps": len(bound.times),
                "grid": "best trajectory" if on_trajectory else "even",
                "variance": variance,
                "terms": section.terms,
                "draws": bound.draws,
                "evaluations_per_example": bound.evaluations,
            },
            "quality": self.quality(section.samples, guidance=guidance),
        }
        result = plain(result)
        write(self.folder / "evaluation.json", json.dumps(result, indent=2, ensure_ascii=False))
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
