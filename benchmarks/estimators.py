"""What the terms of a bound cost: the noise of each way of drawing t, at equal numbers of network evaluations.

    python benchmarks/estimators.py RUN [--evaluations 20 50 100] [--repeats 10]

The noise is the standard deviation of repeats with other seeds, over the same held-out images, in bits per dimension;
the full sum over all steps is drawn twice, for its own noise.
"""

from __future__ import annotations

import argparse
import statistics

import kuosan as ks
from kuosan.progress import Progress
from kuosan.runs import DiffusionRun

WAYS = ("random", "stratified", "importance")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--evaluations", type=int, nargs="+", default=[20, 50, 100], help="of the network, each image")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--examples", type=int, default=10**6)
    options = parser.parse_args()
    run = DiffusionRun.open(options.run)
    x, condition = run.examples("held_out", options.examples)
    chain, how = run.chain()
    assert isinstance(chain, ks.DiffusionChain)
    print(f"{options.run}: {len(x)} held-out images, {how['steps']} steps, variance {how['variance']}")
    print(f"{'terms':12s}{'evaluations':>14s}{'bits/dim':>10s}{'noise':>10s}{'stated':>10s}")
    progress = Progress("bound")
    todo = [(way, n, repeat) for n in options.evaluations for way in WAYS for repeat in range(options.repeats)]
    found: dict[tuple[str, int], list[ks.Bound]] = {}
    for done, (way, n, repeat) in enumerate(todo, 1):
        # a draw takes one evaluation of a step and one of the decoder; importance sampling one of all, and its pilot
        draws = max(1, int(n - 25 * 16 / len(x)) if way == "importance" else n // 2)
        found.setdefault((way, n), []).append(chain.elbo(x, condition, terms=way, draws=draws, seed=repeat))
        progress(done, len(todo))
    for (way, _), bounds in found.items():
        bits = [bound.bits_per_dim() for bound in bounds]
        noise = statistics.stdev(b.total for b in bits)
        stated = statistics.fmean(b.monte_carlo_error for b in bits)
        mean = statistics.fmean(b.total for b in bits)
        print(f"{way:12s}{bounds[0].evaluations:>14.0f}{mean:>10.4f}{noise:>10.5f}{stated:>10.5f}")
    whole = [chain.elbo(x, condition, terms="all", seed=seed, progress=Progress("full sum")) for seed in range(2)]
    totals = [bound.bits_per_dim().total for bound in whole]
    noise = abs(totals[0] - totals[1]) / 2**0.5
    print(f"{'all':12s}{whole[0].evaluations:>14.0f}{statistics.fmean(totals):>10.4f}{noise:>10.5f}{'-':>10s}")


if __name__ == "__main__":
    main()
