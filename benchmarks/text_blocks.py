"""Texts longer than the model's own, written in blocks: whether they stay fluent, and what they cost.

    python benchmarks/text_blocks.py RUN [--length 80] [--blocks 10] [--samples 200] [--guidance 0] [--nucleus 1]

Fluency: the perplexity of each block by trigrams of the training texts, without ends, the first two words of a block
given those before it; at the seams: of just those words. Beside it texts of windows that see nothing of what is before
them, texts of the model's full length, and real held-out texts. Repeated: pairs of words that the same text has had
before.

Cost: evaluations for each text, with and without the cache, and what is expected of ancestral steps under masks. The
run's folder gets text-blocks.json.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import kuosan as ks
from kuosan.discrete import expected_evaluations
from kuosan.discrete.blocks import blocks_of
from kuosan.plain import plain
from kuosan.progress import Progress
from kuosan.runs import DiscreteRun
from kuosan.text.medium import ORDER, lengths_of
from kuosan.text.ngram import NGram


def surprise(law: NGram, tokens: Tensor) -> Tensor:
    """-log p of each token given those before it, nats (N, L); NaN after the end."""
    start, found = (0,) * (ORDER - 1), torch.full(tokens.shape, math.nan, dtype=torch.float64)
    for row, (text, n) in enumerate(zip(tokens.tolist(), lengths_of(tokens).tolist(), strict=True)):
        whole = (*start, *text[:n])
        found[row, :n] = torch.tensor([-math.log(law.probability(whole[i : i + ORDER - 1], text[i])) for i in range(n)])
    return found


def perplexity(nats: Tensor) -> float:
    return float(nats.nanmean().exp())


def repeated(tokens: Tensor) -> float:
    """The share of pairs of neighbours that stand further ahead in the same text, too."""
    counts = [(len(set(pairs)), len(pairs)) for pairs in (list(pairwise(text)) for text in tokens.tolist())]
    return 1 - sum(different for different, _ in counts) / sum(all_ for _, all_ in counts)


def about(law: NGram, tokens: Tensor, block: int, seams: range) -> dict[str, Any]:
    nats = surprise(law, tokens)
    places = [i for seam in seams for i in range(seam, min(seam + ORDER - 1, tokens.shape[1]))]
    return {
        "blocks": [perplexity(part) for part in nats.split(block, dim=1)],
        "seams": perplexity(nats[:, places]) if places else None,
        "whole": perplexity(nats),
        "repeated": None if bool(nats.isnan().any()) else repeated(tokens),
    }


def fluency(run: DiscreteRun, options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    n, window, block = options.samples, run.shape[0], options.blocks
    law, part = run.medium.ngrams[ORDER], run.data.held_out
    ways: dict[str, tuple[dict[str, Any], range]] = {
        f"blocks of {block}": ({"length": options.length, "blocks": block}, range(window, options.length, block)),
        f"windows of {window}, each alone": (
            {"length": options.length, "blocks": window},
            range(window, options.length, window),
        ),
        f"texts of {window}": ({"length": window}, range(0)),
    }
    found = {}
    for name, (how, seams) in ways.items():
        drawn = run.draw(run.sampler(**how, **settings), range(n), progress=Progress(name))
        found[name] = about(law, drawn.tokens, block, seams)
        found[name]["first"] = run.medium.words(drawn.tokens[0])
    found["real held-out texts"] = about(law, part.tokens[run.chosen("held_out", n)], block, range(0))
    return found


def cost(run: DiscreteRun, options: argparse.Namespace, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Of texts of one, two and all windows, in fewer and more steps; without the cache all cost alike, so of two."""
    window, rows = run.shape[0], []
    lengths = sorted({window, min(2 * window, options.length), options.length})
    progress = Progress("cost: settings")
    for length in lengths:
        how: dict[str, Any] = {"length": length} | ({"blocks": options.blocks} if length > window else {})
        for steps in options.steps:
            sampler = run.sampler(steps=steps, **how, **settings)
            cached = run.draw(sampler, range(options.counted)).evaluations.double()
            plain_ = run.draw(sampler, range(2), cache=False).evaluations.double()
            row: dict[str, Any] = {"length": length, "steps": steps, "cached": float(cached.mean())}
            row["error"] = float(cached.std()) / math.sqrt(len(cached))
            passes = blocks_of(length, window, options.blocks)
            row["expected"] = sum(expected_evaluations(width, steps) for width in passes)
            rows.append(row | {"uncached": float(plain_.mean()), "passes": len(passes)})
            progress(len(rows), len(lengths) * len(options.steps))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--length", type=int, default=80, help="of the long texts (default 80)")
    parser.add_argument("--blocks", type=int, default=10, help="tokens of a block (default 10)")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--guidance", type=float, help="weight w (default: the recipe's)")
    parser.add_argument("--nucleus", type=float, help="(default: the recipe's)")
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 20, 80], help="of the table of costs")
    parser.add_argument("--counted", type=int, default=50, help="texts whose evaluations are counted")
    options = parser.parse_args()
    run = ks.load(options.run)
    if not isinstance(run, DiscreteRun):
        parser.error(f"{run.folder} does not write in blocks: it is {run.kind}")
    if options.length <= run.shape[0]:
        parser.error(f"--length {options.length}: this model's own texts have {run.shape[0]} tokens, longer are meant")
    settings = {key: getattr(options, key) for key in ("guidance", "nucleus") if getattr(options, key) is not None}
    texts = fluency(run, options, settings)
    costs = cost(run, options, settings)
    result = {"run": str(run.folder), "step": run.step, "settings": settings, "fluency": texts, "cost": costs}
    (run.folder / "text-blocks.json").write_text(json.dumps(plain(result), indent=1), "utf-8")

    count = math.ceil(options.length / options.blocks)
    print(f"perplexity of words by {ORDER}-grams of real texts, block by block of {options.blocks} tokens")
    heads = "".join(f"{i:>7d}" for i in range(1, count + 1))
    print(f"{'':28s}{heads}{'seams':>8s}{'whole':>8s}{'repeated':>10s}")
    for name, one in texts.items():
        blocks = "".join(f"{value:>7,.0f}" for value in one["blocks"]) + " " * 7 * (count - len(one["blocks"]))
        seams = "-" if one["seams"] is None else f"{one['seams']:,.0f}"
        again = "-" if one["repeated"] is None else f"{one['repeated']:.1%}"
        print(f"{name:28s}{blocks}{seams:>8s}{one['whole']:>8,.0f}{again:>10s}")
    for name, one in texts.items():
        if "first" in one:
            print(f"  {name}: {one['first']}")
    print("\nevaluations for each text")
    print(f"{'tokens':>6s}{'windows':>9s}{'steps':>7s}{'cached':>9s}{'±':>6s}{'expected':>10s}{'without':>9s}")
    for row in costs:
        print(
            f"{row['length']:>6d}{row['passes']:>9d}{row['steps']:>7d}{row['cached']:>9.1f}{row['error']:>6.1f}"
            f"{row['expected']:>10.1f}{row['uncached']:>9.0f}"
        )
    print(run.folder / "text-blocks.json")


if __name__ == "__main__":
    main()
