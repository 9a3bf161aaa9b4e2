"""The whole ladder on the same data: every kind of model, its bound, its importance-weighted bound and its ODE.

Each model is a shipped recipe with what is written beside it changed; all see the same number of training examples. All
numbers are bits per dimension of the same held-out images over the same levels, with the standard error over images.

    python benchmarks/ladder.py [--data digits|mnist] [--out FOLDER] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from kuosan import recipe as recipes
from kuosan.runs import DiffusionRun, load
from kuosan.train import train

#: name -> (recipe, overrides, how it is measured besides by its bound)
DIGITS: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    "VAE": ("digits-vae", [], ("importance",)),
    "VAE, flow posterior": ("digits-vae", ["autoencoder.posterior=flow"], ("importance",)),
    "two-layer VAE, bottom-up": (
        "digits-vae",
        ["autoencoder.layers=2", "autoencoder.inference=bottom_up"],
        ("importance",),
    ),
    "two-layer VAE, top-down": ("digits-vae", ["autoencoder.layers=2"], ("importance",)),
    "4-layer VAE with skips": ("digits-hvae", [], ("importance",)),
    "VAE, diffusion prior": ("digits-latent", [], ()),
    # a Gaussian decoder has to take over while its bins are still wider than the noise: the network cannot round
    "diffusion, x0": (
        "digits-likelihood",
        ["denoiser.predicts=x0", "evaluation.variance=beta", "process.t_min=0.02", "network.dropout=0.2"],
        ("ode",),
    ),
    "diffusion, noise, learned variance": (
        "digits-likelihood",
        [
            "denoiser.predicts=eps",
            "denoiser.preconditioning=none",
            "denoiser.learned_variance=true",
            "objective.kind=hybrid",
            "evaluation.variance=learned",
            "process.t_min=0.02",
            "network.dropout=0.2",
        ],
        ("ode",),
    ),
    "diffusion, levels": ("digits-likelihood", [], ("ode",)),
    "diffusion, learned schedule": ("digits-vdm", [], ("ode",)),
}
#: The best of them at 256 levels. A flow posterior alone falls silent there: its layer is given 20 nats for nothing.
MNIST: dict[str, tuple[str, list[str], tuple[str, ...]]] = {
    "two-layer VAE, top-down": ("mnist-vae", [], ("importance",)),
    "VAE, flow posterior": (
        "mnist-vae",
        ["autoencoder.layers=1", "autoencoder.posterior=flow", "objective.free_bits=20.0", "training.steps=4000"],
        ("importance",),
    ),
    "diffusion, learned schedule": ("mnist-likelihood", [], ("ode",)),
}
#: data -> the models, and how many held-out images each measure takes.
LADDERS = {
    "digits": (DIGITS, {"bound": 10**6, "importance": 10**6, "ode": 10**6}),
    "mnist": (MNIST, {"bound": 1000, "importance": 1000, "ode": 64}),
}
#: The reverse variances with which the point-predicting diffusion model is measured.
VARIANCES = ("beta_tilde", "beta", "optimal", "optimal_per_dimension")


def measure(name: str, folder: Path, how: tuple[str, ...], options: argparse.Namespace) -> list[dict[str, Any]]:
    run = load(folder)
    rows: list[dict[str, Any]] = []
    settings: list[dict[str, Any]] = [{}]
    if isinstance(run, DiffusionRun):
        choices = VARIANCES if run.recipe.denoiser.predicts == "x0" else (run.recipe.evaluation.variance,)
        settings = [{"variance": choice} for choice in choices]
    for one in settings:
        draws = {"bound": options.draws * (8 if "prior" in name else 1), "ode": 4}  # a prior's bound is one t a draw
        for measure_name in ("bound", *(how if one is settings[-1] else ())):
            given = {
                "draws": draws.get(measure_name),
                "importance": options.importance,
                "examples": LADDERS[options.data][1][measure_name],
            } | one
            about = run.evaluate((measure_name,), quality=False, **given)["likelihoods"][measure_name]
            label = name + (f", variance {one['variance']}" if len(settings) > 1 and measure_name == "bound" else "")
            rows.append({"model": label, "measure": measure_name} | about)
            rows[-1] |= {"seconds": run.seconds, "parameters": run.info["parameters"], "steps": run.step}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(LADDERS), default="digits")
    parser.add_argument("--out", type=Path, default=Path("runs/ladder"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of these models")
    parser.add_argument("--draws", type=int, default=32, help="repeats of each bound (default 32)")
    parser.add_argument("--importance", type=int, default=256, help="paths of the importance-weighted bound")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    models, _ = LADDERS[options.data]
    if unknown := set(options.only or ()) - set(models):
        parser.error(f"--only: of {options.data} there are {', '.join(models)}; not {', '.join(unknown)}")
    options.out /= options.data
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only or models:
        recipe, overrides, how = models[name]
        folder = options.out / name.replace(", ", "-").replace(" ", "-")
        print(f"-- {name}", file=sys.stderr)
        train(recipes.read(recipe, [*overrides, "training.sample_every=0"]), folder)
        rows += measure(name, folder, how, options)
        (options.out / "ladder.json").write_text(json.dumps(rows, indent=1), "utf-8")
    rows.sort(key=lambda row: row["total"])
    print(f"{'model':52s}{'measure':>12s}{'bits/dim':>10s}{'±':>8s}{'± drawn':>9s}{'parameters':>12s}{'trained':>9s}")
    for row in rows:
        drawn = row["monte_carlo_error"]
        print(
            f"{row['model']:52s}{row['measure']:>12s}{row['total']:>10.4f}{row['standard_error']:>8.4f}"
            f"{'-' if drawn is None else format(drawn, '.4f'):>9s}{row['parameters']:>12,d}{row['seconds']:>8.0f}s"
        )


if __name__ == "__main__":
    main()
