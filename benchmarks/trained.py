"""On a trained run: a few evaluations, tuned or with noise, beside a thousand ancestral steps, by the judge.

    python benchmarks/trained.py RUN [--steps 8] [--samples 10000] [--guidance 0] [--precision bfloat16] [--only ...]

Tunes the table first if the run has none (`kuosan tune`). The same seeds for all; each line stands alone, so that
`--only` may measure them one at a time. Standard errors: of the share from
the number of samples; of the Frechet distance from ten tenths (each reads higher than the whole, all by as much).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time

import torch

import kuosan as ks
from kuosan.progress import Progress
from kuosan.sampler import TunedTableError
from kuosan.solvers import DDIM, Ancestral, Auto, DPMSolverPP

PARTS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--ancestral", type=int, default=1000, help="steps of the ancestral sampler")
    parser.add_argument("--samples", type=int, default=10000)
    parser.add_argument("--guidance", type=float, default=0.0)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--only", nargs="+", choices=["tuned", "auto", "sde", "ddim", "ancestral"])
    options = parser.parse_args()
    run, n = ks.load(options.run), options.samples
    settings = {"guidance": options.guidance, "precision": options.precision}
    tuned = {"solver": {"kind": "tuned"}, "steps": options.steps}
    tries = {
        f"tuned, {options.steps}": tuned,
        f"auto, {options.steps}": {"solver": Auto(tuned=False), "steps": options.steps},
        "auto, 20": {"solver": Auto(tuned=False), "steps": 20},
        f"sde dpm_solver++, {options.steps}": {"solver": DPMSolverPP(2, sde=True), "steps": options.steps},
        "ddim, 50": {"solver": DDIM(), "steps": 50},
        f"ancestral beta~, {options.ancestral}": {"solver": Ancestral(), "steps": options.ancestral},
    }
    if options.only:
        tries = {name: how for name, how in tries.items() if name.split()[0].strip(",") in options.only}
    if tuned in tries.values():
        try:
            run.sampler(**tuned, **settings)
        except TunedTableError:
            run.tune(options.steps, settings=settings, progress=Progress("tune"))
    labels = run.labels_for(n)
    print(f"{'solver, evaluations':24}{'90 % sure':>18}{'Frechet':>10}{'of a tenth':>20}{'seconds':>10}")
    for name, how in tries.items():
        begun = time.monotonic()
        x = run.sample(n, progress=Progress(name), **how, **settings)
        seconds = time.monotonic() - begun
        whole = run.judge.quality(x, labels)
        tenths = torch.tensor(
            [run.judge.quality(x[k::PARTS], None if labels is None else labels[k::PARTS]).frechet for k in range(PARTS)]
        )
        error = float(tenths.std()) / math.sqrt(PARTS)
        sure = f"{whole.confident:.2%} ± {dataclasses.asdict(whole)['confident_error']:.2%}"
        print(
            f"{name:24}{sure:>18}{whole.frechet:>10.4f}{f'{tenths.mean():.4f} ± {error:.4f}':>20}{seconds:>10.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
