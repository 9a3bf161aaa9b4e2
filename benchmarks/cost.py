"""The time that a sampler adds to the network, microseconds per step: Kuosan beside the other libraries.

    python benchmarks/cost.py

50 steps, float32, a network that returns a tensor made beforehand. Wall time less the number of evaluations times the
network's own time, over 50. Every library gets the parametrisation in which it is fastest; what is made once for many
samples (tables, timesteps) is not counted for any. The libraries take turns, 9 times; medians. "Floor" is DDIM by
hand with coefficients known beforehand. "Ratio" is Kuosan over the fastest of azula, k-diffusion and diffusers.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from peers import k_sampling, linear_beta
from torch import Tensor, nn

import kuosan as ks

STEPS, TURNS = 50, 9
SHAPES = [(64, 3, 32, 32), (256, 2)]
SAMPLERS = ("floor", "DDIM", "Euler", "DPM-Solver++ 2M", "UniPC 2", "Heun", "ancestral")
LIBRARIES = ("by hand", "Kuosan", "azula", "k-diffusion", "diffusers", "flow_matching")
#: One whole run of 50 steps, by (sampler, library); several where the parametrisation may be chosen.
Runs = dict[tuple[str, str], list[Callable[[], object]]]


class Fixed(nn.Module):
    """A network that costs nothing; counts its evaluations."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.outputs, self.count = [torch.randn(shape) for _ in range(8)], 0  # no network returns the same memory twice

    def forward(self, *_: object, **__: object) -> Tensor:
        self.count += 1
        return self.outputs[self.count % 8]


def by_hand(net: Fixed, x: Tensor) -> Runs:
    rows = [(1.0 - 1e-3 * k, 1e-3 * k) for k in range(STEPS)]

    memory = torch.empty_like(x)

    @torch.no_grad()
    def ddim():
        y = x
        for a, b in rows:
            y = torch.mul(y, a, out=memory).add_(net(y), alpha=b)
        return y

    return {("floor", "by hand"): [ddim]}


def kuosan(net: Fixed, x: Tensor) -> Runs:
    names = ("ddim", "euler", "dpm_solver++", "unipc", "heun", "ancestral")
    process = ks.Process(ks.schedules.LinearBeta())
    runs: Runs = {}
    for sampler, name in zip(SAMPLERS[1:], names, strict=True):
        if name not in ks.solvers.SOLVERS:
            continue
        solver = ks.solvers.SOLVERS[name]()
        table = solver.table(process, steps=STEPS)
        forms = dict.fromkeys((table.form, "x0", "eps"))
        models = [ks.Denoiser(net, process, predicts=form) for form in forms]
        runs[sampler, "Kuosan"] = [
            lambda m=m, t=table: ks.solvers.run(t, m, x, lambda: torch.randn_like(x)) for m in models
        ]
    return runs


def azula(net: Fixed, x: Tensor) -> Runs:
    from azula import noise, sample
    from azula.denoise import Denoiser, DiracPosterior

    class Exact(Denoiser):
        def __init__(self):
            super().__init__()
            self.schedule, self.net = noise.VPSchedule(), net

        def forward(self, x_t, t):
            return DiracPosterior(mean=self.net(x_t, t))

    makers = {
        "DDIM": lambda: sample.DDIMSampler(Exact(), steps=STEPS, silent=True),
        "Euler": lambda: sample.EulerSampler(Exact(), steps=STEPS, silent=True),
        "DPM-Solver++ 2M": lambda: sample.xEABSampler(Exact(), order=2, steps=STEPS, silent=True),
        "Heun": lambda: sample.HeunSampler(Exact(), steps=STEPS, silent=True),
        "ancestral": lambda: sample.DDPMSampler(Exact(), steps=STEPS, silent=True),
    }
    return {(name, "azula"): [partial(make(), x)] for name, make in makers.items()}


def k_diffusion(net: Fixed, x: Tensor) -> Runs:
    k = k_sampling()
    sigmas = torch.tensor(linear_beta(1e-3)(STEPS))
    functions = {
        "DDIM": k.sample_euler,  # in its parametrisation DDIM is Euler
        "Euler": k.sample_euler,
        "DPM-Solver++ 2M": k.sample_dpmpp_2m,
        "Heun": k.sample_heun,
        "ancestral": k.sample_euler_ancestral,
    }
    return {(name, "k-diffusion"): [lambda f=f: f(net, x, sigmas, disable=True)] for name, f in functions.items()}


def diffusers(net: Fixed, x: Tensor) -> Runs:
    import diffusers as d

    def loop(scheduler):
        scale = getattr(scheduler, "scale_model_input", lambda y, t: y)

        @torch.no_grad()
        def run():
            y = x
            for t in scheduler.timesteps:
                y = scheduler.step(net(scale(y, t), t), t, y, return_dict=False)[0]
            return y

        run.ready = lambda: scheduler.set_timesteps(STEPS)
        return run

    makers = {
        "DDIM": lambda **o: d.DDIMScheduler(clip_sample=False, **o),
        "Euler": d.EulerDiscreteScheduler,
        "DPM-Solver++ 2M": d.DPMSolverMultistepScheduler,
        "UniPC 2": d.UniPCMultistepScheduler,
        "Heun": d.HeunDiscreteScheduler,
        "ancestral": d.EulerAncestralDiscreteScheduler,
    }
    runs: Runs = {}
    for name, make in makers.items():
        forms = ("epsilon",) if name == "ancestral" else ("epsilon", "sample")
        runs[name, "diffusers"] = [loop(make(prediction_type=form)) for form in forms]
    runs["Euler", "diffusers"].append(loop(d.FlowMatchEulerDiscreteScheduler()))
    runs["ancestral", "diffusers"].append(loop(d.DDPMScheduler(clip_sample=False)))
    return runs


def flow_matching(net: Fixed, x: Tensor) -> Runs:
    from flow_matching.solver import ODESolver

    solver, times = ODESolver(net), torch.linspace(0, 1, STEPS + 1)
    methods = {"Euler": "euler", "Heun": "heun2"}
    return {
        (name, "flow_matching"): [lambda m=m: solver.sample(x, step_size=None, method=m, time_grid=times)]
        for name, m in methods.items()
    }


def measure(shape: tuple[int, ...]) -> dict[tuple[str, str], float]:
    """Microseconds per step that each sampler of each library adds, its fastest parametrisation."""
    net, x = Fixed(shape), torch.randn(shape)
    runs: Runs = {}
    for library in (by_hand, kuosan, azula, k_diffusion, diffusers, flow_matching):
        runs |= library(net, x)
    own, t = [], torch.zeros(shape[0])
    taken: dict[tuple[tuple[str, str], int], list[float]] = {}
    for turn in range(TURNS + 2):
        begun = time.perf_counter()
        for _ in range(1000):
            net(x, t)
        own.append((time.perf_counter() - begun) / 1000)
        for key, several in runs.items():
            for i, run in enumerate(several):
                getattr(run, "ready", lambda: None)()
                net.count = 0
                begun = time.perf_counter()
                run()
                seconds = time.perf_counter() - begun - net.count * own[-1]
                if turn > 1:  # two to warm up
                    taken.setdefault((key, i), []).append(seconds / STEPS * 1e6)
    best: dict[tuple[str, str], float] = {}
    for (key, _), values in taken.items():
        best[key] = min(best.get(key, torch.inf), statistics.median(values))
    return best


def main() -> None:
    warnings.filterwarnings("ignore")
    for shape in SHAPES:
        best = measure(shape)
        print(f"{'x'.join(map(str, shape)):18s}" + "".join(f"{name:>15s}" for name in LIBRARIES) + f"{'ratio':>8s}")
        for sampler in SAMPLERS:
            cells = [best.get((sampler, library)) for library in LIBRARIES]
            peers = [c for c in cells[2:5] if c is not None]
            ratio = f"{cells[1] / min(peers):8.2f}" if cells[1] is not None and peers else ""
            print(f"{sampler:18s}" + "".join(f"{'-' if c is None else f'{c:.0f}':>15s}" for c in cells) + ratio)
        print()


if __name__ == "__main__":
    main()
