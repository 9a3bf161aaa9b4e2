"""The size of codes against what comes back of them, the bound, and how good samples of a latent model of them are.

kuosan evaluate runs/text-to-image && kuosan evaluate runs/text-to-image-8
python benchmarks/code_sizes.py runs/text-to-image runs/text-to-image-8
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kuosan.image.characters import ATTRIBUTES


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="latent runs, each with its evaluation.json")
    given = options.parse_args()
    found = [evaluation(run) for run in given.runs]
    columns = {str(run): cells(one) for run, one in zip(given.runs, found, strict=True)}
    rows = list(next(iter(columns.values())))
    print(f"{'':28s}" + "".join(f"{name[-20:]:>22s}" for name in columns))
    for row in rows:
        print(f"{row:28s}" + "".join(f"{one.get(row, '-'):>22s}" for one in columns.values()))


def evaluation(run: Path) -> dict[str, Any]:
    """What `kuosan evaluate` wrote last."""
    try:
        found = json.loads((run / "evaluation.json").read_text("utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"{run} has no evaluation.json: first kuosan evaluate {run}") from None
    if "reconstruction" not in found:
        raise SystemExit(f"{run} has no codes: this is about latent diffusion models and autoencoders")
    return found


def cells(found: dict[str, Any]) -> dict[str, str]:
    """The words of a column, by row; of samples where a judge saw some."""
    codes, bits = found["reconstruction"], found["bits_per_dim"]
    said = {
        "numbers": f"{codes['numbers']:,}",
        "times fewer than an image": f"{codes['times_fewer']:.3g}",
        "PSNR, held out, dB": f"{codes['psnr']:.2f}",
        "bound, bits/dim": f"{bits['total']:.4f} ± {bits['standard_error']:.4f}",
    }
    attributes = (found.get("quality") or {}).get("attributes", {})
    for name in ATTRIBUTES:
        for key, words in (("seen", "seen"), ("unseen", "held out")):
            one = attributes.get(name, {}).get(key)
            said[f"{name}, {words}"] = f"{one['right']:.1%} ± {one['error']:.1%}" if one else "-"
    return said


if __name__ == "__main__":
    main()
