"""Control of a model of words as points against its fluency: a classifier's gradient beside classifier-free guidance.

    python benchmarks/embedding_control.py RUN [--samples 500] [--weights 0 1 2 5 10] [--gradients 1 3]

Control is of the model without classes (weight 1: Bayes' rule; the fluency weight is one over it), guidance of the one
with them (weight 0: Bayes' rule). The same seeds for all. The share judged as the class that was asked for has a
binomial standard error; the perplexity is that of trigrams of the training texts. Beside them what rounding loses: the
share of held-out words that x0-hat at the sampler's last noisy time is nearest to, and the smallest distance of two
points.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from kuosan.discrete.embedding import rounding_accuracy
from kuosan.plain import plain
from kuosan.progress import Progress
from kuosan.runs import EmbeddingRun

LEVELS = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


def measure(run: EmbeddingRun, n: int, settings: dict[str, Any]) -> dict[str, Any]:
    """What the judge says of n texts drawn in one way."""
    begun = time.monotonic()
    assert run.classes is not None
    labels = torch.arange(n) % len(run.classes)
    tokens = run.sample(n, labels=labels, progress=Progress("samples"), **settings)
    seconds = time.monotonic() - begun
    quality = run.medium.quality(tokens, labels)
    names = ("agreement", "agreement_error", "perplexity", "distinct_2", "length", "copied")
    return {name: quality[name] for name in names} | {"seconds": seconds}


def rounding(run: EmbeddingRun, settings: dict[str, Any], most: int) -> dict[str, Any]:
    """How surely the last x0-hat is rounded, of held-out texts."""
    last = run.sampler(**settings).table.times[-1]
    part, denoiser = run.data.held_out, run.denoiser
    chosen = run.chosen("held_out", most)
    labels = part.labels[chosen] if run.conditional else None
    return {
        "time": float(last),
        "log_snr": float(denoiser.process.log_snr(last)),
        "accuracy": rounding_accuracy(denoiser, part.tokens[chosen], float(last), labels),
        "smallest_distance": denoiser.embedding.smallest_distance(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--weights", type=float, nargs="+", default=[0, 1, 2, 5, 10], help="of control")
    parser.add_argument("--gradients", type=int, nargs="+", default=[1, 3], help="at each time, of control")
    parser.add_argument("--guidance", type=float, nargs="+", default=[0, 0.5, 1, 2], help="classifier-free weights")
    parser.add_argument("--classifier-steps", type=int, help="of its training (default: what is kept, or 3,000)")
    parser.add_argument("--solver", default="auto", help="the kind; default auto")
    parser.add_argument("--steps", type=int, help="default the recipe's")
    parser.add_argument("--out", type=Path, help="default RUN/embedding-control.json")
    options = parser.parse_args()
    run = EmbeddingRun.open(options.run)
    classifier, held_out = run.noisy_classifier(options.classifier_steps), run.data.held_out
    how: dict[str, Any] = {"solver": {"kind": options.solver}, "steps": options.steps}
    chosen = run.chosen("held_out", 1000)
    tokens, labels = held_out.tokens[chosen], held_out.labels[chosen]
    found: dict[str, Any] = {
        "run": str(run.folder),
        "step": run.step,
        "sampler": run.sampler(**how).how,
        "judge": run.judge.accuracy,
        "real": run.medium.quality(held_out.tokens, held_out.labels)["held_out"],
        "classifier": {str(t): classifier.accuracy(tokens, labels, t) for t in LEVELS},
        "rounding": rounding(run, how, 1000),
        "rows": [],
    }
    said = ", ".join(f"{share:.0%} at {t}" for t, share in found["classifier"].items())
    print(f"{run.folder}, step {run.step}, {options.samples} samples; solver {found['sampler']['solver']}")
    print(
        f"the classifier of noisy held-out texts is right of {said}; the judge of clean ones {run.judge.accuracy:.1%}"
    )
    print("rounding at log-SNR {log_snr:.2g}: {accuracy:.2%} of held-out words; ".format_map(found["rounding"]), end="")
    print(f"smallest distance {found['rounding']['smallest_distance']:.3f}")
    real = found["real"]
    print(f"\n{'':34s}{'fluency':>9s}{'as asked':>17s}{'perplexity':>12s}{'distinct-2':>12s}{'copied':>9s}{'s':>7s}")
    print(
        f"{'held-out texts':34s}{'':>9s}{real['agreement']:>11.1%}{'':6s}{real['perplexity']:>12.1f}"
        f"{real['distinct_2']:>12.1%}{real['copied']:>9.1%}"
    )
    tries: list[dict[str, Any]] = [
        {"control": w, "control_steps": k} for k in options.gradients for w in options.weights if w or k == 1
    ]
    if run.conditional:
        tries += [{"guidance": w} for w in options.guidance]
    for one in tries:
        row = measure(run, options.samples, how | one)
        weight = one.get("control", 0)
        row |= one | {"fluency": 1 / weight if weight else None}
        found["rows"].append(row)
        name = f"guidance {one['guidance']:g}" if "guidance" in one else f"control {weight:g}"
        name += f", {one['control_steps']} gradients" if one.get("control_steps", 1) > 1 else ""
        fluency = f"{row['fluency']:.2g}" if row["fluency"] else "-"
        share = f"{row['agreement']:.1%} ± {row['agreement_error']:.1%}"
        print(
            f"{name:34s}{fluency:>9s}{share:>17s}{row['perplexity']:>12.1f}{row['distinct_2']:>12.1%}"
            f"{row['copied']:>9.1%}{row['seconds']:>7.0f}",
            flush=True,
        )
    path = options.out or run.folder / "embedding-control.json"
    path.write_text(json.dumps(plain(found), indent=1), "utf-8")
    print(f"\n{path}")


if __name__ == "__main__":
    main()
