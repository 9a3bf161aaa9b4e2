r"""The variables of the ODE: with y = x / g and the right clock w, an output of the model drives it alone, dy/dw = m.

Along the probability-flow ODE dx = alpha' x0 dt + sigma' eps dt, so that what multiplies nothing but itself is gone:

    x0        y = x / sigma                 w = alpha / sigma              (DPM-Solver++, arXiv 2211.01095, eq. 4)
    eps       y = x / alpha                 w = sigma / alpha              (DDIM, arXiv 2010.02502, eq. 14; DEIS)
    flow      y = x / (alpha + sigma)       w = sigma / (alpha + sigma)    m = eps - x0, the straight line's velocity
    v         y = x / hypot(alpha, sigma)   w = atan(sigma / alpha)        m = v / hypot(alpha, sigma)
    velocity  y = x                         w = t                          m = dx/dt of the schedule itself
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kuosan.prediction import conversion
from kuosan.process import Process
from kuosan.solvers.table import Row


@dataclass(frozen=True)
class Variable:
    """One of the five, for float64 numbers or arrays.

    Args:
        scale: g from (alpha, sigma).
        clock: w from half the log-SNR, log(alpha / sigma); None for w = t.
        rate: dw / d(half log-SNR).
        level: half the log-SNR from w.
    """

    scale: Callable[[float, float], float]
    clock: Callable | None
    rate: Callable | None
    level: Callable | None


VARIABLES: dict[str, Variable] = {
    "x0": Variable(lambda alpha, sigma: sigma, np.exp, np.exp, np.log),
    "eps": Variable(lambda alpha, sigma: alpha, lambda h: np.exp(-h), lambda h: -np.exp(-h), lambda w: -np.log(w)),
    "flow": Variable(
        lambda alpha, sigma: alpha + sigma,
        lambda h: 1 / (1 + np.exp(h)),
        lambda h: -1 / (2 + np.exp(h) + np.exp(-h)),
        lambda w: np.log1p(-w) - np.log(w),
    ),
    "v": Variable(
        math.hypot,
        lambda h: np.arctan(np.exp(-h)),
        lambda h: -1 / (np.exp(h) + np.exp(-h)),
        lambda w: -np.log(np.tan(w)),
    ),
    "velocity": Variable(lambda alpha, sigma: 1.0, None, None, None),
}
#: What a polynomial through past outputs may be a polynomial in.
CLOCKS = ("own", "log_snr", "flow", "time")


def check_variable(name: str) -> None:
    if name not in VARIABLES:
        raise ValueError(f"variable must be one of {', '.join(VARIABLES)}, got {name!r}")


def half_log_snr(process: Process, t: float) -> float:
    """log(alpha_t / sigma_t); infinite at the data."""
    return 0.5 * process.at(_log_snr, t)[0]


def _log_snr(process: Process, t) -> tuple[torch.Tensor]:
    return (process.log_snr(t),)


def scale_at(name: str, process: Process, t: float) -> float:
    """g at time t."""
    return float(VARIABLES[name].scale(*process.at(Process.scales, t)))


def clock_at(name: str, process: Process, t: float) -> float:
    """w at time t; at the data it is 0, or for x0 infinite."""
    clock = VARIABLES[name].clock
    if clock is None:
        return t
    with np.errstate(over="ignore"):
        return float(clock(half_log_snr(process, t)))


def time_at(name: str, process: Process, w: float) -> float:
    """The time at which the clock shows w."""
    level = VARIABLES[name].level
    return w if level is None else float(process.schedule.time_of(2 * float(level(w))))


#: Variables in which the step to the data is :func:`to_data`: their clock does not reach it (x0), or the rule would
#: leave noise there (v and velocity, in which data that is one point does not move along a straight line).
JUMPS = ("x0", "v", "velocity")


def to_data(name: str, process: Process, *nodes: float, apart: int = 1) -> Row:
    r"""The step to the data that takes the model's x0 for it, for outputs in that variable.

    From several times, newest first, it takes the end of the polynomial through their x0. Along the ODE x0-hat is an
    even function of the noise level :math:`\rho` (its sign enters nowhere): the polynomial is one in the square of
    :math:`\tan^{-1}\rho`, and n times end with an error of order 2n.

    Args:
        apart: how many evaluations each of the times is before the next.
    """
    angles = [clock_at("v", process, u) ** 2 for u in nodes]
    x, m = ([0.0] * (apart * (len(nodes) - 1) + 1) for _ in range(2))
    for k, (u, end) in enumerate(zip(nodes, lagrange(angles, np.zeros(1))[:, 0], strict=True)):
        p, q = process.at(conversion(name, "x0"), u)
        x[k * apart], m[k * apart] = float(end) * p, float(end) * q
    return Row(nodes[0], x=tuple(x), m=tuple(m))


def output_scale(name: str, process: Process, t: float) -> float:
    """What the model's output of that form is multiplied by to be dy/dw."""
    return 1 / scale_at("v", process, t) if name == "v" else 1.0


def lagrange(nodes: Sequence[float], at: np.ndarray) -> np.ndarray:
    """The polynomials that are 1 at one node and 0 at the others, (len(nodes), len(at))."""
    rows = []
    for j, node in enumerate(nodes):
        others = [other for k, other in enumerate(nodes) if k != j]
        rows.append(np.prod([(at - other) / (node - other) for other in others], axis=0) * np.ones_like(at))
    return np.array(rows)


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def weights(name: str, polynomial: str, process: Process, nodes: Sequence[float], t: float, s: float) -> list[float]:
    r"""What the outputs at times ``nodes`` weigh in the step from t to s:
    :math:`g_s \int_{w_t}^{w_s} \ell_j(p(w))\,\mathrm dw`, with the polynomial through them in the clock p.

    Float64, by Gauss's quadrature: exact for p = w, and to rounding otherwise.
    """
    variable = VARIABLES[name]
    if s == 0 and name == "x0":  # the integral weighs the end alone
        return [float(v) for v in lagrange([_p(polynomial, process, u) for u in nodes], np.zeros(1))[:, 0]]
    if len(nodes) == 1:
        clock = clock_at(name, process, s) - clock_at(name, process, t)
        return [scale_at(name, process, s) * clock]
    if polynomial == "own" or variable.clock is None:
        w_t, w_s = clock_at(name, process, t), clock_at(name, process, s)
        at, dw = w_t + (w_s - w_t) * (1 + _NODES) / 2, (w_s - w_t) * _WEIGHTS / 2
        p = [clock_at(name, process, u) for u in nodes]
    else:
        assert variable.rate is not None
        first, last = half_log_snr(process, t), half_log_snr(process, s)
        if s == 0:  # beyond, nothing is left in float64
            if polynomial == "log_snr":
                raise ValueError(f"log-SNR is infinite at the data: no polynomial in it reaches there in {name}")
            last = max(first, 0.0) + 40.0
        panels = np.linspace(first, last, math.ceil(abs(last - first)) + 1)
        width = np.diff(panels)[:, None]
        h = (panels[:-1, None] + width * (1 + _NODES) / 2).ravel()
        dw = variable.rate(h) * (width * _WEIGHTS / 2).ravel()
        at = _p_of_level(polynomial, process, h)
        p = [_p(polynomial, process, u) for u in nodes]
    return [scale_at(name, process, s) * float(v) for v in lagrange(p, at) @ dw]


def _p(polynomial: str, process: Process, t: float) -> float:
    if polynomial == "time":
        return t
    return clock_at("flow", process, t) if polynomial == "flow" else half_log_snr(process, t)


def _p_of_level(polynomial: str, process: Process, h: np.ndarray) -> np.ndarray:
    if polynomial == "time":
        return process.schedule.time_of(torch.from_numpy(2 * h)).numpy()
    return VARIABLES["flow"].clock(h) if polynomial == "flow" else h  # type: ignore[misc]
