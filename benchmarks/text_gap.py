"""Where the gap between masked diffusion and its autoregressive twin comes from, on the same held-out texts.

    python benchmarks/text_gap.py runs/glosses-masked runs/glosses-autoregressive

A masked model can be read from left to right too: log p(n) + sum of log p(x_i given x_1, ..., x_{i-1}), with all later
tokens masked. What this gains on its own bound, the mean over random orders, is what the order costs; what is left
between it and the twin is what it costs to learn every order with the same network and the same training.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

import kuosan as ks
from kuosan.bound import error_of_mean
from kuosan.progress import Progress
from kuosan.runs import AutoregressiveRun, DiscreteRun
from kuosan.text.medium import lengths_of
from kuosan.tokenizer import PAD


@torch.no_grad()
def read_in_order(run: DiscreteRun, x: Tensor, condition: Tensor | None, order: str) -> Tensor:
    """log p(n) + the sum over i of log p(x_i | the tokens before it in the order), (B,), nats."""
    denoiser, lengths = run.denoiser, lengths_of(x)
    mask = denoiser.process.mask
    assert mask is not None
    assert denoiser.lengths is not None
    total = denoiser.lengths.law(len(x), condition).gather(1, lengths[:, None] - 1)[:, 0].double()
    progress = Progress(f"{order}: places")
    places = range(x.shape[1]) if order == "left to right" else range(x.shape[1] - 1, -1, -1)
    hidden = x != PAD
    for done, i in enumerate(places, 1):
        here = x[:, i] != PAD
        if bool(here.any()):
            seen = torch.where(hidden, mask, x)[here]
            place = torch.zeros_like(seen, dtype=torch.bool)
            place[:, i] = True
            law = denoiser.at(seen, 1.0, None if condition is None else condition[here], place)
            total[here] += law.log_prob(x[here, i]).double()
        hidden[:, i] = False
        progress(done, x.shape[1])
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("masked")
    parser.add_argument("twin")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--out", type=Path, help="also write the numbers here, as JSON")
    options = parser.parse_args()
    masked, twin = ks.load(options.masked), ks.load(options.twin)
    if not isinstance(masked, DiscreteRun) or not isinstance(twin, AutoregressiveRun):
        raise SystemExit("a run of masked diffusion and one of an autoregressive model are expected")
    found = {}
    for told in (True, False) if masked.conditional else (False,):
        x, condition = masked.examples("held_out", options.examples)
        condition = condition if told else None
        settings = masked.elbo_settings(masked.model) | {"draws": options.draws, "batch_size": 256}
        rows = {
            "masked, its bound (random orders)": masked.model.elbo(x, condition, **settings).nats,
            "masked, read from left to right": read_in_order(masked, x, condition, "left to right"),
            "masked, read from right to left": read_in_order(masked, x, condition, "right to left"),
        }
        whole = torch.nn.functional.pad(x, (0, masked.shape[0] - x.shape[1]), value=PAD)
        with torch.no_grad():
            law = twin.model.model.autoregressive
            parts = zip(whole.split(256), whole.split(256) if condition is None else condition.split(256), strict=True)
            rows["autoregressive twin"] = torch.cat(
                [law.log_prob(part, None if condition is None else c).double() for part, c in parts]
            )
        baselines = {} if told else masked.medium.baselines(x)
        title = "told the class" if told else "not told the class"
        print(f"\n{title}, {len(x)} held-out texts".ljust(48) + f"{'nats per text':>14}{'±':>8}{'over the twin':>15}")
        twin_nats = -float(rows["autoregressive twin"].mean())
        for name, nats in rows.items():
            mean, error = -float(nats.mean()), float(error_of_mean(nats))
            print(f"{'  ' + name:47}{mean:>14.2f}{error:>8.2f}{mean / twin_nats - 1:>15.1%}")
            found[f"{title}: {name}"] = [mean, error]
        for name, mean in baselines.items():
            print(f"{'  ' + name:47}{mean:>14.2f}{'':8}{mean / twin_nats - 1:>15.1%}")
            found[f"{title}: {name}"] = [mean, math.nan]
    if options.out:
        options.out.write_text(json.dumps(found, indent=1), "utf-8")


if __name__ == "__main__":
    main()
