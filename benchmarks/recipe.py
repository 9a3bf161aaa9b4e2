"""The figures of a recipe (default: the demo), measured again: train it, then its bound and the quality of its samples.

    python benchmarks/recipe.py [--recipe digits] [--out FOLDER] [key=value ...]

Prints the time of training, the held-out and training bound with standard errors, and the judge's verdict on 1,000
samples for DDIM and ancestral sampling, beside real held-out digits. For MNIST: --recipe mnist, 10 minutes of training.
"""

import argparse
from pathlib import Path

from kuosan import recipe as recipes
from kuosan.progress import Progress, duration
from kuosan.runs import load
from kuosan.solvers import DDIM, Ancestral
from kuosan.train import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="digits")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("override", nargs="*")
    options = parser.parse_args()
    out = options.out or Path("runs") / f"bench-{options.recipe}"
    train(recipes.read(options.recipe, options.override), out)
    run = load(out)
    print(f"{out}: {run.step} steps in {duration(run.seconds)}, {run.info['parameters']:,} parameters")
    for split in ("held_out", "train"):
        bits = run.bound(split, progress=Progress("bound: evaluation")).bits_per_dim()
        print(f"bound, {split:9s} {bits.total:.4f} ± {bits.standard_error:.4f} bits/dim")
    rows = [("ddim", DDIM(), run.recipe.sampling.steps), ("ancestral", Ancestral(), 250)]
    weights = [0.0, 1.0] if run.conditional else [0.0]
    print(f"{'samples':32s}{'90 % sure':>10s}{'as asked':>10s}{'Frechet':>10s}{'classes':>16s}")
    for name, solver, steps in rows:
        for w in weights:
            quality = run.quality(options.samples, solver=solver, steps=steps, guidance=w)
            if quality is None:
                print("no classes in this data: no judge")
                return
            _row(f"{name}, {steps} steps, guidance {w:g}", quality)
    _row("real, held out", quality["held_out"])


def _row(name: str, quality) -> None:
    shares = quality["classes"].values()
    asked = f"{quality['agreement']:.1%}" if quality["agreement"] is not None else "-"
    span = f"{min(shares):.1%} to {max(shares):.1%}"
    print(f"{name:32s}{quality['confident']:>10.1%}{asked:>10s}{quality['frechet']:>10.3f}{span:>16s}")


if __name__ == "__main__":
    main()
