"""A run as a folder of diffusers: opened by ``DiffusionPipeline.from_pretrained``, with a model card that says it all.

diffusers 0.42.1 opens pipelines of its own classes only, and components of modules that are already imported. So the
folder names one of its pipelines, whichever does what the run does, and is opened after
``import kuosan.bridge.components``.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kuosan.bridge.autoencoders import DiffusersAutoencoder
from kuosan.bridge.card import card
from kuosan.bridge.networks import DiffusersNetwork, DiffusersTextNetwork, read_json
from kuosan.bridge.solver import DiffusersSolver
from kuosan.bridge.steps import EULER
from kuosan.build import make_solver
from kuosan.discrete.lengths import PAD
from kuosan.runs import FAMILIES, DiffusionRun, LatentRun, Run, RunError, load
from kuosan.sampler import Sampler, TunedTableError
from kuosan.seeds import stream
from kuosan.solvers import check_seeds
from kuosan.tokenizer import SPECIAL, UNKNOWN

#: Pipelines that begin with noise of the scheduler's standard deviation, and let it scale what the network is given.
SCALES_NOISE = ("LDMPipeline", "StableDiffusionPipeline")
#: The class that stands for "any" in diffusers' pipeline of classes.
NO_CLASS = 1000


def _components() -> ModuleType:
    try:
        from kuosan.bridge import components
    except ImportError as error:
        raise ImportError(f"this needs diffusers: pip install kuosan[diffusers] ({error})") from None
    return components


def generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """One for each seed: a pipeline that is given them begins from the noise that this package draws for these seeds.

    Raises:
        ValueError: as :func:`kuosan.solvers.check_seeds`.
    """
    return [stream("sample", seed) for seed in check_seeds(seeds)]


def scheduler_of(run: Run | str | Path, steps: int | Sequence[int] | None = None, guidance: float | None = None) -> Any:
    """The sampler of a run as a scheduler: ``pipe.scheduler = kuosan.bridge.scheduler_of("runs/x", steps=8)``.

    A tuned table where there is one for so many steps and this guidance; else the recipe's solver.

    Args:
        run: a run, or its folder.
        steps: one number, or several, each with a table of its own; default the recipe's, and those that were tuned.
        guidance: the weight w that tuned tables are for; default the recipe's. Guiding is left to the pipeline.

    Returns:
        A :class:`~kuosan.bridge.components.TableScheduler`, for a network that says what the run's does.

    Raises:
        ImportError: diffusers is not installed.
        RunError: not the run of a diffusion model of images.
        ValueError: a way of sampling that is not a table of numbers.
    """
    components = _components()
    run = _of_images(run)
    return _tables(components, run, samplers(run, steps, guidance))


def export(
    run: Run | str | Path,
    path: str | Path,
    steps: int | Sequence[int] | None = None,
    guidance: float | None = None,
) -> Path:
    """Write a run as a folder that diffusers opens: weights, tables and a model card. The whole folder or nothing.

    A network, an autoencoder and a scheduler that are diffusers' own, of a run that was imported, are written as they
    are: a folder of nothing else opens without this package.

    Args:
        run: of a diffusion model of images or of their codes; or its folder.
        path: a folder that is empty or not there.
        steps, guidance: of the tables: :func:`scheduler_of`.

    Raises:
        ImportError: diffusers is not installed.
        RunError: another kind of run, or one that no pipeline of diffusers can sample.
        ValueError: the folder is not empty, or a way of sampling that is not a table of numbers.
    """
    components, path = _components(), Path(path)
    run = _of_images(run)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} is not an empty folder: choose another, or empty it")
    chosen = samplers(run, steps, guidance)
    pipeline = _pipeline(components, run, chosen)
    aside = path.parent / f".{path.name}.exporting"
    shutil.rmtree(aside, ignore_errors=True)  # of an export that was killed
    try:
        pipeline.save_pretrained(aside)
        (aside / "README.md").write_text(card(run, chosen, pipeline), "utf-8")
        if path.exists():
            path.rmdir()
        aside.rename(path)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return path


def _of_images(run: Run | str | Path) -> DiffusionRun:
    found = run if isinstance(run, Run) else load(run)
    if not isinstance(found, DiffusionRun) or found.recipe.family not in ("diffusion", "latent"):
        raise RunError(
            f"{found.folder} is the run of {FAMILIES[found.recipe.family]}: diffusers is given diffusion models of "
            "images, and latent ones"
        )
    captions = found.recipe.data.captions
    if captions is not None and captions.pretrained is not None and not _of_text(found):
        raise RunError(
            f"{found.folder} reads captions with {captions.pretrained}, which lies elsewhere, and a folder for "
            "diffusers has to have all that it needs: train with a reader of its own"
        )
    return found


def _of_text(run: DiffusionRun) -> bool:
    """Whether it is told texts by the encoder of Stable Diffusion."""
    return isinstance(run, LatentRun) and isinstance(run.denoiser.network, DiffusersTextNetwork)


def samplers(run: DiffusionRun, steps: int | Sequence[int] | None, guidance: float | None) -> dict[int, Sampler]:
    """The run's sampler for each number of steps; by default those of the recipe and of its tuned tables.

    Raises:
        ValueError: no steps, a corrector, or guidance that is not the same at every step.
    """
    section = run.recipe.sampling
    counts = [section.steps] if steps is None else [steps] if isinstance(steps, int) else list(steps)
    if not counts:
        raise ValueError("give at least one number of steps")
    found = {count: run.sampler(steps=count, guidance=guidance) for count in counts}
    first = found[counts[0]]
    if first.corrector is not None:
        raise ValueError(
            "a corrector is no table: pipelines of diffusers have no place for it; drop sampling.corrector"
        )
    if uneven := [key for key in ("interval", "rescale") if key in first.how]:
        raise ValueError(
            f"pipelines of diffusers guide by the same weight at every step: drop sampling.{uneven[0]}, or export with "
            "guidance 0"
        )
    if steps is None:
        names = (re.match(r"steps-(\d+)", file.name) for file in run.tuned.folder.glob("*.json"))
        for count in sorted({int(name[1]) for name in names if name} - {section.steps}):
            with contextlib.suppress(TunedTableError):  # tuned for other guidance
                other = run.sampler(steps=count, guidance=guidance)
                found |= {count: other} if _is_tuned(other) else {}
    return found


def _is_tuned(sampler: Sampler) -> bool:
    return sampler.how["solver"].startswith("tuned")


# -- the parts of a pipeline -------------------------------------------------------------------------------------------


def _pipeline(components: ModuleType, run: DiffusionRun, chosen: Mapping[int, Sampler]) -> Any:
    """The pipeline of diffusers that does what the run does.

    Raises:
        RunError: none of them does.
    """
    import diffusers

    classes = len(run.classes or ()) if run.conditional else 0
    latent = isinstance(run, LatentRun)
    kind: Any = diffusers.DiTPipeline if classes else diffusers.LDMPipeline if latent else diffusers.DDPMPipeline
    told = run.recipe.data.captions is not None
    kind = diffusers.StableDiffusionPipeline if told else kind
    _, height, width = run.state_shape
    if told and (side := run.shape[1]) % 8:
        raise RunError(f"{run.folder} makes images of {side} pixels a side, and {kind.__name__} multiples of 8")
    if height != width and kind is not diffusers.DDPMPipeline:
        raise RunError(f"{run.folder} makes samples of {height} x {width}, and {kind.__name__} makes squares")
    if classes > NO_CLASS:
        raise RunError(f"{run.folder} has more than {NO_CLASS} classes, the number that diffusers says for none")
    if next(iter(chosen.values())).how["guidance"] < 0:
        raise RunError(f"{kind.__name__} does not guide by a weight under 0")
    network = _own_network(components, run)
    scheduler = _own_scheduler(components, run, chosen, kind.__name__, network)
    if run.denoiser.learned_variance and scheduler is None:
        network = None  # which only a scheduler of the same kind can take whole
    if network is None and _of_text(run):
        raise RunError(f"{run.folder} reads its network's output otherwise than {kind.__name__} does")
    if network is None:
        network = _network(components, run, classes)
    if scheduler is None:
        scheduler = _tables(components, run, chosen)
        starts = {table["start"] for table in scheduler.config.tables.values()}
        if starts != {1.0} and kind.__name__ not in SCALES_NOISE:
            raise RunError(
                f"{run.folder} begins with noise of standard deviation {max(starts):g}, and {kind.__name__} with 1: "
                "take another solver, or the table alone, from kuosan.bridge.scheduler_of"
            )
    if kind is diffusers.DDPMPipeline:
        return kind(network, scheduler)
    decoder = _autoencoder(components, run) if isinstance(run, LatentRun) else components.Pixels()
    if kind is diffusers.LDMPipeline:
        return kind(decoder, network, scheduler)
    if told:
        encoder = run.denoiser.network.encoder if _of_text(run) else components.Words(pad=PAD)
        unsafe = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return kind(decoder, encoder, _tokenizer(run), network, scheduler, **unsafe)
    pipeline: Any = kind(network, decoder, scheduler)
    pipeline.register_to_config(id2label={str(i): name for i, name in enumerate(run.classes or ())})
    return pipeline


def _tokenizer(run: DiffusionRun) -> Any:
    """The run's words as a tokenizer of transformers."""
    from transformers import CLIPTokenizer, PreTrainedTokenizerFast

    if _of_text(run):
        return CLIPTokenizer.from_pretrained(run.folder / "tokenizer", local_files_only=True)
    import tokenizers

    said = json.loads((run.folder / "tokenizer.json").read_text("utf-8"))["tokenizer"]
    library, captions = tokenizers.Tokenizer.from_str(json.dumps(said)), run.recipe.data.captions
    assert captions is not None
    return PreTrainedTokenizerFast(
        tokenizer_object=library,
        pad_token=SPECIAL[PAD],
        unk_token=SPECIAL[UNKNOWN],
        model_max_length=captions.length,
        split_special_tokens=True,  # a text that spells one out is ordinary text
    )


def _tables(components: ModuleType, run: DiffusionRun, chosen: Mapping[int, Sampler]) -> Any:
    denoiser, found = run.denoiser, list(chosen.values())
    return components.TableScheduler.of(
        [one.table for one in found],
        denoiser.process,
        components.form_of(denoiser),
        found[0].transform,
        [one.start for one in found],
    )


def _own_scheduler(
    components: ModuleType, run: DiffusionRun, chosen: Mapping[int, Sampler], pipeline: str, network: Any | None
) -> Any | None:
    """The scheduler of diffusers that the run's solver is, if it is one and this pipeline calls it as it wants."""
    import diffusers

    solver = make_solver(run.recipe.sampling.solver) if run.recipe.sampling.solver["kind"] == "diffusers" else None
    if not isinstance(solver, DiffusersSolver) or solver.eta or any(map(_is_tuned, chosen.values())):
        return None
    read, kind = solver.scheduler, getattr(diffusers, solver.scheduler.name)
    if read.predicts != components.form_of(run.denoiser) or (read.learned_variance and network is None):
        return None
    if run.denoiser.learned_variance and pipeline != "DDPMPipeline":  # the others drop what is said of it
        return None
    scales = read.name in EULER and pipeline not in SCALES_NOISE
    told = pipeline == "DDPMPipeline" and "generator" not in inspect.signature(kind.step).parameters
    return None if scales or told else kind.from_config(read_json(solver.config))


def _own_network(components: ModuleType, run: DiffusionRun) -> Any | None:
    """The model of diffusers that the run's network is, if a pipeline may take what it says as it comes."""
    denoiser, network = run.denoiser, run.denoiser.network
    if not isinstance(network, DiffusersNetwork):
        return None
    clock = components.Clock.of(denoiser.process)
    fits = denoiser.predicts == components.form_of(denoiser) and network.classes in (0, NO_CLASS)
    return network.model if fits and (network.steps, network.flow) == (clock.steps, clock.flow) else None


def _network(components: ModuleType, run: DiffusionRun, classes: int) -> Any:
    channels, height, width = run.state_shape
    shape = {
        "in_channels": channels,
        "sample_size": height if height == width else [height, width],
        "out_channels": channels,
        "levels": 0 if isinstance(run, LatentRun) else run.levels,
    }
    if run.recipe.data.captions is None:
        found = components.Network(recipe=_recipe(run), **shape, classes=classes)
    else:
        found = components.TextNetwork(recipe=_recipe(run), **shape)
    found.denoiser.load_state_dict(run.denoiser.state_dict())
    return found


def _autoencoder(components: ModuleType, run: LatentRun) -> Any:
    if isinstance(run.model, DiffusersAutoencoder):
        own = run.model.model.decoder.autoencoder
        if not own.config.get("shift_factor"):  # which pipelines take no notice of
            return own
    halvings = math.log2(run.shape[1] / run.state_shape[1])
    found = components.Autoencoder(
        recipe=_recipe(run), shape=list(run.shape), levels=run.levels, block_out_channels=[1] * (1 + round(halvings))
    )
    names = found.autoencoder.state_dict()
    found.autoencoder.load_state_dict({k: v for k, v in run.model.state_dict().items() if k in names})
    return found


def _recipe(run: DiffusionRun) -> dict[str, Any]:
    """What of the recipe models are made from, as JSON; names of folders without the way to them."""
    found = run.recipe.model_dump(exclude_defaults=True, exclude={"description", "sampling", "evaluation"})
    data, training = found["data"], found["training"]
    for table, key in ((data, "folder"), (data, "pipeline"), (training, "start")):
        if key in table:
            table[key] = Path(table[key]).name
    found["training"] = {key: training[key] for key in ("steps", "start") if key in training}
    found["sampling"] = {"clip": run.recipe.sampling.clip}  # of which a recipe of codes says that there is none
    return found
