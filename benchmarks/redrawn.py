"""At which noise a model of captioned images loses what was asked: real images under noise, drawn anew from there.

python benchmarks/redrawn.py runs/text-to-image --precision bfloat16

Held-out images are put under the noise of a time, and drawn on from it with their own captions. What the judge sees of
them at a time of 0 is the autoencoder's doing, and from a time of 1 the model has drawn everything.
"""

from __future__ import annotations

import argparse

import torch

import kuosan
from kuosan.image.captioned import CaptionedMedium
from kuosan.image.characters import ATTRIBUTES, unseen
from kuosan.image.data import to_levels, to_pixels
from kuosan.process import Process
from kuosan.progress import Progress
from kuosan.runs import LatentRun
from kuosan.solvers import Noise
from kuosan.solvers.executor import run as execute

TIMES = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("run", metavar="RUN")
    options.add_argument("--examples", type=int, default=500, help="held-out images")
    options.add_argument("--times", type=float, nargs="+", default=TIMES)
    options.add_argument("--guidance", type=float, help="default the recipe's")
    options.add_argument("--steps", type=int, default=12)
    options.add_argument("--precision", default="float32")
    given = options.parse_args()
    run = kuosan.load(given.run)
    if not (isinstance(run, LatentRun) and isinstance(run.medium, CaptionedMedium)) or run.judge is None:
        options.error(f"{given.run} is no latent run of captioned images with attributes that a judge can see")
    held = run.data.held_out
    seen = torch.nonzero(~unseen(held.captions))[:, 0]
    chosen = seen[torch.randperm(len(seen), generator=torch.Generator().manual_seed(1))[: given.examples]]
    captions = [held.captions[i] for i in chosen]
    pixels = to_pixels(held.levels[chosen], run.levels)
    codes = torch.cat([run.autoencoder.encode(part).mean for part in pixels.split(256)])
    noise = Noise(list(range(len(codes))), run.state_shape, torch.float32).draw()
    how = {"guidance": given.guidance, "precision": given.precision, "steps": given.steps}
    print(f"{len(codes)} held-out characters under the noise of a time, and drawn on from it: right, by the judge\n")
    print(f"{'time':>6s}{'sigma / alpha':>15s}" + "".join(f"{name:>10s}" for name in ATTRIBUTES))
    progress = Progress("times")
    for k, t in enumerate(given.times):
        x, ratio = codes, 0.0
        if t:
            begun = {"image": pixels[0], "strength": t} if t < 1 else {}  # the grid's first time is what it gives
            sampler = run.sampler(prompt=captions, **begun, **how)
            table, model, told = sampler.table, sampler.model, sampler.condition
            alpha, sigma = run.denoiser.process.at(Process.scales, table.times[0])
            x_t = alpha * codes + sigma * noise
            x = torch.cat([execute(table, model, x_t[i], None, told[i]) for i in torch.arange(len(codes)).split(256)])
            ratio = sigma / alpha
        found = run.judge.quality(to_levels(run.decoded(run.autoencoder, x), run.levels), captions)["attributes"]
        shares = [found[name]["seen"]["right"] for name in ATTRIBUTES]
        print(f"{t:6.2f}{ratio:15.3g}" + "".join(f"{share:10.1%}" for share in shares), flush=True)
        progress(k + 1, len(given.times))


if __name__ == "__main__":
    main()
