"""One network output at (x_t, t), readable in every form: data, noise, score, v and velocity are the same model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from kuosan.process import Process, expand
from kuosan.schedules import Time


def _velocity(process: Process, t: Time) -> tuple[Tensor, Tensor]:
    return process.schedule.rates(t)


def _v(process: Process, t: Time) -> tuple[Tensor, Tensor]:
    alpha, sigma = process.scales(t)
    return -sigma, alpha


def _score(process: Process, t: Time) -> tuple[Tensor, Tensor]:
    sigma = process.sigma(t)
    return torch.zeros_like(sigma), -1 / sigma


def _constant(a: float, b: float) -> Callable[[Process, Time], tuple[Tensor, Tensor]]:
    return lambda process, t: (torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))


#: Every form is a combination a x0 + b eps; with x_t = alpha x0 + sigma eps that is two equations in two unknowns.
FORMS: dict[str, Callable[[Process, Time], tuple[Tensor, Tensor]]] = {
    "x0": _constant(1.0, 0.0),
    "eps": _constant(0.0, 1.0),
    "score": _score,  # the gradient of log q(x_t): -eps / sigma (Tweedie; Vincent 2011)
    "v": _v,  # alpha eps - sigma x0 (Salimans and Ho 2022, arXiv 2202.00512)
    "flow": _constant(-1.0, 1.0),  # eps - x0: the velocity of the straight line, under whichever schedule
    "velocity": _velocity,  # dx_t/dt along the probability-flow ODE (Lipman et al. 2023, arXiv 2210.02747)
}


def target(form: str, process: Process, t: Time, x_0: Tensor, eps: Tensor) -> Tensor:
    """What a network that predicts ``form`` should have said at x_t = alpha_t x_0 + sigma_t eps."""
    a, b = FORMS[form](process, t)
    return expand(a, x_0) * x_0 + expand(b, x_0) * eps


@dataclass(frozen=True)
class conversion:  # called and used as a function
    """The function of (process, t) whose (p, q) make wanted = p x_t + q given: the solution of the two equations."""

    given: str
    wanted: str

    def __call__(self, process: Process, t: Time) -> tuple[Tensor, Tensor]:
        alpha, sigma = process.scales(t)
        a, b = FORMS[self.given](process, t)
        c, d = FORMS[self.wanted](process, t)
        det = alpha * b - sigma * a
        return (c * b - d * a) / det, (alpha * d - sigma * c) / det


def log_gain(form: str, process: Process, t: Time) -> Tensor:
    r"""log of the ratio of squared errors, :math:`\log(\|\text{form}-\widehat{\text{form}}\|^2/\|x_0-\hat x_0\|^2)`.

    An error e in x0 is an error :math:`(a - b\,\alpha/\sigma)\,e` in the form a x0 + b eps: SNR for eps,
    SNR / sigma^2 for the score, and SNR + 1 for v where alpha^2 + sigma^2 = 1. Float64, of t's shape.
    """
    a, b = FORMS[form](process, t)
    return 2 * torch.log(torch.abs(a - b * torch.exp(0.5 * process.log_snr(t))))


@dataclass(eq=False)  # not frozen: that would make it four times as slow to make, one for each step of a sampler
class Prediction:
    r"""What a denoiser says about x_t, in whichever form it came; the others are derived when asked for.

    Not to be changed: :func:`dataclasses.replace` makes another one.

    Args:
        process: the forward process.
        t: time of shape () or (B,).
        x_t: the noisy input, (B, ...).
        form: "x0", "eps", "score", "v", "velocity" or "flow".
        value: the network's output in that form, of x_t's shape.
        variance_fraction: where the reverse variance lies between beta-tilde (0) and beta (1) on a log scale, of
            x_t's shape; None for a network that does not say.
        log_levels: log-probabilities (..., L) over the data's levels for each coordinate, given x_t; None for a
            network that gives a point.
        level_values: the L values that they belong to.
    """

    process: Process
    t: Time
    x_t: Tensor
    form: str
    value: Tensor
    variance_fraction: Tensor | None = None
    log_levels: Tensor | None = None
    level_values: Tensor | None = None

    def __post_init__(self):
        if self.form not in FORMS:
            raise ValueError(f"a prediction is one of {', '.join(FORMS)}, got {self.form!r}")

    def __getitem__(self, rows: Tensor) -> Prediction:
        """The prediction of some of the examples."""
        t = self.t[rows.to(self.t.device)] if isinstance(self.t, Tensor) and self.t.ndim else self.t
        fraction, log_levels = (None if v is None else v[rows] for v in (self.variance_fraction, self.log_levels))
        parts = (self.x_t[rows], self.form, self.value[rows], fraction, log_levels)
        return Prediction(self.process, t, *parts, self.level_values)

    def read(self, form: str) -> Tensor:
        """The prediction in the named form; the value itself, untouched, if it came in that form."""
        if form == self.form:
            return self.value
        p, q = self.process.at(conversion(self.form, form), self.t)
        return expand(p, self.x_t) * self.x_t + expand(q, self.x_t) * self.value

    @cached_property
    def x0(self) -> Tensor:
        return self.read("x0")

    @cached_property
    def eps(self) -> Tensor:
        return self.read("eps")

    @property
    def score(self) -> Tensor:
        return self.read("score")

    @property
    def v(self) -> Tensor:
        return self.read("v")

    @property
    def velocity(self) -> Tensor:
        return self.read("velocity")

    @property
    def flow(self) -> Tensor:
        return self.read("flow")

    @property
    def x0_variance(self) -> Tensor:
        """Var[x_0 | x_t] of each coordinate, for a prediction of levels.

        Raises:
            ValueError: the network gives a point, not a distribution.
        """
        if self.log_levels is None or self.level_values is None:
            raise ValueError('only a denoiser that predicts "levels" knows the variance of x0')
        centred = self.level_values - self.x0.unsqueeze(-1)
        return (self.log_levels.exp() * centred**2).sum(-1)

    def with_x0(self, x_0: Tensor) -> Prediction:
        """The same prediction with its x0 replaced: clipped, thresholded, rounded or guided."""
        return replace(self, form="x0", value=x_0, log_levels=None)

    def tilted(self, gradient: Tensor) -> Prediction:
        r"""The prediction for the density multiplied by :math:`e^{h(x_t)}`, given the gradient of h: the score plus it.

        In x0 that is :math:`\hat x_0 + \sigma_t^2/\alpha_t\,\nabla h`; it is added in the form that the prediction has.
        """
        _, gain = self.process.at(conversion("score", self.form), self.t)
        return replace(self, value=self.value + expand(gain, self.x_t) * gradient, log_levels=None)
