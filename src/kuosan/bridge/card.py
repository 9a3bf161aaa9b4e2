"""The model card of an exported run: what is known of it, and in plain words what is not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kuosan.image.captioned import CaptionedMedium
from kuosan.recipe import Recipe
from kuosan.runs import DiffusionRun
from kuosan.sampler import Sampler

NOT_MEASURED = "not measured: `kuosan evaluate` measures it"


def card(run: DiffusionRun, chosen: Mapping[int, Sampler], pipeline: Any) -> str:
    """README.md of the folder: its head for the hub in YAML, and the rest in Markdown.

    Args:
        chosen: the sampler of each number of steps, the first one that of the example.
        pipeline: as it was saved.
    """
    kind, (first, *_) = type(pipeline).__name__, chosen.values()
    parts = [part for part in pipeline.components.values() if part is not None]
    ours = [type(part).__name__ for part in parts if type(part).__module__.startswith("kuosan")]
    tables = "TableScheduler" in ours
    names = run.classes or () if run.conditional else ()
    head = ["---", "license: other", "license_name: see-licences-below", "library_name: diffusers"]
    if kind == "StableDiffusionPipeline":
        head.append("pipeline_tag: text-to-image")
    elif not names:
        head.append("pipeline_tag: unconditional-image-generation")
    head += ["tags:", *(f"- {tag}" for tag in dict.fromkeys(("kuosan", "diffusion", run.recipe.family))), "---"]
    rows = [
        ("data", _data(run)),
        ("images", " x ".join(map(str, run.shape)) + f", {run.levels} levels" + _some(names)),
        ("network", f"{_kind(run.recipe.network)}, predicts {run.recipe.denoiser.predicts}{_edm(run.recipe)}"),
        ("parameters", f"{run.info['parameters']:,}"),
        ("process", _kind(run.recipe.process)),
        ("training", _training(run)),
        *(
            [("machine", run.info.get("machine", "not recorded")), ("training seed", str(run.info["seed"]))]
            if run.step
            else []
        ),
        *_measured(run),
        ("solver", _solvers(run, chosen) if tables else _kind(run.recipe.sampling.solver)),
        ("x0", _transform(first)),
        ("guidance", f"{first.how['guidance']:g}" + (" (none)" if not first.how["guidance"] else "")),
        ("versions", ", ".join(f"{name} {version}" for name, version in run.info["versions"].items())),
    ]
    data = run.info["data"]
    lines = [
        *head,
        "",
        f"# {run.folder.resolve().name}",
        "",
        run.recipe.description or f"{run.kind[0].upper()}{run.kind[1:]}{f' of {len(names)} classes' if names else ''}.",
        "",
        "## How to use it",
        "",
        "```python",
        *_example(kind, chosen, tables, ours, len(names), _prompt(run)),
        "```",
        "",
        *(f"- {note}" for note in _notes(run, kind, chosen, tables, ours)),
        "",
        "## What it is",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_cell(value)} |" for name, value in rows),
        "",
        "## Licences",
        "",
        f"The data: {data['licence']}. Kuosan, which wrote this folder, is Apache-2.0. "
        + (
            "No licence has been stated for the weights, which were made from the data: whoever passes them on has to "
            "see to what the data's licence says of that."
            if run.step
            else "The weights were imported, and the licence of the pipeline that they came from holds for them."
        ),
        "",
    ]
    return "\n".join(lines)


def _prompt(run: DiffusionRun) -> str:
    """One for the example: of the run's own captions, if it has some."""
    kept = run.medium.prompts[:1] if isinstance(run.medium, CaptionedMedium) else ()
    return kept[0] if kept and kept[0] else "a photograph of a cat"


def _example(
    kind: str, chosen: Mapping[int, Sampler], tables: bool, ours: Sequence[str], classes: int, prompt: str
) -> list[str]:
    steps, first = next(iter(chosen.items()))
    noise = "generators(range(4))" if ours else "torch.Generator().manual_seed(0)"
    call = f"num_inference_steps={first.table.evaluations if tables else steps}, generator={noise}"
    if kind == "StableDiffusionPipeline":
        call = f"4 * [{prompt!r}], guidance_scale={1 + first.how['guidance']:g}, {call}"
    elif classes:
        labels = [i % classes for i in range(4)]
        call = f"class_labels={labels}, guidance_scale={1 + first.how['guidance']:g}, {call}"
    else:
        call = f"batch_size=4, {call}"
    imports = ["from diffusers import DiffusionPipeline"]
    if ours:
        imports.insert(0, "import kuosan.bridge.components  # the classes of this folder's parts")
        imports.append("from kuosan.bridge import generators")
    else:
        imports.insert(0, "import torch")
    return [
        *imports,
        "",
        'pipe = DiffusionPipeline.from_pretrained(".")  # this folder',
        f"images = pipe({call}).images",
        'images[0].save("sample.png")',
    ]


def _notes(
    run: DiffusionRun, kind: str, chosen: Mapping[int, Sampler], tables: bool, ours: Sequence[str]
) -> Iterator[str]:
    first = next(iter(chosen.values()))
    if ours:
        yield (
            f"{', '.join(ours)} are classes of Kuosan: `pip install kuosan[diffusers]`. diffusers imports no module "
            "because a folder names it, hence the first line."
        )
        yield "Number k of `generators` begins from the noise that `kuosan sample` draws for seed k."
    if tables:
        counts = ", ".join(str(one.table.evaluations) for one in chosen.values())
        yield f"`num_inference_steps` is one of {counts}: there is a table of numbers for each, and no other."
    else:
        yield (
            "The scheduler is diffusers' own; `kuosan.bridge.fields.DIFFERENCES` says where its numbers are not those "
            "of `kuosan sample`."
        )
    if kind in ("DiTPipeline", "StableDiffusionPipeline"):
        tuned = ", which tuned tables are for" if first.how["solver"].startswith("tuned") else ""
        yield (
            f"`guidance_scale` is 1 + w, of the weight w that Kuosan counts from 0: {1 + first.how['guidance']:g} "
            f"here{tuned}; 1 is none."
        )
    if "Words" in ours:
        yield (
            "It knows the words of its training captions, and others as one unknown word; a prompt of more than "
            f"{run.recipe.data.captions.length} tokens is cut, which `kuosan sample` refuses."  # type: ignore[union-attr]
        )
    if kind == "DiTPipeline":
        yield "`pipe.get_label_ids` turns names of classes into numbers."
    if any(one.table.stochastic for one in chosen.values()) and kind in ("DiTPipeline", "LDMPipeline"):
        yield f"{kind} draws the noise of later steps from torch's global generator: set torch.manual_seed."
    yield f"`kuosan sample` then takes the nearest of {run.levels} levels for each value; this pipeline does not."


def _training(run: DiffusionRun) -> str:
    if not run.step:
        return "none by Kuosan: the weights were imported"
    return f"{run.step:,} steps of {run.recipe.training.batch_size}, {run.seconds:,.4g} s"


def _solvers(run: DiffusionRun, chosen: Mapping[int, Sampler]) -> str:
    usual = _kind(run.recipe.sampling.solver)
    return "; ".join(
        f"{one.table.evaluations} evaluations: "
        f"{'tuned to this run' if one.how['solver'].startswith('tuned') else usual}"
        for one in chosen.values()
    )


def _data(run: DiffusionRun) -> str:
    data = run.info["data"]
    if not data["train"]:
        return f"not known: the weights were imported, from a pipeline of diffusers that was named {data['name']}"
    source = "a folder of pictures" if run.recipe.data.folder else data["source"]  # and not where it lay
    return (
        f"{data['name']} ({source}); licence: {data['licence']}; {data['train']:,} to train on, "
        f"{data['held_out']:,} held out"
    )


def _some(names: Sequence[str], most: int = 20) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return f", classes {', '.join(names[:most])}{more}" if names else ""


def _kind(table: dict[str, Any] | None) -> str:
    table = dict(table or {})
    name = str(table.pop("kind", "none"))
    if isinstance(config := table.pop("config", None), str):  # of diffusers: of all that is there, its name
        name = f"{json.loads(config).get('_class_name')} of diffusers"
        table = {key: value for key, value in table.items() if not isinstance(value, str)}
    return name + (f" ({', '.join(f'{key} = {value}' for key, value in table.items())})" if table else "")


def _edm(recipe: Recipe) -> str:
    return (
        f", EDM's preconditioning of {recipe.denoiser.sigma_data:g}" if recipe.denoiser.preconditioning == "edm" else ""
    )


def _transform(first: Sampler) -> str:
    if first.how.get("threshold"):
        return f"thresholded at the quantile {first.how['threshold']:g} at every step"
    if first.how.get("transform"):
        return f"{first.how['transform']} at every step"
    return "clipped to [-1, 1] at every step" if first.how["clip"] else "as the network says it"


def _measured(run: DiffusionRun) -> list[tuple[str, str]]:
    """The rows of evaluation.json: the bound and the quality, if these weights were measured."""
    try:
        found = json.loads((run.folder / "evaluation.json").read_text("utf-8"))
    except (OSError, ValueError):
        return [("bound", NOT_MEASURED), ("quality", NOT_MEASURED)]
    if found.get("step") != run.step:
        return [("bound", NOT_MEASURED), ("quality", NOT_MEASURED)]
    bound, quality = found.get("likelihoods", {}).get("bound"), found.get("quality")
    unit = found.get("unit", {}).get("name", "")
    rows = [("bound", NOT_MEASURED), ("quality", NOT_MEASURED)]
    if bound:
        error = bound.get("standard_error")
        spread = "" if error is None else f" ± {error:.4f} (standard error over {found['scored']:,} held-out images)"
        rows[0] = ("bound", f"{bound['total']:.4f}{spread} {unit}; {bound.get('form', '')}")
    if quality and "attributes" in quality:
        said = []
        for which, words in (("seen", "seen in training"), ("unseen", "held out")):
            of = {key: one[which]["right"] for key, one in quality["attributes"].items() if one[which]}
            if of:
                said.append(f"{', '.join(f'{key} {share:.1%}' for key, share in of.items())} (combinations {words})")
        rows[1] = (
            "quality",
            f"as the captions ask: {'; '.join(said)} of {quality['samples']:,} samples, by classifiers of real images, "
            f"at guidance {quality['guidance']:g}",
        )
    elif quality and "frechet" not in quality:  # another judge's
        numbers = {key: value for key, value in quality.items() if isinstance(value, int | float)}
        rows[1] = ("quality", ", ".join(f"{key} {value:.4g}" for key, value in numbers.items()))
    elif quality:
        rows[1] = (
            "quality",
            f"Frechet distance {quality['frechet']:.3f} in a classifier's features ({quality['frechet_of_real']:.3f} "
            f"of real images), {quality['confident']:.1%} of {quality['samples']:,} samples 90 % sure, "
            f"at guidance {quality['guidance']:g}",
        )
    return rows


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
