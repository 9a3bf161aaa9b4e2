"""A run's way of sampling: the recipe's, with what was asked for instead; and the tables that were tuned to the run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from kuosan.build import make_corrector, make_grid, make_solver
from kuosan.denoiser import Denoiser
from kuosan.networks import BFloat16
from kuosan.optimal import weights_fingerprint
from kuosan.plain import plain
from kuosan.process import Grid, Process
from kuosan.recipe import RecipeError, Sampling, explain
from kuosan.solvers import (
    Auto,
    Autoguidance,
    ClassifierFree,
    Clip,
    Corrector,
    DynamicThreshold,
    Inpainting,
    Model,
    Solver,
    Spacing,
    Table,
    Tuned,
)

#: The time from which an image is drawn anew where nobody says.
STRENGTH = 0.6
#: Settings of sampling that a recipe does not have.
OTHERS = ("weak", "negative", "known", "mask", "corrections", "image", "strength")
OBJECTS = {"solver": Solver, "grid": Spacing | Grid, "corrector": Corrector}


class TunedTableError(ValueError):
    """A tuned table that is not there, is damaged, or was tuned for something else."""


@dataclass(frozen=True)
class Sampler:
    """A model made ready to be sampled in one way.

    Args:
        model: the denoiser, guided if it is.
        table: the solver on its grid.
        transform: of x0-hat.
        corrector: run before each evaluation.
        how: the same in words and numbers, for records.
        image: x_0 that samples begin with, under the noise of the table's first time.
        condition: (n, ...) of what samples are told, in turn; None: what the run tells them.
        prompts: the same in words.
        held: pixels, and a mask that is True where a sample is to have just them.
        start: the standard deviation of the noise that it begins with, where the prior's is 1.
    """

    model: Model
    table: Table
    transform: Callable[[Tensor], Tensor] | None
    corrector: Corrector | None
    how: dict[str, Any]
    _: KW_ONLY
    image: Tensor | None = None
    condition: Tensor | None = None
    prompts: tuple[str, ...] = ()
    held: tuple[Tensor, Tensor] | None = None
    start: float = 1.0


@dataclass(frozen=True)
class Settings:
    """The settings of sampling, made into objects where they name a kind.

    ``Settings.of(recipe.sampling, steps=8, solver=Heun())``: what is given replaces the recipe's; None is not given.

    Args:
        weak: the model that guidance leads away from; by default the same one, asked for no class.
        negative: a condition that guidance leads away from instead.
        known, mask: a sample's shape: values that are held, and where (True).
        corrections: of :class:`~kuosan.solvers.Inpainting`.
        image: a sample's shape: what samples begin with, under noise, instead of noise alone.
        strength: the time of that noise, over 0 and under 1.
    """

    section: Sampling
    solver: Solver | None  # None: the tuned table, and nothing else
    grid: Spacing | Grid | None
    corrector: Corrector | None
    weak: Denoiser | None = None
    known: Tensor | None = None
    mask: Tensor | None = None
    corrections: int = 0
    negative: Tensor | None = None
    image: Tensor | None = None
    strength: float | None = None

    @classmethod
    def of(cls, section: Sampling, **given: Any) -> Settings:
        """Raises RecipeError for an unknown setting or an impossible value."""
        given = {key: value for key, value in given.items() if value is not None}
        others = {key: given.pop(key) for key in OTHERS if key in given}
        held = "known" in others
        if "weak" in others and not given.get("guidance", section.guidance):
            raise RecipeError("weak is a model to be guided away from: it needs a guidance weight")
        if held != ("mask" in others) or (others.get("corrections") and not held):
            raise RecipeError("inpainting needs both known, the picture, and mask, which says where it is held")
        if "negative" in others and not given.get("guidance", section.guidance):
            raise RecipeError("a negative prompt is what guidance leads away from: it needs a guidance weight")
        if "negative" in others and "weak" in others:
            raise RecipeError("guidance leads away from one thing: drop the negative prompt, or weak")
        if "strength" in others and "image" not in others:
            raise RecipeError("strength is how much noise an image is put under: it needs an image to begin with")
        if "strength" in others and isinstance(given.get("grid"), Grid):
            raise RecipeError("an image is put under the noise of its grid's first time: drop strength, or the grid")
        if not 0 < others.get("strength", STRENGTH) < 1:
            raise RecipeError(f"strength lies between 0 (the image) and 1 (noise alone), got {others['strength']:g}")
        objects = {k: v for k, v in given.items() if k in OBJECTS and isinstance(v, OBJECTS[k])}
        numbers = {k: v for k, v in given.items() if k not in objects}
        if given.get("threshold"):
            numbers.setdefault("clip", False)
        if "solver" in given and "grid" not in given:
            numbers["grid"] = None  # the recipe's grid is of the recipe's solver
        known = section.model_dump()
        try:
            section = Sampling.model_validate(known | numbers)
        except ValidationError as error:
            raise RecipeError(explain(error, "sampling")) from None
        solver = None if section.solver.get("kind") == "tuned" else make_solver(section.solver)
        grid = make_grid(section.grid) if section.grid and "grid" not in objects else None
        if held and (section.corrector or "corrector" in objects):
            raise RecipeError("a corrector would move what inpainting holds: drop it")
        corrector = make_corrector(section.corrector) if section.corrector else None
        found: dict[str, Any] = {"solver": solver, "grid": grid, "corrector": corrector} | objects
        return cls(section, **found, **others)

    def model(self, denoiser: Denoiser, conditional: bool) -> Model:
        """The denoiser in the precision asked for, guided if the weight is not 0, held to what is known.

        Raises:
            ValueError: guidance of a model without classes or a weaker model, a mask of another shape.
        """
        section = self.section
        weight, interval, rescale = section.guidance, section.interval, section.rescale

        def precise(one: Denoiser) -> Denoiser:
            return one.around(BFloat16(one.network)) if section.precision == "bfloat16" else one

        strong = precise(denoiser)
        model: Model = strong
        if weight and self.weak is not None:
            model = Autoguidance(strong, precise(self.weak), weight, interval, rescale)
        elif weight:
            if not conditional:
                raise ValueError(
                    "guidance needs a model trained with classes, or a weaker one: there is nothing to guide towards"
                )
            model = ClassifierFree(strong, weight, interval, rescale, self.negative)
        if self.known is not None and self.mask is not None:
            model = Inpainting(model, self.known, self.mask, self.corrections)
        return model

    @property
    def transform(self) -> Callable[[Tensor], Tensor] | None:
        if not self.section.threshold:
            own = None if self.solver is None else self.solver.transform
            return own or (Clip() if self.section.clip else None)
        thresholded, known, mask = DynamicThreshold(self.section.threshold), self.known, self.mask
        if known is None or mask is None:
            return thresholded
        return lambda x_0: torch.where(mask.to(x_0.device), known.to(x_0), thresholded(x_0))  # and not scaled too

    @property
    def words(self) -> dict[str, Any]:
        section = self.section
        words: dict[str, Any] = {"solver": str(self.solver) if self.solver else "tuned", "guidance": section.guidance}
        if self.grid is not None:
            words["grid"] = str(self.grid)
        if section.guidance and section.interval != Sampling().interval:
            words["interval"] = list(section.interval)
        for key in ("rescale", "threshold"):
            if getattr(section, key):
                words[key] = getattr(section, key)
        words["clip"] = section.clip
        if self.solver is not None and self.solver.transform is not None and self.transform is self.solver.transform:
            words["transform"] = str(self.solver.transform)
        if section.precision != Sampling().precision:
            words["precision"] = section.precision
        if self.corrector is not None:
            words["corrector"] = str(self.corrector)
        if self.mask is not None:
            words["held"] = float(self.mask.double().mean())
            words["corrections"] = self.corrections
        return words


class TunedTables:
    """The tables that were tuned to a run, in RUN/tables, each with what it was tuned for.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path):
        self.folder = folder / "tables"

    def path(self, steps: int, fingerprint: Mapping[str, Any]) -> Path:
        guided = f"-guidance-{fingerprint['guidance']:g}" if fingerprint["guidance"] else ""
        weak = f"-weak-{fingerprint['weak model'][:8]}" if "weak model" in fingerprint else ""
        if "negative" in fingerprint:
            weak = f"-negative-{hashlib.sha256(repr(fingerprint['negative']).encode()).hexdigest()[:8]}"
        return self.folder / f"steps-{steps}{guided}{weak}.json"

    @staticmethod
    def fingerprint(denoiser: Denoiser, settings: Settings) -> dict[str, Any]:
        """What a tuned table is valid for."""
        section = settings.section
        found: dict[str, Any] = {
            "weights": weights_fingerprint(denoiser),
            "schedule": _schedule_fingerprint(denoiser.process),
            "guidance": section.guidance,
            "clip": section.clip,
            "threshold": section.threshold,
        }
        if section.temperature != 1:
            found["temperature"] = section.temperature
        if section.guidance:
            found |= {"interval": plain(section.interval), "rescale": section.rescale}
        if settings.weak is not None:
            found["weak model"] = weights_fingerprint(settings.weak)
        if settings.negative is not None:
            found["negative"] = settings.negative[settings.negative >= 0].tolist()
        return found

    def save(self, tuned: Tuned, steps: int, fingerprint: dict[str, Any]) -> Path:
        path = self.path(steps, fingerprint)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "fingerprint": fingerprint,
            "start": tuned.start,
            "errors": asdict(tuned.errors),
            "start_errors": asdict(tuned.start_errors),
            "table": tuned.table.to_json(),
        }
        aside = path.with_suffix(".new")
        aside.write_text(json.dumps(content, indent=1), "utf-8")
        aside.replace(path)
        return path

    def load(self, steps: int, fingerprint: dict[str, Any]) -> Table:
        """The table for so many steps.

        Raises:
            TunedTableError: there is none, it is damaged, or it was tuned for another model, schedule or guidance.
        """
        path = self.path(steps, fingerprint)
        if not path.is_file():
            kept = sorted(p.stem for p in self.folder.glob("*.json"))
            have = f"; there are {', '.join(kept)}" if kept else ""
            guided = f" --guidance {fingerprint['guidance']:g}" if fingerprint["guidance"] else ""
            guided += " --weak ..." if "weak model" in fingerprint else ""
            guided += " --negative ..." if "negative" in fingerprint else ""
            raise TunedTableError(
                f"there is no {path}{have}: `kuosan tune {self.folder.parent} --steps {steps}{guided}` makes it"
            )
        try:
            content = json.loads(path.read_text("utf-8"))
            table, made_for = Table.from_json(content["table"]), dict(content["fingerprint"])
            if table.evaluations != steps:
                raise ValueError(f"it has {table.evaluations} evaluations")
        except (ValueError, KeyError, TypeError) as error:
            raise TunedTableError(f"{path} is damaged: {error}") from None
        wrong = sorted(key for key in {*made_for, *fingerprint} if made_for.get(key) != fingerprint.get(key))
        if wrong:
            what = ", ".join(
                key
                if key in ("weights", "schedule", "weak model")
                else f"{key} ({made_for.get(key)}, asked for {fingerprint.get(key)})"
                for key in wrong
            )
            raise TunedTableError(f"{path} was tuned for other {what}: tune again, or choose another solver")
        return table


def _schedule_fingerprint(process: Process) -> str:
    at = torch.linspace(1 / 64, 1, 64, dtype=torch.float64)
    curve = torch.stack([process.log_snr(at), *process.scales(at)])
    return hashlib.sha256(curve.numpy().round(9).tobytes()).hexdigest()[:16]


def _check_trained(grid: Grid, process: Process) -> None:
    """Raises ValueError for times at which the model was never trained, instead of leaving them out."""
    earliest = process.schedule.t_min
    if early := [t for t in grid.times if t < earliest * (1 - 1e-9)]:
        raise ValueError(
            f"the model was trained at times from {earliest:g} to 1, and the grid has "
            f"{', '.join(f'{t:g}' for t in early)}"
        )


def sampler(
    settings: Settings, denoiser: Denoiser, conditional: bool, tuned: TunedTables, say: Callable[[str], None]
) -> Sampler:
    """The sampler of these settings.

    A tuned table for the same number of steps takes the place of :class:`Auto`, if it was tuned for the same.

    Raises:
        ValueError: guidance without classes, steps out of range; TunedTableError for the solver "tuned".
    """
    model = settings.model(denoiser, conditional)
    if isinstance(settings.grid, Grid):
        _check_trained(settings.grid, denoiser.process)
    how, table, start = settings.words, None, 1.0
    wants = settings.solver is None
    if wants and settings.grid is not None:
        raise ValueError("a tuned table has its own times: drop the grid")
    if wants and settings.known is not None:
        raise TunedTableError("a table is tuned without anything held: choose another solver for inpainting")
    if wants and settings.image is not None:
        raise TunedTableError("a table is tuned from noise on: choose another solver to begin with an image")
    if wants or (
        isinstance(settings.solver, Auto)
        and settings.solver.tuned
        and settings.grid is None
        and settings.corrector is None
        and settings.known is None
        and settings.image is None
    ):
        steps, fingerprint = settings.section.steps, tuned.fingerprint(denoiser, settings)
        if wants or tuned.path(steps, fingerprint).is_file():
            try:
                table = tuned.load(steps, fingerprint)
                how["solver"] = f"tuned ({tuned.path(steps, fingerprint).name})"
            except TunedTableError as error:
                if wants:
                    raise
                say(f"{error} (using auto)")
    if table is None:
        assert settings.solver is not None
        grid, count = settings.grid, settings.section.steps
        if settings.image is not None and not isinstance(grid, Grid):
            grid = (grid or settings.solver.spacing).grid(denoiser.process, count, settings.strength or STRENGTH)
        table = settings.solver.table(denoiser.process, grid, steps=None if isinstance(grid, Grid) else count)
        start = settings.solver.start(count)
    if settings.image is not None:
        how["strength"] = table.times[0]
        if table.times[0] == 1:
            raise ValueError("a grid that begins at t = 1 leaves nothing of an image: let it begin earlier")
    how["evaluations"] = table.evaluations * (1 + (settings.corrector.evaluations if settings.corrector else 0))
    return Sampler(model, table, settings.transform, settings.corrector, how, image=settings.image, start=start)
