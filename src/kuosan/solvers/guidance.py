"""Guidance: wrappers around a denoiser that any solver accepts. A weight of 0 is no guidance, everywhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from kuosan.denoiser import slope
from kuosan.prediction import Prediction
from kuosan.process import Process, expand
from kuosan.schedules import Time
from kuosan.solvers.energies import energy_of
from kuosan.solvers.executor import Model

Interval = tuple[float, float]
ALWAYS: Interval = (0.0, float("inf"))


def _noise_ratio(process: Process, t: Time) -> tuple[Tensor]:
    return (torch.exp(-0.5 * process.log_snr(t)),)


class Guidance(nn.Module, ABC):
    """What all guidance shares: a weight, and the interval of noise in which it works.

    Args:
        weight: w.
        interval: (lower, upper) bounds of sigma / alpha, the standard deviation of the noise in units of the data
            whatever the schedule (EDM's sigma): guidance works where lower < sigma / alpha <= upper, and elsewhere only
            the model itself is evaluated (Kynkäänniemi et al. 2024, arXiv 2404.07724).

    Raises:
        ValueError: a weight that is not finite, or an interval that is reversed or negative.
    """

    def __init__(self, weight: float, interval: Interval):
        super().__init__()
        if not abs(weight) < float("inf"):
            raise ValueError(f"a guidance weight is a finite number (0: no guidance), got {weight}")
        lower, upper = interval
        if not 0 <= lower < upper:
            raise ValueError(f"an interval is (lower, upper) with 0 <= lower < upper, in sigma / alpha; got {interval}")
        self.weight, self.interval = weight, (float(lower), float(upper))

    @property
    @abstractmethod
    def process(self) -> Process: ...

    def _weight_at(self, t: Time) -> Tensor | float:
        """The weight, or 0 outside the interval; for a t of shape (B,), of that shape."""
        (ratio,) = self.process.at(_noise_ratio, t)
        inside = (self.interval[0] < ratio) & (ratio <= self.interval[1])
        return self.weight * inside

    @staticmethod
    def _idle(weight: Tensor | float) -> bool:
        return not (weight.any() if isinstance(weight, Tensor) else weight)


class Extrapolation(Guidance):
    r"""Away from a poorer answer: the one formula of classifier-free guidance and of autoguidance.

    .. math:: \hat x_0 = \hat x_0^a + w\,[\hat x_0^a - \hat x_0^b]

    The coefficients sum to one, so the same holds in eps, score, v and velocity: it is computed in the form in which
    the models answer. For models with energies, E^a + w [E^a - E^b] is the energy.

    Args:
        weight, interval: see :class:`Guidance`.
        rescale: phi of Lin et al. 2023 (arXiv 2305.08891, eq. 15 and 16): the standard deviation of each sample's
            guided x0-hat is brought back by that share towards that of x0-hat^a, against over-exposure,

            .. math::
                \hat x_0 \leftarrow
                \Big(\phi\,\frac{\mathrm{std}\,\hat x_0^a}{\mathrm{std}\,\hat x_0} + 1 - \phi\Big)\,\hat x_0

            (The paper's x is the network's output; here it is x0-hat whatever the network predicts.)

    Raises:
        ValueError: a weight under -1, a rescale outside [0, 1], or see :class:`Guidance`.
    """

    def __init__(self, weight: float = 1.0, interval: Interval = ALWAYS, rescale: float = 0.0):
        if not -1 <= weight < float("inf"):
            raise ValueError(f"a guidance weight is at least -1 (0: no guidance), got {weight}")
        if not 0 <= rescale <= 1:
            raise ValueError(f"rescale is a share from 0 (none) to 1, got {rescale}")
        super().__init__(weight, interval)
        self.rescale = rescale

    @abstractmethod
    def _alone(self, x_t: Tensor, t: Time, condition: object) -> Prediction:
        """The better answer, a."""

    @abstractmethod
    def _pair(self, x_t: Tensor, t: Time, condition: object) -> tuple[Prediction, Tensor]:
        """The better answer, and the poorer one b in the same form."""

    @abstractmethod
    def _energies(self, x_t: Tensor, t: Time, condition: object) -> tuple[Tensor, Tensor]:
        """The energies of both."""

    def forward(self, x_t: Tensor, t: Time, condition: object = None) -> Prediction:
        weight = self._weight_at(t)
        if self._idle(weight):
            return self._alone(x_t, t, condition)
        better, poorer = self._pair(x_t, t, condition)
        value = better.value + expand(weight, x_t) * (better.value - poorer)
        guided = replace(better, value=value, log_levels=None)
        if not self.rescale:
            return guided
        wanted, got = _std(better.x0), _std(guided.x0)
        # a constant has no spread to scale
        factor = torch.where(got > 0, self.rescale * wanted / got + 1 - self.rescale, 1.0)
        return guided.with_x0(expand(factor, x_t) * guided.x0)

    def energy(self, x_t: Tensor, t: Time, condition: object = None) -> Tensor:
        """E^a + w [E^a - E^b], (B,), of models that have energies.

        Raises:
            ValueError: with a rescale, which is no gradient of anything; a model without an energy.
        """
        if self.rescale:
            raise ValueError("rescaled guidance has no energy: use rescale=0")
        better, poorer = self._energies(x_t, t, condition)
        return better + expand(self._weight_at(t), better) * (better - poorer)


def _std(x: Tensor) -> Tensor:
    """Of each sample, (B,)."""
    if x[0].numel() < 2:
        raise ValueError("a sample of one number has no standard deviation to rescale: use rescale=0")
    return x.flatten(1).std(1)


class ClassifierFree(Extrapolation):
    r"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598, eq. 6), in x0 and so in every linear form.

    .. math:: \hat x_0 = \hat x_0(c) + w\,[\hat x_0(c) - \hat x_0(\varnothing)]

    w = 0 is the conditional model itself. (Many programs count from 1: their scale is 1 + w.) Both answers come from
    one evaluation of a doubled batch; outside the interval the conditional one is evaluated alone.

    Args:
        denoiser: a conditional denoiser that was trained with its condition dropped now and then.
        weight: w, at least -1.
        interval, rescale: see :class:`Extrapolation`.
        negative: a condition (...) to lead away from, in the place of none at all: a negative prompt.

    Raises:
        ValueError: see :class:`Extrapolation`; sampling without a condition.
    """

    negative: Tensor | None

    def __init__(
        self,
        denoiser: Model,
        weight: float = 1.0,
        interval: Interval = ALWAYS,
        rescale: float = 0.0,
        negative: Tensor | None = None,
    ):
        super().__init__(weight, interval, rescale)
        self.denoiser = denoiser
        self.register_buffer("negative", negative, persistent=False)

    @property
    def process(self) -> Process:
        return self.denoiser.process

    def _alone(self, x_t, t, condition):
        return self.denoiser(x_t, t, _given(condition))

    def _pair(self, x_t, t, condition):
        both = self.denoiser(*_doubled(x_t, t, condition, self.negative))
        given, free = both.value.chunk(2)
        own = both.variance_fraction  # of the conditional half: guidance moves the mean only
        fraction = None if own is None else own.chunk(2)[0]
        return Prediction(self.process, t, x_t, both.form, given, fraction), free

    def _energies(self, x_t, t, condition):
        return energy_of(self.denoiser, *_doubled(x_t, t, condition, self.negative)).chunk(2)


def _given(condition: object) -> Tensor:
    if not isinstance(condition, Tensor):
        raise ValueError("guidance needs a condition for each sample: this model, or this call, has none")
    return condition


def _doubled(x_t: Tensor, t: Time, condition: object, negative: Tensor | None) -> tuple[Tensor, Time, Tensor]:
    """The batch with its condition, and again with what to lead away from, or else with -1: nothing, to all networks
    here."""
    condition = _given(condition)
    away = torch.full_like(condition, -1) if negative is None else negative.to(condition).expand_as(condition)
    return (
        torch.cat([x_t, x_t]),
        torch.cat([t, t]) if isinstance(t, Tensor) and t.ndim else t,
        torch.cat([condition, away]),
    )


class Autoguidance(Extrapolation):
    r"""Guidance by a weaker version of the model itself (Karras et al. 2024, arXiv 2406.02507).

    .. math:: \hat x_0 = \hat x_0^{strong} + w\,[\hat x_0^{strong} - \hat x_0^{weak}]

    Where the weaker model errs, the stronger one errs the same way, but less: away from the weaker one is towards the
    data, without a loss of variety. (The paper's w is 1 + w here.) Each model is given the same condition.

    Args:
        strong: the model.
        weak: a smaller or less trained one of the same process.
        weight, interval, rescale: see :class:`Extrapolation`.

    Raises:
        ValueError: two different processes, or see :class:`Extrapolation`.
    """

    def __init__(
        self, strong: Model, weak: Model, weight: float = 1.0, interval: Interval = ALWAYS, rescale: float = 0.0
    ):
        super().__init__(weight, interval, rescale)
        if strong.process != weak.process:
            raise ValueError(f"both models must be of one process, got {strong.process} and {weak.process}")
        self.strong, self.weak = strong, weak

    @property
    def process(self) -> Process:
        return self.strong.process

    def _alone(self, x_t, t, condition):
        return self.strong(x_t, t, condition)

    def _pair(self, x_t, t, condition):
        strong = self.strong(x_t, t, condition)
        return strong, self.weak(x_t, t, condition).read(strong.form)

    def _energies(self, x_t, t, condition):
        return energy_of(self.strong, x_t, t, condition), energy_of(self.weak, x_t, t, condition)


class ClassifierGuidance(Guidance):
    r"""Classifier guidance (Dhariwal and Nichol 2021, arXiv 2105.05233, alg. 2; Song et al. 2021, arXiv 2011.13456).

    .. math::
        \nabla\log q(x_t) + w\,\nabla_{x_t}\log p(y \mid x_t, t), \qquad\text{so}\quad
        \hat x_0 = \hat x_0 + w\,\frac{\sigma_t^2}{\alpha_t}\,\nabla_{x_t}\log p(y \mid x_t, t)

    Over an unconditional denoiser, w = 1 is Bayes' rule: the conditional itself, which classifier-free guidance has at
    w = 0.

    Args:
        denoiser: the model to guide.
        log_prob: ``log_prob(x_t, t, condition)``, the log-probability (B,) of each sample's condition given its noisy
            state: a classifier of *noisy* data, differentiable in x_t.
        weight: w, of any sign.
        interval: see :class:`Guidance`.
        conditional: whether the denoiser itself is told the condition too.

    Raises:
        ValueError: see :class:`Guidance`; sampling with a log_prob of another shape or that does not depend on x_t.
    """

    def __init__(
        self,
        denoiser: Model,
        log_prob: Callable[[Tensor, Time, object], Tensor],
        weight: float = 1.0,
        interval: Interval = ALWAYS,
        conditional: bool = False,
    ):
        super().__init__(weight, interval)
        self.denoiser, self.log_prob, self.conditional = denoiser, log_prob, conditional

    @property
    def process(self) -> Process:
        return self.denoiser.process

    def forward(self, x_t: Tensor, t: Time, condition: object = None) -> Prediction:
        said = self.denoiser(x_t, t, condition if self.conditional else None)
        weight = self._weight_at(t)
        if self._idle(weight) or (not isinstance(t, Tensor) and self.process.at(Process.scales, t)[0] == 0):
            return said  # where there is no signal at all, no direction is better than another
        _, gradient = slope(lambda x: self.log_prob(x, t, condition), x_t)
        return said.tilted(expand(weight, x_t) * gradient)

    def energy(self, x_t: Tensor, t: Time, condition: object = None) -> Tensor:
        """E - w log p(y | x_t, t), (B,), of a model that has an energy."""
        own = energy_of(self.denoiser, x_t, t, condition if self.conditional else None)
        return own - expand(self._weight_at(t), own) * self.log_prob(x_t, t, condition)
