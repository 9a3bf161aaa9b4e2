"""What a denoiser is trained on: a weighting of its error, a way to draw the times, or the bound itself.

Every squared-error loss, whatever the network predicts, is one loss: w(t) ||x0 - x0_hat||^2. The named weightings below
say what w is; the error itself is measured in the form in which the network speaks, where nothing cancels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kuosan.diffusion import DiffusionChain, decoder
from kuosan.gaussian import per_example
from kuosan.prediction import FORMS, Prediction, log_gain, target
from kuosan.process import Process
from kuosan.schedules import float64
from kuosan.variance import check_variance

# -- how times are drawn ----------------------------------------------------------------------------------------------


class TimeSampler(ABC):
    """Draws training times. Importance weights keep the expected loss what uniform times would give, where stated."""

    @abstractmethod
    def sample(self, process: Any, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(t, weight), both (n,) float64, under a :class:`~kuosan.process.Process` (of models with a time)."""

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Told, after each step, the unweighted losses of the whole batch; most samplers do not care."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint has to keep."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, dtype=torch.float64, generator=generator)


def _stratified(n: int, generator: torch.Generator) -> Tensor:
    """One point in each of n even strata, in random order."""
    return (torch.randperm(n, generator=generator) + _uniform(n, generator)) / n


@dataclass(frozen=True)
class Spread(TimeSampler):
    """No times, but numbers in [0, 1) spread evenly over the batch, for models that have no schedule of their own."""

    def sample(self, process, n, generator):
        return _stratified(n, generator), torch.ones(n, dtype=torch.float64)


SPREAD = Spread()


@dataclass(frozen=True)
class Uniform(TimeSampler):
    """Times uniform over the schedule's own range."""

    def sample(self, process, n, generator):
        return process.schedule.at(_uniform(n, generator)), torch.ones(n, dtype=torch.float64)


@dataclass(frozen=True)
class Stratified(TimeSampler):
    """Uniform times, spread evenly over each batch: the same expected loss with less noise.

    (Kingma et al. 2021, arXiv 2107.00630, appendix I.1.)
    """

    def sample(self, process, n, generator):
        return process.schedule.at(_stratified(n, generator)), torch.ones(n, dtype=torch.float64)


@dataclass(frozen=True)
class LogitNormal(TimeSampler):
    """t = sigmoid(mean + std z): the middle times more often (Esser et al. 2024, arXiv 2403.03206, sec. 3.1)."""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        if not self.std > 0:
            raise ValueError(f"std must be positive, got {self.std}")

    def sample(self, process, n, generator):
        z = torch.special.ndtri(_stratified(n, generator))
        return process.schedule.at(torch.sigmoid(self.mean + self.std * z)), torch.ones(n, dtype=torch.float64)


@dataclass(frozen=True)
class LogNormalNoise(TimeSampler):
    """log(sigma / alpha) = mean + std z (Karras et al. 2022, arXiv 2206.00364, table 1), under any schedule."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self):
        if not self.std > 0:
            raise ValueError(f"std must be positive, got {self.std}")

    def sample(self, process, n, generator):
        z = torch.special.ndtri(_stratified(n, generator))
        t = process.schedule.time_of(-2 * (self.mean + self.std * z))
        return t.clamp_min(process.schedule.t_min), torch.ones(n, dtype=torch.float64)


@dataclass
class LossAware(TimeSampler):
    r"""Importance sampling in proportion to the root mean square of recent losses, weighted back to uniform.

    (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 18.) Times are drawn from ``bins`` even cells; until each cell has
    ``history`` losses, uniformly.

    Args:
        bins: number of cells.
        history: losses remembered in each.
        floor: share of the draws that stays uniform, so that no cell is forgotten.
    """

    bins: int = 100
    history: int = 10
    floor: float = 0.001
    _losses: Tensor = field(init=False, repr=False)
    _seen: Tensor = field(init=False, repr=False)

    def __post_init__(self):
        if self.bins < 1 or self.history < 1 or not 0 <= self.floor <= 1:
            raise ValueError("need bins >= 1, history >= 1 and 0 <= floor <= 1")
        self._losses = torch.zeros(self.bins, self.history, dtype=torch.float64)
        self._seen = torch.zeros(self.bins, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """The chance of each cell, (bins,)."""
        uniform = torch.full((self.bins,), 1 / self.bins, dtype=torch.float64)
        if bool((self._seen < self.history).any()):
            return uniform
        size = (self._losses**2).mean(1).sqrt()
        if not size.sum() > 0:
            return uniform
        return (1 - self.floor) * size / size.sum() + self.floor * uniform

    def sample(self, process, n, generator):
        p = self.probabilities()
        cell = torch.multinomial(p, n, replacement=True, generator=generator)
        self._cells = cell
        u = (cell + _uniform(n, generator)) / self.bins
        return process.schedule.at(u), 1 / (self.bins * p[cell])

    def update(self, t, loss):
        for cell, value in zip(self._cells.tolist(), loss.tolist(), strict=True):
            self._losses[cell, self._seen[cell] % self.history] = value
            self._seen[cell] += 1

    def state(self):
        return {"losses": self._losses.clone(), "seen": self._seen.clone()}

    def restore(self, state):
        self._losses, self._seen = state["losses"].clone(), state["seen"].clone()


# -- how errors are weighted ------------------------------------------------------------------------------------------


class Weighting(Protocol):
    def log_weight(self, process: Process, t: Tensor) -> Tensor:
        """log of the weight of ||x0 - x0_hat||^2 at time t; float64, of t's shape."""
        ...


@dataclass(frozen=True)
class Plain:
    """The plain squared error of a form, "eps" being DDPM's L_simple (Ho et al. 2020, arXiv 2006.11239, eq. 14)."""

    form: str

    def __post_init__(self):
        if self.form not in FORMS:
            raise ValueError(f"a target is one of {', '.join(FORMS)}, got {self.form!r}")

    def log_weight(self, process, t):
        return log_gain(self.form, process, t).expand(t.shape)


@dataclass(frozen=True)
class SNR:
    """max(SNR, floor): truncated-SNR weighting, the error in eps with a floor under it (arXiv 2202.00512, sec. 4)."""

    floor: float = 1.0

    def __post_init__(self):
        if not self.floor >= 0:
            raise ValueError(f"floor must be at least 0, got {self.floor}")

    def log_weight(self, process, t):
        return process.log_snr(t).clamp_min(math.log(self.floor) if self.floor > 0 else -math.inf)


@dataclass(frozen=True)
class MinSNR:
    """min(SNR, gamma): easy, nearly clean inputs weigh less (Hang et al. 2023, arXiv 2303.09556, eq. 8)."""

    gamma: float = 5.0

    def __post_init__(self):
        if not self.gamma > 0:
            raise ValueError(f"gamma must be positive, got {self.gamma}")

    def log_weight(self, process, t):
        return process.log_snr(t).clamp_max(math.log(self.gamma))


@dataclass(frozen=True)
class EDMWeight:
    """SNR + 1 / sigma_data^2: unit weight at every level for EDM's network (arXiv 2206.00364, table 1)."""

    sigma_data: float = 0.5

    def __post_init__(self):
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data must be positive, got {self.sigma_data}")

    def log_weight(self, process, t):
        return torch.logaddexp(process.log_snr(t), float64(-2 * math.log(self.sigma_data)))


@dataclass(frozen=True)
class Sigmoid:
    """-1/2 d log-SNR/dt SNR sigmoid(bias - log-SNR) (Kingma and Gao 2023, arXiv 2303.00848): on eps, sigmoid(bias -
    log-SNR) for log-SNR uniform, whence the rate where it is t that is uniform."""

    bias: float = 2.0

    def log_weight(self, process, t):
        snr = process.log_snr(t)
        return snr + logsigmoid(self.bias - snr) + torch.log(-0.5 * process.schedule.log_snr_rate(t))


@dataclass(frozen=True)
class Likelihood:
    """-1/2 d SNR / dt: the continuous-time bound up to its end terms, for t uniform (arXiv 2107.00630, eq. 17).

    The one weighting whose scale has a meaning: nats for each dimension, when the mean over dimensions is taken.
    """

    def log_weight(self, process, t):
        return process.log_snr(t) + torch.log(-0.5 * process.schedule.log_snr_rate(t))


# -- losses -----------------------------------------------------------------------------------------------------------


class Objective(ABC):
    """loss = objective(model, x_0, condition): one number for each example, to be averaged and minimised.

    Training draws ``t`` and ``noise`` itself, so that they are the same whatever the number of processes, and says at
    which ``step`` it is; alone, an objective draws them from ``generator``.
    """

    times: TimeSampler

    def noise_shape(self, model: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the standard-normal numbers that one example of the given shape takes."""
        return shape

    @abstractmethod
    def __call__(
        self,
        model: Any,
        x_0: Tensor,
        condition: object = None,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        step: int | None = None,
    ) -> Tensor: ...


def draw(times, process, x_0, t, noise, generator) -> tuple[Tensor, Tensor, Tensor | None]:
    """(t, noise, weight or None): those that are given, or drawn."""
    if generator is None:
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    weight = None
    if t is None:
        t, weight = times.sample(process, len(x_0), generator)
    if noise is None:
        dtype = x_0.dtype if x_0.is_floating_point() else torch.float32
        noise = torch.randn(x_0.shape, generator=generator, dtype=dtype).to(x_0.device)
    return t, noise, weight


def _weighted(loss: Tensor, weight: Tensor | None) -> Tensor:
    return loss if weight is None else loss * weight.to(loss)


def squared_error(prediction: Prediction, x_0: Tensor, noise: Tensor, weighting: Weighting) -> Tensor:
    """w(t) times the mean over dimensions of (x0 - x0_hat)^2, for each example, computed in the prediction's form."""
    process, t, form = prediction.process, prediction.t, prediction.form
    t = float64(t).expand(len(x_0))
    error = ((prediction.value - target(form, process, t, x_0, noise)) ** 2).flatten(1).mean(1)
    if isinstance(weighting, Plain) and weighting.form == form:
        return error  # log_gain would cancel exactly; at alpha = 0 or sigma = 0 it would be 0 times infinity
    return error * (weighting.log_weight(process, t) - log_gain(form, process, t)).exp().to(error)


@dataclass(frozen=True)
class Weighted(Objective):
    """Squared error under a weighting, at times drawn by a sampler.

    Args:
        weighting: :class:`Plain`, :class:`SNR`, :class:`MinSNR`, :class:`EDMWeight`, :class:`Sigmoid`,
            :class:`Likelihood`, or anything with their one method.
        times: a :class:`TimeSampler`.
    """

    weighting: Weighting
    times: TimeSampler = Stratified()

    def __call__(self, denoiser, x_0, condition=None, *, t=None, noise=None, generator=None, step=None):
        t, noise, weight = draw(self.times, denoiser.process, x_0, t, noise, generator)
        prediction = denoiser(denoiser.process.marginal(x_0, t).sample(noise), t, condition)
        return _weighted(squared_error(prediction, x_0, noise, self.weighting), weight)


@dataclass(frozen=True)
class Simple(Objective):
    """The plain squared error of ``target``; None: of what the network predicts (x0 for levels, eps for energies)."""

    target: str | None = None
    times: TimeSampler = Stratified()

    def __post_init__(self):
        if self.target is not None:
            Plain(self.target)  # says what a target may be

    def __call__(self, denoiser, x_0, condition=None, *, t=None, noise=None, generator=None, step=None):
        own = {"levels": "x0", "energy": "eps"}.get(denoiser.predicts, denoiser.predicts)
        loss = Weighted(Plain(self.target or own), self.times)
        return loss(denoiser, x_0, condition, t=t, noise=noise, generator=generator)


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """-log p(level of x_0 | x_t), averaged over dimensions, nats: the loss of a network that predicts levels."""

    times: TimeSampler = Stratified()

    def __call__(self, denoiser, x_0, condition=None, *, t=None, noise=None, generator=None, step=None):
        if denoiser.predicts != "levels":
            raise ValueError('cross-entropy needs a denoiser with predicts="levels"')
        t, noise, weight = draw(self.times, denoiser.process, x_0, t, noise, generator)
        prediction = denoiser(denoiser.process.marginal(x_0, t).sample(noise), t, condition)
        return _weighted(-per_example(decoder(denoiser, prediction).log_prob(x_0)) / x_0[0].numel(), weight)


@dataclass(frozen=True)
class Bound(Objective):
    """An unbiased estimate of minus the bound of :class:`kuosan.DiffusionChain`, nats per dimension.

    For each example the time picks one of the K terms, reconstruction included, which is multiplied by K. The prior
    term has nothing to learn while the schedule is fixed and is left out.

    Args:
        steps: K.
        variance: of the reverse kernel (:mod:`kuosan.variance`).
    """

    steps: int = 1000
    variance: str = "beta_tilde"
    times: TimeSampler = Stratified()

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        check_variance(self.variance)

    def __call__(self, denoiser, x_0, condition=None, *, t=None, noise=None, generator=None, step=None):
        t, noise, weight = draw(self.times, denoiser.process, x_0, t, noise, generator)
        cost, _ = _drawn_step(
            DiffusionChain(denoiser, steps=self.steps, variance=self.variance), x_0, condition, t, noise
        )
        return _weighted(cost, weight)


def _drawn_step(
    chain: DiffusionChain, x_0: Tensor, condition: object, t: Tensor, noise: Tensor, mean: bool = True
) -> tuple[Tensor, Tensor]:
    """K times what the step that each time stands for takes from the bound, nats per dimension; and L_simple there.

    Args:
        mean: the gradient of the first reaches the mean of the reverse kernel, not only its variance.
    """
    denoiser, process = chain.model.denoiser, chain.guide.process
    step, weight = process.schedule.cells(t.cpu(), chain.length)
    prediction = denoiser(
        process.marginal(x_0, chain.guide.times[step + 1]).sample(noise), chain.guide.times[step + 1], condition
    )
    simple = squared_error(prediction, x_0, noise, Plain(prediction.form))
    if not mean:
        prediction = replace(prediction, value=prediction.value.detach())
    return weight.to(x_0) * chain.step_cost(step, prediction, x_0) / x_0[0].numel(), simple


@dataclass(frozen=True)
class Hybrid(Objective):
    r"""L_simple + weight * L_vlb (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 16): learns the reverse variance.

    The bound's gradient reaches the variance only; the mean is learned by the simple loss. L_vlb is the whole sum over
    the steps, in nats per dimension.

    Args:
        weight: of the bound.
        steps: of the bound's grid.
    """

    weight: float = 0.001
    steps: int = 1000
    times: TimeSampler = Stratified()

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def __call__(self, denoiser, x_0, condition=None, *, t=None, noise=None, generator=None, step=None):
        if not denoiser.learned_variance:
            raise ValueError("the hybrid objective learns a variance: make the denoiser with learned_variance=True")
        t, noise, importance = draw(self.times, denoiser.process, x_0, t, noise, generator)
        chain = DiffusionChain(denoiser, steps=self.steps, variance="learned")
        bound, simple = _drawn_step(chain, x_0, condition, t, noise, mean=False)
        return _weighted(simple + self.weight * bound, importance)
