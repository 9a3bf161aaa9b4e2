"""The run of a diffusion model: its samplers and tuned tables, its optimal variance, its chain of K steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from kuosan.bound import Likelihood
from kuosan.build import make_solver
from kuosan.chain import Chain
from kuosan.denoiser import Denoiser
from kuosan.dequantisation import Variational, data_bound, fit_variational
from kuosan.diffusion import DiffusionChain
from kuosan.fetch import to_stderr
from kuosan.image.captioned import CaptionedMedium
from kuosan.image.medium import ImageMedium
from kuosan.optimal import measure, weights_fingerprint
from kuosan.process import Grid
from kuosan.progress import Progress
from kuosan.recipe import Recipe, RecipeError
from kuosan.runs.run import Run, RunError, device
from kuosan.sampler import Sampler, Settings, TunedTables, sampler
from kuosan.solvers import Solver, Tuned, UniformTime, sample, sample_batches, tune
from kuosan.solvers.noise import measured
from kuosan.trajectory import trajectory
from kuosan.variance import MEASURED, Choice, OptimalVariance, VarianceError

#: Settings of sampling that not all kinds of model have.
OF_TEXTS = ("infill", "length", "blocks", "candidates", "temperature", "nucleus", "control", "control_steps")
OF_IMAGES = ("negative", "image", "strength")
OF_VOCODERS = ("input",)
OF_TEXT_TO_SPEECH = ("text", "vocoder", "speed", "seconds")
OF_SPEECH = (*OF_VOCODERS, *OF_TEXT_TO_SPEECH, "griffin_lim")


#: Prompts that a page of samples gives a column each.
MOST_COLUMNS = 16


def unmeasured_solver(recipe: Recipe) -> Solver:
    """The recipe's solver; a variance that is measured of the trained model is beta-tilde until then."""
    kind = recipe.sampling.solver
    solver = make_solver({"kind": "auto"} if kind.get("kind") == "tuned" else kind)
    return measured(solver, lambda name: "beta_tilde")


class DiffusionRun(Run):
    """A trained (or half-trained) diffusion model."""

    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    has_ode = True
    #: Settings of sampling that other kinds of model have.
    foreign: ClassVar[tuple[str, ...]] = (*OF_TEXTS, *OF_SPEECH)

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Of what is diffused of one example."""
        return self.shape

    def states(self, part: Any) -> tuple[Tensor, Tensor | None]:
        """Examples of a part as they are diffused, and what the model is told of them."""
        return self.medium.batch(part, torch.arange(len(part)))

    def conditions(self, n: int) -> Tensor | None:
        """What the model is told of n examples, such as tables are tuned on: classes in turn."""
        return self.labels_for(n)

    @property
    def denoiser(self) -> Denoiser:
        """The model with its averaged weights, ready to use."""
        return self.model

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
        x_0, condition = self.states(self.data.train)
        x_0, condition = x_0.to(device()), None if condition is None else condition.to(device())
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
                that is white where it is drawn anew; corrections, of inpainting; image, a picture or its pixels that
                samples begin with, under the noise of time ``strength``; of captioned images prompt, or a list of them
                in turn, and negative, the prompt that guidance leads away from.

        Raises:
            ValueError: an unknown setting or an impossible value.
        """
        grid = settings.get("grid") or (None if settings.get("solver") else self.recipe.sampling.grid)
        if isinstance(grid, Mapping) and grid.get("kind") == "trajectory":
            if len(grid) > 1:
                raise RecipeError(f"sampling.grid: trajectory has no settings, got {', '.join(grid.keys() - {'kind'})}")
            settings["grid"] = self.trajectory(settings.get("steps") or self.recipe.sampling.steps)
        prompts = settings.pop("prompt", None)
        if prompts is not None and not isinstance(self.medium, CaptionedMedium):
            raise RunError(f"{self.folder} is the run of {self.kind} without captions: it has no prompt to choose")
        prompts = (prompts,) if isinstance(prompts, str) else None if prompts is None else tuple(prompts)
        if prompts == ():
            raise ValueError("there is nothing to draw: give at least one prompt")
        condition = None if prompts is None else self.medium.conditions(prompts)
        chosen = self._settings(settings)
        if chosen.solver is not None:
            chosen = dataclasses.replace(chosen, solver=measured(chosen.solver, self.variance))
        found = sampler(chosen, self.denoiser, self.conditional, self.tuned, to_stderr)
        for name in ("weak", "known", "mask", "image", "negative"):  # of files and folders, the names too
            given = settings.get(name)
            if isinstance(given, Run | str | Path):
                found.how[name] = str(given.folder if isinstance(given, Run) else given)
        return dataclasses.replace(found, condition=condition, prompts=prompts or ())

    def labels_of(self, sampler: Sampler, n: int) -> Tensor | None:
        if sampler.condition is None:
            return self.labels_for(n)
        return sampler.condition[torch.arange(n) % len(sampler.condition)]

    def labels_for(self, n: int) -> Tensor | None:
        """Classes or kept captions in turn for n samples; None for an unconditional model."""
        if isinstance(self.medium, CaptionedMedium):
            return self.medium.kept_conditions(n)
        return super().labels_for(n)

    def asked(self, sampler: Sampler, labels: Tensor | None, n: int) -> list[dict[str, str]]:
        if not isinstance(self.medium, CaptionedMedium):
            return super().asked(sampler, labels, n)
        prompts = sampler.prompts or self.medium.prompts
        return [{"prompt": prompts[i % len(prompts)]} for i in range(n)]

    def columns(self, sampler: Sampler, labels: Tensor | None) -> int | None:
        several = len(sampler.prompts)
        return several if 1 < several <= MOST_COLUMNS else super().columns(sampler, labels)

    def usual_count(self, sampler: Sampler) -> int:
        return max(super().usual_count(sampler) if len(sampler.prompts) < 2 else 0, len(sampler.prompts))

    def state_of(self, picture: Tensor) -> Tensor:
        """What is diffused of a picture, pixels (C, H, W)."""
        return picture

    def mask_of(self, mask: Tensor) -> Tensor:
        """Where what is diffused is held, of a picture that is held where the mask is True."""
        return mask

    def _settings(self, given: Mapping[str, Any]) -> Settings:
        """The recipe's settings with those given, other runs loaded and pictures read."""
        found = dict(given)
        if weak := given.get("weak"):
            other = weak if isinstance(weak, DiffusionRun) else type(self).open(weak)
            if other.shape != self.shape:
                raise RunError(f"{other.folder} makes samples of shape {other.shape}, {self.folder} of {self.shape}")
            if self.conditional and (not other.conditional or other.classes != self.classes):
                raise RunError(f"{other.folder} was not trained with the classes of {self.folder}")
            if other.state_shape != self.state_shape:
                raise RunError(f"{other.folder} diffuses {other.state_shape}, {self.folder} {self.state_shape}")
            mine, its = ((one.folder / "tokenizer.json") for one in (self, other))
            if isinstance(self.medium, CaptionedMedium) and (
                self.medium.how != getattr(other.medium, "how", None)
                or (mine.is_file() and (not its.is_file() or mine.read_bytes() != its.read_bytes()))
            ):
                raise RunError(f"{other.folder} reads captions as other tokens than {self.folder}")
            found["weak"] = other.denoiser
        if isinstance(self.medium, ImageMedium):
            found |= self.pictures(given)
            found |= {k: self.state_of(found[k]) for k in ("known", "image") if found.get(k) is not None}
            if found.get("mask") is not None:
                found["mask"] = self.mask_of(found["mask"])
            if isinstance(negative := given.get("negative"), str):
                found["negative"] = self.medium.conditions([negative])[0]
        for name in self.foreign:
            if found.get(name) is not None:
                raise RunError(f"{self.folder} is the run of {self.kind}: it has no {name} to choose")
        chosen = Settings.of(self.recipe.sampling, **found)
        away = chosen.weak is not None or chosen.negative is not None
        if chosen.section.guidance and self.conditional and not away and self.recipe.training.label_drop == 0:
            raise RunError(
                f"{self.folder} was always told a {self.told} in training "
                "(training.label_drop = 0): guidance has nothing to lead away from; give a weaker run"
            )
        return chosen

    def pictures(self, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """Those of some settings as pixels (C, H, W), read where they are files; the mask as bool."""
        assert isinstance(self.medium, ImageMedium)
        read = {"known": self.medium.read_one, "mask": self.medium.read_mask, "image": self.medium.read_one}
        found = {name: given[name] for name in read if given.get(name) is not None}
        for name, one in found.items():
            found[name] = read[name](one) if isinstance(one, str | Path) else one
            if tuple(found[name].shape) != self.shape:
                raise ValueError(f"{name} has shape {tuple(found[name].shape)}, and samples have {self.shape}")
            if name != "mask" and not found[name].is_floating_point():
                raise ValueError(f"{name} has pixels in [-1, 1], got {found[name].dtype}: levels are to become such")
        known, mask = (given.get(name) for name in ("known", "mask"))
        if isinstance(known, str | Path) and isinstance(mask, str | Path):
            self.medium.check_mask(known, mask)
        return found

    def tune(self, steps: int, *, settings: Mapping[str, Any] | None = None, **how: Any) -> tuple[Tuned, Path]:
        """Fit a table of so many evaluations to this run and keep it: :func:`kuosan.solvers.tune`.

        Args:
            settings: of sampling, such as guidance, that the table is for; default the recipe's.
            how: pairs, iterations, batch_size, learning_rate, fine, seed, progress.
        """
        chosen = self._settings(dict(settings or {}) | {"steps": steps, "prompt": None, "solver": {"kind": "auto"}})
        if chosen.known is not None or chosen.image is not None:
            raise ValueError("a table is tuned without anything held, and from noise on: drop known, mask and image")
        found = tune(
            chosen.model(self.denoiser, self.conditional),
            self.state_shape,
            steps,
            labels=self.conditions,
            transform=chosen.transform,
            temperature=chosen.section.temperature,
            device=device(),
            **how,
        )
        return found, self.tuned.save(found, steps, self.tuned.fingerprint(self.denoiser, chosen))

    def batches(
        self, sampler: Sampler, seeds: Sequence[int], labels: Tensor | None = None, batch_size: int | None = None
    ) -> Iterator[Tensor]:
        """The samples of :meth:`sample` batch by batch, as they are done."""
        for pixels in sample_batches(
            sampler.model,
            self.state_shape,
            sampler.table,
            seeds=seeds,
            condition=self.labels_of(sampler, len(seeds)) if labels is None else labels,
            begin=sampler.image,
            transform=sampler.transform,
            corrector=sampler.corrector,
            temperature=sampler.start,
            batch_size=self.together(batch_size),
            device=device(),
        ):
            yield self.kept(pixels, sampler)

    def kept(self, x: Tensor, sampler: Sampler) -> Tensor:
        """Samples as they are kept, from what was drawn."""
        return self.medium.outputs(x)

    def quality(self, n: int, **settings: Any) -> Mapping[str, Any] | None:
        if isinstance(self.medium, ImageMedium) and self.judge is None:
            return None  # before anything is drawn
        return super().quality(n, **settings)

    def check(self, model: Denoiser) -> None:
        sampling = self.recipe.sampling
        fixed = {} if (sampling.grid or {}).get("kind") != "trajectory" else {"grid": UniformTime()}
        settings = Settings.of(sampling, **fixed)
        settings.model(model, self.conditional)
        unmeasured_solver(self.recipe).table(model.process, settings.grid, steps=sampling.steps)
        model.process.grid(self.recipe.evaluation.bound_steps)

    def draw_while_training(self, model: Denoiser, seeds: Sequence[int]) -> Tensor:
        return sample(
            model,
            self.state_shape,
            seeds=seeds,
            table=unmeasured_solver(self.recipe).table(model.process, steps=min(20, self.recipe.sampling.steps)),
            condition=self.labels_for(len(seeds)),
            transform=Settings.of(self.recipe.sampling, grid=UniformTime()).transform,
            device=device(),
        )

    # -- measuring ----------------------------------------------------------------------------------------------------

    def chain(  # type: ignore[override]
        self,
        *,
        variance: Choice | None = None,
        steps: int | None = None,
        grid: Grid | None = None,
        on_trajectory: bool = False,
        decoder_variance: float | None = None,
    ) -> tuple[DiffusionChain, dict[str, Any]]:
        """The chain of K steps whose bound is this model's.

        Args:
            variance: of the reverse steps, such as "optimal"; default the recipe's.
            steps: K; default the recipe's.
            grid: the noisy times, in the place of ``steps``.
            on_trajectory: on the best K times instead of evenly spread ones.
            decoder_variance: of the last step: :class:`kuosan.DiffusionChain`.
        """
        section = self.recipe.evaluation
        choice = section.variance if variance is None else variance
        if on_trajectory:
            searched = choice if choice in ("beta", "beta_tilde", "optimal_per_dimension") else "optimal"
            grid = self.trajectory(section.bound_steps if steps is None else steps, str(searched))
        if grid is None:
            grid = self.denoiser.process.grid(section.bound_steps if steps is None else steps)
        chain = DiffusionChain(
            self.denoiser, grid=grid, variance=self.variance(choice), decoder_variance=decoder_variance
        )
        name = choice if isinstance(choice, str) else repr(choice)
        how = {"steps": len(grid), "grid": "best trajectory" if on_trajectory else "even", "variance": name}
        return chain, how | {"form": f"{how['steps']} steps on the {how['grid']} grid, variance {name}"}

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
        """A bound on log P(x) by the ODE, from the prior at its end: :func:`kuosan.dequantisation.data_bound`.

        Args:
            draws: repeats, each with states and a probe of its own.
            tolerance: relative and absolute, of the solver.
            divergence: "rademacher" or "gaussian" probes, or "exact", which takes as many as x has dimensions.
            dequantisation: "noise", that of the process; "uniform"; or "variational", fitted here to training data. The
                last two fill the space between levels, where a network that predicts levels has next to no density.
        """
        q: str | Variational = dequantisation
        if dequantisation == "variational":
            fitted = self.examples("train", 10_000)
            q = fit_variational(self.denoiser, *fitted, progress=Progress("dequantisation: steps"))
        elif dequantisation not in ("noise", "uniform"):
            raise ValueError(f"dequantisation must be noise, uniform or variational, got {dequantisation!r}")
        how: dict[str, Any] = {"batch_size": 1024, "progress": Progress("ODE: states")}
        process = self.denoiser.process
        if self.denoiser.predicts in ("eps", "score", "energy") and float(process.alpha(1.0)) == 0:
            # they say nothing of x0 where there is no signal: end, as sampling begins, where a thousandth is
            how["end"] = float(process.schedule.time_of(-2 * math.log(1000.0)))
        how |= {"q": q, "divergence": divergence, "rtol": tolerance, "atol": tolerance}
        return data_bound(self.denoiser, x, condition, draws=draws, **how)

    def elbo_settings(self, chain: Chain) -> dict[str, Any]:
        return {"terms": self.recipe.evaluation.terms, "draws": self.recipe.evaluation.draws}
