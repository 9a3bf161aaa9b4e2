"""A diffusion model as a ladder: q is fixed and linear-Gaussian, all rungs have the data's shape, p is a denoiser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from kuosan.decoders import DiscretisedGaussian, Levels
from kuosan.denoiser import Denoiser
from kuosan.gaussian import Gaussian, per_example
from kuosan.kernels import Generative, Rung
from kuosan.prediction import Prediction
from kuosan.process import Grid, Process, expand
from kuosan.process_chain import ProcessChain, ProcessGuide
from kuosan.schedules import float64
from kuosan.variance import Choice, OptimalVariance, check_variance, reverse


class Forward(ProcessGuide):
    """The Gaussian process on a grid as a q, known between every two rungs too."""

    process: Process

    def bridge(self, i: Rung, below: Sequence[Tensor], above: Sequence[Tensor], given: Any) -> Gaussian:
        scale, variance = self.process.step_coefficients(self.times[i + 1], self.times[i])
        y = above[0]
        return self.up(i, below, given).given(y, expand(scale, y), expand(variance, y))


def decoder(
    denoiser: Denoiser, prediction: Prediction, variance: float | Tensor | None = None
) -> Gaussian | DiscretisedGaussian | Levels:
    """p(x_0 | x_t): the last step of a diffusion model, from a noisy time to the data.

    A network that predicts levels is its own decoder; otherwise it is a Gaussian around x0-hat, cut into bins for
    discrete data.

    Args:
        variance: of that Gaussian, a number or one for each coordinate; None: sigma_t^2 / alpha_t^2, right if the data
            were flat.
    """
    if prediction.log_levels is not None and prediction.level_values is not None and denoiser.levels is not None:
        return Levels(prediction.log_levels, prediction.level_values)
    x_0 = prediction.x0
    if variance is None:
        variance = expand(torch.exp(-denoiser.process.log_snr(prediction.t)), x_0)
    variance = torch.as_tensor(variance, dtype=x_0.dtype, device=x_0.device)
    return Gaussian(x_0, variance) if denoiser.levels is None else DiscretisedGaussian(x_0, variance, denoiser.levels)


class Reverse(Generative):
    """The reverse kernels of a denoiser on a grid as a p: q's own posterior with x_0 guessed.

    Args:
        denoiser: the model.
        grid: its noisy times.
        variance: of the kernels (:mod:`kuosan.variance`).
        decoder_variance: of :func:`decoder`; None: M_t of a variance that was measured, otherwise sigma^2 / alpha^2.
    """

    def __init__(self, denoiser: Denoiser, grid: Grid, variance: Choice, decoder_variance: float | None = None):
        super().__init__()
        self.denoiser, self.length, self.variance = denoiser, len(grid), variance
        self.times = float64((0.0, *grid.times[::-1]))
        self.discrete = denoiser.levels is not None
        self.decoder_variance: float | Tensor | None = decoder_variance
        if decoder_variance is None and isinstance(variance, OptimalVariance):
            self.decoder_variance = variance.mean_squared_error(self.times[1])

    def prior(self, condition: Any = None) -> Gaussian:
        return self.denoiser.process.prior(self.times[-1])

    def down(self, i: Rung, above: Sequence[Tensor], condition: Any = None) -> Any:
        return self.law(i, self.denoiser(above[0], self.times[i + 1], condition))

    def law(self, i: Rung, prediction: Prediction) -> Any:
        """p(z_i | z_{i+1}) from what the denoiser says of z_{i+1}; as a tensor, i is never 0."""
        if isinstance(i, int) and i == 0:
            return decoder(self.denoiser, prediction, self.decoder_variance)
        return reverse(prediction, self.times[i], self.variance)


class DiffusionChain(ProcessChain):
    r"""A diffusion model on a grid of K noisy times, as a ladder with K rungs (theory row 5).

    The continuous form takes no notice of the variance:

    .. math:: \tfrac12 \int_{t_i}^{t_{i+1}} \left(-\frac{\mathrm d\,\mathrm{SNR}}{\mathrm dt}\right)
        \mathbb E\,\|x_0 - \hat x_0(x_t, t)\|^2 \,\mathrm dt

    with a time drawn evenly in log-SNR (Kingma et al. 2021, arXiv 2107.00630, eq. 15). The sum depends on the
    schedule's end points only.

    Args:
        denoiser: the model. With ``denoiser.levels`` the data is discrete and the bound is on a probability; without,
            on a density.
        steps: K, on :meth:`Process.grid <kuosan.Process.grid>`; or give ``grid``.
        variance: "beta_tilde", "beta", "learned" or "posterior" (:mod:`kuosan.variance`), or the optimal one, measured
            (:func:`kuosan.optimal.measure`).
        decoder_variance: of the last step, for a network that predicts a point; None: the optimal one, M_t there, if
            ``variance`` was measured, otherwise sigma^2 / alpha^2.
        form: of :meth:`estimate`: "matching" or "continuous".

    Raises:
        ValueError: both or neither of steps and grid, or an unknown or impossible choice.
    """

    guide: Forward
    model: Reverse

    def __init__(
        self,
        denoiser: Denoiser,
        *,
        steps: int | None = None,
        grid: Grid | None = None,
        variance: Choice = "beta_tilde",
        decoder_variance: float | None = None,
        form: str = "matching",
    ):
        if (steps is None) == (grid is None):
            raise ValueError("give either steps= or grid=")
        check_variance(variance)
        if decoder_variance is not None and not decoder_variance > 0:
            raise ValueError(f"decoder_variance must be positive, got {decoder_variance}")
        if not isinstance(denoiser, Denoiser):
            raise ValueError(
                f"a bound belongs to a model, not to a sampler: pass the Denoiser itself, got {type(denoiser).__name__}"
            )
        process = denoiser.process
        if isinstance(variance, OptimalVariance):
            variance.check(process)
        if grid is None:
            assert steps is not None
            grid = process.grid(steps)
        super().__init__(Forward(process, grid), Reverse(denoiser, grid, variance, decoder_variance), form)

    def between(self, s: Tensor, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """On the clock of log-SNR, which runs backwards."""
        process = self.guide.process
        start, end = process.log_snr(s), process.log_snr(t)
        if not bool(torch.isfinite(end).all()):
            raise ValueError(
                "the continuous form draws times evenly in log-SNR, which is infinite at time 1 of this schedule: "
                "pass a grid= that begins a little earlier, such as at .999"
            )
        log_snr = start + u * (end - start)
        time = process.schedule.time_of(log_snr.detach())
        if log_snr.requires_grad:  # a learned schedule: that time moves as the curve does, so that log-SNR stays
            rate = process.schedule.log_snr_rate(time).detach()
            time = time + (log_snr - process.log_snr(time)) / rate
        return time, start - end

    def rate(self, x_t: Tensor, t: Tensor, x: Tensor, condition: Any = None) -> Tensor:
        r""":math:`\tfrac12 \mathrm{SNR}_t \|x_0 - \hat x_0\|^2`; of a density less what it is of Gaussian data."""
        process = self.guide.process
        error = per_example((x - self.model.denoiser(x_t, t, condition).x0) ** 2)
        if not self.model.discrete:
            alpha, sigma = process.scales(t)
            linear = alpha * self._variance / (alpha**2 * self._variance + sigma**2)
            error = error - per_example((x - expand(linear, x) * x_t) ** 2)
        return 0.5 * expand(process.log_snr(t).exp(), error) * error

    def known(self, s: Tensor, t: Tensor, x: Tensor) -> Tensor | float:
        r"""The cost of the model of Gaussian data N(0, v), if this is one of a density.

        Its denoiser is :math:`x_t\, \alpha v / (\alpha^2 v + \sigma^2)`, and under q its cost is

        .. math:: \tfrac12 \int \frac{\|x\|^2 + d\, v^2 S}{(1 + v S)^2}\, \mathrm dS, \qquad S = \mathrm{SNR}

        A density's own denoiser errs much as it does, at much noise and at little and with the same draws: estimating
        the difference alone takes most of the noise out of the estimate (a control variate) and leaves its mean.
        """
        if self.model.discrete:
            return 0.0
        start, end = (self.guide.process.log_snr(time) + math.log(self._variance) for time in (s, t))
        share = (torch.sigmoid(start) - torch.sigmoid(end)).to(x)
        of_noise = (softplus(start) - softplus(end)).to(x) - share
        return 0.5 * (share * per_example(x**2) / self._variance + of_noise * x[0].numel())

    @property
    def _variance(self) -> float:
        """v: what the network's preconditioning takes the data's variance for."""
        edm = self.model.denoiser.preconditioning
        return 1.0 if edm is None else edm.sigma_data**2

    def step_cost(self, i: Tensor, prediction: Prediction, x_0: Tensor) -> Tensor:
        """What rungs i (B,), from 0 to K - 1, take from the matching form, (B,), given what is said of x_{t_{i+1}}."""
        i = i.to(x_0.device)
        cost = torch.zeros(len(x_0), dtype=prediction.x_t.dtype, device=x_0.device)
        decoded, between = (i == 0).nonzero().flatten(), (i > 0).nonzero().flatten()
        if len(decoded):
            p = self.model.law(0, prediction[decoded])
            cost = cost.index_put((decoded,), -per_example(p.log_prob(x_0[decoded])).to(cost))
        if len(between):
            rung, said = i[between].cpu(), prediction[between]
            q = self.guide.posterior(rung, (said.x_t,), x_0[between])
            cost = cost.index_put((between,), per_example(q.kl(self.model.law(rung, said))).to(cost))
        return cost
