"""The other libraries' deterministic samplers, each through its own public code, as functions of the same three things.

A configuration is ``run(denoise, x, n)``: E[x_0|x] as a function of (x, sigma) with x = x_0 + sigma z; the start x at
sigma 80; and the most evaluations it may take. It returns x at (or next to) sigma 0. Nothing of the libraries is
rewritten here: only their states, x / (1 + sigma) or x / sqrt(1 + sigma^2), are translated. Wherever a library lets its
user say where to evaluate (sigmas, a time grid, a schedule, betas), it is given every grid of :data:`GRIDS`.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import diffusers as hf
import numpy
import torch
from azula import noise as azula_noise
from azula import sample as azula_sample
from azula.denoise import Denoiser, DiracPosterior
from flow_matching.path import scheduler as paths
from flow_matching.solver import ODESolver
from flow_matching.utils import ModelWrapper
from problems import SIGMA_MAX, Denoise
from torch import Tensor

Grid = Callable[[int], list[float]]
Options = dict[str, Any]


class Counted:
    """A denoiser that counts its evaluations, and refuses one too many."""

    def __init__(self, denoise: Denoise, most: int):
        self.denoise, self.most, self.count = denoise, most, 0

    def __call__(self, x: Tensor, sigma: float | Tensor) -> Tensor:
        self.count += 1
        if self.count > self.most:
            raise OverBudget(f"more than {self.most} evaluations")
        return self.denoise(x, float(sigma))


class OverBudget(RuntimeError):
    """A configuration asked for more evaluations than it was given."""


@dataclass(frozen=True)
class Configuration:
    """One way to sample with one library.

    Args:
        sample: a function of the counted denoiser, the start and the most evaluations.
        own: the grid too is one that the library makes, by a setting; otherwise it was given to it from outside.
    """

    library: str
    name: str
    sample: Callable[[Counted, Tensor, int], Tensor]
    own: bool = False

    def run(self, denoise: Denoise, x: Tensor, n: int) -> tuple[Tensor, int]:
        """(the end, evaluations taken); raises OverBudget, or whatever the library raises."""
        counted = Counted(denoise, n)
        return self.sample(counted, x, n), counted.count


# -- grids: n + 1 noise levels from 80 down to 0 ----------------------------------------------------------------------


def rectified(shift: float = 1.0, power: float = 1.0) -> Grid:
    """sigma = shift u / (1 - u) with u = u_0 r^power, r uniform: shift 1 and power 1 is the rectified flow's own."""
    u = SIGMA_MAX / (shift + SIGMA_MAX)
    return lambda n: [shift * v / (1 - v) for v in (u * (1 - k / n) ** power for k in range(n + 1))]


def angle(scale: float = 1.0) -> Grid:
    """sigma = scale tan(a), the angle uniform: the cosine schedule."""
    end = math.atan(SIGMA_MAX / scale)
    return lambda n: [*(scale * math.tan(end * (1 - k / n)) for k in range(n)), 0.0]


def rho(power: float) -> Grid:
    """sigma^(1 / power) uniform down to 0."""
    return lambda n: [SIGMA_MAX * (1 - k / n) ** power for k in range(n + 1)]


def karras(power: float, low: float) -> Grid:
    """sigma^(1 / power) uniform down to ``low``, then 0 (Karras et al. 2022, arXiv 2206.00364, eq. 5)."""
    top, end = SIGMA_MAX ** (1 / power), low ** (1 / power)
    return lambda n: [*((top + (end - top) * k / (n - 1)) ** power for k in range(n)), 0.0]


def exponential(low: float) -> Grid:
    """log sigma uniform down to ``low``, then 0."""
    return lambda n: [*(SIGMA_MAX * (low / SIGMA_MAX) ** (k / (n - 1)) for k in range(n)), 0.0]


def linear_beta(last: float) -> Grid:
    """Uniform in the time of the VP process with linear beta, from 1 to ``last``, then 0."""
    d = 2 * (math.log1p(SIGMA_MAX**2) - 0.1)

    def grid(n: int) -> list[float]:
        times = (1 - (1 - last) * k / (n - 1) for k in range(n))
        return [*(math.sqrt(math.expm1(d * t**2 / 2 + 0.1 * t)) for t in times), 0.0]

    return grid


def halved(grid: Grid) -> Grid:
    """For two evaluations a step, and one for the last."""
    return lambda n: grid((n + 1) // 2)


GRIDS: dict[str, Grid] = {
    **{f"rectified, shift {s:g}": rectified(s) for s in (0.25, 0.35, 0.5, 0.7, 1, 1.4, 2, 4)},
    **{f"rectified, power {p:g}": rectified(1, p) for p in (0.8, 1.25, 1.5, 2)},
    **{f"rectified, shift {s:g}, power {p:g}": rectified(s, p) for s, p in ((2, 1.5), (1.4, 1.25), (0.5, 0.8))},
    **{f"angle, scale {s:g}": angle(s) for s in (0.25, 0.35, 0.5, 0.7, 1, 1.4, 2)},
    **{f"rho {p:g} to 0": rho(p) for p in (3, 4, 5, 7, 10)},
    **{f"karras {p:g} to {s:g}": karras(p, s) for p in (3, 5, 7) for s in (0.002, 0.01, 0.03, 0.1)},
    **{f"exponential to {s:g}": exponential(s) for s in (0.002, 0.01, 0.03, 0.07, 0.15)},
    **{f"linear beta to {s:g}": linear_beta(s) for s in (0.001, 0.01, 0.03, 0.1)},
}


# -- azula ------------------------------------------------------------------------------------------------------------


class _Exact(Denoiser):
    def __init__(self, schedule, counted: Counted):
        super().__init__()
        self.schedule, self.counted = schedule, counted

    def forward(self, x_t, t):
        alpha, sigma = self.schedule(t)
        return DiracPosterior(mean=self.counted(x_t / alpha, sigma / alpha))


class _OnGrid(azula_noise.Schedule):
    """A schedule as a user may write one: the rectified path, whose time is the position on a grid."""

    def __init__(self, levels: list[float]):
        self.levels = torch.tensor(levels, dtype=torch.float64)

    def __call__(self, t):
        sigma = self.levels[((1 - t) * (len(self.levels) - 1)).round().long()]
        return 1 / (1 + sigma), sigma / (1 + sigma)


def _azula_run(sampler, options: Options, schedule, steps: int, counted: Counted, x: Tensor) -> Tensor:
    end, begin = torch.tensor([0.0, 1.0], dtype=torch.float64)
    alpha, sigma = schedule(begin)
    assert abs(float(sigma / alpha) / SIGMA_MAX - 1) < 1e-9
    made = sampler(_Exact(schedule, counted), steps=steps, silent=True, dtype=torch.float64, **options)
    return made(alpha * x) / schedule(end)[0]


def _azula_own(sampler, options, cost, schedule, extra: bool, counted: Counted, x: Tensor, n: int) -> Tensor:
    """Down to the schedule's end; ``extra`` spends the last evaluation on one more denoising there."""
    y = _azula_run(sampler, options, schedule, (n - extra) // cost, counted, x)
    if not extra:
        return y
    alpha, sigma = schedule(torch.zeros((), dtype=torch.float64))
    return counted(y, sigma / alpha)


def _azula_given(sampler, options, cost, grid: Grid, counted: Counted, x: Tensor, n: int) -> Tensor:
    return _azula_run(sampler, options, _OnGrid(grid(n // cost)), n // cost, counted, x)


def _azula_samplers() -> Iterator[tuple[str, type, Options, int]]:
    """(name, class, options, evaluations per step).

    EulerSampler, and order 1 of zAB, zEAB and xEAB, are DDIM written differently: the same numbers.
    """
    yield "DDIMSampler", azula_sample.DDIMSampler, {}, 1
    yield "HeunSampler", azula_sample.HeunSampler, {}, 2
    for name in ("zABSampler", "vABSampler", "zEABSampler", "xEABSampler", "REABSampler"):
        for order in (1, 2, 3, 4):
            if order > 1 or name in ("vABSampler", "REABSampler"):
                yield f"{name} {order}", getattr(azula_sample, name), {"order": order}, 1


def _azula_schedules() -> Iterator[tuple[str, Any, bool]]:
    """(name, schedule from sigma 80, whether it ends above 0)."""
    for low in (0.0, 1e-3, 0.003, 0.01, 0.03, 0.1):
        alpha = math.sqrt((1 + low**2) / (1 + SIGMA_MAX**2))
        yield f"RectifiedSchedule(sigma_min={low:g})", azula_noise.RectifiedSchedule(1 / SIGMA_MAX, low), low > 0
        yield f"CosineSchedule(sigma_min={low:g})", azula_noise.CosineSchedule(alpha, low), low > 0
        yield f"VPSchedule(sigma_min={low:g})", azula_noise.VPSchedule(alpha, low), low > 0
        if low:
            yield f"VESchedule(sigma_min={low:g})", azula_noise.VESchedule(low, SIGMA_MAX), True
    for gamma in (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7):
        for low in (0.0, 0.003):
            name = f"DecaySchedule(gamma={gamma:g}, sigma_min={low:g})"
            yield name, azula_noise.DecaySchedule(1 / SIGMA_MAX, low, gamma), low > 0


def azula() -> Iterator[Configuration]:
    """Every deterministic sampler x its own schedules, and schedules of a user's own."""
    for name, *sampler in _azula_samplers():
        for at, schedule, above in _azula_schedules():
            yield Configuration("azula", f"{name}, {at}", partial(_azula_own, *sampler, schedule, False), own=True)
            if above and sampler[-1] == 1:
                sample = partial(_azula_own, *sampler, schedule, True)
                yield Configuration("azula", f"{name}, {at}, last denoised", sample, own=True)
        for at, grid in GRIDS.items():
            yield Configuration("azula", f"{name}, own schedule: {at}", partial(_azula_given, *sampler, grid))


# -- k-diffusion ------------------------------------------------------------------------------------------------------


def k_sampling() -> types.ModuleType:
    """``k_diffusion.sampling`` alone: the package's own start imports what training on images needs."""
    if "k_diffusion" in sys.modules:
        return sys.modules["k_diffusion.sampling"]
    spec = importlib.util.find_spec("k_diffusion")
    assert spec is not None
    sys.modules["k_diffusion"] = types.ModuleType("k_diffusion")
    sys.modules["k_diffusion"].__path__ = list(spec.submodule_search_locations or ())
    try:
        importlib.import_module("torchvision.transforms.functional")
        return importlib.import_module("k_diffusion.sampling")
    except (ImportError, RuntimeError):  # no torchvision that fits this torch; sampling never calls it
        parts = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
        sys.modules.update({name: types.ModuleType(name) for name in parts})
        sys.modules[parts[1]].functional = sys.modules[parts[2]]  # type: ignore[attr-defined]
        try:
            return importlib.import_module("k_diffusion.sampling")
        finally:
            for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
                del sys.modules[name]


QUIET = {"disable": True}
STILL = {"eta": 0.0, "noise_sampler": lambda sigma, sigma_next: 0.0, **QUIET}


def _k_samplers() -> Iterator[tuple[str, Options, bool]]:
    """(name, options, whether a step takes two evaluations): all that are deterministic, or are so with eta = 0."""
    yield "sample_euler", QUIET, False
    yield "sample_heun", QUIET, True
    yield "sample_dpm_2", QUIET, True
    for order in (2, 3, 4):
        yield "sample_lms", {"order": order, **QUIET}, False
    yield "sample_dpmpp_2m", QUIET, False
    yield "sample_dpmpp_2s_ancestral", STILL, True
    for r in (0.3, 0.5, 0.7):
        yield "sample_dpmpp_sde", {"r": r, **STILL}, True
    yield "sample_dpmpp_2m_sde", {"solver_type": "heun", **STILL}, False  # midpoint is sample_dpmpp_2m
    yield "sample_dpmpp_3m_sde", STILL, False


def _model(counted: Counted):
    return lambda x, sigma: counted(x, sigma[0])


def _k_run(sampler, options: Options, grid: Grid, counted: Counted, x: Tensor, n: int) -> Tensor:
    return sampler(_model(counted), x, torch.tensor(grid(n), dtype=torch.float64), **options)


def _k_fast(sampler, low: float, counted: Counted, x: Tensor, n: int) -> Tensor:
    return sampler(_model(counted), x, low, SIGMA_MAX, n, **STILL)


def _k_adaptive(sampler, low: float, options: Options, counted: Counted, x: Tensor, n: int) -> Tensor:
    return sampler(_model(counted), x, low, SIGMA_MAX, **options, **STILL)


def k_diffusion() -> Iterator[Configuration]:
    """Every sampler that is, or with eta = 0 becomes, deterministic x every grid; and those that make their own."""
    k = k_sampling()
    for name, options, two in _k_samplers():
        shown = ", ".join(f"{key}={v}" for key, v in options.items() if key in ("order", "r", "solver_type", "eta"))
        for at, grid in GRIDS.items():
            own = at.startswith(("karras", "exponential", "linear beta", "rho"))  # get_sigmas_*
            sample = partial(_k_run, getattr(k, name), options, halved(grid) if two else grid)
            yield Configuration("k-diffusion", f"{name}({shown}), {at}", sample, own)
    for low in (0.002, 0.01, 0.03, 0.1, 0.2):
        sample = partial(_k_fast, k.sample_dpm_fast, low)
        yield Configuration("k-diffusion", f"sample_dpm_fast to {low:g}", sample, own=True)
        for order in (2, 3):
            for tolerance in (0.01, 0.03, 0.05, 0.1, 0.2, 0.4):
                name = f"sample_dpm_adaptive(order={order}, rtol=atol={tolerance:g}) to {low:g}"
                o = {"order": order, "rtol": tolerance, "atol": tolerance}
                yield Configuration("k-diffusion", name, partial(_k_adaptive, k.sample_dpm_adaptive, low, o), own=True)


# -- flow_matching ----------------------------------------------------------------------------------------------------


class _Velocity(ModelWrapper):
    """E[x_1 - x_0 | x_t] with x_1 the data: x itself at t = 1, where nothing is left of the noise."""

    def __init__(self, counted: Counted):
        super().__init__(None)
        self.counted = counted

    def forward(self, x, t, **extras):
        t = min(max(float(t), 1e-12), 1.0)
        x_ve, sigma = x / t, (1 - t) / t
        d = self.counted(x_ve, sigma)
        return d - (x_ve - d) / sigma if sigma > 0 else d


#: Evaluations per step. The multistep rules start with three steps of "rk4".
STAGES = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
PATHS = {
    "cosine": paths.CosineScheduler(),
    "VP": paths.VPScheduler(),
    "linear VP": paths.LinearVPScheduler(),
    "polynomial 2": paths.PolynomialConvexScheduler(2),
    "polynomial 3": paths.PolynomialConvexScheduler(3),
}


def _steps(method: str, n: int, cost: int = 1) -> int:
    if method in STAGES:
        return n // STAGES[method]
    return max((n - 9) // cost, 1) if n > 12 else max(n // 4, 1)


def _straight(method: str, grid: Grid, cost: int, options: Options, counted: Counted, x: Tensor, n: int) -> Tensor:
    """On the straight path x_t = t x_1 + (1 - t) x_0."""
    steps = 1 if method in ADAPTIVE else _steps(method, n, cost)
    times = torch.tensor([1 / (1 + s) for s in grid(steps)], dtype=torch.float64)
    solver = ODESolver(_Velocity(counted))
    return solver.sample(x / (1 + SIGMA_MAX), step_size=None, method=method, time_grid=times, **options)


def _transformed(method: str, path, counted: Counted, x: Tensor, n: int) -> Tensor:
    """The same field on another path, in steps uniform in its time."""
    field = paths.ScheduleTransformedModel(_Velocity(counted), paths.CondOTScheduler(), path)
    first = float(path.snr_inverse(torch.tensor(1 / SIGMA_MAX, dtype=torch.float64)))
    times = torch.linspace(first, 1.0, _steps(method, n) + 1, dtype=torch.float64)
    return ODESolver(field).sample(path(times[0]).alpha_t * x, step_size=None, method=method, time_grid=times)


ADAPTIVE = ("dopri5", "bosh3", "adaptive_heun", "fehlberg2", "dopri8")


def flow_matching() -> Iterator[Configuration]:
    """Its ODESolver, every method of torchdiffeq that fits, on the straight path and on others."""
    fixed: list[tuple[str, str, int, Options]] = [(m, "", 1, {}) for m in (*STAGES, "explicit_adams")]
    for tolerance, cost in ((1e-1, 2), (1e-3, 3)):
        o = {"atol": tolerance, "rtol": tolerance}
        fixed.append(("implicit_adams", f", tolerance {tolerance:g}, {cost} a step", cost, o))
    for method, more, cost, options in fixed:
        for at, grid in GRIDS.items():
            sample = partial(_straight, method, grid, cost, options)
            yield Configuration("flow_matching", f"{method}, {at}{more}", sample, own=at == "rectified, shift 1")
    for method in ADAPTIVE:
        for tolerance in (3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5):
            o = {"atol": tolerance, "rtol": tolerance}
            sample = partial(_straight, method, rectified(), 1, o)
            yield Configuration("flow_matching", f"{method}, rtol=atol={tolerance:g}", sample, own=True)
    for method in (*STAGES, "explicit_adams"):
        for name, path in PATHS.items():
            yield Configuration(
                "flow_matching", f"{method}, path: {name}", partial(_transformed, method, path), own=True
            )


# -- diffusers --------------------------------------------------------------------------------------------------------


def betas_of(levels: list[float]) -> list[float]:
    """The betas of a VP model trained at these levels of noise, lowest first."""
    return [1 - after / before for before, after in pairwise([1.0, *(1 / (1 + s**2) for s in levels)])]


def _level(scheduler, state: str, i: int, t: Tensor) -> float:
    """The sigma, x = x_0 + sigma z, at which a scheduler wants its i-th evaluation.

    It is read off the scheduler, exact: the model need not see the time that some schedulers round to a whole number.
    """
    if isinstance(scheduler, hf.IPNDMScheduler):
        return float(scheduler.betas[i] / scheduler.alphas[i])
    if not hasattr(scheduler, "sigmas"):
        bar = float(scheduler.alphas_cumprod[int(t)])
        return math.sqrt((1 - bar) / bar)
    if isinstance(scheduler, hf.KDPM2DiscreteScheduler) and not scheduler.state_in_first_order:
        return float(scheduler.sigmas_interpol[i])
    s = float(scheduler.sigmas[i])
    return s / (1 - s) if state == "flow" else s


def _said(scheduler, y: Tensor, x_ve: Tensor, d: Tensor, sigma: float) -> Tensor:
    """What a network should have said, in the form in which the scheduler expects it."""
    eps = (x_ve - d) / sigma
    if hasattr(scheduler, "precondition_outputs"):
        data, total = scheduler.config.sigma_data, math.hypot(sigma, scheduler.config.sigma_data)
        return (d - (data / total) ** 2 * y) / (sigma * data / total)
    if isinstance(scheduler, hf.IPNDMScheduler):  # v
        return (eps - sigma * d) / math.hypot(1, sigma)
    return {"sample": d, "epsilon": eps, "flow_prediction": eps - d}[scheduler.config["prediction_type"]]


def _drive(scheduler, state: str, counted: Counted, x: Tensor, **options) -> Tensor:
    """diffusers' loop: scale_model_input, model, step.

    Args:
        state: the scheduler's own: "ve" x, "vp" x / sqrt(1 + sigma^2), "flow" x / (1 + sigma).
        options: of the scheduler's step.
    """

    def scale(sigma: float) -> float:
        return {"ve": 1.0, "vp": 1 / math.hypot(1, sigma), "flow": 1 / (1 + sigma)}[state]

    first = _level(scheduler, state, 0, scheduler.timesteps[0])
    if abs(first / SIGMA_MAX - 1) > 1e-3:
        raise ValueError(f"starts at sigma {first:.4g}")
    y = x * scale(first)
    for i, t in enumerate(scheduler.timesteps):
        sigma = _level(scheduler, state, i, t)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(y, t)
        x_ve = y / scale(sigma)
        d = counted(x_ve.double(), sigma).to(y.dtype)
        y = scheduler.step(_said(scheduler, y, x_ve, d, sigma), t, y, **options).prev_sample
    return y.double()


def _either_precision(sample, *given) -> Tensor:
    """In float64; in float32 where the library cannot."""
    counted, x, n = given
    try:
        return sample(counted, x, n)
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        counted.count = 0
        return sample(counted, x.float(), n)


def _hf(name: str, sample, own: bool = False) -> Configuration:
    return Configuration("diffusers", name, partial(_either_precision, sample), own)


def _make(name: str, **options):
    return getattr(hf, name + "Scheduler")(**options)


def _shown(name: str, options: Options) -> str:
    return f"{name}({', '.join(f'{k}={v}' for k, v in options.items() if k != 'tau_func')})"


def _to_zero(name, options: Options, grid: Grid, state: str, step: Options, counted, x: Tensor, n: int) -> Tensor:
    """A model trained at exactly the grid's levels; the sampler visits all of them, then 0."""
    levels = [s for s in grid(n) if s > 0]
    made = _make(name, num_train_timesteps=len(levels), trained_betas=betas_of(levels[::-1]), **options)
    if name in ("DPMSolverMultistep", "DPMSolverSinglestep", "HeunDiscrete"):
        made.set_timesteps(timesteps=list(range(len(levels)))[::-1])
    else:
        made.set_timesteps(len(levels))
    return _drive(made, state, counted, x, **step)


def _to_low(name, options: Options, grid: Grid, counted: Counted, x: Tensor, n: int) -> Tensor:
    """As above for samplers that cannot end at 0: they end at the model's lowest level, .002 or less."""
    levels = [s for s in grid(n) if s > 0]
    levels.append(min(0.002, levels[-1] / 2))
    made = _make(name, num_train_timesteps=len(levels), trained_betas=betas_of(levels[::-1]), **options)
    made.set_timesteps(n)
    return _drive(made, "vp", counted, x)


def _flow_sigmas(name, options: Options, grid: Grid, counted: Counted, x: Tensor, n: int) -> Tensor:
    """Sigmas given to a scheduler of flow models."""
    made = _make(name, **options)
    made.set_timesteps(sigmas=numpy.array([s / (1 + s) for s in grid(n) if s > 0]))
    return _drive(made, "flow", counted, x)


def _ipndm(grid: Grid, counted: Counted, x: Tensor, n: int) -> Tensor:
    made = hf.IPNDMScheduler(trained_betas=[s / math.hypot(1, s) for s in grid(n)])
    made.set_timesteps(n)
    return _drive(made, "vp", counted, x)


def _spaced(name, options: Options, state: str, counted: Counted, x: Tensor, n: int) -> Tensor:
    """The scheduler's own spacing."""
    made = _make(name, **options)
    made.set_timesteps((n + 1) // 2 if name == "HeunDiscrete" else n)
    return _drive(made, state, counted, x)


def _hf_solvers() -> Iterator[tuple[str, Options]]:
    """Multistep and singlestep solvers, by class and options. With the last step to 0, no other ending differs.

    DDIM, EulerDiscrete and FlowMatchEulerDiscrete are order 1 of DPMSolverMultistep: the same numbers on a given grid.
    """
    for order in (1, 2, 3):
        for kind in ("midpoint", "heun") if order == 2 else ("midpoint",):
            o = {"solver_order": order, "solver_type": kind}
            yield "DPMSolverMultistep", o
            if order == 3:
                yield "DPMSolverMultistep", {**o, "lower_order_final": False}
            yield "DPMSolverSinglestep", o
            o = {"algorithm_type": "dpmsolver", **o, "final_sigmas_type": "sigma_min"}
            yield "DPMSolverMultistep", o
            yield "DPMSolverSinglestep", o
        for kind in ("bh1", "bh2"):
            o = {"solver_order": order, "solver_type": kind}
            yield "UniPCMultistep", {**o, "predict_x0": True}
            if order > 1:
                yield "UniPCMultistep", {**o, "predict_x0": True, "lower_order_final": False}
            yield "UniPCMultistep", {**o, "predict_x0": False, "final_sigmas_type": "sigma_min"}
        yield "DEISMultistep", {"solver_order": order}
        for corrector in {1: (1, 3), 2: (2, 3), 3: (3, 4)}[order]:
            for what in ("data_prediction", "noise_prediction"):
                o = {"predictor_order": order, "corrector_order": corrector, "algorithm_type": what}
                yield "SASolver", {**o, "tau_func": lambda t: 0}


def _hf_on_grids() -> Iterator[Configuration]:
    """On every grid: as sigmas, or as the betas of a model trained there."""
    x0 = {"prediction_type": "sample"}
    plms = {"skip_prk_steps": True, "set_alpha_to_one": True, "timestep_spacing": "linspace"}
    for at, grid in GRIDS.items():
        shifted = at.startswith("rectified, shift") and "power" not in at  # use_flow_sigmas and flow_shift
        for name, options in _hf_solvers():
            shown = f"{_shown(name, options)}, {at}"
            if name == "UniPCMultistep" and options["predict_x0"]:
                o = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", **options}
                yield _hf(shown, partial(_flow_sigmas, name, o, grid), shifted)
            elif name in ("DEISMultistep", "SASolver") or "final_sigmas_type" in options:
                yield _hf(shown, partial(_to_low, name, {**x0, **options}, grid))
            else:
                yield _hf(shown, partial(_to_zero, name, {**x0, **options}, grid, "vp", {}), shifted)
        yield _hf(f"HeunDiscrete, {at}", partial(_to_zero, "HeunDiscrete", x0, halved(grid), "ve", {}))
        yield _hf(f"KDPM2Discrete, {at}", partial(_to_zero, "KDPM2Discrete", {}, halved(grid), "ve", {}))
        shorter = partial(lambda grid, n: grid(n - 1), grid)  # PNDM evaluates its second time twice
        yield _hf(f"PNDM, {at}", partial(_to_zero, "PNDM", plms, shorter, "vp", {}))
        for order in (2, 3, 4):
            sample = partial(_to_zero, "LMSDiscrete", x0, grid, "ve", {"order": order})
            yield _hf(f"LMSDiscrete(order={order}), {at}", sample)
        yield _hf(f"IPNDM, {at}", partial(_ipndm, grid))


def _hf_edm() -> Iterator[Configuration]:
    solvers: list[tuple[str, Options]] = [("EDMEuler", {})]
    several = [{"solver_order": 2}, {"solver_order": 3}, {"solver_order": 2, "solver_type": "heun"}]
    solvers += [("EDMDPMSolverMultistep", o) for o in several]
    for kind, powers in (("karras", (2, 3, 5, 7, 10)), ("exponential", (7,))):
        for power in powers:
            for low in (0.002, 0.01, 0.03, 0.1):
                for name, options in solvers:
                    o = {"sigma_schedule": kind, "rho": float(power), "sigma_min": low, **options}
                    yield _hf(_shown(name, o), partial(_spaced, name, o, "ve"), own=True)


def _fits(name: str, spacing: Options) -> bool:
    """Whether a scheduler has a spacing."""
    if "use_lu_lambdas" in spacing:
        return name == "DPMSolverMultistep"
    if "timestep_spacing" in spacing or not spacing:  # one has no choice between "linspace" and "trailing"
        return (name == "DPMSolverSinglestep") == (not spacing)
    return name != "DDIM"


def _hf_spacings() -> Iterator[Configuration]:
    """The schedulers' own spacings of models trained at 1,000 levels, on three schedules that reach sigma 80."""
    thousand = {"linear beta": linear_beta(0.001), "rectified": rectified(), "cosine": angle()}
    solvers = [(n, o) for n, o in _hf_solvers() if o.get("solver_order") != 1]
    solvers += [(n, {}) for n in ("EulerDiscrete", "HeunDiscrete", "LMSDiscrete", "DDIM")]
    spacings: list[Options] = [{}, {"timestep_spacing": "linspace"}, {"timestep_spacing": "trailing"}]
    spacings += [{f"use_{s}": True} for s in ("karras_sigmas", "exponential_sigmas", "beta_sigmas", "lu_lambdas")]
    for model, grid in thousand.items():
        betas = betas_of([s for s in grid(1000) if s > 0][::-1])
        common = {"num_train_timesteps": 1000, "trained_betas": betas, "prediction_type": "sample"}
        for name, options in solvers:
            more = {"clip_sample": False} if name == "DDIM" else {}
            state = "ve" if name.endswith("Discrete") else "vp"
            for spacing in (s for s in spacings if _fits(name, s)):
                sample = partial(_spaced, name, {**common, **options, **spacing, **more}, state)
                yield _hf(f"{_shown(name, {**options, **spacing})}, 1000 betas: {model}", sample, own=True)


def diffusers() -> Iterator[Configuration]:
    """The schedulers with their own spacings, and on every grid."""
    hf.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="diffusers")
    yield from _hf_on_grids()
    yield from _hf_edm()
    yield from _hf_spacings()


LIBRARIES: dict[str, Callable[[], Iterator[Configuration]]] = {
    "azula": azula,
    "k-diffusion": k_diffusion,
    "flow_matching": flow_matching,
    "diffusers": diffusers,
}
