r"""What diffusers' schedulers do in so many steps, as tables: the noise levels, the timesteps told, the rule of a step.

The rules are this package's own solvers. They run on a ladder: a process whose times are the noise levels
:math:`\rho = \sigma/\alpha` that a scheduler visits, whatever the timesteps that its network is told there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kuosan.process import Grid, Process
from kuosan.schedules import RectifiedFlow
from kuosan.schedules import Table as Steps
from kuosan.solvers.ancestral import Ancestral
from kuosan.solvers.ddim import DDIM
from kuosan.solvers.dpm_solver import ExponentialStep, UniPC
from kuosan.solvers.multistep import AdamsBashforth, added
from kuosan.solvers.table import Row, Table
from kuosan.solvers.variables import half_log_snr, to_data

#: alpha_bar where rescale_betas_zero_snr leaves no signal: next to nothing, or what diffusers puts there to divide by.
ZERO_SNR = {"DDPMScheduler": 1e-20, "DDIMScheduler": 1e-20}
LEAST_SIGNAL = 2.0**-24
#: Classes whose state is x / alpha, and whose grids need not be of whole timesteps.
EULER = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
#: Classes that lay out one point more than there are steps, and leave out the last.
MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


def alpha_bar(name: str, config: Mapping[str, Any]) -> Tensor:
    r""":math:`\bar\alpha` of timesteps 0 to N - 1, (N,), float64, by the schedule that beta_schedule names.

    With rescale_betas_zero_snr (Lin et al. 2024, arXiv 2305.08891, algorithm 1) the square roots are moved and scaled
    so that the last is 0 (:data:`ZERO_SNR`) and the first as it was.

    Raises:
        ValueError: a beta outside (0, 1).
    """
    n, first, last = config["num_train_timesteps"], config["beta_start"], config["beta_end"]
    if config["trained_betas"] is not None:
        betas = np.array(config["trained_betas"], dtype=np.float64)
    elif config["beta_schedule"] == "linear":
        betas = np.linspace(first, last, n)
    elif config["beta_schedule"] == "scaled_linear":
        betas = np.linspace(math.sqrt(first), math.sqrt(last), n) ** 2
    elif config["beta_schedule"] == "sigmoid":
        betas = first + (last - first) / (1 + np.exp(-np.linspace(-6, 6, n)))
    else:  # the cosine, Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 17, each beta at most 0.999
        cosine = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = np.minimum(1 - cosine[1:] / cosine[:-1], 0.999)
    if not ((betas > 0) & (betas < 1)).all():
        raise ValueError(f"{name}: betas lie between 0 and 1, got {betas.min():g} to {betas.max():g}")
    bar = np.cumprod(1 - betas)
    if config.get("rescale_betas_zero_snr"):
        root = np.sqrt(bar)
        bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        bar[-1] = ZERO_SNR.get(name, LEAST_SIGNAL)
    return torch.from_numpy(bar)


@dataclass(frozen=True)
class Levels:
    """Where a scheduler evaluates.

    Args:
        rho: the noise level sigma / alpha at each evaluation, (K,), falling.
        told: the timestep that the network is told there, (K,).
        last: the level at which the last step ends; 0 for the data.
    """

    rho: np.ndarray
    told: np.ndarray
    last: float


def levels(name: str, config: Mapping[str, Any], steps: int) -> Levels:
    """The levels of ``set_timesteps(steps)``.

    Raises:
        ValueError: a timestep outside training, or the same one twice.
    """
    n = config["num_train_timesteps"]
    if steps > n:
        raise ValueError(f"this model was trained with {n} timesteps: steps is at most that, got {steps}")
    trained = np.sqrt(1 / alpha_bar(name, config).numpy() - 1)
    told = timesteps(name, config, trained, steps)
    rho = np.interp(told, np.arange(n), trained)
    # Euler's levels lie between those of its timesteps, the others' between those of training
    ends = (rho[0], rho[-1]) if name in EULER else (trained[-1], trained[0])
    high, low = (config.get(f) or end for f, end in zip(("sigma_max", "sigma_min"), ends, strict=True))
    karras, even = config.get("use_karras_sigmas"), config.get("use_exponential_sigmas")
    if karras or even or config.get("use_lu_lambdas"):
        rho = karras_levels(high, low, steps) if karras else np.exp(np.linspace(math.log(high), math.log(low), steps))
        told = np.interp(np.log(rho), np.log(np.append(trained[:-1], max(trained[-2:]))), np.arange(n))
        told[rho > trained[-1] * (1 - 1e-9)] = n - 1  # where it stands for no signal, it may be under the one before
        if name in MULTISTEP:
            cosine = config["beta_schedule"] == "squaredcos_cap_v2" and name == "DPMSolverMultistepScheduler"
            told = np.floor(told + 1e-3) if even or cosine else told.round()
    if not len(told) or told.max() > n - 1:
        raise ValueError(
            f"{steps} steps and steps_offset {config['steps_offset']} go past timestep {n - 1}: take fewer"
        )
    ends_on_data = config.get("set_alpha_to_one", config.get("final_sigmas_type", "zero") == "zero")
    least = rho[-1] if name == "UniPCMultistepScheduler" and (karras or even) else trained[0]
    last = 0.0 if ends_on_data else float(least)
    if (np.diff(rho) >= 0).any() or last > rho[-1] * (1 + 1e-6):
        raise ValueError(f"with {steps} steps the noise levels do not fall at every step: take fewer, or another grid")
    return Levels(rho, told, last)


def timesteps(name: str, config: Mapping[str, Any], trained: np.ndarray, steps: int) -> np.ndarray:
    """The grid that timestep_spacing names, from noise to data, (<= steps,): whole numbers, but for Euler's linspace.

    (Lin et al. 2024, arXiv 2305.08891, table 2.)
    """
    n = last = config["num_train_timesteps"]
    if config.get("lambda_min_clipped", -math.inf) > -math.inf:
        last = int((-np.log(trained) >= config["lambda_min_clipped"]).sum())
    points = steps + (name in MULTISTEP)
    if config["timestep_spacing"] == "linspace":
        told = np.linspace(0, last - 1, points)[::-1][:steps]
        return told if name in EULER else told.round()
    if config["timestep_spacing"] == "leading":
        return (last // points * np.arange(points)[::-1][:steps] + config["steps_offset"]).astype(float)
    told = np.arange(last, 0, -n / steps).round() - 1
    return told[told >= 0]


def karras_levels(high: float, low: float, steps: int) -> np.ndarray:
    """Evenly spaced in the seventh root (Karras et al. 2022, arXiv 2206.00364, eq. 5)."""
    return np.linspace(high ** (1 / 7), low ** (1 / 7), steps) ** 7


@dataclass(frozen=True)
class Ladder:
    """A process whose times are levels, and the steps between them.

    Args:
        times: of each evaluation.
        ends: of each step; 0 for the data. Where the last is the same as its time, that step stays where it is.
    """

    process: Process
    times: tuple[float, ...]
    ends: tuple[float, ...]

    @classmethod
    def of(cls, levels: Levels) -> Ladder:
        further = 0 < levels.last < levels.rho[-1] * (1 - 1e-6)
        rho = np.append(levels.rho, levels.last) if further else levels.rho
        n = len(rho)
        process = Process(Steps(log_snrs=tuple((-2 * np.log(rho[::-1])).tolist())))
        times = tuple((n - i) / n for i in range(n))
        evaluations = times[: len(levels.rho)]
        end = times[-1] if levels.last else 0.0
        return cls(process, evaluations, (*evaluations[1:], end))

    @property
    def stays(self) -> bool:
        return self.ends[-1] == self.times[-1]

    def rows(self, solver: DDIM | Ancestral) -> list[Row]:
        """Of a solver that looks at nothing but its own step."""
        further = () if self.stays or not self.ends[-1] else self.ends[-1:]
        rows = list(solver.rows(self.process, Grid((*self.times, *further))))[: len(self.times)]
        if self.stays:
            rows[-1] = Row(self.times[-1], x=1.0)
        return rows


def table(name: str, config: Mapping[str, Any], predicts: str, steps: int, eta: float) -> Table:
    """The table of a scheduler of discrete timesteps, in the form ``predicts``.

    Raises:
        ValueError: as :func:`levels`; noise is predicted where there is no signal; eta outside [0, 1].
    """
    at = levels(name, config, steps)
    n = config["num_train_timesteps"]
    if predicts == "eps" and config.get("rescale_betas_zero_snr") and name in ZERO_SNR and at.told[0] == n - 1:
        raise ValueError(
            f"timestep {n - 1} has no signal (rescale_betas_zero_snr), where predicted noise says nothing of x0: set "
            "timestep_spacing leading, or prediction_type v_prediction if that is what the network was trained for"
        )
    ladder, told, form = Ladder.of(at), at.told, "x0"
    if name == "DDPMScheduler":
        variance = {"fixed_large": "beta", "fixed_large_log": "beta", "learned_range": "learned"}
        rows = ladder.rows(Ancestral(variance.get(config["variance_type"], "beta_tilde")))
    elif name == "DDIMScheduler":
        rows = ladder.rows(DDIM(eta))
    elif name in EULER:  # Euler in x / alpha along sigma / alpha; the ancestral one is DDPM's sampler in it
        rows = ladder.rows(DDIM() if name == "EulerDiscreteScheduler" else Ancestral())
        scale = math.hypot(1, at.last)  # the last state is not brought back to unit variance
        x, m, _ = rows[-1].history()
        rows[-1] = replace(rows[-1], x=tuple(scale * c for c in x), m=tuple(scale * c for c in m))
    elif name == "PNDMScheduler":
        form, told = predicts, np.insert(told, 1, told[1]) if len(told) > 1 else told
        rows = pndm_rows(ladder, form)
    elif name == "UniPCMultistepScheduler":
        form = "x0" if config["predict_x0"] else "eps"
        rows = unipc_rows(ladder, config)
    else:
        form = "x0" if config["algorithm_type"].endswith("++") else "eps"
        rows = dpm_solver_rows(ladder, config)
    rows = list(Table(tuple(rows), form).read_as(predicts, ladder.process).rows)
    times = (told + 1) / n
    return Table(tuple(replace(row, t=t) for row, t in zip(rows, times, strict=True)), predicts)


def dpm_solver_rows(ladder: Ladder, config: Mapping[str, Any]) -> list[Row]:
    """DPMSolverMultistepScheduler: which order each step has."""
    rows, count = [], len(ladder.times)
    few = config["lower_order_final"] and count < 15
    for i, s in enumerate(ladder.ends):
        order, left = min(config["solver_order"], i + 1), count - i
        if left == 1 and (config["euler_at_final"] or few or config["final_sigmas_type"] == "zero"):
            order = 1
        elif left == 2 and few:
            order = min(order, 2)
        if s == ladder.times[i]:
            rows.append(Row(s, x=1.0))
        else:
            nodes = ladder.times[i + 1 - order : i + 1][::-1]
            heun = config["solver_type"] == "heun"
            rows.append(dpm_solver_row(ladder.process, nodes, s, config["algorithm_type"], heun))
    return rows


def dpm_solver_row(process: Process, nodes: Sequence[float], s: float, algorithm: str, heun: bool) -> Row:
    r"""DPM-Solver of order 1, 2 or 3, as many as there are nodes, newest first (Lu et al. 2022, arXiv 2211.01095).

    .. math:: x_s = k\,x_t - S\,[\varphi_1 m_t + w_1 D_1 + w_2 D_2] + \text{noise}

    in the notation of :mod:`kuosan.solvers.dpm_solver`. Of order 2, w_1 is :math:`\varphi_1 / 2` ("midpoint") or
    :math:`\varphi_2` ("heun"); of order 3, :math:`\varphi_2` and :math:`\varphi_3`, which is half of the parabola's
    curvature and what diffusers and its authors take. The SDE's step on x0 has 2 H for H, that on the noise 2 S for S.
    """
    variable = "x0" if algorithm.endswith("++") else "eps"
    if s == 0:
        return to_data(variable, process, nodes[0])
    step = ExponentialStep.between(variable, process, nodes[0], s)
    noise = 0.0
    if algorithm.startswith("sde"):
        (_, sigma_s), double = process.at(Process.scales, s), replace(step, H=2 * step.H)
        noise = sigma_s * math.sqrt(abs(double.phi(1)))
        step = replace(double, k=step.k * math.exp(step.H)) if variable == "x0" else replace(step, S=2 * step.S)
    h = [half_log_snr(process, u) for u in nodes]
    r = [(h[j] - h[j + 1]) / (half_log_snr(process, s) - h[0]) for j in range(len(h) - 1)]
    m = step.phi(1) * np.eye(len(nodes))[0]
    if len(nodes) == 2:
        m += (step.phi(2) if heun else 0.5 * step.phi(1)) * np.array([1, -1]) / r[0]
    elif len(nodes) == 3:
        first, second = np.array([1, -1, 0]) / r[0], np.array([0, 1, -1]) / r[1]
        bend = (first - second) / (r[0] + r[1])
        m += step.phi(2) * (first + r[0] * bend) + step.phi(3) * bend
    return Row(nodes[0], x=step.k, m=tuple(-step.S * m), z=noise)


def unipc_rows(ladder: Ladder, config: Mapping[str, Any]) -> list[Row]:
    """UniPCMultistepScheduler: :class:`~kuosan.solvers.UniPC` with an order, and a corrector, of each step's own."""
    solver = UniPC(config["solver_order"], config["solver_type"], "x0" if config["predict_x0"] else "eps")
    rows, count, correction = [], len(ladder.times), np.zeros(0)
    for i, (t, s) in enumerate(zip(ladder.times, ladder.ends, strict=True)):
        order = min(solver.order, i + 1, count - i if config["lower_order_final"] else count)
        nodes = ladder.times[i + 1 - order : i + 1][::-1]
        x, m, _ = (Row(t, x=1.0) if s == t else solver.row(ladder.process, nodes, s)).history()
        rows.append(Row(t, x=x, m=tuple(added(m, (x[0] if x else 0.0) * correction))))
        correction = np.zeros(0)
        if i + 1 < count and i not in config["disable_corrector"]:
            correction = added(solver.outputs(ladder.process, (s, *nodes), t, s), [0.0, *(-c for c in m)])
    return rows


#: Adams-Bashforth on even steps, orders 1 to 4.
_ADAMS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def pndm_rows(ladder: Ladder, form: str) -> list[Row]:
    r"""PNDMScheduler without its Runge-Kutta start: pseudo linear multistep (Liu et al. 2022, arXiv 2202.09778, eq. 9).

    DDIM's step with the outputs' Adams-Bashforth combination for the noise. The first step is taken twice: once to
    evaluate at its end, then again with the mean of both outputs (Heun's); the evaluation at its end, at which the
    network is asked again, is left out of the history. With "v" the combination is of v, and read as noise at x_t.
    """

    def row(i: int, weights: Sequence[float], back: int = 0) -> Row:
        alpha_t, sigma_t = ladder.process.at(Process.scales, ladder.times[i])
        alpha_s, sigma_s = ladder.process.at(Process.scales, ladder.ends[i])
        k = alpha_s / alpha_t
        c = sigma_s - sigma_t * k
        if form == "v":
            k, c = k + c * sigma_t, c * alpha_t
        return Row(ladder.times[i], x=(*(0.0,) * back, k), m=tuple(c * w for w in weights))

    rows = [row(0, (1.0,))]
    if len(ladder.times) > 1:
        rows.append(row(0, (0.5, 0.5), back=1))
    for i in range(1, len(ladder.times)):
        weights = list(_ADAMS[min(i, 3)])
        if i < 4:
            weights.insert(i, 0.0)  # the second evaluation, between the first and those after it
        rows.append(row(i, weights))
    return rows


def flow_table(config: Mapping[str, Any], steps: int, tokens: int | None) -> Table:
    r"""FlowMatchEulerDiscreteScheduler, in the form "flow": Euler's :math:`x_s = x_t + (s - t)\,m`, times being sigma.

    With stochastic_sampling :math:`x_s = (1 - s)\,\hat x_0 + s\,z` instead.

    Raises:
        ValueError: one step with shift_terminal.
    """
    times = flow_times(config, steps, tokens)
    grid, process = Grid(tuple(times.tolist())), Process(RectifiedFlow())
    if config["stochastic_sampling"]:
        rows = [Row(t, m=1 - s, z=s) for t, s in grid.pairs()]
        return Table(tuple(rows), "x0").read_as("flow", process)
    return Table(tuple(AdamsBashforth(1, "flow").rows(process, grid)), "flow")


def flow_times(config: Mapping[str, Any], steps: int, tokens: int | None) -> np.ndarray:
    r"""Evenly spaced from 1, shifted :math:`t \leftarrow st / (1 + (s - 1)t)` (Esser et al. 2024, arXiv 2403.03206).

    The shift s is given, and then the earliest time, shifted as in training, is shifted twice; or, with
    use_dynamic_shifting, a line in the number of tokens, or its exponential.
    """
    first, shift = 1 / config["num_train_timesteps"], config["shift"]
    if config["use_dynamic_shifting"]:
        assert tokens is not None
        part = (tokens - config["base_image_seq_len"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
        shift = config["base_shift"] + part * (config["max_shift"] - config["base_shift"])
        shift = math.exp(shift) if config["time_shift_type"] == "exponential" else shift
    else:
        first = shift * first / (1 + (shift - 1) * first)
    times = np.linspace(1, first, steps)
    times = shift * times / (1 + (shift - 1) * times)
    if config["shift_terminal"]:
        if steps == 1:
            raise ValueError("shift_terminal says where the last of several evaluations is: take at least 2 steps")
        times = 1 - (1 - times) * (1 - config["shift_terminal"]) / (1 - times[-1])
    if config["use_karras_sigmas"]:
        times = karras_levels(times[0], times[-1], steps)
    elif config["use_exponential_sigmas"]:
        times = np.exp(np.linspace(math.log(times[0]), math.log(times[-1]), steps))
    return np.minimum(times, 1.0)  # not over it by rounding
