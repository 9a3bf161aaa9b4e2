"""Control against fluency: how often texts are of the class asked for, and what that costs, by guidance and nucleus.

    python benchmarks/text_control.py RUN [RUN ...] [--samples 1000] [--guidance 0 0.5 1 2] [--nucleus 1 0.95 0.9 0.8]
                                      [--temperature 1]

Of conditional runs of texts, masked, uniform or from left to right. The weight w is counted as in
p(x|c)^(1+w) p(x)^-w: 0 is the conditional model alone, 1 what others call a scale of 2. The same seeds for all. Beside
them as many real held-out texts, and for glosses what an earlier trial found. Each run's folder gets text-control.json
and text-control.png. Perplexity is that of trigrams of the training texts; where unknown words become more it falls
for that alone, so their share stands beside it. Evaluations are of the network for each text: two a step where guided.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import kuosan as ks
from kuosan.figures import FIRST, INK, LINE, SECOND, SOFT
from kuosan.plain import plain
from kuosan.progress import Progress
from kuosan.runs import TokenRun

#: A first masked model of the glosses, by the same measures: judged as asked, perplexity, w.
TRIAL = ((0.70, 388.0, 0.0), (0.995, 1704.0, 1.0))
#: key, heading, form and width of each column.
COLUMNS = (
    ("agreement", "as asked", ".1%", 10),
    ("agreement_error", "±", ".1%", 7),
    ("perplexity", "perplexity", ",.0f", 12),
    ("distinct_2", "distinct-2", ".1%", 12),
    ("entropy", "entropy", ".2f", 9),
    ("copied", "copied", ".1%", 9),
    ("length", "length", ".1f", 8),
    ("unknown", "unknown", ".1%", 9),
    ("evaluations", "evaluations", ".1f", 13),
)
COLOURS = (FIRST, SECOND, "#5b8c3e", "#8a5aa8", "#b08a1e", SOFT)
MARKERS = "osD^vP"


def measure(run: TokenRun, options: argparse.Namespace) -> dict[str, Any]:
    """Every way of drawing, and the real texts, each as its numbers."""
    measured, n = run.medium.measured, options.samples
    labels, chosen, part = run.labels_for(n), run.chosen("held_out", n), run.data.held_out
    ways = list(product(options.temperature, options.nucleus, options.guidance))
    progress, points = Progress(f"{run.folder.name}: ways"), []
    for temperature, nucleus, weight in ways:
        sampler = run.sampler(guidance=weight, nucleus=nucleus, temperature=temperature)
        drawn = run.draw(sampler, range(n), labels)
        evaluations = float(drawn.evaluations.double().mean()) * (2 if weight else 1)
        way = {"temperature": temperature, "nucleus": nucleus, "guidance": weight, "evaluations": evaluations}
        points.append(way | measured(drawn.tokens, labels))
        progress(len(points), len(ways))
    found = {"run": str(run.folder), "step": run.step, "solver": run.sampler().how["solver"], "points": points}
    found["real"] = measured(part.tokens[chosen], part.labels[chosen])
    if run.info["data"]["name"] == "glosses":
        found["trial"] = [{"agreement": share, "perplexity": p, "guidance": w} for share, p, w in TRIAL]
    return found


def table(found: dict[str, Any]) -> str:
    heading = f"{'temperature':>11s}{'nucleus':>9s}{'w':>6s}" + "".join(f"{name:>{n}s}" for _, name, _, n in COLUMNS)
    lines = [f"{found['run']}, step {found['step']}, {found['solver']}", heading]

    def line(name: str, one: dict[str, Any]) -> str:
        cells = (format(one[key], how) if one.get(key) is not None else "-" for key, _, how, _ in COLUMNS)
        return name + "".join(f"{cell:>{n}s}" for cell, (_, _, _, n) in zip(cells, COLUMNS, strict=True))

    for one in found["points"]:
        lines.append(line(f"{one['temperature']:>11g}{one['nucleus']:>9g}{one['guidance']:>6g}", one))
    lines.append(line(f"{'real held-out texts':26s}", found["real"]))
    for one in found.get("trial", ()):
        lines.append(line(f"{'trial':20s}{one['guidance']:>6g}", one))
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> Path:
    """Agreement against perplexity: a line for each nucleus and temperature, guidance along it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

    figure = Figure(figsize=(8.4, 4.8), layout="constrained")
    axes = figure.add_subplot()
    small: dict[str, Any] = {"fontsize": 7.5, "color": SOFT, "textcoords": "offset points"}
    ways = list(dict.fromkeys((one["temperature"], one["nucleus"]) for one in found["points"]))
    for k, way in enumerate(ways):
        own = [one for one in found["points"] if (one["temperature"], one["nucleus"]) == way]
        x, y, errors = ([one[key] for one in own] for key in ("perplexity", "agreement", "agreement_error"))
        name = ("all tokens" if way[1] == 1 else f"nucleus {way[1]:g}") + (f", T = {way[0]:g}" if way[0] != 1 else "")
        style: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)], "label": name}
        axes.errorbar(x, y, errors, linewidth=1.5, markersize=5, elinewidth=0.8, **style)
        for one in own if way == ways[0] else ():  # the others go the same way
            place = (one["perplexity"], one["agreement"])
            axes.annotate(f"w = {one['guidance']:g}", place, (6, -11), **small)
    real = found["real"]
    star: dict[str, Any] = {
        "color": INK,
        "marker": "*",
        "markersize": 12,
        "linestyle": "none",
        "label": "real held-out texts",
    }
    axes.plot([real["perplexity"]], [real["agreement"]], **star)
    if trial := found.get("trial"):
        cross: dict[str, Any] = {"color": INK, "marker": "X", "markersize": 7, "linestyle": "none", "label": "trial"}
        axes.plot([one["perplexity"] for one in trial], [one["agreement"] for one in trial], **cross)
        for one in trial:
            axes.annotate(f"w = {one['guidance']:g}", (one["perplexity"], one["agreement"]), (6, -11), **small)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    seen = [(one["perplexity"], one["agreement"]) for one in (*found["points"], real, *found.get("trial", ()))]
    axes.set_xlim(min(seen)[0] / 1.15, max(seen)[0] * 1.3)
    axes.set_ylim(max(0.0, min(share for _, share in seen) - 0.05), 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    name = f"{Path(found['run']).name}, step {found['step']:,}"
    axes.set_title(f"judged as the class asked for: {name}", loc="left", fontsize=10, color=INK, pad=8)
    axes.set_xlabel("perplexity, by trigrams of real texts", fontsize=9, color=SOFT)
    axes.tick_params(labelsize=9, labelcolor=SOFT, color=LINE, length=3)
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, labelcolor=SOFT)
    figure.savefig(path, dpi=150, facecolor="white")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--samples", type=int, default=1000, help="of each way of drawing (default 1000)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[0.0, 0.5, 1.0, 2.0], help="weights w")
    parser.add_argument("--nucleus", type=float, nargs="+", default=[1.0, 0.95, 0.9, 0.8])
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0])
    options = parser.parse_args()
    runs: list[TokenRun] = []
    for run in map(ks.load, options.runs):
        if not isinstance(run, TokenRun) or not run.conditional or run.judge is None:
            parser.error(f"{run.folder}: a run of tokens of texts with classes is needed, for the judge is of classes")
        runs.append(run)
    for run in runs:
        found = measure(run, options)
        (run.folder / "text-control.json").write_text(json.dumps(plain(found), indent=1), "utf-8")
        print(table(found))
        print(f"{plot(found, run.folder / 'text-control.png')}\n", flush=True)


if __name__ == "__main__":
    main()
