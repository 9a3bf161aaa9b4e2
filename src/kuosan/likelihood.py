"""The bound on log p(x) of a diffusion model: reconstruction - prior matching - denoising matching, term by term."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.special import log_ndtr

from kuosan.denoiser import Denoiser, evaluating
from kuosan.gaussian import Gaussian
from kuosan.prediction import Prediction
from kuosan.process import Grid
from kuosan.schedules import Time
from kuosan.seeds import stream
from kuosan.variance import Choice, OptimalVariance, check_variance, reverse

TERMS = ("all", "random", "stratified")


def per_example(x: Tensor) -> Tensor:
    """The sum over all dimensions but the first."""
    return x.flatten(1).sum(1)


def level_of(x: Tensor, levels: int) -> Tensor:
    """The index, 0 to L - 1, of values on the L even levels of [-1, 1].

    Raises:
        ValueError: a value that is not one of them.
    """
    index = (x + 1) * (levels - 1) / 2
    if not bool(((index - index.round()).abs() < 0.01).all()) or x.abs().max() > 1 + 1e-6:
        raise ValueError(f"discrete data must lie on the {levels} even levels of [-1, 1]; this does not")
    return index.round().long()


def discretised_gaussian_log_prob(x: Tensor, mean: Tensor, variance: Tensor, levels: int) -> Tensor:
    r"""log-probability of a level under a Gaussian cut into bins, in nats for each coordinate.

    .. math:: \log\left[\Phi\!\left(\tfrac{x+h-\mu}{\sigma}\right) - \Phi\!\left(\tfrac{x-h-\mu}{\sigma}\right)\right],
        \qquad h = \tfrac1{L-1}

    The first bin begins at minus infinity and the last ends at infinity, so that the levels' probabilities sum to 1
    (Ho et al. 2020, arXiv 2006.11239, eq. 13). In log space: 30 standard deviations away it is still finite.

    Args:
        x: values on the levels of [-1, 1].
        mean, variance: broadcastable with x.
        levels: L, at least 2.

    Raises:
        ValueError: a value of x that is not one of the levels.
    """
    level_of(x, levels)  # says what is wrong with data off the levels
    half = 1 / (levels - 1)
    std = variance.sqrt()
    low, high = (x - half - mean) / std, (x + half - mean) / std
    # (low, high) has the probability of (-high, -low): take the one in the lower tail, where log_ndtr is exact
    flip = low + high > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    inner_low = log_ndtr(low)
    inner_high = log_ndtr(high)
    inside = inner_high + torch.log(-torch.expm1(inner_low - inner_high))
    first, last = x <= -1 + half, x >= 1 - half
    # an open-ended bin keeps the one border that it has, on whichever side the flip put it
    border_of_first = torch.where(flip, log_ndtr(-low), inner_high)
    border_of_last = torch.where(flip, inner_high, log_ndtr(-low))
    return torch.where(first, border_of_first, torch.where(last, border_of_last, inside))


def reconstruction_term(
    denoiser: Denoiser, prediction: Prediction, x_0: Tensor, decoder_variance: float | Tensor | None
) -> Tensor:
    """log p(x_0 | x_1) for each example, nats: the last step of the chain, from the first noisy time to the data.

    A network that predicts levels is its own decoder; otherwise it is a Gaussian around x0-hat, cut into bins for
    discrete data, with the given variance, a number or one for each coordinate (None: sigma_1^2 / alpha_1^2, right if
    the data were flat).
    """
    if prediction.log_levels is not None and denoiser.levels is not None:
        index = level_of(x_0, denoiser.levels)
        return per_example(prediction.log_levels.gather(-1, index.unsqueeze(-1)).squeeze(-1))
    if decoder_variance is None:
        decoder_variance = float(torch.exp(-denoiser.process.log_snr(prediction.t)).max())
    variance = torch.as_tensor(decoder_variance, dtype=x_0.dtype, device=x_0.device)
    if denoiser.levels is not None:
        return per_example(discretised_gaussian_log_prob(x_0, prediction.x0, variance, denoiser.levels))
    return per_example(Gaussian(prediction.x0, variance).log_prob(x_0))


def matching_term(prediction: Prediction, x_0: Tensor, s: Time, variance: Choice) -> Tensor:
    """KL(q(x_s|x_t,x_0) || p(x_s|x_t)) for each example, nats (Ho et al. 2020, arXiv 2006.11239, eq. 5)."""
    exact = prediction.process.posterior(prediction.x_t, prediction.t, x_0, s)
    return per_example(exact.kl(reverse(prediction, s, variance)))


@dataclass(frozen=True)
class BitsPerDim:
    """The negative bound in bits per dimension, averaged over examples, term by term."""

    total: float
    standard_error: float
    reconstruction: float
    prior: float
    matching: float


@dataclass(frozen=True)
class Bound:
    """An estimate of a lower bound on log p(x), for each of B examples, in nats.

    Args:
        reconstruction: E log p(x_0 | x_1), (B,).
        prior: KL(q(x_T | x_0) || p(x_T)), (B,).
        matching: (K-1, B). Row i is E KL(q(x_s|x_t,x_0) || p(x_s|x_t)) with t = ``times[i + 1]``, s = ``times[i]``:
            exact sums have every row; random ones hold an unbiased estimate, zero where t was not drawn.
        times: the K noisy times, increasing.
        dimensions: coordinates of one example.
        draws: noise draws for each term ("all"), or draws of t for each example.
        evaluations: network evaluations spent on each example.
        discrete: whether the data is discrete (a log-probability) or continuous (a log-density).
    """

    reconstruction: Tensor
    prior: Tensor
    matching: Tensor
    times: Tensor
    dimensions: int
    draws: int
    evaluations: int
    discrete: bool

    @property
    def total(self) -> Tensor:
        """reconstruction - prior - sum of matching, (B,), nats: the bound on log p(x)."""
        return self.reconstruction - self.prior - self.matching.sum(0)

    @property
    def standard_error(self) -> float:
        """Standard error of the mean of ``total`` over examples, nats: their spread and the draws' noise together.

        NaN for a single example, whose spread is unknown.
        """
        return float(self.total.std() / math.sqrt(len(self.total))) if len(self.total) > 1 else math.nan

    def bits_per_dim(self) -> BitsPerDim:
        unit = math.log(2) * self.dimensions
        return BitsPerDim(
            total=float(-self.total.mean() / unit),
            standard_error=self.standard_error / unit,
            reconstruction=float(-self.reconstruction.mean() / unit),
            prior=float(self.prior.mean() / unit),
            matching=float(self.matching.sum(0).mean() / unit),
        )


def _steps_to_visit(
    terms: str, n: int, steps: int, draws: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """(step, example, weight) of every term to evaluate, flat; the weights make their sum unbiased."""
    if terms == "all":
        step = torch.arange(steps).repeat_interleave(n).repeat(draws)
        example = torch.arange(n).repeat(steps * draws)
        return step, example, torch.full((len(step),), 1 / draws, dtype=torch.float64)
    example = torch.arange(n).repeat(draws)
    u = torch.rand(n * draws, generator=generator, dtype=torch.float64)
    if terms == "stratified":  # one point in each of n * draws even strata, dealt out to the examples at random
        u = (torch.randperm(n * draws, generator=generator) + u) / (n * draws)
    step = (u * steps).long().clamp_max(steps - 1)
    return step, example, torch.full((n * draws,), steps / draws, dtype=torch.float64)


@torch.no_grad()
def elbo(
    denoiser: Denoiser,
    x_0: Tensor,
    condition: Tensor | None = None,
    *,
    steps: int | None = None,
    grid: Grid | None = None,
    variance: Choice = "beta_tilde",
    decoder_variance: float | None = None,
    terms: str = "all",
    draws: int = 1,
    seed: int = 0,
    batch_size: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> Bound:
    r"""The evidence lower bound of a diffusion model on a grid of K noisy times (theory row 9).

    .. math::
        \log p(x_0) \ge \mathbb E\log p(x_0|x_{t_1}) - \mathrm{KL}(q(x_{t_K}|x_0)\,\|\,p(x_{t_K}))
        - \sum_{i=2}^{K} \mathbb E\,\mathrm{KL}(q(x_{t_{i-1}}|x_{t_i},x_0)\,\|\,p(x_{t_{i-1}}|x_{t_i}))

    (Ho et al. 2020, arXiv 2006.11239, eq. 5.) Every KL is closed form; only x_t is drawn.

    Args:
        denoiser: the model. With ``denoiser.levels`` the data is discrete and the bound is on a probability; without,
            on a density.
        x_0: (B, ...), on the levels if discrete.
        condition: (B, ...) or None.
        steps: K, on :meth:`Process.grid <kuosan.Process.grid>`; or give ``grid``.
        variance: "beta_tilde", "beta", "learned" or "posterior" (:mod:`kuosan.variance`), or the optimal one, measured
            (:func:`kuosan.optimal.measure`).
        decoder_variance: of the last step, for a network that predicts a point; None: the optimal one, M_t there, if
            ``variance`` was measured, otherwise sigma^2 / alpha^2.
        terms: "all" sums every t; "random" draws one t for each example and draw, "stratified" the same with the t's
            of the whole batch spread evenly. All three are unbiased.
        draws: how many times each is repeated.
        seed: of the noise and of the t's.
        batch_size: examples that the network sees at once.
        progress: called with (done, all) network evaluations as the sum over t goes on.

    Raises:
        ValueError: both or neither of steps and grid, an unknown choice, data off the levels or not finite.
    """
    if (steps is None) == (grid is None):
        raise ValueError("give either steps= or grid=")
    check_variance(variance)
    if terms not in TERMS:
        raise ValueError(f"terms must be one of {', '.join(TERMS)}, got {terms!r}")
    if draws < 1 or len(x_0) < 1:
        raise ValueError(f"a bound needs at least one example and one draw, got {len(x_0)} and {draws}")
    if not bool(torch.isfinite(x_0).all()):
        raise ValueError("x_0 holds values that are not finite")
    if decoder_variance is not None and not decoder_variance > 0:
        raise ValueError(f"decoder_variance must be positive, got {decoder_variance}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if condition is not None and len(condition) != len(x_0):
        raise ValueError(f"one condition for each example expected: {len(x_0)} examples, {len(condition)} conditions")
    process = denoiser.process
    if isinstance(variance, OptimalVariance):
        variance.check(process, x_0.shape[1:])
    if grid is None:
        assert steps is not None
        grid = process.grid(steps)
    times = torch.tensor(grid.times[::-1], dtype=torch.float64)  # increasing
    n, dimensions = len(x_0), x_0[0].numel()
    decoding: float | Tensor | None = decoder_variance
    if decoding is None and isinstance(variance, OptimalVariance):
        decoding = variance.mean_squared_error(times[0])
    generator = stream("bound", seed)

    def predict(rows: Tensor, t: Tensor) -> tuple[Prediction, Tensor]:
        x, given = x_0[rows], None if condition is None else condition[rows]
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        return denoiser(process.marginal(x, t).sample(noise), t, given), x

    reconstruction = torch.zeros(n, dtype=torch.float64)
    matching = torch.zeros(len(times) - 1, n, dtype=torch.float64)
    with evaluating(denoiser):
        for rows in torch.arange(n).repeat(draws).split(batch_size):
            prediction, x = predict(rows, times[:1].expand(len(rows)))
            value = reconstruction_term(denoiser, prediction, x, decoding).double().cpu()
            reconstruction.index_add_(0, rows, value / draws)
        if len(matching):
            visits = _steps_to_visit(terms, n, len(matching), draws, generator)
            done = 0
            for step, rows, weight in zip(*(part.split(batch_size) for part in visits), strict=True):
                prediction, x = predict(rows, times[step + 1])
                value = matching_term(prediction, x, times[step], variance).double().cpu()
                matching.view(-1).index_add_(0, step * n + rows, weight * value)
                done += len(rows)
                if progress is not None:
                    progress(done, len(visits[0]))
    prior = per_example(process.marginal(x_0.double(), times[-1]).kl(process.prior(times[-1]))).cpu()
    evaluations = draws * (1 + (len(matching) if terms == "all" else min(1, len(matching))))
    return Bound(reconstruction, prior, matching, times, dimensions, draws, evaluations, denoiser.levels is not None)
