"""How good vocoders are against the minutes that they were trained, beside Griffin-Lim: a table and a picture.

    python benchmarks/vocoder_curves.py RUN [RUN ...] [--rows 6] [--picture FILE.png]

The figures are those that training kept each `training.sample_every` steps, of the first held-out recordings, with the
recipe's own way of sampling; Griffin-Lim is measured here on the same recordings. Minutes are of the trainings
themselves: compare them only if the runs were trained on one machine, with as many threads.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import kuosan
from kuosan.runs import VocoderRun
from kuosan.speech.judge import judge
from kuosan.speech.medium import MEASURES

SHOWN = {"mel_l1": "mel-L1", "log_spectral_distance": "LSD, dB", "mel_cepstral_distortion": "MCD, dB"}
COLOURS = ("#1f6f8c", "#c2562d", "#5b8c3a", "#7a4fa3", "#b08900")


def line(name: str, minutes: str, step: str, row: dict[str, Any]) -> str:
    return f"{name:22}{minutes:>8}{step:>8}" + "".join(f"{row[m]:9.3f} ± {row[f'{m}_error']:.3f}" for m in SHOWN)


def picture(path: Path, curves: dict[str, list[dict[str, Any]]], beside: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained", dpi=110)
    for axes, measure in zip(figure.subplots(1, len(SHOWN)), SHOWN, strict=True):
        for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
            axes.plot([p["minutes"] for p in curve], [p[measure] for p in curve], color=colour, label=name)
        axes.axhline(beside[measure], color="black", linewidth=1, linestyle=(0, (4, 3)), label="Griffin-Lim, 32")
        axes.set(xlabel="minutes of training", title=MEASURES[measure][0], xlim=(0, None), ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--rows", type=int, default=6, help="of each run, evenly spread")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    curves: dict[str, list[dict[str, Any]]] = {}
    beside: dict[str, Any] | None = None
    print(f"{'':22}{'minutes':>8}{'step':>8}" + "".join(f"{name:>17}" for name in SHOWN.values()))
    for folder in options.runs:
        run = kuosan.load(folder)
        assert isinstance(run, VocoderRun), f"{folder} is {run.kind}"
        curve = run.curve()
        assert curve, f"{folder} kept nothing: train it with training.sample_every"
        if beside is None:
            natural = run.data.held_out.waves[: curve[0]["utterances"]]
            beside = asdict(judge(natural, [run.medium.griffin_lim(x) for x in natural], None, run.medium.analysis))
            print(line("Griffin-Lim, 32", "", "", beside))
        assert curve[0]["utterances"] == beside["utterances"], f"{folder} was followed on other recordings"
        curves[run.folder.name] = curve
        places = torch.linspace(0, len(curve) - 1, min(options.rows, len(curve))).round().long().tolist()
        for one in [curve[i] for i in places]:
            print(line(run.folder.name, f"{one['minutes']:.1f}", str(one["step"]), one), flush=True)
    assert beside is not None
    if options.picture:
        picture(options.picture, curves, beside)


if __name__ == "__main__":
    main()
