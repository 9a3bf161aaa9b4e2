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

from kuosan import __version__
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
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if not hasattr(options, "command"):
        parser.print_help()
        return 0
    if rest and not (options.command is _train and all("=" in one and not one.startswith("-") for one in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # settings after an option
        options.override += rest
    try:
        result, words = options.command(options)
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


def _numbers(text: str) -> list[int]:
    """Whole numbers like 0-15,20."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            span = range(int(first), int(last if dash else first) + 1)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected numbers like 0-15,20, got {text!r}") from None
        if not span or span[-1] - span[0] >= 10**7:
            raise argparse.ArgumentTypeError(f"{part.strip()!r} is not a range of 1 to ten million numbers")
        numbers += span
    return numbers


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


# -- words -------------------------------------------------------------------------------------------------------------


class _TrainHelp(argparse.Action):
    """`kuosan train --help` lists what an override may set, from the recipe's own types."""

    def __call__(self, parser, namespace, values, option_string=None):
        from kuosan.build import describe_kinds
        from kuosan.recipe import describe

        parser.print_help()
        print(f"\nsettings (override with key=value):\n{describe()}\n\n{describe_kinds()}")
        parser.exit()


def _sampling_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--solver", metavar="WORDS", help='such as auto, tuned, "ddim eta=0.5", "dpm_solver++ order=3"'
    )
    command.add_argument(
        "--grid", metavar="WORDS", help='such as karras, "rectified shift=3", trajectory, or 1,0.6,0.2'
    )
    command.add_argument("--steps", type=int, help="steps from noise to data")
    command.add_argument("--guidance", type=float, help="classifier-free weight w: 0 none; x0(c) + w (x0(c) - x0())")
    command.add_argument("--weak", metavar="RUN", help="guide away from this weaker run instead (autoguidance)")
    command.add_argument(
        "--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guide between these noise levels sigma/alpha"
    )
    command.add_argument("--rescale", type=float, help="guided contrast towards the unguided, 0 to 1")
    command.add_argument("--threshold", type=float, help="dynamic thresholding of x0 at this quantile, such as 0.995")
    command.add_argument("--corrector", metavar="WORDS", help='such as "langevin snr=0.16 steps=1"')
    command.add_argument("--precision", help="of the network: float32, or bfloat16: faster for large batches")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kuosan", description="Diffusion models: train, sample, measure.")
    parser.add_argument("--version", action="version", version=f"kuosan {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def add(name: str, function: Any, what: str, **settings: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=what, description=what, **settings)
        command.add_argument("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
        command.set_defaults(command=function)
        return command

    train = add("train", _train, "train a recipe, or go on with a run that was interrupted", add_help=False)
    train.add_argument("-h", "--help", nargs=0, action=_TrainHelp, help="show this and every setting")
    train.add_argument("recipe", help="a name from `kuosan recipes`, or a path to a .toml file")
    train.add_argument("override", nargs="*", help="settings such as training.steps=500 data.folder=photos")
    train.add_argument("--out", metavar="RUN", help="the run's folder (default: runs/RECIPE)")

    draw = add("sample", _sample, "draw samples from a run")
    draw.add_argument("run", metavar="RUN", help="a run's folder")
    draw.add_argument("-n", "--count", type=int, help="how many (default 16)")
    draw.add_argument("--seeds", type=_numbers, help="one for each sample, like 0-15,20 (default 0, 1, 2, ...)")
    draw.add_argument("--class", dest="classes", metavar="NAMES", help="classes asked for, in turn, like 3 or 0,1,2")
    _sampling_options(draw)
    draw.add_argument(
        "--known",
        metavar="PICTURE",
        help="hold a part of this picture, draw the rest; it and the mask are cropped and scaled",
    )
    draw.add_argument("--mask", metavar="PICTURE", help="white where it is drawn anew, black where it is held")
    draw.add_argument(
        "--input",
        nargs="+",
        metavar="FILE",
        help="of a vocoder: sound files that are analysed and made anew, or mels (.npz); default: held-out clips",
    )
    draw.add_argument("--text", help="of text to speech: what is to be said (default: held-out texts)")
    draw.add_argument("--vocoder", metavar="RUN", help="of text to speech: what makes sound (default: Griffin-Lim)")
    draw.add_argument("--speed", type=float, help="of text to speech: 2 is twice as fast as the voice by itself")
    draw.add_argument("--seconds", type=float, help="of text to speech: how long it is to last (default: by the text)")
    draw.add_argument(
        "--griffin-lim", type=int, metavar="N", help="of speech: iterations that find phases (default 32)"
    )
    draw.add_argument("--prompt", metavar="TEXT", help="what images are to show; of texts: how each begins")
    draw.add_argument("--prompts", metavar="FILE", help="of captioned images: a prompt on each line, drawn in turn")
    draw.add_argument("--negative", metavar="TEXT", help="a prompt that guidance leads away from")
    draw.add_argument("--image", metavar="PICTURE", help="begin with this picture under noise, instead of noise alone")
    draw.add_argument(
        "--strength", type=float, help="how much noise that is: its time, over 0 and under 1 (default 0.6)"
    )
    draw.add_argument("--infill", metavar="TEXT", help='of texts: a text with "_" for each token that is to be drawn')
    draw.add_argument("--length", type=int, help="of texts: how many tokens each has (default: drawn)")
    draw.add_argument(
        "--blocks",
        type=int,
        metavar="B",
        help="of texts: write in blocks of so many tokens, each given what comes before: for a --length beyond the "
        "model's own",
    )
    draw.add_argument(
        "--control", type=float, metavar="W", help="of words as points: lead by a classifier's gradient, of this weight"
    )
    draw.add_argument("--control-steps", type=int, metavar="K", help="gradients in each step of it (default 1)")
    draw.add_argument(
        "--candidates",
        type=int,
        metavar="K",
        help="of texts: draw so many for each, and take the one most like the others",
    )
    draw.add_argument("--temperature", type=float, help="of texts and speech: under 1, what is likelier")
    draw.add_argument("--nucleus", type=float, help="of texts: only the likeliest tokens, of this total probability")
    draw.add_argument("--corrections", type=int, help="of what is drawn, by what is held; default 0")
    draw.add_argument("--batch-size", type=int, help="samples at once (default 256; of words as points 1024)")
    draw.add_argument("--out", metavar="PATH", help="a folder, or the file of one sample (default: RUN/samples)")

    fit = add("tune", _tune, "fit a table of few evaluations to a run; `kuosan sample` then uses it")
    fit.add_argument("run", metavar="RUN", help="a run's folder")
    fit.add_argument("--steps", type=int, required=True, help="evaluations of the table")
    fit.add_argument("--guidance", type=float, help="the weight w that it is for (default: the recipe's)")
    fit.add_argument("--weak", metavar="RUN", help="guided away from this weaker run")
    fit.add_argument("--negative", metavar="TEXT", help="guided away from this prompt")
    fit.add_argument("--precision", help="of the network while tuning: float32 or bfloat16")
    fit.add_argument("--pairs", type=int, help="samples to fit (default 1024)")
    fit.add_argument("--iterations", type=int, help="of gradient descent (default 300)")
    fit.add_argument("--batch-size", type=int, help="samples of each iteration (default 64)")
    fit.add_argument("--fine", type=int, help="steps of the fine solution that is fitted (default 100)")
    fit.add_argument("--seed", type=int, help="the same seed gives the same table (default 0)")

    show = add("table", _table, "print a sampler as the numbers that it is")
    show.add_argument("run", metavar="RUN", help="a run's folder")
    _sampling_options(show)
    show.add_argument("--plot", metavar="FILE.png", help="also draw it")

    beside = add("compare", _compare, "solvers side by side: error and quality against evaluations")
    beside.add_argument("run", metavar="RUN", help="a run's folder")
    beside.add_argument("--solvers", nargs="+", metavar="WORDS", help='such as auto tuned "dpm_solver++ order=3"')
    beside.add_argument("--evaluations", type=_numbers, help="budgets like 5,10,20")
    beside.add_argument("-n", "--count", type=int, default=1000, help="samples of each (default 1000)")
    beside.add_argument("--guidance", type=float, help="classifier-free weight w (default: the recipe's)")
    beside.add_argument("--precision", help="of the network: float32 or bfloat16")

    measure = add("evaluate", _evaluate, "measure a run: its held-out bound, its samples' quality")
    measure.add_argument("run", metavar="RUN", help="a run's folder")
    measure.add_argument("--guidance", type=float, help="weight w for the samples (default: the recipe's)")
    measure.add_argument("--bound", action="store_true", help="the bound (the default, with the samples' quality)")
    measure.add_argument("--ode", action="store_true", help="the likelihood by the probability-flow ODE")
    measure.add_argument("--importance", type=int, metavar="K", help="the importance-weighted bound of K paths")
    measure.add_argument("--split", choices=("test", "held_out", "train"), default="held_out", help="default held_out")
    measure.add_argument(
        "--data", nargs="+", metavar="PATH", help="score these instead: pictures or folders of them, files of texts"
    )
    measure.add_argument(
        "--unconditional", action="store_true", help="do not tell the model the examples' classes or captions"
    )
    measure.add_argument("--examples", type=int, metavar="N", help="at most so many (default: the recipe's)")
    measure.add_argument("--draws", type=int, metavar="N", help="repeats of what is drawn (default: the recipe's)")
    measure.add_argument("--variance", help="of the bound: beta_tilde, beta, learned, posterior, optimal, ...")
    measure.add_argument("--bound-steps", type=int, metavar="K", help="steps of the bound's chain")
    measure.add_argument("--trajectory", action="store_true", help="the bound on the best K times, by its own search")

    measure.add_argument("--tolerance", type=float, help="of the ODE's solver, relative and absolute (default 1e-5)")
    measure.add_argument("--divergence", help="of the ODE: rademacher (the default) or gaussian probes, or exact")
    measure.add_argument(
        "--dequantisation",
        help="of the ODE: noise (the default); uniform or variational, which fill the space between levels, where a "
        "network that predicts levels has next to no density",
    )

    page = add("report", _report, "write a run's report: one HTML page that needs nothing else")
    page.add_argument("run", metavar="RUN", help="a run's folder")

    take = add("import", _import, "read a pipeline that diffusers saved into a run")
    take.add_argument("path", metavar="PATH", help="the pipeline's folder")
    take.add_argument("--out", metavar="RUN", help="the run's folder (default: runs/ and the pipeline's name)")
    take.add_argument("--data", metavar="FOLDER", help="pictures to measure it on, and to train on")

    give = add("export", _export, "write a run as a folder that diffusers' DiffusionPipeline opens")
    give.add_argument("run", metavar="RUN", help="a run's folder")
    give.add_argument("path", metavar="PATH", help="a folder that is empty or not there")
    give.add_argument(
        "--steps", type=_numbers, help="of its tables, like 8,20 (default: the recipe's, and those that were tuned)"
    )
    give.add_argument("--guidance", type=float, help="the weight w that its tables are for (default: the recipe's)")

    shipped = add("recipes", _recipes, "list the recipes that ship, or print one")
    shipped.add_argument("name", nargs="?", help="print this one as TOML, to copy and change")
    named = add("data", _data, "list the named data sets, or fetch one into the cache")
    named.add_argument("name", nargs="?", help="fetch this one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
