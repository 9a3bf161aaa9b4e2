"""Captioned images against guidance weights: how often samples have what their captions ask for, and a picture of it.

python benchmarks/text_to_image.py runs/text-to-image --samples 1000 --out docs/text-to-image.png
python benchmarks/text_to_image.py runs/text-to-emoji --prompts benchmarks/emoji.txt --out docs/emoji.png

The shares are of attributes that a judge can see: of other images than Chinese characters there is only the picture.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import kuosan
from kuosan.image.captioned import CaptionedMedium
from kuosan.image.data import to_levels, to_pixels
from kuosan.progress import Progress
from kuosan.runs import LatentRun

WEIGHTS = (0.0, 1.0, 2.0, 4.0)
#: Rows of the picture of characters: captions of no one image.
PROMPTS = (
    "water radical, 8 strokes, serif, bold; river",
    "water radical, 8 strokes, sans, regular; river",
    "tree radical, 10 strokes, sans, bold; peach tree",
    "tree radical, 16 strokes, serif, regular; orange tree",
    "mouth radical, 6 strokes, serif, bold; to shout",
    "fire radical, 13 strokes, sans, regular; smoke",
    "fish radical, 19 strokes, sans, bold; carp",
    "man radical, 5 strokes, serif, regular; to stand",
)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("run", metavar="RUN")
    options.add_argument("--samples", type=int, default=1000, help="of each weight")
    options.add_argument("--steps", type=int, help="default the recipe's")
    options.add_argument("--weights", type=float, nargs="+", default=WEIGHTS)
    options.add_argument("--precision", default="float32")
    options.add_argument("--out", type=Path, help="a picture: prompts against weights")
    options.add_argument("--prompts", type=Path, help="its rows, a prompt a line; default some of characters")
    given = options.parse_args()
    run = kuosan.load(given.run)
    if not isinstance(run.medium, CaptionedMedium):
        options.error(f"{given.run} is no run of captioned images")
    how = {"steps": given.steps, "precision": given.precision}
    if run.judge is None:
        print(f"no judge: {run.why_no_judge}")
    else:
        judged(run, given, how)
    if given.out:
        prompts = given.prompts.read_text("utf-8").splitlines() if given.prompts else PROMPTS
        print(picture(run, prompts, given.weights, how, given.out))


def judged(run, given, how) -> None:
    """The table: shares of samples that have the value asked for, by attribute and weight."""
    real: dict[str, Any] = run.judge.reference["attributes"]
    names = [(name, key) for name in real for key in ("seen", "unseen")]
    print(f"{given.samples} samples of each weight, half of the captions of held-out images")
    print("right, by the judge, ± standard error")
    coded = through_codes(run)
    beside = f"{'real':>9s}" + (f"{'coded':>9s}" if coded else "")
    print(f"{'attribute, combination':28s}{beside}" + "".join(f"{f'w = {w:g}':>16s}" for w in given.weights))
    found = {
        w: run.quality(given.samples, guidance=w, **how)["attributes"]  # type: ignore[index]
        for w in given.weights
    }
    for name, key in names:
        words = f"{name}, {'seen' if key == 'seen' else 'held out'}"
        shares = [found[w][name][key] for w in given.weights]
        cells = ["-" if one is None else f"{one['right']:.1%} ± {one['error']:.1%}" for one in shares]
        bounds = [one[name][key] for one in (real, coded) if one]
        of_real = "".join(f"{'-' if one is None else format(one['right'], '.1%'):>9s}" for one in bounds)
        print(f"{words:28s}{of_real}" + "".join(f"{cell:>16s}" for cell in cells))


@torch.no_grad()
def through_codes(run) -> dict[str, Any] | None:
    """Of a latent run: what the judge sees of real held-out images that went through the autoencoder, as samples do."""
    if not isinstance(run, LatentRun):
        return None
    held = run.data.held_out
    codes = [run.autoencoder.encode(to_pixels(part, run.levels)).mean for part in held.levels.split(256)]
    again = to_levels(run.decoded(run.autoencoder, torch.cat(codes)), run.levels)
    return run.judge.quality(again, held.captions)["attributes"]


def picture(run, prompts, weights, how, path: Path, each: int = 4) -> Path:
    """Prompts down, weights across, so many samples of each, of the same seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    seeds = [k + each * i for i in range(len(prompts)) for k in range(each)]
    asked = [prompt for prompt in prompts for _ in range(each)]
    progress = Progress("picture: weights")
    figure, axes = plt.subplots(
        len(prompts), len(weights), figsize=(2.6 * len(weights) + 3.4, 0.62 * len(prompts) + 0.4), squeeze=False
    )
    for j, weight in enumerate(weights):
        drawn = run.sample(seeds=seeds, prompt=asked, guidance=weight, **how)
        for i, prompt in enumerate(prompts):
            row = drawn[each * i : each * (i + 1)]
            image = row.movedim(1, -1).permute(1, 0, 2, 3).flatten(1, 2).squeeze(-1).numpy()
            axis = axes[i, j]
            axis.imshow(image, cmap="gray", vmin=0, vmax=run.levels - 1, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if i == 0:
                axis.set_title(f"w = {weight:g}", fontsize=9)
            if j == 0:
                axis.set_ylabel(prompt, fontsize=8, rotation=0, ha="right", va="center")
        progress(j + 1, len(weights))
    figure.tight_layout(pad=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    return path


if __name__ == "__main__":
    main()
