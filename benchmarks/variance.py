"""The bound against the reverse variance, as Analytic-DPM's authors print it: bits per dimension, few steps to many.

    python benchmarks/variance.py [RUN] [--examples N] [--drawn K ...]

Rows are variances, columns numbers of steps, first on the even trajectory (ET: the recipe's own chain), then on the
best one for that variance by dynamic programming (OT). Held-out examples, the same noise for all. Standard errors are
over the examples; since they are the same in every row, the last lines give the paired difference between the best of
the fixed variances and the optimal ones, which is what decides. A network that predicts a point decodes with
N(x0-hat, M_t) cut into bins in every row, so that only the reverse variance differs (per dimension: with its own).
"""

import argparse
import math
from pathlib import Path

import torch

from kuosan.bound import Bound
from kuosan.progress import Progress
from kuosan.runs import Run, load
from kuosan.variance import MEASURED

STEPS = (5, 10, 25, 50, 100, 1000)
FIXED = ("beta_tilde", "beta", "learned")


def bound(run: Run, variance: str, steps: int, searched: bool, options: argparse.Namespace) -> Bound:
    name = f"{variance} {'OT' if searched else 'ET'} K={steps}"
    if searched:  # what varies with x_t has no closed form: it takes the trajectory of the optimal one
        substitute = {"learned": "optimal", "posterior": "optimal_per_dimension"}
        grid = run.trajectory(steps, substitute.get(variance, variance))
    else:
        grid = run.denoiser.process.grid(steps)
    decoder = None
    if variance != "optimal_per_dimension":
        decoder = max(float(run.optimal_variance.scalar.mean_squared_error(grid.times[-1])), 1e-12)
    drawn = steps in options.drawn
    terms = {"terms": "stratified", "draws": options.draws} if drawn else {"terms": "all", "draws": 1}
    return run.bound(
        examples=options.examples,
        variance=variance,
        grid=grid,
        decoder_variance=decoder,
        batch_size=1024,
        progress=Progress(name),
        **terms,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/digits"))
    parser.add_argument("--examples", type=int, default=1000, help="most held-out examples")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--drawn", type=int, nargs="*", default=[], help="numbers of steps whose terms are drawn")
    parser.add_argument("--draws", type=int, default=20, help="terms drawn for each example then")
    options = parser.parse_args()
    run = load(options.run)
    variances = ["beta_tilde", "beta"]
    variances += ["learned"] if run.recipe.denoiser.learned_variance else []
    variances += [*MEASURED]
    variances += ["posterior"] if run.recipe.denoiser.predicts == "levels" else []
    unit = math.log(2) * math.prod(run.shape)
    print(f"{options.run}, step {run.step}: bound in bits per dimension on held-out data, {run.levels} levels")
    for searched in (False, True):
        print(f"\n{'OT: searched trajectory' if searched else 'ET: even trajectory':26s}", end="")
        print("".join(f"{f'K = {steps}':>18s}" for steps in options.steps))
        totals: dict[str, list[torch.Tensor]] = {}
        for variance in variances:
            bounds = [bound(run, variance, steps, searched, options) for steps in options.steps]
            totals[variance] = [-one.total / unit for one in bounds]
            cells = [f"{float(one.mean()):.4f} ± {float(one.std()) / len(one) ** 0.5:.4f}" for one in totals[variance]]
            print(f"{variance:26s}{''.join(f'{cell:>18s}' for cell in cells)}", flush=True)
        for column, steps in enumerate(options.steps):
            best = {name: float(values[column].mean()) for name, values in totals.items()}
            fixed = min((name for name in best if name in FIXED), key=best.__getitem__)
            verdicts = []
            for name in variances:
                if name in FIXED:
                    continue
                gain = totals[fixed][column] - totals[name][column]
                verdicts.append(f"{name} {float(gain.mean()):+.5f} ± {float(gain.std()) / len(gain) ** 0.5:.5f}")
            print(
                f"  K = {steps}: tightest {min(best, key=best.__getitem__)}; gain over {fixed}: {', '.join(verdicts)}"
            )


if __name__ == "__main__":
    main()
