"""Noise schedules: a curve of log-SNR against time, and the convention that turns it into alpha and sigma.

Time runs from 0 (data) to 1 (noise). ``log_snr`` is log(alpha^2 / sigma^2) in float64. **Time 0 is the data itself**:
there log-SNR is infinite, alpha is 1 and sigma is 0, whatever the curve's limit; the noisy times are 0 < t <= 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Time = Tensor | float


#: The largest number under 1: the end of [0, 1).
BELOW_ONE = 1 - 2**-53
#: Stands for the limit t -> 0 where a rate of change is asked for at the data itself.
EARLIEST = 1e-150


def float64(t: Any) -> Tensor:
    """A number, sequence or tensor as a float64 tensor."""
    return torch.as_tensor(t, dtype=torch.float64)


@dataclass(frozen=True)
class Convention:
    """How a log-SNR becomes a pair (alpha, sigma).

    Args:
        log_alpha, log_sigma: functions of the log-SNR, exact at both infinities.
        slope: d log(alpha) / d log-SNR; that of log(sigma) is slope - 1/2, since log-SNR = 2 log(alpha) - 2 log(sigma).
        unit_prior: x_1 is taken to be standard normal; otherwise it has the variance that it really has, sigma_1^2.
    """

    log_alpha: Callable[[Tensor], Tensor]
    log_sigma: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    unit_prior: bool = True


CONVENTIONS = {
    # variance preserving: alpha^2 + sigma^2 = 1
    "vp": Convention(
        lambda snr: 0.5 * logsigmoid(snr),
        lambda snr: 0.5 * logsigmoid(-snr),
        lambda snr: 0.5 * torch.sigmoid(-snr),
    ),
    # variance exploding: alpha = 1
    "ve": Convention(torch.zeros_like, lambda snr: -0.5 * snr, torch.zeros_like, unit_prior=False),
    # sub-variance preserving: sigma = 1 - alpha^2 (Song et al. 2021, arXiv 2011.13456, eq. 29); with r = alpha / sigma,
    # r alpha^2 + alpha - r = 0, solved without cancellation from either side
    "sub_vp": Convention(
        lambda snr: math.log(2) - torch.log(torch.exp(-0.5 * snr) + torch.sqrt(torch.exp(-snr) + 4)),
        lambda snr: math.log(2) - torch.log1p(torch.sqrt(1 + 4 * torch.exp(snr))),
        lambda snr: 1 / (2 * (torch.sqrt(1 + 4 * torch.exp(snr)))),
    ),
    # rectified flow: alpha + sigma = 1
    "flow": Convention(
        lambda snr: logsigmoid(0.5 * snr),
        lambda snr: logsigmoid(-0.5 * snr),
        lambda snr: 0.5 * torch.sigmoid(-0.5 * snr),
    ),
}


@dataclass(frozen=True)
class Schedule(ABC):
    """The base: a subclass gives ``curve``, and everything else follows from it.

    Args:
        t_min: the earliest noisy time, from which training draws and grids start; curves that are infinite at 0 need it
            well above 0, the others do not.
    """

    convention: ClassVar[str] = "vp"
    t_min: float = field(default=1e-3, kw_only=True)

    def __post_init__(self):
        if not 0 < self.t_min < 1:
            raise ValueError(f"t_min must lie between 0 (data) and 1 (noise), got {self.t_min}")
        if self.convention not in CONVENTIONS:
            raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {self.convention!r}")

    @abstractmethod
    def curve(self, t: Tensor) -> Tensor:
        """log(alpha_t^2 / sigma_t^2) for 0 < t <= 1, float64, strictly decreasing."""

    def log_snr(self, t: Time) -> Tensor:
        """log(alpha_t^2 / sigma_t^2), float64, of t's shape; infinite at t = 0."""
        t = float64(t)
        inside = t.clamp_min(1e-300)
        return torch.where(t > 0, self.curve(inside), torch.inf)

    def log_snr_rate(self, t: Time) -> Tensor:
        """d log-SNR / dt by automatic differentiation of the curve, so that it can never disagree with it."""
        with torch.enable_grad():
            time = float64(t).detach().clamp_min(EARLIEST).requires_grad_()
            (rate,) = torch.autograd.grad(self.curve(time).sum(), time)
        return rate

    def scales(self, t: Time) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t), float64."""
        snr = self.log_snr(t)
        kind = CONVENTIONS[self.convention]
        return kind.log_alpha(snr).exp(), kind.log_sigma(snr).exp()

    def log_rates(self, t: Time) -> tuple[Tensor, Tensor]:
        """(d log alpha / dt, d log sigma / dt), float64."""
        t = float64(t).clamp_min(EARLIEST)
        slope = CONVENTIONS[self.convention].slope(self.log_snr(t))
        rate = self.log_snr_rate(t)
        return slope * rate, (slope - 0.5) * rate

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        """(d alpha / dt, d sigma / dt), float64."""
        alpha, sigma = self.scales(t)
        log_alpha_rate, log_sigma_rate = self.log_rates(t)
        return alpha * log_alpha_rate, sigma * log_sigma_rate

    def time_of(self, log_snr: Tensor | float) -> Tensor:
        """The time at which the curve has this log-SNR, by sectioning; clamped to the noisy times (0, 1].

        Bisection, but into 256 parts at once where few times are asked for: a curve costs the same at one as at 256.
        """
        target = float64(log_snr)
        bits = 8 if target.numel() <= 16 else 1
        parts = torch.linspace(0, 1, 2**bits + 1, dtype=torch.float64)
        low, high = torch.zeros_like(target).unsqueeze(-1), torch.ones_like(target).unsqueeze(-1)
        for _ in range(64 // bits):
            t = torch.lerp(low, high, parts)
            cleaner = (self.log_snr(t[..., 1:-1]) >= target.unsqueeze(-1)).sum(-1, keepdim=True)
            low, high = t.gather(-1, cleaner), t.gather(-1, cleaner + 1)
        return high.squeeze(-1)

    def at(self, u: Tensor) -> Tensor:
        """A training time from u in [0, 1): continuous curves stretch it over [t_min, 1], tables pick a step."""
        return self.t_min + (1 - self.t_min) * float64(u).clamp(0, BELOW_ONE)

    def cells(self, t: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Which of ``count`` even cells of training time each t is in, and one over the chance of its cell."""
        u = (float64(t) - self.t_min) / (1 - self.t_min)
        cell = (u * count).long().clamp(0, count - 1)
        return cell, torch.full_like(u, count)

    def times(self, steps: int, last: float | None = None) -> Tensor:
        """``steps`` noisy times, evenly spaced from 1 down to ``last``; a table's are of the steps that it has.

        Args:
            last: the last noisy time before the data; None, or anything under it, for the earliest, ``t_min``.

        Raises:
            ValueError: fewer than one step, or more than a table has.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if steps > 10**6:
            raise ValueError(f"steps must be at most a million, got {steps}")
        return torch.linspace(1.0, max(last or 0.0, self.t_min), steps, dtype=torch.float64)


def log_snr_of_log_alpha_bar(log_alpha_bar: Tensor) -> Tensor:
    """log(a / (1 - a)) from log a, without ever forming 1 - a."""
    return log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))


@dataclass(frozen=True)
class LinearBeta(Schedule):
    r"""The continuous form of DDPM's linear beta (Song et al. 2021, arXiv 2011.13456, eq. 32).

    .. math:: \log\bar\alpha_t = -\beta_{\min} t - \tfrac12 (\beta_{\max}-\beta_{\min}) t^2
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.beta_min <= self.beta_max:
            raise ValueError(f"need 0 < beta_min <= beta_max, got {self.beta_min} and {self.beta_max}")

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        return -self.beta_min * t - 0.5 * (self.beta_max - self.beta_min) * t**2

    def curve(self, t: Tensor) -> Tensor:
        return log_snr_of_log_alpha_bar(self.log_alpha_bar(t))


@dataclass(frozen=True)
class SubVP(LinearBeta):
    r"""Sub-variance-preserving diffusion with the linear beta (Song et al. 2021, arXiv 2011.13456, eq. 28 and 29).

    .. math:: \alpha_t^2 = \bar\alpha_t, \qquad \sigma_t = 1 - \bar\alpha_t
    """

    convention: ClassVar[str] = "sub_vp"

    def curve(self, t: Tensor) -> Tensor:
        log_alpha_bar = self.log_alpha_bar(t)
        return log_alpha_bar - 2 * torch.log(-torch.expm1(log_alpha_bar))


@dataclass(frozen=True)
class Cosine(Schedule):
    r"""The cosine schedule (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 17), normalised to 1 at t = 0.

    .. math:: \bar\alpha_t = \cos^2 a_t / \cos^2 a_0, \qquad a_0 = \frac{s}{1+s}\frac{\pi}{2}

    The angle is linear in t and ends where log-SNR is ``log_snr_end`` instead of at pi/2, where it would be minus
    infinity: with the default, 5e-4 before it.
    """

    s: float = 0.008
    log_snr_end: float = -15.0

    def __post_init__(self):
        super().__post_init__()
        if self.s <= 0:
            raise ValueError(f"s must be positive, got {self.s}")
        if not self.log_snr_end <= 10:
            raise ValueError(f"log_snr_end is that of noise, at most 10, got {self.log_snr_end}")

    def curve(self, t: Tensor) -> Tensor:
        start = self.s / (1 + self.s) * math.pi / 2
        end = math.acos(math.cos(start) * math.sqrt(1 / (1 + math.exp(-self.log_snr_end))))
        angle = start + t * (end - start)
        # 1 - cos^2(a) / cos^2(a_0) = sin(a - a_0) sin(a + a_0) / cos^2(a_0)
        return 2 * torch.log(torch.cos(angle)) - torch.log(torch.sin(t * (end - start)) * torch.sin(angle + start))


@dataclass(frozen=True)
class Sqrt(Schedule):
    r"""The square-root schedule of Diffusion-LM (Li et al. 2022, arXiv 2205.14217, appendix A).

    .. math:: \bar\alpha_t = 1 - \sqrt{c\,t + s}

    c, a little under 1, is set so that log-SNR ends at ``log_snr_end`` (c = 1 would make abar_1 negative).
    """

    s: float = 1e-4
    log_snr_end: float = -15.0
    t_min: float = field(default=1e-9, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.s < 1:
            raise ValueError(f"s must lie in (0, 1), got {self.s}")
        if not (1 / (1 + math.exp(self.log_snr_end))) ** 2 > self.s:
            raise ValueError(f"log_snr_end must be that of more noise than s = {self.s}, got {self.log_snr_end}")

    def curve(self, t: Tensor) -> Tensor:
        c = (1 / (1 + math.exp(self.log_snr_end))) ** 2 - self.s
        root = torch.sqrt(c * t + self.s)
        return torch.log1p(-root) - torch.log(root)


@dataclass(frozen=True)
class VE(Schedule):
    r"""Variance exploding (Song et al. 2021, arXiv 2011.13456, eq. 30).

    .. math:: \alpha_t = 1, \qquad \sigma_t = \sigma_{\min} (\sigma_{\max}/\sigma_{\min})^t
    """

    convention: ClassVar[str] = "ve"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    t_min: float = field(default=1e-9, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"need 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}")

    def curve(self, t: Tensor) -> Tensor:
        return -2 * (math.log(self.sigma_min) + t * math.log(self.sigma_max / self.sigma_min))


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    r"""The straight line between data and noise (Liu et al. 2023, arXiv 2209.03003; Lipman et al. 2023, 2210.02747).

    .. math:: \alpha_t = 1 - t, \qquad \sigma_t = t
    """

    convention: ClassVar[str] = "flow"

    def curve(self, t: Tensor) -> Tensor:
        return 2 * (torch.log1p(-t) - torch.log(t))

    def scales(self, t: Time) -> tuple[Tensor, Tensor]:
        t = float64(t)
        return 1 - t, t.clone()

    def rates(self, t: Time) -> tuple[Tensor, Tensor]:
        # both are constant; the general rule would multiply 0 by infinity at the two ends
        t = float64(t)
        return -torch.ones_like(t), torch.ones_like(t)


@dataclass(frozen=True)
class FromLogSNR(Schedule):
    """A user's own log-SNR curve under a convention; see :func:`from_log_snr`."""

    function: Callable[[Tensor], Tensor] = field(kw_only=True)
    convention: str = field(default="vp", kw_only=True)  # type: ignore[misc]
    t_min: float = field(default=1e-9, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        values = self.curve(torch.linspace(self.t_min, 1, 1001, dtype=torch.float64))
        if not bool((values[1:] < values[:-1]).all()) or not bool(values[:-1].isfinite().all()):
            raise ValueError("a log-SNR curve must be finite and strictly decreasing on (0, 1); this one is not")

    def curve(self, t: Tensor) -> Tensor:
        return self.function(t)


def from_log_snr(function: Callable[[Tensor], Tensor], convention: str = "vp", t_min: float = 1e-9) -> FromLogSNR:
    """A schedule from any strictly decreasing log-SNR curve.

    Args:
        function: maps float64 times in (0, 1] to log(alpha^2 / sigma^2), built of differentiable torch operations.
        convention: "vp", "ve", "sub_vp" or "flow".
        t_min: the earliest noisy time; raise it if the curve is infinite at 0.

    Raises:
        ValueError: the curve is not finite and strictly decreasing, or the convention is unknown.
    """
    return FromLogSNR(function=function, convention=convention, t_min=t_min)


@dataclass(frozen=True)
class Table(Schedule):
    """A discrete-time schedule of N steps: step i is time i / N, and what lies between is linear in log-SNR.

    Args:
        log_snrs: log-SNR of steps 1 to N, strictly decreasing.
    """

    log_snrs: tuple[float, ...] = field(kw_only=True, repr=False)
    convention: str = field(default="vp", kw_only=True)  # type: ignore[misc]
    t_min: float = field(default=1e-9, kw_only=True)

    def __post_init__(self):
        super().__post_init__()
        values = float64(list(self.log_snrs))
        if values.ndim != 1 or len(values) < 1 or not bool(values.isfinite().all()):
            raise ValueError("a table needs at least one finite log-SNR")
        if not bool((values[1:] < values[:-1]).all()):
            first = int((values[1:] >= values[:-1]).nonzero()[0])
            raise ValueError(f"log-SNR must fall at every step; it does not from step {first + 1} to step {first + 2}")

    def __len__(self) -> int:
        return len(self.log_snrs)

    @cached_property
    def _knots(self) -> Tensor:
        return float64(list(self.log_snrs))

    def curve(self, t: Tensor) -> Tensor:
        knots = self._knots.to(t.device)
        if len(knots) == 1:
            return knots[0] + 0 * t
        position = t * len(knots) - 1  # in units of steps, 0 at the first knot
        left = position.detach().floor().nan_to_num(0).clamp(0, len(knots) - 2).long()
        part = position - left
        return knots[left] * (1 - part) + knots[left + 1] * part  # exact at both ends of a segment

    def at(self, u: Tensor) -> Tensor:
        return (torch.floor(float64(u).clamp(0, BELOW_ONE) * len(self)) + 1) / len(self)

    def cells(self, t: Tensor, count: int) -> tuple[Tensor, Tensor]:
        n = len(self)
        cell_of_step = torch.arange(n) * count // n  # as even as whole steps can be
        cell = cell_of_step[(float64(t) * n).round().long().clamp(1, n) - 1]
        return cell, n / torch.bincount(cell_of_step, minlength=count)[cell].double()

    def times(self, steps: int, last: float | None = None) -> Tensor:
        n = len(self)
        if not 1 <= steps <= n:
            raise ValueError(f"this model was made with {n} steps: steps must lie in 1 to {n}, got {steps}")
        first = max(1, round((last or 0.0) * n))
        # evenly spread indices first .. N, both ends included, halves rounded to even
        index = [round(first + i * (n - first) / (steps - 1)) for i in range(steps)] if steps > 1 else [n]
        return torch.tensor(index[::-1], dtype=torch.float64) / n


def from_alpha_bar(alpha_bar: Sequence[float] | Tensor, convention: str = "vp") -> Table:
    """A discrete-time schedule from a table of alpha_bar (steps 1 to N).

    Under "vp", alpha^2 = alpha_bar and sigma^2 = 1 - alpha_bar; other conventions keep the same SNR.

    Raises:
        ValueError: a value is not strictly between 0 and 1, or the table does not fall at every step.
    """
    table = float64(alpha_bar)
    if not bool(((table > 0) & (table < 1)).all()):
        raise ValueError("alpha_bar must lie strictly between 0 and 1 at every step (step 0, the data, is not listed)")
    return Table(log_snrs=tuple((table.log() - torch.log1p(-table)).tolist()), convention=convention)


def linear_beta_table(steps: int = 1000, beta_first: float = 1e-4, beta_last: float = 0.02) -> Table:
    """DDPM's table: beta evenly spaced from ``beta_first`` to ``beta_last`` (Ho et al. 2020, arXiv 2006.11239, sec. 4).

    A model with another number of steps should resample the continuous form (:class:`LinearBeta`): rescaling this
    table's betas by 1000 / steps reaches beta >= 1 for 20 steps and fewer.

    Raises:
        ValueError: a beta outside (0, 1), or no step.
    """
    if steps < 1 or not 0 < beta_first <= beta_last < 1:
        raise ValueError(f"need steps >= 1 and 0 < beta_first <= beta_last < 1, got {steps}, {beta_first}, {beta_last}")
    betas = torch.linspace(beta_first, beta_last, steps, dtype=torch.float64)
    log_alpha_bar = torch.log1p(-betas).cumsum(0)
    return Table(log_snrs=tuple(log_snr_of_log_alpha_bar(log_alpha_bar).tolist()))
