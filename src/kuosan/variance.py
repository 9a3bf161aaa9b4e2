"""The reverse kernel p(x_s | x_t): its mean is the posterior's with x0 guessed; its variance is a choice made here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from kuosan.gaussian import Gaussian
from kuosan.prediction import Prediction
from kuosan.process import Process, expand
from kuosan.schedules import Time, float64

#: beta_tilde  variance of q(x_s|x_t,x_0): right if x0 were known (Ho et al. 2020, the lower choice)
#: beta        variance of q(x_t|x_s): right if the data were white noise (Ho et al. 2020, the upper choice)
#: learned     between the two, on a log scale, where the network says (Nichol and Dhariwal 2021, eq. 15)
#: posterior   beta_tilde + c_0^2 Var[x_0|x_t]: the optimal one for each x_t, of a network that predicts levels
VARIANCES = ("beta_tilde", "beta", "learned", "posterior")
#: The best that do not depend on x_t: names, in recipes and commands, of what has to be measured first.
MEASURED = ("optimal", "optimal_per_dimension")
#: Under this a mean squared error counts as zero: it is interpolated on a log scale.
SMALLEST = 1e-30


class VarianceError(ValueError):
    """A file that does not hold a measured variance, or one of another process."""


@dataclass(frozen=True, eq=False, repr=False)
class OptimalVariance:
    r"""The best reverse variance that does not depend on x_t, from the mean squared error of a denoiser at each time.

    .. math:: v = \tilde\beta + c_0^2 M_t, \qquad M_t = \mathbb E\,\|x_0 - \hat x_0(x_t, t)\|^2 / d

    It maximises the bound over all v, because :math:`\mathbb E\,\mathrm{KL} = \tfrac d2[(\tilde\beta + c_0^2 M_t)/v - 1
    + \log(v/\tilde\beta)]`; it does so for a perfect mean (Bao et al. 2022, arXiv 2201.06503), for any other, and for
    each coordinate by itself (Bao et al. 2022, arXiv 2206.07309). For a perfect denoiser M_t is the mean of
    Var[x_0|x_t]. Between the knots log M_t is linear in log-SNR; beyond them it stays as it is.

    Args:
        process: the forward process under which it was measured.
        times: (n,), in (0, 1], increasing or decreasing.
        error: M_t at these times, never negative: (n,), or (n, *shape of one example), each coordinate by itself.
        standard_error: of ``error``; None if it is exact.
        scalar_standard_error: (n,), of the mean over coordinates; None if unknown.
        reconstruction: (n,), E -log p(x_0|x_t) in nats per dimension, where the last step is not a Gaussian: the
            decoder of discrete data. None: it is one, with variance M_t.
        fingerprint: of the weights that it was measured of.

    Raises:
        ValueError: shapes that do not fit, an M_t that is negative or not finite, times repeated or out of (0, 1].
    """

    process: Process
    times: Tensor
    error: Tensor
    standard_error: Tensor | None = None
    scalar_standard_error: Tensor | None = None
    reconstruction: Tensor | None = None
    fingerprint: str = ""

    def __post_init__(self):
        names = ("times", "error", "standard_error", "scalar_standard_error", "reconstruction")
        given = {name: float64(value).cpu() for name in names if (value := getattr(self, name)) is not None}
        times, error = given["times"], given["error"]
        if times.ndim != 1 or not len(times):
            raise ValueError(f"times must have shape (n,), one for each measured error; got {tuple(times.shape)}")
        for name, value in given.items():
            shape = error.shape if name == "standard_error" else times.shape
            if value.shape[: len(shape)] != shape or (name != "error" and value.shape != shape):
                raise ValueError(f"{name} does not belong to {len(times)} times: its shape is {tuple(value.shape)}")
        if not bool(((times > 0) & (times <= 1)).all()) or len(times.unique()) < len(times):
            raise ValueError("the times of a measured error lie in (0, 1] and are all different; these do not")
        if not bool(error.isfinite().all()) or bool((error < 0).any()):
            bad = error[(error < 0) | ~error.isfinite()][0]
            raise ValueError(f"a mean squared error is finite and never negative, got {float(bad):g}")
        order = times.argsort(descending=True)  # by rising log-SNR
        for name, value in given.items():
            object.__setattr__(self, name, value[order])
        object.__setattr__(self, "_log_snr", self.process.log_snr(self.times).detach().clamp_min(-1e6))
        object.__setattr__(self, "_log_error", self.error.clamp_min(SMALLEST).log())

    def __repr__(self) -> str:
        what = f"of shape {self.shape}" if self.shape else "scalar"
        return f"OptimalVariance({what}, measured at {len(self.times)} times)"

    @property
    def shape(self) -> tuple[int, ...]:
        """() for one number at each time, or that of one example."""
        return tuple(self.error.shape[1:])

    @property
    def scalar(self) -> OptimalVariance:
        """One number at each time: the mean over coordinates."""
        if not self.shape:
            return self
        mean = self.error.flatten(1).mean(1)
        known = (self.scalar_standard_error, self.scalar_standard_error, self.reconstruction, self.fingerprint)
        return OptimalVariance(self.process, self.times, mean, *known)

    def mean_squared_error(self, t: Time) -> Tensor:
        """M_t, float64: of t's shape, followed by this one's."""
        return self._between(self._log_error, t).exp()  # type: ignore[attr-defined]

    def decoding_cost(self, t: Time) -> Tensor:
        r"""E -log p(x_0|x_t) in nats per dimension if t is the last noisy time; of t's shape.

        For continuous data :math:`\tfrac12\log 2\pi e M_t`, with the decoder :math:`\mathcal N(\hat x_0, M_t)`.
        """
        if self.reconstruction is not None:
            return self._between(self.reconstruction, t)
        entropy = Gaussian(torch.zeros(()), self.mean_squared_error(t)).entropy()
        return entropy.flatten(float64(t).ndim).mean(-1) if self.shape else entropy

    def _between(self, values: Tensor, t: Time) -> Tensor:
        """Values at the knots, linear in log-SNR between them."""
        knots: Tensor = self._log_snr  # type: ignore[attr-defined]
        at = self.process.log_snr(t).detach().cpu().clamp(knots[0], knots[-1])
        left = (torch.searchsorted(knots, at, right=True) - 1).clamp(0, max(len(knots) - 2, 0))
        right = (left + 1).clamp_max(len(knots) - 1)
        width = (knots[right] - knots[left]).clamp_min(1e-300)
        part = ((at - knots[left]) / width).reshape((*at.shape, *(1,) * (values.ndim - 1)))
        return torch.lerp(values[left], values[right], part)

    def reverse(self, t: Time, s: Time) -> Tensor:
        """v of the step from t to s > 0, float64: of t's shape, followed by this one's."""
        _, c_0, beta_tilde = self.process.posterior_coefficients(t, s)
        error = self.mean_squared_error(t)
        wide = (*c_0.shape, *(1,) * (error.ndim - c_0.ndim))
        return beta_tilde.cpu().reshape(wide) + (c_0**2).cpu().reshape(wide) * error

    def check(self, process: Process, shape: tuple[int, ...] | None = None) -> None:
        """Raises ValueError if it was measured under another process, or of examples of another shape."""
        if process != self.process:
            raise ValueError(f"this variance was measured under another process: {self.process}, not {process}")
        if shape is not None and self.shape not in ((), tuple(shape)):
            raise ValueError(
                f"this variance was measured of examples of shape {self.shape}, these have {tuple(shape)}; take .scalar"
            )

    def save(self, path: Path) -> None:
        """All of it in one safetensors file: the whole file or nothing of it."""
        names = ("times", "error", "standard_error", "scalar_standard_error", "reconstruction")
        tensors = {name: getattr(self, name).contiguous() for name in names if getattr(self, name) is not None}
        tensors["log_snr"] = self.process.log_snr(self.times).detach()
        aside = path.with_suffix(f".{os.getpid()}.new")  # several processes may measure at once, all the same
        aside.write_bytes(safetensors.torch.save(tensors, {"kuosan": "optimal variance", "of": self.fingerprint}))
        aside.replace(path)

    @classmethod
    def load(cls, path: Path, process: Process) -> OptimalVariance:
        """Raises VarianceError: it is damaged, not such a file, or measured under another process."""
        try:
            with safetensors.safe_open(path, "pt") as file:
                notes = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            log_snr = tensors.pop("log_snr")
            if notes.get("kuosan") != "optimal variance":
                raise VarianceError(f"{path} is not a measured variance")
            if not torch.equal(process.log_snr(tensors["times"]).detach(), log_snr):
                raise VarianceError(f"{path} was measured under another process than {process}")
            return cls(process, **tensors, fingerprint=notes["of"])
        except (safetensors.SafetensorError, KeyError, TypeError) as error:
            raise VarianceError(f"{path} is damaged: {error}") from None


#: How the variance is given: one of the names above, or what was measured.
Choice = str | OptimalVariance


def check_variance(choice: Choice) -> None:
    if isinstance(choice, OptimalVariance) or choice in VARIANCES:
        return
    if choice in MEASURED:
        raise ValueError(
            f'variance="{choice}" has to be measured first: pass kuosan.optimal.measure(denoiser, data), '
            "or the optimal_variance of a run"
        )
    raise ValueError(f"variance must be one of {', '.join((*VARIANCES, *MEASURED))}, got {choice!r}")


def reverse_variance(prediction: Prediction, s: Time, choice: Choice) -> Tensor:
    """Variance of p(x_s | x_t), broadcastable with x_t; s > 0, because a step to the data is the decoder's.

    Raises:
        ValueError: an unknown choice, or one that needs what the network does not say; a variance measured under
            another process, or of another shape.
    """
    check_variance(choice)
    process, t, x_t = prediction.process, prediction.t, prediction.x_t
    _, c_0, beta_tilde = process.posterior_coefficients(t, s)
    if isinstance(choice, OptimalVariance):
        choice.check(process, x_t.shape[1:])
        error = choice.mean_squared_error(t).to(x_t)
        return expand(beta_tilde, x_t) + expand(c_0**2, x_t) * (error if choice.shape else expand(error, x_t))
    if choice == "beta_tilde":
        return expand(beta_tilde, x_t)
    if choice == "posterior":
        return expand(beta_tilde, x_t) + expand(c_0**2, x_t) * prediction.x0_variance
    _, beta = process.step_coefficients(t, s)
    if choice == "beta":
        return expand(beta, x_t)
    if prediction.variance_fraction is None:
        raise ValueError('variance="learned" needs a denoiser made with learned_variance=True')
    low, high = expand(beta_tilde.log(), x_t), expand(beta.log(), x_t)
    return (low + prediction.variance_fraction * (high - low)).exp()


def reverse(prediction: Prediction, s: Time, choice: Choice) -> Gaussian:
    r""":math:`p(x_s|x_t) = \mathcal N(c_x x_t + c_0 \hat x_0, v)`, with the coefficients of ``Process.posterior``."""
    c_x, c_0, _ = prediction.process.posterior_coefficients(prediction.t, s)
    x_t = prediction.x_t
    return Gaussian(expand(c_x, x_t) * x_t + expand(c_0, x_t) * prediction.x0, reverse_variance(prediction, s, choice))
