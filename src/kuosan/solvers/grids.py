r"""Grids: where the evaluations of a sampler lie. All but "time" and "quadratic" are laid out in the noise level.

:math:`\rho = \sigma_t / \alpha_t` means the same under every schedule, so that such a grid visits the same amounts of
noise whatever the process. It starts at the process's last time, t = 1, or where what is already there begins; the step
after its last time goes to the data.
"""

from __future__ import annotations

import math
from abc import ABC
from dataclasses import dataclass

import numpy as np
import torch

from kuosan.process import Grid, Process
from kuosan.schedules import Table


class Spacing(ABC):  # noqa: B024  (a subclass gives one of the two)
    """A rule that lays out a grid of so many steps. A subclass gives ``levels``, or ``times`` itself."""

    def levels(self, first: float, least: float, steps: int) -> np.ndarray:
        """log(sigma / alpha) of evaluations; the process begins at ``first``, and models saw none under ``least``."""
        raise NotImplementedError

    def times(self, process: Process, steps: int, begin: float) -> np.ndarray:
        earliest = 1 / len(process.schedule) if isinstance(process.schedule, Table) else process.schedule.t_min
        first, least = (-0.5 * float(process.log_snr(t)) for t in (begin, earliest))
        levels = self.levels(min(first, 40.0), least, steps)
        return process.schedule.time_of(torch.from_numpy(-2 * levels)).numpy()

    def grid(self, process: Process, steps: int, begin: float = 1.0) -> Grid:
        """The grid: from ``begin``, and not under the earliest time that the model has seen, ``schedule.t_min``.

        On a discrete-time process each time is the nearest step of the model.

        Raises:
            ValueError: steps is under 1, or more than a discrete-time process has; begin is over 1, or leaves no room
                for so many steps.
        """
        schedule = process.schedule
        schedule.times(steps)  # says what is wrong with the number
        room = round(begin * len(schedule)) if isinstance(schedule, Table) else steps
        if not schedule.t_min < begin <= 1 or room < steps:
            raise ValueError(f"a grid of {steps} steps cannot begin at t = {begin:g}: take a later time, up to 1")
        times = np.array(self.times(process, steps, begin))
        times[0] = begin
        if isinstance(schedule, Table):
            return Grid(tuple(_to_steps(times, len(schedule))))
        if times[-1] < schedule.t_min:
            times = begin - (begin - times) * (begin - schedule.t_min) / (begin - times[-1])
            times[-1] = schedule.t_min  # to the last bit
        return Grid(tuple(times.tolist()))


def _to_steps(times: np.ndarray, n: int) -> list[float]:
    """The nearest multiples of 1/n, moved apart where two would be the same."""
    index = np.clip(np.rint(times * n).astype(int), 1, n)
    for i in range(1, len(index)):
        index[i] = min(index[i], index[i - 1] - 1)
    for i in range(len(index)):  # what was pushed below the first step comes back up
        index[-1 - i] = max(index[-1 - i], i + 1)
    return (index / n).tolist()


@dataclass(frozen=True)
class UniformTime(Spacing):
    """Evenly spaced in t: 1, 1 - 1/K, ..., 1/K (:meth:`Process.sampling_grid <kuosan.Process.sampling_grid>`)."""

    def times(self, process, steps, begin):
        return begin * np.array(process.sampling_grid(steps).times)


@dataclass(frozen=True)
class Quadratic(Spacing):
    """Evenly spaced in sqrt(t): DDIM's quadratic grid (Song et al. 2021, arXiv 2010.02502, appendix D.2)."""

    def times(self, process, steps, begin):
        return begin * (1 - np.arange(steps) / steps) ** 2


@dataclass(frozen=True)
class UniformLogSNR(Spacing):
    """Evenly spaced in log-SNR (Lu et al. 2022, arXiv 2206.00927), between two noise levels sigma / alpha.

    Args:
        last: the noise level of the last evaluation.
        first: where the process begins with more noise than this, only its first evaluation is there.

    Raises:
        ValueError: unless 0 < last < first.
    """

    last: float = 0.002
    first: float = 80.0

    def __post_init__(self):
        if not 0 < self.last < self.first < math.inf:
            raise ValueError(f"noise levels must satisfy 0 < last < first, got {self.last} and {self.first}")

    def ends(self, first: float, least: float) -> tuple[float, float]:
        """The levels of the first and of the last evaluation."""
        first = min(first, math.log(self.first))
        return first, min(max(math.log(self.last), least), first - 1e-6)

    def levels(self, first, least, steps):
        return np.linspace(*self.ends(first, least), steps)


@dataclass(frozen=True)
class Karras(UniformLogSNR):
    r"""EDM's: evenly spaced in :math:`(\sigma/\alpha)^{1/p}` (Karras et al. 2022, arXiv 2206.00364, eq. 5: p = 7).

    Args:
        p: the larger, the more of the evaluations are near the data.
        last, first: as in :class:`UniformLogSNR`.

    Raises:
        ValueError: p not positive, or unless 0 < last < first.
    """

    p: float = 7.0

    def __post_init__(self):
        super().__post_init__()
        if not self.p > 0:
            raise ValueError(f"p must be positive, got {self.p}")

    def levels(self, first, least, steps):
        high, low = (math.exp(level / self.p) for level in self.ends(first, least))
        return self.p * np.log(np.linspace(high, low, steps))


@dataclass(frozen=True)
class Rectified(Spacing):
    r"""Evenly spaced in the rectified flow's time :math:`u = \rho / (\text{shift} + \rho)`, or in a power of it.

    With a shift of 1 it is the straight line's own time; a larger shift spends more evaluations on high noise (Esser et
    al. 2024, arXiv 2403.03206, eq. 23).

    Args:
        shift: the noise level sigma / alpha in the middle of the grid.
        power: u is spaced as :math:`(1 - i/K)^{\text{power}}`: over 1, denser near the data.

    Raises:
        ValueError: shift or power not positive.
    """

    shift: float = 1.0
    power: float = 1.0

    def __post_init__(self):
        if not (self.shift > 0 and self.power > 0):
            raise ValueError(f"shift and power must be positive, got {self.shift} and {self.power}")

    def fractions(self, lowest: float, steps: int) -> np.ndarray:
        """1, 1 - 1/K, ..., 1/K to the power, or evenly down to ``lowest`` where that is more than the last."""
        return np.linspace(1, max(1 / steps, lowest ** (1 / self.power)), steps) ** self.power

    def levels(self, first, least, steps):
        top, bottom = (1 / (1 + self.shift * math.exp(-level)) for level in (first, least))
        u = top * self.fractions(bottom / top, steps)
        with np.errstate(divide="ignore"):
            return np.minimum(np.log(self.shift) + np.log(u) - np.log1p(-u), first)


@dataclass(frozen=True)
class LinearBetaTime(Rectified):
    r"""Evenly spaced in the time of a linear-beta process, :math:`\tau = \sqrt{\log(1 + (\rho/\text{shift})^2)}`, or in
    a power of it: like the rectified time near the data, like log-SNR where there is much noise.

    With a power of 1 and no shift it is the grid that is even in t under :class:`kuosan.schedules.LinearBeta` with its
    small beta_min left out; the power and the shift are the best of ``benchmarks/accuracy.py`` over all its problems.

    Args:
        shift: rho is measured in it.
        power: tau is spaced as :math:`(1 - i/K)^{\text{power}}`.
        first: where the process begins with more noise than this, only its first evaluation is there.

    Raises:
        ValueError: one of them is not positive.
    """

    shift: float = 0.5
    power: float = 1.5
    first: float = 80.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.first < math.inf:
            raise ValueError(f"first, a noise level, must be positive, got {self.first}")

    def levels(self, first, least, steps):
        top, bottom = (
            math.sqrt(math.log1p((min(math.exp(level), self.first) / self.shift) ** 2)) for level in (first, least)
        )
        tau = top * self.fractions(bottom / top, steps)
        return math.log(self.shift) + 0.5 * np.log(np.expm1(tau**2))


#: The grids that recipes and the command line know by name.
GRIDS: dict[str, type[Spacing]] = {
    "time": UniformTime,
    "quadratic": Quadratic,
    "log_snr": UniformLogSNR,
    "karras": Karras,
    "rectified": Rectified,
    "linear_beta": LinearBetaTime,
}
