"""Training a recipe in a folder, which becomes a run; or going on with the training that it holds."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kuosan
from kuosan.build import make_model, make_objective
from kuosan.fetch import to_stderr
from kuosan.medium import TrainingExamples, fingerprint, medium_of, read_data
from kuosan.recipe import Recipe, RecipeError
from kuosan.runs import Run, RunError, device, kind_of, load, write
from kuosan.seeds import stream
from kuosan.training.ema import load_parameters
from kuosan.training.loop import Trainer
from kuosan.training.processes import Processes, joined

#: Names of a latent diffusion model's parameters that are the autoencoder's begin so.
OF_AUTOENCODER = ("guide", "model.decoder")


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
    recipe = _with_whole_paths(recipe)
    with joined() as processes:
        data = read_data(recipe.data)
        described = medium_of(recipe.data).describe(recipe.data, data)
        torch.manual_seed(stream("weights", recipe.seed).initial_seed())
        model = make_model(recipe, tuple(described["shape"]), described["levels"], len(data.classes or ()))
        fixed = OF_AUTOENCODER if recipe.family == "latent" else ()
        if recipe.training.start is not None:
            _begin_with(model, Path(recipe.training.start), fixed)
        _freeze(model, recipe.training.freeze, fixed)
        objective = make_objective(recipe)
        run = kind_of(recipe)(folder, recipe, _info(recipe, data, described, model, processes, command), data)
        run.prepare(model)
        run.check(model)
        if processes.first:
            _begin(run)
        trainer = Trainer(
            model=model,
            objective=objective,
            source=TrainingExamples(run.medium),
            settings=recipe.training,
            seed=recipe.seed,
            store=run.store,
            log=folder / "metrics.jsonl",
            processes=processes,
            on_sample=lambda step: run.sheet_while_training(model, step),
            device=device(),
        )
        trainer.train()
        return run


def _begin_with(model: nn.Module, folder: Path, whole: Sequence[str]) -> None:
    """Take over the averaged weights of another run, those of the same name and shape.

    Args:
        whole: beginnings of names: all such parameters have to be there.

    Raises:
        RunError: it is no run, has no checkpoint, or lacks what has to be there.
    """
    kept = load(folder).store.load(groups=("ema",))
    if kept is None:
        raise RunError(f"training.start: {folder} has no checkpoint to begin with")
    known, own = kept.tensors["ema"], dict(model.named_parameters())
    same = [name for name, p in own.items() if name in known and known[name].shape == p.shape]
    if not same:
        raise RunError(f"training.start: no parameter of {folder} has the name and shape of one of this model's")
    if lacks := [name for name in own if name.startswith(tuple(f"{part}." for part in whole)) and name not in same]:
        raise RunError(f"training.start: {folder} is the run of another autoencoder: it lacks {lacks[0]} of this shape")
    load_parameters(model, {name: known[name] if name in same else p.detach() for name, p in own.items()})
    to_stderr(f"{len(same)} of {len(own)} parameters begin as in {folder}")


def _freeze(model: nn.Module, prefixes: Sequence[str], fixed: Sequence[str]) -> None:
    for prefix in (*prefixes, *fixed):
        named = [p for name, p in model.named_parameters() if f"{name}.".startswith(f"{prefix}.")]
        if not named and prefix in prefixes:
            first = ", ".join(sorted({name.split(".")[0] for name, _ in model.named_parameters()}))
            raise RecipeError(f"training.freeze: no parameter's name begins with {prefix!r}; they begin with {first}")
        for p in named:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise RecipeError("training.freeze: nothing is left to be trained")


def _info(
    recipe: Recipe, data: Any, described: dict[str, Any], model: nn.Module, processes: Processes, command: str | None
) -> dict[str, Any]:
    return {
        "shape": described["shape"],
        "levels": described["levels"],
        "classes": list(data.classes) if data.classes else None,
        "data": {
            "name": data.name,
            "train": len(data.train),
            "held_out": len(data.held_out),
            "licence": data.licence,
            "source": data.source,
            "notes": list(data.notes),
            "sha256": fingerprint(described),
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": recipe.seed,
        "processes": processes.size,
        "versions": {"kuosan": kuosan.__version__, "torch": version("torch"), "python": platform.python_version()},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {device().type}",
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
    run.medium.keep()
    write(folder / "recipe.toml", run.recipe.to_toml())
    write(folder / "run.json", json.dumps(run.info, indent=2, ensure_ascii=False))


def _with_whole_paths(recipe: Recipe) -> Recipe:
    """The recipe with its folders, of data and of the run to begin with, as paths that are right from anywhere."""
    data, training, sampling = recipe.data, recipe.training, recipe.sampling
    for key in ("folder", "texts"):
        if (path := getattr(data, key)) is not None:
            data = data.model_copy(update={key: str(Path(path).expanduser().resolve())})
    if training.start is not None:
        training = training.model_copy(update={"start": str(Path(training.start).expanduser().resolve())})
    if sampling.vocoder is not None:
        sampling = sampling.model_copy(update={"vocoder": str(Path(sampling.vocoder).expanduser().resolve())})
    return recipe.model_copy(update={"data": data, "training": training, "sampling": sampling})
