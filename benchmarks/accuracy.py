"""How far deterministic samplers end from the exact end of the same ODE: Kuosan beside the best setting of every peer.

    python benchmarks/accuracy.py [--problems ring-2d ...] [--evaluations 5 10 20 50] [--libraries azula ...] [--ours]

Exact denoisers of Gaussian mixtures, float64, the same 1,024 start points at sigma 80 for all. Every configuration of
benchmarks/peers.py first runs on 256 of the points (over 20 evaluations: each library's 1,000 best at 20); each
library's 40 best by each of three measures then run on all of them.
For every problem and number of evaluations it prints the best peer by root mean square error per coordinate, which a
few points near a border between modes decide, and the best by the median over points:

    own    among the configurations whose grid the library makes itself, by a setting
    any    among all, grids given from outside included
    one    the one configuration, of either, with the least geometric mean of RMSE over all problems

The first two are picked for each cell knowing the truth, which no user can: a bound on what the peers can do. Results
are merged into benchmarks/accuracy.json, so that problems, evaluations and libraries can be measured one at a time;
the errors of all configurations on the 256 points are kept in .cache/accuracy, from which "one" is chosen.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from problems import PROBLEMS, SIGMA_MAX, Denoise, denoiser, start_and_end
from torch import Tensor

import kuosan as ks

RESULTS = Path(__file__).with_suffix(".json")
CACHE = Path(__file__).parent.parent / ".cache" / "accuracy"
EVALUATIONS = (5, 10, 20, 50)
POINTS, FIRST, FINALISTS, SHORTLIST = 1024, 256, 40, 1000
TUNED = 10


def errors(y: Tensor, end: Tensor) -> tuple[float, float, float]:
    """Root mean square per coordinate; its median and 90th percentile over points. Infinite where it is not finite."""
    each = (y - end).square().mean(1).sqrt()
    if not bool(each.isfinite().all()):
        return (torch.inf,) * 3
    return each.square().mean().sqrt().item(), each.median().item(), each.quantile(0.9).item()


def run_all(configurations: list, denoise: Denoise, x: Tensor, end: Tensor, n: int, failures: Counter) -> list:
    """(errors, evaluations, configuration) of each that runs within n evaluations."""
    rows = []
    for c in configurations:
        try:
            y, count = c.run(denoise, x, n)
        except Exception as error:  # another library's: whatever it raises, the configuration does not work here
            failures[f"{c.library} {c.name.split('(')[0].split(',')[0]}: {type(error).__name__}: {error}"[:100]] += 1
            continue
        rows.append((errors(y, end), count, c))
    return rows


def shortlist(configurations: list, kept: Path) -> list:
    """Those with the least RMSE in an earlier measurement, if there was one."""
    if not kept.exists():
        return configurations
    before = json.loads(kept.read_text())
    return sorted(configurations, key=lambda c: before.get(c.name, math.inf))[:SHORTLIST]


def best_of(configurations: list, denoise: Denoise, x: Tensor, end: Tensor, n: int, kept: Path) -> dict:
    """One library's best: {"own" | "any": {"rmse" | "median": the best five}}, and what failed."""
    failures: Counter = Counter()
    rows = run_all(configurations, denoise, x[:FIRST], end[:FIRST], n, failures)
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({c.name: e[0] for e, _, c in rows if e[0] < torch.inf}))
    finalists = {}
    for own in (True, False):
        some = [r for r in rows if r[2].own or not own]
        for measure in range(3):
            finalists |= {id(c): c for _, _, c in sorted(some, key=lambda r: r[0][measure])[:FINALISTS]}
    rows = run_all(list(finalists.values()), denoise, x, end, n, failures)
    best: dict = {"configurations": len(configurations), "failures": dict(failures.most_common(10))}
    for kind in ("own", "any"):
        some = [r for r in rows if (r[2].own or kind == "any") and r[0][0] < torch.inf]
        best[kind] = {
            name: [
                {"name": c.name, "evaluations": count, "rmse": e[0], "median": e[1]}
                for e, count, c in sorted(some, key=lambda r: r[0][measure])[:5]
            ]
            for measure, name in enumerate(("rmse", "median"))
        }
    return best


def logs(n: int) -> dict[tuple[str, str], float]:
    """Sum of log RMSE over all problems of each (library, name) that works on all, from the first points."""
    found: dict[tuple[str, str], list[float]] = {}
    for kept in CACHE.glob(f"*@{n}@*.json"):
        for name, error in json.loads(kept.read_text()).items():
            found.setdefault((kept.stem.split("@")[2], name), []).append(math.log(error))
    return {key: sum(values) for key, values in found.items() if len(values) == len(PROBLEMS)}


def add_single(results: dict, problems: dict, evaluations: list[int], libraries: dict) -> None:
    """The one configuration that is best over all problems, measured on all points of each."""
    every = {(c.library, c.name): c for make in libraries.values() for c in make()}
    for n in evaluations:
        sums = logs(n)
        for kind in ("own", "any"):
            able = [c for key, c in every.items() if key in sums and (c.own or kind == "any")]
            for c in sorted(able, key=lambda c: sums[c.library, c.name])[:1]:
                for problem, (mixture, x, end) in problems.items():
                    e = errors(c.run(denoiser(mixture), x, n)[0], end)
                    row = {"library": c.library, "name": c.name, "rmse": e[0], "median": e[1]}
                    results[problem][str(n)].setdefault("one", {})[kind] = row


def ranking(cell: dict, kind: str, measure: str) -> list[dict]:
    """The best rows of all libraries, each with its library, best first."""
    rows = [{"library": name, **row} for name, found in cell.get("peers", {}).items() for row in found[kind][measure]]
    return sorted(rows, key=lambda row: row[measure])


# -- Kuosan -----------------------------------------------------------------------------------------------------------


def ours(mixture: ks.Mixture, x: Tensor, n: int, tuning: bool) -> dict[str, Tensor]:
    """Kuosan's ends, by name: the default, and up to 10 evaluations a table tuned on other points."""
    process = ks.Process(ks.schedules.VE(sigma_max=SIGMA_MAX))
    model = mixture.denoiser(process)
    tables = {"auto": ks.solvers.Auto().table(process, steps=n)}
    if tuning and n <= TUNED:
        settings = {"pairs": 16384, "iterations": 1000, "batch_size": 512, "dtype": torch.float64}
        tables["tuned"] = ks.solvers.tune(model, (mixture.dimension,), n, seed=1, **settings).table
    return {name: ks.solvers.run(table, model, x) for name, table in tables.items()}


# -- the table --------------------------------------------------------------------------------------------------------


def show(results: dict) -> None:
    head = f"{'problem':10s}{'evals':>6s}  {'what':12s}{'RMSE':>9s}{'median':>9s}  configuration"
    print(head + "\n" + "-" * len(head))
    for problem, cells in results.items():
        for n, cell in cells.items():
            beaten = {}
            for kind in ("own", "any"):
                for measure in ("rmse", "median"):
                    for row in ranking(cell, kind, measure)[:1]:
                        _line(problem, n, f"{kind}, {measure}", row, f"{row['library']} {row['name']}")
                        beaten.setdefault(kind, row)
            for kind, row in cell.get("one", {}).items():
                beaten[f"one {kind}"] = row
                _line(problem, n, f"one {kind}", row, f"{row['library']} {row['name']}")
            for name, row in cell.get("ours", {}).items():
                ratios = ", ".join(f"{row['rmse'] / other['rmse']:.2f} of {kind}" for kind, other in beaten.items())
                _line(problem, n, "Kuosan", row, f"{name}  ({ratios})")


def _line(problem: str, n: str, what: str, row: dict, name: str) -> None:
    print(f"{problem:10s}{n:>6s}  {what:12s}{row['rmse']:>9.2g}{row['median']:>9.2g}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--evaluations", nargs="*", type=int, default=list(EVALUATIONS))
    parser.add_argument("--libraries", nargs="*", help="measure only these peers again (none: only 'one')")
    parser.add_argument("--ours", action="store_true", help="measure only Kuosan again; the peers from the last file")
    parser.add_argument("--no-tuning", action="store_true", help="keep the tuned tables' errors of the last file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    libraries: dict = {}
    if not options.ours:
        from peers import LIBRARIES as libraries
    configurations = {
        name: list(make()) for name, make in libraries.items() if options.libraries is None or name in options.libraries
    }
    problems = {}
    for problem in options.problems:
        mixture = PROBLEMS[problem]()
        x, end = start_and_end(mixture, POINTS)
        problems[problem] = mixture, x, end
        for n in options.evaluations:
            cell = results.setdefault(problem, {}).setdefault(str(n), {})
            for library, several in configurations.items():
                begun = time.perf_counter()
                kept = CACHE / f"{problem}@{n}@{library}.json"
                if n > 20:
                    several = shortlist(several, CACHE / f"{problem}@20@{library}.json")
                cell.setdefault("peers", {})[library] = best_of(several, denoiser(mixture), x, end, n, kept)
                print(f"{problem}, {n} evaluations, {library}: {time.perf_counter() - begun:.0f} s", flush=True)
                save(results)
            found = {name: errors(y, end) for name, y in ours(mixture, x, n, not options.no_tuning).items()}
            cell["ours"] = {k: v for k, v in cell.get("ours", {}).items() if k == "tuned"} | {
                name: {"rmse": e[0], "median": e[1]} for name, e in found.items()
            }
    if libraries:
        add_single(results, problems, options.evaluations, libraries)
    save(results)
    show({p: {str(n): results[p][str(n)] for n in options.evaluations} for p in options.problems})
    print(RESULTS)


def save(results: dict) -> None:
    order = {p: dict(sorted(results[p].items(), key=lambda kv: int(kv[0]))) for p in PROBLEMS if p in results}
    RESULTS.write_text(json.dumps(order, indent=1) + "\n")


if __name__ == "__main__":
    main()
