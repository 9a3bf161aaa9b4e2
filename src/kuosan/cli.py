"""The command line. Torch is imported by the commands that need it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kuosan.options import parser
from kuosan.plain import plain

INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it did what was asked, 2 for bad input, 1 for a failure, 130 when interrupted."""
    try:
        done = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as head, has seen enough; nothing is left to be flushed at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return done


def _run(arguments: Sequence[str] | None) -> int:
    asked = parser()
    options, rest = asked.parse_known_args(arguments)
    if not hasattr(options, "command"):
        asked.print_help()
        return 0
    if rest and not (options.command == "train" and all("=" in one and not one.startswith("-") for one in rest)):
        asked.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # settings after an option
        options.override += rest
    try:
        result, words = _COMMANDS[options.command](options)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        return _explain(error)
    if os.environ.get("RANK", "0") != "0":  # under torchrun, one process speaks
        return 0
    if options.json:
        print(json.dumps(plain(result), ensure_ascii=False))
    else:
        print(words)
    return 0


def _explain(error: Exception) -> int:
    """Say an expected error in one line; let a bug show its traceback."""
    kind = type(error).__name__
    if kind == "Interrupted":
        print(f"\n{error}", file=sys.stderr)
        return INTERRUPTED
    missing = isinstance(error, ImportError) and "pip install" in str(error)  # an extra, and how to get it
    bad_input = missing or isinstance(error, ValueError | OSError)
    if not bad_input and kind not in ("TrainingError", "CheckpointError", "FetchError", "SamplingError", "SolveError"):
        raise error
    print(f"kuosan: {error}", file=sys.stderr)
    return 2 if bad_input else 1


# -- commands: each returns (the JSON object, the words) ---------------------------------------------------------------


def _train(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kuosan import recipe as recipes

    recipe = recipes.read(options.recipe, options.override)
    folder = Path(options.out or Path("runs") / Path(options.recipe).stem)
    from kuosan.train import train

    run = train(recipe, folder, shlex.join(["kuosan", *sys.argv[1:]]))
    words = f"trained {run.folder}; next: kuosan sample, evaluate or report {run.folder}"
    return {"run": str(run.folder), "step": recipe.training.steps}, words


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the options say of sampling; what is None is the recipe's."""
    from kuosan.process import Grid
    from kuosan.recipe import as_table

    def kind(words: str | None) -> dict[str, Any] | None:
        return as_table(shlex.split(words)) if words else None

    settings: dict[str, Any] = {"guidance": options.guidance}
    for name in (
        *("steps", "rescale", "interval", "threshold", "precision", "weak", "known", "mask", "corrections"),
        *("input", "griffin_lim", "text", "vocoder", "speed", "seconds"),
        *("negative", "image", "strength"),
        *("prompt", "infill", "length", "candidates", "temperature", "nucleus", "control", "control_steps"),
    ):
        settings[name] = getattr(options, name, None)
    if getattr(options, "prompts", None) is not None:
        from kuosan.files import decoded

        if settings["prompt"] is not None:
            raise ValueError("give one prompt, or a file of prompts: drop one of them")
        settings["prompt"] = [line.strip() for line in decoded(Path(options.prompts)).splitlines() if line.strip()]
        if not settings["prompt"]:
            raise ValueError(f"{options.prompts} holds no prompts: one stands on each line")
    if getattr(options, "blocks", None) is not None:
        settings["blocks"] = options.blocks
    settings["solver"], settings["corrector"] = (
        kind(getattr(options, "solver", None)),
        kind(getattr(options, "corrector", None)),
    )
    grid = getattr(options, "grid", None)
    if grid and grid[0] in "0123456789.":
        try:
            times = tuple(float(t) for t in grid.split(","))
        except ValueError:
            raise ValueError(f"a grid is a name with its settings, or times like 1,0.6,0.2; got {grid!r}") from None
        if settings["steps"] not in (None, len(times)):
            raise ValueError(f"{len(times)} times are given, but {settings['steps']} steps asked for: drop --steps")
        settings["grid"] = Grid(times)
    else:
        settings["grid"] = kind(grid)
    return settings


def _sample(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kuosan.runs import load
    from kuosan.samples import save_samples

    run = load(options.run)
    count, seeds = options.count, options.seeds
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if seeds is None and count is not None:
        seeds = list(range(count))
    if count is not None and count != len(seeds):
        raise ValueError(f"count is {count}, but there are {len(seeds)} seeds: one for each sample")
    classes = None if options.classes is None else [run.class_of(name) for name in options.classes.split(",")]
    out = Path(options.out) if options.out else None
    result = save_samples(run, seeds, classes, out, options.batch_size, **_settings(options))
    n = len(result["samples"])
    words = f"{n} sample{'s' * (n != 1)}, {result['evaluations']:g} evaluations each ({result['solver']})"
    return result, f"{run.medium.glimpse(result['samples'])}{words}: {result['sheet']}"


def _tune(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from dataclasses import asdict

    from kuosan.progress import Progress
    from kuosan.runs import load_diffusion

    run = load_diffusion(options.run)
    given = {k: getattr(options, k) for k in ("pairs", "iterations", "batch_size", "fine", "seed")}
    how = {k: v for k, v in given.items() if v is not None}
    settings = {k: v for k, v in _settings(options).items() if k != "steps"}
    found, path = run.tune(options.steps, settings=settings, progress=Progress("tune"), **how)
    guided = f" --guidance {options.guidance:g}" if options.guidance is not None else ""
    guided += f" --weak {options.weak}" if options.weak else ""
    guided += f" --negative {shlex.quote(options.negative)}" if options.negative else ""
    guided += "" if run.recipe.sampling.solver.get("kind") in ("auto", "tuned") else " --solver tuned"
    before, after = found.start_errors, found.errors
    lines = [
        f"{'distance to the fine solution, fresh samples':48}{'rmse':>10}{'median':>10}",
        f"{'  ' + found.start:48}{before.rmse:>10.4f}{before.median:>10.4f}",
        f"{'  tuned':48}{after.rmse:>10.4f}{after.median:>10.4f}",
        "" if found.improved else "nothing better than the start was found; the start is kept",
        f"{path}; `kuosan sample {run.folder} --steps {options.steps}{guided}` uses it",
    ]
    result = {"table": str(path), "start": found.start, "improved": found.improved}
    result |= {"errors": asdict(after), "start_errors": asdict(before)}
    return result, "\n".join(line for line in lines if line)


def _table(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kuosan.runs import load_diffusion
    from kuosan.tables import plot, words

    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("drawing needs matplotlib: pip install 'kuosan[report]'")
    run = load_diffusion(options.run)
    sampler = run.sampler(**_settings(options))
    result: dict[str, Any] = sampler.how
    result |= {"table": sampler.table.to_json()}
    lines = [
        f"{sampler.how['solver']}, {sampler.table.evaluations} evaluations",
        "",
        words(sampler.table, run.denoiser.process),
    ]
    if options.plot:
        lines += ["", str(plot(sampler.table, run.denoiser.process, Path(options.plot)))]
    return result, "\n".join(lines)


def _compare(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kuosan import compare
    from kuosan.progress import Progress
    from kuosan.runs import load_diffusion

    run = load_diffusion(options.run)
    found = compare.compare(
        run,
        options.solvers or compare.SOLVERS,
        options.evaluations or compare.EVALUATIONS,
        options.count,
        progress=Progress("compare"),
        guidance=options.guidance,
        precision=options.precision,
    )
    path = run.folder / "compare.json"
    path.write_text(json.dumps(plain(found), indent=1), "utf-8")
    picture = compare.plot(found, run.folder / "compare.png")
    return found, f"{compare.words(found)}\n\n{picture}"


def _evaluate(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kuosan.runs import load

    run = load(options.run)
    asked = {"bound": options.bound, "importance": options.importance is not None, "ode": options.ode}
    measures = [name for name, wanted in asked.items() if wanted]
    settings = {
        "variance": options.variance,
        "steps": options.bound_steps,
        "on_trajectory": options.trajectory or None,
    }
    ode = {name: getattr(options, name) for name in ("tolerance", "divergence", "dequantisation")}
    ode = {name: value for name, value in ode.items() if value is not None}
    if ode and not options.ode:
        raise ValueError(f"--{next(iter(ode))} is of the ODE: add --ode")
    result = run.evaluate(
        measures or None,
        quality=not measures and options.data is None,
        split="held_out" if options.split == "test" else options.split,
        files=options.data,
        examples=options.examples,
        importance=64 if options.importance is None else options.importance,
        draws=options.draws,
        ode=ode,
        guidance=options.guidance,
        unconditional=options.unconditional,
        **{name: value for name, value in settings.items() if value is not None},
    )
    what = {"held_out": "held-out ", "train": "training ", "files": ""}[result["split"]] + run.medium.many
    unit = run.medium.unit
    scored = f": {result['scored']} {what}" if result["scored"] else ""
    lines = [f"{result['run']}, step {result['step']}{scored}"]
    if result["likelihoods"]:
        lines += ["", f"{unit.name:32s}{'':>9s}{'±':>9s}{'± drawn':>10s}{'evaluations':>14s}"]
    one: dict[str, Any] = {}
    for name, one in result["likelihoods"].items():
        lines.append(
            f"{_measure_in_words(name, one):32s}{one['total']:>9.4f}{_known(one['standard_error']):>9s}"
            f"{_known(one['monte_carlo_error']):>10s}{one['evaluations_per_example']:>14,.0f}"
        )
        if name == "bound":
            bits = result[unit.key]
            terms = {term: round(bits[term], 4) + 0.0 for term in ("reconstruction", "prior", "matching")}  # no -0
            lines += [f"{'  ' + term:32s}{value:>9.4f}" for term, value in terms.items()]
            form = f"{bits['form']}, {bits['terms']} terms" if "steps" in bits else bits["form"]
            lines.append(f"  ({form}, {bits['draws']} draw{'s' if bits['draws'] > 1 else ''})")
    if "nats_per_token" in one:
        lines.append(f"{'  per token':32s}{one['nats_per_token']:>9.4f}   perplexity {one['perplexity']:.4g}")
    if codes := result.get("reconstruction"):
        lines.append(f"{'reconstruction, PSNR in dB':32s}{codes['psnr']:>9.2f}")
        lines.append(f"  (from {codes['numbers']:,} numbers, {codes['times_fewer']:.3g} times fewer)")
    lines += [f"{name:32s}{value:>9.4f}" for name, value in result["baselines"].items()]
    if result.get("condition"):
        lines.append(f"  ({result['condition']})")
    if result["split"] == "files":
        lines += _least_likely(result["examples"], unit)
    quality = None if measures or options.data else result["quality"]
    if quality:
        lines += ["", *run.medium.quality_in_words(quality)]
        if run.conditional:
            lines.append(f"  guidance: {quality['guidance']:g}")
    elif not measures and options.data is None:
        lines += ["", f"no judge of quality: {run.why_no_judge}"]
    lines.append("")
    if "examples" in result:
        lines.append(f"each {run.medium.one}: {result['examples']}")
    lines.append(result["file"])
    return result, "\n".join(lines)


def _known(error: float | None) -> str:
    return "-" if error is None else f"{error:.4f}"


def _measure_in_words(name: str, found: dict[str, Any]) -> str:
    words = {"bound": "bound", "importance": "importance-weighted", "ode": "by ODE"}[name]
    return f"{words}, {found['quantity']}" if name == "importance" else words


def _least_likely(path: str, unit: Any, most: int = 10) -> list[str]:
    """The examples of a file of scores that are least likely by its first measure, the least likely first."""
    import csv

    with open(path, encoding="utf-8", newline="") as file:
        scores = list(csv.DictReader(file))
    column = next(name for name in scores[0] if name.endswith(unit.key))
    scores.sort(key=lambda one: -float(one[column]))
    shown = [f"  {float(one[column]):>8.4f}  {one['example']}" for one in scores[:most]]
    return ["", f"least likely first, {unit.name}:", *shown, *(["  ..."] if len(scores) > most else [])]


def _export(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kuosan.bridge.export import export

    path = export(options.run, options.path, options.steps, options.guidance)
    index = json.loads((path / "model_index.json").read_text("utf-8"))
    scheduler = json.loads((path / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    ours = [part for part, of in index.items() if isinstance(of, list) and str(of[0]).startswith("kuosan")]
    found: dict[str, Any] = {
        "path": str(path),
        "pipeline": index["_class_name"],
        "scheduler": scheduler["_class_name"],
        "evaluations": [int(count) for count in scheduler.get("tables", ())],
        "of_kuosan": ours,
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
        "card": str(path / "README.md"),
    }
    rows = [
        ("pipeline", f"{found['pipeline']} of diffusers{', after `import kuosan.bridge.components`' if ours else ''}"),
        ("scheduler", found["scheduler"]),
        ("steps", ", ".join(map(str, found["evaluations"]))),
        ("size", f"{found['bytes'] / 1e6:,.1f} MB"),
        ("card", found["card"]),
    ]
    return found, "\n".join(f"{name:12}{value}" for name, value in rows if value)


def _import(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kuosan.bridge.importing import import_pipeline

    found = import_pipeline(options.path, options.out, options.data)
    run, scheduler = found.run, found.scheduler
    sampling, shape = run.recipe.sampling, " x ".join(map(str, run.shape))
    codes = getattr(run, "state_shape", run.shape)
    result: dict[str, Any] = {
        "run": str(run.folder),
        "pipeline": found.pipeline,
        "shape": list(run.shape),
        "codes": None if codes == run.shape else list(codes),
        "scheduler": scheduler.name,
        "timesteps": scheduler.config["num_train_timesteps"],
        "predicts": scheduler.predicts,
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "classes": len(run.classes or ()),
        "parameters": run.info["parameters"],
        "left_out": list(found.left_out),
    }
    betas = scheduler.config.get("beta_schedule", "a flow")
    guided = f", guidance {sampling.guidance:g}" if sampling.guidance else ""
    rows = [
        ("pipeline", f"{found.pipeline} of diffusers"),
        ("shape", shape if codes == run.shape else f"{shape}, codes {' x '.join(map(str, codes))}"),
        ("process", f"{result['timesteps']:,} timesteps, {betas}"),
        ("predicts", scheduler.predicts),
        ("sampling", f"{sampling.steps} steps of {scheduler.name}{guided}"),
        ("classes", f"{result['classes']:,}" if result["classes"] else ""),
        ("parameters", f"{result['parameters']:,}"),
        ("left out", ", ".join(found.left_out)),
        ("run", str(run.folder)),
        ("next", f"kuosan sample {run.folder}"),
        ("", f'kuosan sample {run.folder} --solver "dpm_solver++ order=2" --steps 20'),
        ("", f"kuosan evaluate {run.folder}{'' if options.data else ' --data PICTURES'}"),
    ]
    return result, "\n".join(f"{name:12}{value}" for name, value in rows if value)


def _report(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kuosan.report import write_report
    from kuosan.runs import load

    path = write_report(load(options.run))
    return {"report": str(path)}, f"report: {path}"


def _recipes(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kuosan import recipe as recipes

    found = {name: recipes.read(name).description for name in recipes.shipped()}
    if options.name:
        if options.name not in found:
            raise ValueError(f"there is no recipe {options.name!r}; there are {', '.join(found)}")
        text = recipes.shipped()[options.name].read_text("utf-8")
        return {"name": options.name, "toml": text}, text.rstrip()
    width = max(map(len, found))
    return found, "\n".join(f"{name:{width}}  {what}" for name, what in found.items())


def _data(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kuosan.fetch import catalogue, fetch

    if options.name:
        path = fetch(options.name)
        return {"name": options.name, "path": str(path)}, f"{options.name}: {path}"
    entries = catalogue()
    width = max(len(entry.name) for entry in entries)
    words = "\n".join(f"{e.name:{width}}  {e.description} ({e.licence})" for e in entries)
    return {e.name: e.description for e in entries}, words


_COMMANDS = {
    "train": _train,
    "sample": _sample,
    "tune": _tune,
    "table": _table,
    "compare": _compare,
    "evaluate": _evaluate,
    "export": _export,
    "import": _import,
    "report": _report,
    "recipes": _recipes,
    "data": _data,
}


if __name__ == "__main__":
    sys.exit(main())
