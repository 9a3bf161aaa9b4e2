"""A pipeline that diffusers saved becomes a run: a folder that needs neither the pipeline's own nor its code."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import kuosan
from kuosan.autoencoders import ImageAutoencoder
from kuosan.bridge.networks import class_of
from kuosan.bridge.pipeline import TOKENIZER, Folder, Kind, PipelineError
from kuosan.bridge.schedulers import Scheduler, read_scheduler
from kuosan.build import make_model
from kuosan.image.data import to_pixels
from kuosan.medium import fingerprint, medium_of
from kuosan.recipe import Recipe
from kuosan.runs import Run, kind_of, load, write
from kuosan.runs.run import device

#: Pictures that the error of an autoencoder is measured on.
MEASURED_ON = 256


@dataclass(frozen=True)
class Imported:
    """What `kuosan import` made.

    Args:
        run: the run.
        pipeline: its class in diffusers.
        scheduler: as it was read.
        left_out: components that the run does without.
    """

    run: Run
    pipeline: str
    scheduler: Scheduler
    left_out: tuple[str, ...]


def import_pipeline(path: str | Path, out: str | Path | None = None, data: str | Path | None = None) -> Imported:
    """The run of a saved pipeline of diffusers, in a new folder.

    Args:
        path: of the pipeline.
        out: the run's folder; default runs/ and the name of the pipeline's.
        data: a folder of pictures to measure it on and to train on; without, the run has no data.

    Raises:
        PipelineError: what is there is not read here; says the file and why.
        ImportError: diffusers, or for texts transformers, is not installed.
        RunError, RecipeError: a folder that is not empty, pictures that do not fit.
    """
    path = Path(path).expanduser()
    folder = Folder(path)
    name, kind, left_out = folder.kind()
    out = Path("runs") / path.resolve().name if out is None else Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PipelineError(f"{out} is not empty: choose another --out")
    scheduler = _scheduler(folder, kind)
    configs = {part: folder.config(part) for part in kind.parts if part not in ("scheduler", "tokenizer")}
    of_network = configs[kind.network]
    try:
        class_of(of_network, kind.classes)
    except ValueError as error:
        raise PipelineError(f"{path / kind.network / 'config.json'}: {error}") from None
    shape, classes = _shape(folder, kind, configs), _classes(folder, kind, of_network)
    table = _recipe(folder, name, kind, scheduler, configs, shape, classes, out)
    found: Any = None
    described: dict[str, Any] = {"shape": list(shape), "levels": 256, "parts": []}
    if data is not None:
        table["data"] = _with_data(table["data"], Path(data), shape)
        section = Recipe.model_validate(table).data
        found = medium_of(section).read(section)
        described = medium_of(section).describe(section, found)
        if classes:
            classes = _same_classes(classes, found.classes, of_network)
            table["training"]["label_drop"] = 0.1 if _has_any(of_network, classes) else 0.0
    recipe = Recipe.model_validate(table)
    try:
        model = make_model(recipe, shape, described["levels"], len(classes or ()))
    except ValueError as error:
        raise PipelineError(f"{path}: {error}") from None
    _fill(folder, kind, configs, model)
    if found is not None and isinstance(model, ImageAutoencoder):
        table["autoencoder"]["std"] = _error(model, found, described["levels"])
        recipe = Recipe.model_validate(table)
    info = _info(folder, name, recipe, described, found, classes, model)
    run = kind_of(recipe)(out, recipe, info, found)
    run.check(model)
    run.store.save(0, {"weights": model.state_dict(), "ema": dict(model.named_parameters())}, {"seconds": 0.0})
    if kind.told == "text":
        (out / "tokenizer").mkdir()
        for file in TOKENIZER:
            if (path / "tokenizer" / file).is_file():
                shutil.copy(path / "tokenizer" / file, out / "tokenizer" / file)
        if found is None:
            write(out / "prompts.json", json.dumps([""]))
        else:
            run.medium.keep()
    elif found is not None:
        run.medium.keep()
    write(out / "recipe.toml", recipe.to_toml())
    write(out / "run.json", json.dumps(info, indent=2, ensure_ascii=False))
    return Imported(load(out), name, scheduler, left_out)


def _scheduler(folder: Folder, kind: Kind) -> Scheduler:
    config = folder.config("scheduler")
    if kind.scheduler is not None:
        config |= {"_class_name": kind.scheduler}
    try:
        found = read_scheduler(config)
        found.table(min(kind.steps, found.config["num_train_timesteps"]))
    except ValueError as error:
        raise PipelineError(f"{folder.path / 'scheduler' / 'scheduler_config.json'}: {error}") from None
    if found.learned_variance and kind.autoencoder is not None and found.name == "DDPMScheduler":
        raise PipelineError(
            f"{folder.path / 'scheduler' / 'scheduler_config.json'}: variance_type is "
            f"{found.config['variance_type']}, and of codes the variance is not read: fixed_small runs the mean"
        )
    return found


def _shape(folder: Folder, kind: Kind, configs: Mapping[str, dict[str, Any]]) -> tuple[int, int, int]:
    """Of an image."""
    config, where = configs[kind.network], folder.path / kind.network / "config.json"
    sides = config.get("sample_size")
    sides = [sides, sides] if isinstance(sides, int) else sides
    if not isinstance(sides, list) or len(sides) != 2 or not all(isinstance(n, int) and n > 0 for n in sides):
        raise PipelineError(f"{where}: sample_size is a side, or two, got {config.get('sample_size')!r}")
    channels, factor = config.get("in_channels", 3), 1
    if kind.autoencoder is not None:
        of = configs[kind.autoencoder]
        channels, factor = of.get("out_channels", 3), 2 ** (len(of.get("block_out_channels", (64,))) - 1)
        for field in ("shift_factor", "latents_mean", "latents_std"):
            if of.get(field):
                raise PipelineError(
                    f"{folder.path / kind.autoencoder / 'config.json'}: {field} is {of[field]}, of which this pipeline "
                    "of diffusers takes no notice: set it null"
                )
    if channels not in (1, 3):
        raise PipelineError(f"{where}: images have one channel or three, got {channels}")
    return channels, factor * sides[0], factor * sides[1]


def _classes(folder: Folder, kind: Kind, config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names: DiT's id2label, the first of several words for one, made different where two are the same; or numbers.

    All embeddings of a UNet are classes: its pipelines do not say whether the last one stands for any.
    """
    if kind.told != "class":
        count = config.get("num_class_embeds")
        return tuple(map(str, range(count))) if count else None
    count, labels = config.get("num_embeds_ada_norm", 1000), folder.index.get("id2label") or {}
    if not isinstance(labels, dict) or (labels and set(labels) != {str(i) for i in range(count)}):
        raise PipelineError(f"{folder.path / 'model_index.json'}: id2label names the classes 0 to {count - 1}")
    names = [str(labels[str(i)]).split(",")[0].strip() if labels else str(i) for i in range(count)]
    return tuple(name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names))


def _has_any(config: Mapping[str, Any], classes: Sequence[str] | None) -> bool:
    embeddings = config.get("num_class_embeds")
    return embeddings is None or len(classes or ()) < embeddings


def _same_classes(
    classes: tuple[str, ...], given: tuple[str, ...] | None, config: Mapping[str, Any]
) -> tuple[str, ...]:
    """The classes of a model's own data: of a UNet by number, and one fewer leaves one embedding for any.

    Raises:
        PipelineError: other classes.
    """
    embeddings = config.get("num_class_embeds")
    if given is not None and (len(given) in (embeddings, embeddings - 1) if embeddings else given == classes):
        return given
    wanted = f"{embeddings} or {embeddings - 1}" if embeddings else f"those of the model, {', '.join(classes[:5])}, ..."
    raise PipelineError(
        f"--data: a sub-folder for each class, {wanted}; got {', '.join(given[:5]) if given else 'none'}. Without "
        "--data, `kuosan evaluate RUN --data` scores pictures of no class"
    )


def _recipe(
    folder: Folder,
    name: str,
    kind: Kind,
    scheduler: Scheduler,
    configs: Mapping[str, dict[str, Any]],
    shape: tuple[int, int, int],
    classes: Sequence[str] | None,
    out: Path,
) -> dict[str, Any]:
    # None that stands for infinity aside, what JSON gives back is the same
    config = json.dumps({"_class_name": scheduler.name, **{k: _plain(v) for k, v in scheduler.config.items()}})
    steps, latent = scheduler.config["num_train_timesteps"], kind.autoencoder is not None
    learned = scheduler.learned_variance and not latent
    network = {"kind": "diffusers", "config": json.dumps(configs[kind.network]), "steps": steps}
    if scheduler.name == "FlowMatchEulerDiscreteScheduler":
        network["flow"] = True
    data: dict[str, Any] = {"pipeline": str(folder.path.resolve()), "size": shape[1], "channels": shape[0]}
    if kind.told == "text":
        network |= {"text_encoder": json.dumps(configs["text_encoder"]), **_empty(folder)}
        pretrained = str(out.expanduser().resolve() / "tokenizer")
        data["captions"] = {"length": network["length"], "pretrained": pretrained}
    elif classes:
        data["conditional"] = True
    objective: dict[str, Any] = {"kind": "hybrid" if learned else "simple"}
    if latent:
        objective = {"kind": "latent", "weighting": {"kind": "plain", "form": scheduler.predicts}}
    table: dict[str, Any] = {
        "description": f"{name} of diffusers, imported",
        "data": data,
        "process": {"kind": "diffusers", "config": config},
        "network": network,
        "denoiser": {"predicts": scheduler.predicts, "learned_variance": learned},
        "objective": objective,
        # to train on, begin with these weights
        "training": {"steps": 1, "start": str(out.expanduser().resolve()), "label_drop": 0.1},
        "sampling": {
            "solver": {"kind": "diffusers", "config": config},
            "steps": min(kind.steps, steps),
            "guidance": kind.guidance,
            "clip": not latent and scheduler.transform is not None,
        },
        "evaluation": {"bound_steps": steps, "variance": "learned" if learned else "beta"},
    }
    if classes and not _has_any(configs[kind.network], classes):
        table["training"]["label_drop"] = 0.0
    if kind.autoencoder is not None:
        table["autoencoder"] = {"kind": "diffusers", "config": json.dumps(configs[kind.autoencoder])}
    return table


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _empty(folder: Folder) -> dict[str, Any]:
    """``length`` of prompts, and ``empty``: the tokens of the empty one, begin, end and padding."""
    from kuosan.bridge.encoders import PretrainedWords

    where = folder.path / "tokenizer"
    folder.json("tokenizer/tokenizer_config.json")
    words = PretrainedWords.load(where)._tokenizer
    length = words.model_max_length
    ids = words("", padding="max_length", max_length=length, truncation=True)["input_ids"] if length < 4096 else []
    if len(ids) < 3 or len(ids) != length or len(set(ids[2:])) != 1:
        raise PipelineError(f"{where}: the empty prompt is a token at each end and padding, of model_max_length in all")
    return {"length": length, "empty": f"{ids[0]} {ids[1]} {ids[2]}"}


def _with_data(section: Mapping[str, Any], data: Path, shape: tuple[int, int, int]) -> dict[str, Any]:
    if shape[1] != shape[2]:
        raise PipelineError(f"--data: pictures are read as squares, and this pipeline makes {shape[1]} x {shape[2]}")
    kept = {k: v for k, v in section.items() if k != "pipeline"}
    return {"folder": str(data.expanduser().resolve()), **kept}


def _fill(folder: Folder, kind: Kind, configs: Mapping[str, dict[str, Any]], model: Any) -> None:
    """The pipeline's weights into the model."""
    network = (model.denoiser if kind.autoencoder is not None else model).network
    parts = {kind.network: network.model}
    if kind.autoencoder is not None:
        parts[kind.autoencoder] = model.model.decoder.autoencoder
    if kind.told == "text":
        parts["text_encoder"] = network.encoder
    for part, module in parts.items():
        module.load_state_dict(folder.weights(part, configs[part]))
    model.eval()


@torch.no_grad()
def _error(model: ImageAutoencoder, data: Any, levels: int) -> float:
    """The root of the mean squared error of training pictures, encoded and decoded."""
    x, errors = to_pixels(data.train.levels[:MEASURED_ON], levels), []
    model.to(device())
    for part in x.split(16):
        errors.append((part - model.decode(model.encode(part.to(device())).mean).mean.cpu()) ** 2)
    model.cpu()
    return float(torch.cat(errors).mean().sqrt().clamp_min(1e-3))


def _info(
    folder: Folder,
    name: str,
    recipe: Recipe,
    described: dict[str, Any],
    data: Any,
    classes: Sequence[str] | None,
    model: torch.nn.Module,
) -> dict[str, Any]:
    source = f"{name} of diffusers {folder.index.get('_diffusers_version', '?')}, {folder.path.resolve()}"
    of = {"name": folder.path.resolve().name, "train": 0, "held_out": 0, "licence": "not known", "source": source}
    of |= {"notes": ["imported without data"], "sha256": ""}
    if data is not None:
        classes = data.classes
        of = {"name": data.name, "train": len(data.train), "held_out": len(data.held_out), "licence": data.licence}
        of |= {"source": data.source, "notes": list(data.notes), "sha256": fingerprint(described)}
    return {
        "shape": described["shape"],
        "levels": described["levels"],
        "classes": list(classes) if classes else None,
        "data": of,
        "imported": source,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seed": recipe.seed,
        "processes": 1,
        "versions": {
            "kuosan": kuosan.__version__,
            "torch": version("torch"),
            "diffusers": version("diffusers"),
            "python": platform.python_version(),
        },
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {device().type}",
        "command": None,
    }
