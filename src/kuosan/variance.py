"""The reverse kernel p(x_s | x_t): its mean is the posterior's with x0 guessed; its variance is a choice made here."""

from __future__ import annotations

from torch import Tensor

from kuosan.gaussian import Gaussian
from kuosan.prediction import Prediction
from kuosan.process import expand
from kuosan.schedules import Time

#: beta_tilde  variance of q(x_s|x_t,x_0): right if x0 were known (Ho et al. 2020, the lower choice)
#: beta        variance of q(x_t|x_s): right if the data were white noise (Ho et al. 2020, the upper choice)
#: learned     between the two, on a log scale, where the network says (Nichol and Dhariwal 2021, eq. 15)
#: posterior   beta_tilde + c_0^2 Var[x_0|x_t]: the optimal one, for a network that predicts levels
VARIANCES = ("beta_tilde", "beta", "learned", "posterior")


def check_variance(choice: str) -> None:
    if choice not in VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, got {choice!r}")


def reverse_variance(prediction: Prediction, s: Time, choice: str) -> Tensor:
    """Variance of p(x_s | x_t), broadcastable with x_t; s > 0, because a step to the data is the decoder's.

    Raises:
        ValueError: an unknown choice, or one that needs what the network does not say.
    """
    check_variance(choice)
    process, t, x_t = prediction.process, prediction.t, prediction.x_t
    _, c_0, beta_tilde = process.posterior_coefficients(t, s)
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


def reverse(prediction: Prediction, s: Time, choice: str) -> Gaussian:
    r""":math:`p(x_s|x_t) = \mathcal N(c_x x_t + c_0 \hat x_0, v)`, with the coefficients of ``Process.posterior``."""
    c_x, c_0, _ = prediction.process.posterior_coefficients(prediction.t, s)
    x_t = prediction.x_t
    return Gaussian(expand(c_x, x_t) * x_t + expand(c_0, x_t) * prediction.x0, reverse_variance(prediction, s, choice))
