"""Solvers side by side on one run: distance to the exact end of its ODE, and quality, against evaluations."""

from __future__ import annotations

import dataclasses
import importlib.util
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from kuosan.build import make_solver
from kuosan.image.judge import Judge
from kuosan.recipe import as_table
from kuosan.runs import DiffusionRun, device
from kuosan.sampler import Sampler, TunedTableError
from kuosan.solvers import AdamsBashforth, Auto, Errors, LinearBetaTime, Solver, sample

SOLVERS = ("auto", "tuned", "ddim", "euler", "heun", "dpm_solver++", "unipc", "deis", "ancestral")
EVALUATIONS = (4, 6, 8, 10, 15, 20, 50)
FINE = 200


def compare(
    run: DiffusionRun,
    solvers: Sequence[str] = SOLVERS,
    evaluations: Sequence[int] = EVALUATIONS,
    samples: int = 1000,
    progress: Callable[[int, int, str], None] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Draw the same seeds with every solver and budget.

    Args:
        solvers: in the words of the command line, such as "dpm_solver++ order=3". "tuned" is left out where no table
            was tuned for that number of evaluations; "auto" is the rule itself, never a tuned table.
        evaluations: budgets; a solver takes as many steps as they allow.
        samples: seeds 0, 1, 2, ...
        settings: of sampling, for all of them, such as guidance.

    Returns:
        ``points``: solver, evaluations, and rmse and median of the distance in x0, per coordinate, to the end of the
        same model's ODE (order 4, 200 steps; None for a solver with noise), and where the run has a judge its
        share of confident samples and Frechet distance; ``reference``: the same quality of the fine solution.
    """
    labels = run.conditions(samples)

    def draw(sampler: Sampler) -> Tensor:
        return sample(
            sampler.model,
            run.state_shape,
            seeds=range(samples),
            table=sampler.table,
            condition=labels,
            transform=sampler.transform,
            corrector=sampler.corrector,
            temperature=getattr(sampler, "temperature", 1.0) * sampler.start,  # of speech
            device=device(),
        )

    def quality(x: Tensor) -> dict[str, Any]:
        if run.medium.one != "image" or not isinstance(run.judge, Judge):  # others judge words, or what captions say
            return {}
        found = dataclasses.asdict(run.judge.quality(run.kept(x, fine), labels))
        return {key: found[key] for key in ("confident", "confident_error", "frechet", "agreement")}

    tries = [(name, n) for name in solvers for n in evaluations]
    for name in solvers:
        _solver(name)  # says now what is wrong with a name
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("comparing draws with matplotlib: pip install 'kuosan[report]'")
    fine = run.sampler(solver=AdamsBashforth(4, "flow"), grid=LinearBetaTime(), steps=FINE, **settings)
    fine = dataclasses.replace(fine, corrector=None)  # one would move the end
    truth = draw(fine)
    points = []
    for done, (name, budget) in enumerate(tries, 1):
        sampler = _within(run, name, budget, settings)
        if sampler is not None:
            x = draw(sampler)
            wanders = sampler.table.stochastic or sampler.corrector is not None
            apart = None if wanders else dataclasses.asdict(Errors.of(x, truth))
            point = {"solver": name, "evaluations": sampler.table.evaluations}
            points.append(point | (apart or {"rmse": None, "median": None}) | quality(x))
        if progress:
            progress(done, len(tries), f"{name}, {budget} evaluations")
    how: dict[str, Any] = {key: fine.how[key] for key in ("guidance", "clip", "precision") if key in fine.how}
    return {
        "step": run.step,
        "samples": samples,
        "evaluations": list(evaluations),
        "fine": FINE,
        **how,
        "reference": quality(truth),
        "points": points,
    }


def _solver(name: str) -> Solver | None:
    """The solver of the command line's words; None for the tuned table."""
    table = as_table(shlex.split(name))
    return None if table["kind"] == "tuned" else make_solver(table)


def _within(run: DiffusionRun, name: str, budget: int, settings: dict[str, Any]) -> Sampler | None:
    """The sampler with the most steps that need no more evaluations than the budget; None if there is none."""
    solver = _solver(name)
    if solver is None:
        try:
            return run.sampler(solver={"kind": "tuned"}, steps=budget, **settings)
        except TunedTableError:
            return None
    if isinstance(solver, Auto):
        solver = Auto(tuned=False)
    for steps in range(budget, solver.order - 1, -1):
        sampler = run.sampler(solver=solver, steps=steps, **settings)
        if sampler.table.evaluations <= budget:
            return sampler
    return None


def words(found: dict[str, Any]) -> str:
    """The points as a table for the terminal."""
    judged = bool(found["reference"])
    lines = [
        f"{'solver':28}{'evaluations':>12}{'rmse':>10}{'median':>10}" + ("   90 % sure   Frechet" if judged else "")
    ]
    for point in found["points"]:
        errors = [f"{point[k]:>10.4f}" if point[k] is not None else f"{'':>10}" for k in ("rmse", "median")]
        line = f"{point['solver']:28}{point['evaluations']:>12d}{''.join(errors)}"
        lines.append(line + (f"{point['confident']:>12.1%}{point['frechet']:>10.3f}" if judged else ""))
    if judged:
        end, fine = found["reference"], f"the ODE, {found['fine']} steps"
        lines.append(f"{fine:60}{end['confident']:>12.1%}{end['frechet']:>10.3f}")
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> Path:
    """Error, and quality where there is a judge, against evaluations, as a PNG."""
    from matplotlib.figure import Figure

    panels = [("rmse", "distance to the end of the ODE, RMSE per pixel", True)]
    if found["reference"]:
        panels.append(("frechet", "Fréchet distance in the judge's features", True))
        panels.append(("confident", "share that the judge is 90 % sure of", False))
    figure = Figure(figsize=(5.2 * len(panels), 4.4), layout="constrained")
    names = list(dict.fromkeys(point["solver"] for point in found["points"]))
    colours = ["#1f6f8c", "#c2562d", "#5b8c3e", "#8a5aa8", "#b08a1e", "#3f6fd1", "#a33b5e", "#4d9c93", "#777777"]
    for axes, (key, title, log) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for k, name in enumerate(names):
            own = [p for p in found["points"] if p["solver"] == name and p[key] is not None]
            if own:
                style = {"lw": 2.4, "zorder": 3} if name in ("auto", "tuned") else {"lw": 1.2}
                x, y = [p["evaluations"] for p in own], [p[key] for p in own]
                axes.plot(x, y, "o-", ms=4, color=colours[k % len(colours)], label=name, **style)
        if key in found["reference"]:
            axes.axhline(found["reference"][key], color="black", lw=0.8, ls=":")
            place = (0.99, found["reference"][key])
            where = ("axes fraction", "data")
            axes.annotate("the ODE itself", place, xycoords=where, ha="right", va="bottom", fontsize=8)
        axes.set(title=title, xlabel="network evaluations for each sample", xscale="log")
        if log:
            axes.set_yscale("log")
        ticks = found["evaluations"]
        axes.set_xticks(ticks, [str(t) for t in ticks], fontsize=8)
        axes.xaxis.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    drawn = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(drawn.values(), drawn.keys(), loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    return path
