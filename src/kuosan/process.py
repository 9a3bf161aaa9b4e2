"""The forward process of a schedule: every Gaussian kernel between data and noise, its grid of times, and its SDE."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kuosan.gaussian import Gaussian
from kuosan.schedules import CONVENTIONS, EARLIEST, Schedule, Time, float64


def expand(coefficient: Tensor | float, x: Tensor) -> Any:
    """A coefficient of shape () or (B,) as a tensor that multiplies x of shape (B, ...); a number is left as it is.

    Raises:
        ValueError: the coefficient is per sample and there are not as many samples.
    """
    if not isinstance(coefficient, Tensor):
        return coefficient
    coefficient = coefficient.to(device=x.device, dtype=x.dtype)
    if coefficient.ndim == 0:
        return coefficient
    if coefficient.ndim != 1 or x.ndim == 0 or coefficient.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"a time must have shape () or ({x.shape[0] if x.ndim else 1},), one per sample; got "
            f"{tuple(coefficient.shape)} for x of shape {tuple(x.shape)}"
        )
    return coefficient.reshape(-1, *(1,) * (x.ndim - 1))


@dataclass(frozen=True)
class Grid:
    """The noisy times that a discrete model or a sampler visits, from noise down; after the last one comes the data.

    The times are stored, never recomputed from strides.

    Args:
        times: strictly decreasing, in (0, 1], float64.

    Raises:
        ValueError: no times, one outside (0, 1], repeated or out of order.
    """

    times: tuple[float, ...]

    def __post_init__(self):
        object.__setattr__(self, "times", tuple(float(t) for t in self.times))
        if not self.times:
            raise ValueError("a grid needs at least one time")
        for t in self.times:
            if not 0 < t <= 1:
                raise ValueError(f"times must lie in (0, 1] (time 0, the data, is understood), got {t}")
        for t, s in zip(self.times, self.times[1:], strict=False):
            if s >= t:
                raise ValueError(f"times must strictly decrease, from noise to data; {s} comes after {t}")

    def __len__(self) -> int:
        return len(self.times)

    def pairs(self) -> Iterator[tuple[float, float]]:
        """Each step as (t, s) with t > s; the last one ends on the data, s = 0."""
        return zip(self.times, (*self.times[1:], 0.0), strict=True)


@dataclass(frozen=True)
class Process:
    r"""The forward (noising) process :math:`q(x_t \mid x_0) = \mathcal N(\alpha_t x_0, \sigma_t^2 I)`.

    Times may be numbers or tensors of shape () or (B,); ``s < t`` throughout; coefficients are float64 until they
    meet x. A time of 0 is the data: every kernel is then in closed form, without a limit taken in floats.

    Args:
        schedule: any :class:`~kuosan.schedules.Schedule`.
    """

    schedule: Schedule
    _known: dict[Any, tuple[float, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def at(self, function: Callable[[Process, Time], tuple[Tensor, ...]], t: Time) -> tuple[Any, ...]:
        """``function(self, t)``; for a t that is a number, as numbers, computed once: samplers ask again and again.

        Args:
            function: something that stays, such as ``Process.scales``: it is the key under which the numbers are kept.
        """
        if isinstance(t, Tensor):
            return function(self, t)
        if isinstance(self.schedule, nn.Module):  # it may have learned since
            with torch.no_grad():
                return tuple(float(c) for c in function(self, t))
        key = (function, t)
        if key not in self._known:
            if len(self._known) >= 100_000:
                self._known.clear()
            self._known[key] = tuple(float(c) for c in function(self, t))
        return self._known[key]

    def log_snr(self, t: Time) -> Tensor:
        return self.schedule.log_snr(t)

    def scales(self, t: Time) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t), float64."""
        return self.schedule.scales(t)

    def alpha(self, t: Time) -> Tensor:
        return self.scales(t)[0]

    def sigma(self, t: Time) -> Tensor:
        return self.scales(t)[1]

    # -- kernels ------------------------------------------------------------------------------------------------------

    def marginal(self, x_0: Tensor, t: Time) -> Gaussian:
        r""":math:`q(x_t|x_0) = \mathcal N(\alpha_t x_0, \sigma_t^2 I)` (Ho et al. 2020, arXiv 2006.11239, eq. 4)."""
        alpha, sigma = self.scales(t)
        return Gaussian(expand(alpha, x_0) * x_0, expand(sigma**2, x_0))

    def corrupt(
        self, x_0: Tensor, t: Time, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """A draw of q(x_t|x_0), from ``noise`` if that is given."""
        return self.marginal(x_0, t).sample(noise, generator)

    def noise_fraction(self, t: Time, s: Time) -> Tensor:
        r""":math:`\tau = 1 - \mathrm{SNR}_t/\mathrm{SNR}_s`: how much of x_t's noise came after time s. Float64.

        Raises:
            ValueError: s is not before t.
        """
        step = self.log_snr(t) - self.log_snr(s)
        if not bool((step < 0).all()):
            raise ValueError(f"a kernel goes from s to a later time t, so s < t; got s = {s} and t = {t}")
        return -torch.expm1(step)

    def step_coefficients(self, t: Time, s: Time) -> tuple[Tensor, Tensor]:
        r"""Scale and variance of q(x_t|x_s): :math:`\alpha_t/\alpha_s` and :math:`\sigma_t^2\tau`, float64."""
        alpha_t, sigma_t = self.scales(t)
        return alpha_t / self.alpha(s), sigma_t**2 * self.noise_fraction(t, s)

    def step(self, x_s: Tensor, s: Time, t: Time) -> Gaussian:
        r""":math:`q(x_t|x_s)`: one jump forward, of any length (theory row 6)."""
        scale, variance = self.step_coefficients(t, s)
        return Gaussian(expand(scale, x_s) * x_s, expand(variance, x_s))

    def posterior_coefficients(self, t: Time, s: Time) -> tuple[Tensor, Tensor, Tensor]:
        r"""(c_x, c_0, beta-tilde) of :math:`q(x_s|x_t,x_0) = \mathcal N(c_x x_t + c_0 x_0, \tilde\beta I)`, float64.

        .. math::
            c_x = \frac{\alpha_t \sigma_s^2}{\alpha_s \sigma_t^2}, \qquad c_0 = \alpha_s \tau,
            \qquad \tilde\beta = \sigma_s^2 \tau

        (Ho et al. 2020, eq. 7, between any two times; Kingma et al. 2021, arXiv 2107.00630, eq. 25 and 26.)
        """
        tau = self.noise_fraction(t, s)
        alpha_t, sigma_t = self.scales(t)
        alpha_s, sigma_s = self.scales(s)
        return alpha_t / alpha_s * (sigma_s / sigma_t) ** 2, alpha_s * tau, sigma_s**2 * tau

    def posterior(self, x_t: Tensor, t: Time, x_0: Tensor, s: Time) -> Gaussian:
        r""":math:`q(x_s|x_t,x_0)`, the step back when the data is known (theory row 7)."""
        c_x, c_0, variance = self.posterior_coefficients(t, s)
        return Gaussian(expand(c_x, x_t) * x_t + expand(c_0, x_t) * x_0, expand(variance, x_t))

    def prior(self, t: Time = 1.0) -> Gaussian:
        """The law that sampling starts from at time t, for one coordinate, float64.

        Standard normal, except where the noise never drowns the data by shrinking it (VE): there N(0, sigma_t^2).
        """
        variance = self.sigma(t) ** 2
        if CONVENTIONS[self.schedule.convention].unit_prior:
            variance = torch.ones_like(variance)
        return Gaussian(torch.zeros_like(variance), variance)

    # -- times --------------------------------------------------------------------------------------------------------

    def grid(self, steps: int) -> Grid:
        """The grid of a chain of that many latents: evenly spaced from 1 down to the earliest noisy time.

        Raises:
            ValueError: steps is under 1, or more than a discrete-time schedule has.
        """
        return Grid(tuple(self.schedule.times(steps).tolist()))

    def sampling_grid(self, steps: int) -> Grid:
        """The grid that sampling takes: 1, 1 - 1/K, ..., 1/K, so that the step to the data is as long as the others.

        On the chain's own grid the last evaluation would change almost nothing, and two would be hardly more than one.

        Raises:
            ValueError: steps is under 1, or more than a discrete-time schedule has.
        """
        return Grid(tuple(self.schedule.times(steps, last=1 / max(steps, 1)).tolist()))

    # -- the same process as a stochastic differential equation dx = f(t) x dt + g(t) dw ------------------------------

    def drift(self, x: Tensor, t: Time) -> Tensor:
        r""":math:`f(t)\,x` with :math:`f = \mathrm d\log\alpha_t/\mathrm dt` (Song et al. 2021, arXiv 2011.13456)."""
        return expand(self.schedule.log_rates(t)[0], x) * x

    def diffusion(self, t: Time) -> Tensor:
        r""":math:`g(t)`, float64: :math:`g^2 = -\sigma_t^2\,\mathrm d\log\mathrm{SNR}_t/\mathrm dt`.

        (Kingma et al. 2021, arXiv 2107.00630, appendix; it holds under every convention.)
        """
        sigma = self.sigma(float64(t).clamp_min(EARLIEST))
        return sigma * torch.sqrt(-self.schedule.log_snr_rate(t))
