"""The words of the command line: every command, every option, and what it is for."""

from __future__ import annotations

import argparse
from typing import Any

from kuosan import __version__


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


def parser() -> argparse.ArgumentParser:
    """Of `kuosan`; what is parsed says the name of its `command`, and has none where no command was given."""
    whole = argparse.ArgumentParser(prog="kuosan", description="Diffusion models: train, sample, measure.")
    whole.add_argument("--version", action="version", version=f"kuosan {__version__}")
    commands = whole.add_subparsers(title="commands", metavar="COMMAND")

    def add(name: str, what: str, **settings: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=what, description=what, **settings)
        command.add_argument("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
        command.set_defaults(command=name)
        return command

    train = add("train", "train a recipe, or go on with a run that was interrupted", add_help=False)
    train.add_argument("-h", "--help", nargs=0, action=_TrainHelp, help="show this and every setting")
    train.add_argument("recipe", help="a name from `kuosan recipes`, or a path to a .toml file")
    train.add_argument("override", nargs="*", help="settings such as training.steps=500 data.folder=photos")
    train.add_argument("--out", metavar="RUN", help="the run's folder (default: runs/RECIPE)")

    draw = add("sample", "draw samples from a run")
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

    fit = add("tune", "fit a table of few evaluations to a run; `kuosan sample` then uses it")
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

    show = add("table", "print a sampler as the numbers that it is")
    show.add_argument("run", metavar="RUN", help="a run's folder")
    _sampling_options(show)
    show.add_argument("--plot", metavar="FILE.png", help="also draw it")

    beside = add("compare", "solvers side by side: error and quality against evaluations")
    beside.add_argument("run", metavar="RUN", help="a run's folder")
    beside.add_argument("--solvers", nargs="+", metavar="WORDS", help='such as auto tuned "dpm_solver++ order=3"')
    beside.add_argument("--evaluations", type=_numbers, help="budgets like 5,10,20")
    beside.add_argument("-n", "--count", type=int, default=1000, help="samples of each (default 1000)")
    beside.add_argument("--guidance", type=float, help="classifier-free weight w (default: the recipe's)")
    beside.add_argument("--precision", help="of the network: float32 or bfloat16")

    measure = add("evaluate", "measure a run: its held-out bound, its samples' quality")
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

    page = add("report", "write a run's report: one HTML page that needs nothing else")
    page.add_argument("run", metavar="RUN", help="a run's folder")

    take = add("import", "read a pipeline that diffusers saved into a run")
    take.add_argument("path", metavar="PATH", help="the pipeline's folder")
    take.add_argument("--out", metavar="RUN", help="the run's folder (default: runs/ and the pipeline's name)")
    take.add_argument("--data", metavar="FOLDER", help="pictures to measure it on, and to train on")

    give = add("export", "write a run as a folder that diffusers' DiffusionPipeline opens")
    give.add_argument("run", metavar="RUN", help="a run's folder")
    give.add_argument("path", metavar="PATH", help="a folder that is empty or not there")
    give.add_argument(
        "--steps", type=_numbers, help="of its tables, like 8,20 (default: the recipe's, and those that were tuned)"
    )
    give.add_argument("--guidance", type=float, help="the weight w that its tables are for (default: the recipe's)")

    shipped = add("recipes", "list the recipes that ship, or print one")
    shipped.add_argument("name", nargs="?", help="print this one as TOML, to copy and change")
    named = add("data", "list the named data sets, or fetch one into the cache")
    named.add_argument("name", nargs="?", help="fetch this one")
    return whole
