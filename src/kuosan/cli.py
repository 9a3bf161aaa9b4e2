"""The command line: train, sample, evaluate, report, recipes, data. Torch is imported by the commands that need it."""

from __future__ import annotations

import argparse
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
    bad_input = isinstance(error, ValueError | OSError)
    if not bad_input and kind not in ("TrainingError", "CheckpointError", "FetchError"):
        raise error
    print(f"kuosan: {error}", file=sys.stderr)
    return 2 if bad_input else 1


# -- commands: each returns (the JSON object, the words) ---------------------------------------------------------------


def _train(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kuosan import recipe as recipes

    recipe = recipes.read(options.recipe, options.override)
    folder = Path(options.out or Path("runs") / Path(options.recipe).stem)
    from kuosan.run import train

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


def _sample(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kuosan.build import make_solver
    from kuosan.image.pictures import good_scale, save_png, sheet, to_image
    from kuosan.progress import Progress
    from kuosan.recipe import as_table
    from kuosan.run import load

    run = load(options.run)
    count = options.count if options.count is not None or options.seeds is not None else 16
    seeds = options.seeds if options.seeds is not None else list(range(max(count, 0)))
    labels = None
    if options.classes is not None:
        import torch

        asked = [run.class_of(name) for name in options.classes.split(",")]
        labels = torch.tensor([asked[i % len(asked)] for i in range(len(seeds))])
    solver = make_solver(as_table(shlex.split(options.solver))) if options.solver else None
    settings = {"solver": solver, "steps": options.steps, "guidance": options.guidance}
    levels = run.sample(count, seeds=seeds, labels=labels, progress=Progress("samples"), **settings)
    labels = run.labels_for(len(seeds)) if labels is None else labels
    table = run.table(solver, options.steps)
    how = {
        "run": str(run.folder),
        "step": run.step,
        "solver": str(solver) if solver else json.dumps(run.recipe.sampling.solver),
        "evaluations": table.evaluations,
        "guidance": run.recipe.sampling.guidance if options.guidance is None else options.guidance,
    }
    folder = Path(options.out) if options.out else run.folder / "samples"
    scale = good_scale(run.shape)
    files = []
    for i, (seed, one) in enumerate(zip(seeds, levels, strict=True)):
        named = {"class": run.classes[int(labels[i])]} if run.classes and labels is not None else {}
        path = folder / f"seed-{seed:06d}{'-' + named['class'] if named else ''}.png"
        save_png(to_image(one, run.levels), path, how | {"seed": seed} | named)
        files.append({"file": str(path), "seed": seed} | named)
    columns = len(run.classes) if run.conditional and run.classes and labels is not None else None
    save_png(sheet(levels, run.levels, columns, scale), folder / "sheet.png", how | {"seeds": seeds})
    result = how | {"sheet": str(folder / "sheet.png"), "samples": files}
    (folder / "samples.json").write_text(json.dumps(result, indent=2, ensure_ascii=False), "utf-8")
    return result, f"{len(files)} samples, {table.evaluations} evaluations each: {folder / 'sheet.png'}"


def _evaluate(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kuosan.run import load

    run = load(options.run)
    result = run.evaluate(options.guidance)
    bits, quality = result["bits_per_dim"], result["quality"]
    lines = [
        f"{result['run']}, step {result['step']}",
        "",
        f"held-out bound, bits per dimension   {bits['total']:.4f} ± {bits['standard_error']:.4f}",
        f"  reconstruction                     {bits['reconstruction']:.4f}",
        f"  prior                              {bits['prior']:.4f}",
        f"  matching                           {bits['matching']:.4f}",
        f"  ({bits['examples']} images, {bits['steps']} steps, variance {bits['variance']}, {bits['terms']} terms)",
    ]
    if quality:
        real = quality["held_out"]
        lines += [
            "",
            f"{'quality, by a classifier of real images':40s}{'samples':>10s}{'real':>10s}",
            f"{'  images':40s}{quality['samples']:>10d}{real['samples']:>10d}",
            f"{'  90 % sure':40s}{quality['confident']:>10.1%}{real['confident']:>10.1%}",
            f"{'  Frechet distance in its features':40s}{quality['frechet']:>10.3f}{quality['frechet_of_real']:>10.3f}",
        ]
        if quality["agreement"] is not None:
            lines.append(
                f"{'  judged as the class asked for':40s}{quality['agreement']:>10.1%}{real['agreement']:>10.1%}"
            )
        shares = "  ".join(f"{name} {share:.0%}" for name, share in quality["classes"].items())
        lines.append(f"  classes: {shares}")
        if run.conditional:
            lines.append(f"  guidance: {quality['guidance']:g}")
    else:
        lines += ["", f"no judge of quality: {run.why_no_judge}"]
    lines += ["", f"{result['run']}/evaluation.json"]
    return result, "\n".join(lines)


def _report(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from kuosan.report import write_report
    from kuosan.run import load

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
    draw.add_argument("--solver", metavar="WORDS", help='such as "ddim eta=0.5" or "ancestral temperature=1"')
    draw.add_argument("--steps", type=int, help="network evaluations for each sample")
    draw.add_argument("--guidance", type=float, help="classifier-free weight w: 0 none; x0(c) + w (x0(c) - x0())")
    draw.add_argument("--out", metavar="FOLDER", help="where to write them (default: RUN/samples)")

    measure = add(
        "evaluate", _evaluate, "measure a run: its held-out bound in bits per dimension, its samples' quality"
    )
    measure.add_argument("run", metavar="RUN", help="a run's folder")
    measure.add_argument("--guidance", type=float, help="weight w for the samples (default: the recipe's)")

    page = add("report", _report, "write a run's report: one HTML page that needs nothing else")
    page.add_argument("run", metavar="RUN", help="a run's folder")

    shipped = add("recipes", _recipes, "list the recipes that ship, or print one")
    shipped.add_argument("name", nargs="?", help="print this one as TOML, to copy and change")
    named = add("data", _data, "list the named data sets, or fetch one into the cache")
    named.add_argument("name", nargs="?", help="fetch this one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
