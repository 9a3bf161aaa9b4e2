"""Measure what the optimal reverse variance needs: a denoiser's mean squared error at each time, once per model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from kuosan.denoiser import Denoiser, evaluating
from kuosan.diffusion import decoder
from kuosan.gaussian import per_example
from kuosan.prediction import Prediction
from kuosan.process import Process
from kuosan.schedules import Table, float64
from kuosan.seeds import stream
from kuosan.variance import OptimalVariance


def knots(process: Process, count: int = 64) -> Tensor:
    """``count`` times, even in log-SNR from the earliest noisy time to 1, increasing; of a table its own steps.

    A curve that ends at log-SNR minus infinity is covered from -20 on: M_t has long been the variance of the data.
    """
    schedule = process.schedule
    own = torch.arange(1.0, len(schedule) + 1).double() / len(schedule) if isinstance(schedule, Table) else None
    if own is not None and len(own) <= count:
        return own
    ends = float64([schedule.t_min, 1.0]) if own is None else float64([own[0], 1.0])
    high, low = (max(float(end), -20.0) for end in schedule.log_snr(ends))
    even = torch.linspace(high, low, count, dtype=torch.float64)
    if own is None:
        times = schedule.time_of(even)
        times[0], times[-1] = ends
    else:  # the nearest step to each
        times = own[(schedule.log_snr(own)[:, None] - even).abs().argmin(0)]
        times[0], times[-1] = own[0], 1.0
    return times.unique()


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of every weight and buffer with its name: what was measured of one is not said of another."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _pairs(
    denoiser: Denoiser,
    x_0: Tensor,
    condition: Tensor | None,
    t: Tensor,
    draws: int,
    generator: torch.Generator,
    size: int,
) -> Iterator[tuple[Prediction, Tensor]]:
    """Predictions at time t for ``draws`` pairs (x_0, eps), and their x_0; each x_0 once before any a second time."""
    rounds = -(-draws // len(x_0))
    order = torch.cat([torch.randperm(len(x_0), generator=generator) for _ in range(rounds)])[:draws]
    for rows in order.split(size):
        x, given = x_0[rows], None if condition is None else condition[rows]
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        times = t.expand(len(rows))
        yield denoiser(denoiser.process.marginal(x, times).sample(noise), times, given), x


def _checked(
    denoiser: Denoiser, x_0: Tensor, condition: Tensor | None, times: Iterable[float] | Tensor | None, draws: int
) -> Tensor:
    if len(x_0) < 1 or draws < 2:
        raise ValueError(f"measuring needs at least one example and two draws, got {len(x_0)} and {draws}")
    if not bool(torch.isfinite(x_0).all()):
        raise ValueError("x_0 holds values that are not finite")
    if condition is not None and len(condition) != len(x_0):
        raise ValueError(f"one condition for each example expected: {len(x_0)} examples, {len(condition)} conditions")
    times = knots(denoiser.process) if times is None else float64(times if isinstance(times, Tensor) else list(times))
    if times.ndim != 1 or not len(times) or not bool(((times > 0) & (times <= 1)).all()):
        raise ValueError(f"times to measure at lie in (0, 1], at least one of them; got {times.tolist()}")
    return times


def _standard_error(total: Tensor, squares: Tensor, n: int) -> Tensor:
    """Of the mean of n numbers, from their sum and the sum of their squares."""
    return ((squares / n - (total / n) ** 2).clamp_min(0) / (n - 1)).sqrt()


@torch.no_grad()
def measure(
    denoiser: Denoiser,
    x_0: Tensor,
    condition: Tensor | None = None,
    *,
    times: Iterable[float] | Tensor | None = None,
    draws: int = 2048,
    seed: int = 0,
    batch_size: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> OptimalVariance:
    r"""M_t = E ||x_0 - x0-hat||^2 / d of a denoiser, for each coordinate and (``.scalar``) over all of them.

    Each coordinate's M_t takes in one draw more, of the mean over coordinates: one that never moved in this data has
    a small variance, not none. Of discrete data the cost of decoding from each time is measured too.

    Args:
        denoiser: the model.
        x_0: (B, ...), data that it was trained on, or like it.
        condition: (B, ...) or None.
        times: default :func:`knots`.
        draws: pairs (x_0, eps) at each time.
        seed: of the choice of examples and of the noise.
        progress: called with (done, all) times.

    Raises:
        ValueError: no data, data or an error that is not finite, fewer than two draws, conditions that do not fit.
    """
    times = _checked(denoiser, x_0, condition, times, draws)
    errors, standard, of_mean, decoding = [], [], [], []
    with evaluating(denoiser):
        for i, t in enumerate(times):
            total = squares = torch.zeros(x_0.shape[1:], dtype=torch.float64)
            mean_squares, cost, first = 0.0, 0.0, None
            for prediction, x in _pairs(denoiser, x_0, condition, t, draws, stream("error", seed, i), batch_size):
                error = (prediction.x0 - x).double().cpu() ** 2
                total, squares = total + error.sum(0), squares + (error**2).sum(0)
                mean_squares += float((error.flatten(1).mean(1) ** 2).sum())
                if prediction.log_levels is not None:
                    cost -= float(per_example(decoder(denoiser, prediction).log_prob(x)).double().sum()) / draws
                first = first or (prediction, x)
            mean = total.mean()
            if not bool(mean.isfinite()):
                raise ValueError(f"the denoiser's error at t = {float(t):g} is not finite")
            errors.append((total + mean / draws) / (draws + 1))
            standard.append(_standard_error(total, squares, draws))
            of_mean.append(_standard_error(mean, torch.tensor(mean_squares), draws))
            assert first is not None
            if denoiser.levels is not None and first[0].log_levels is None:  # bins under a Gaussian that is known now
                prediction, x = first
                p = decoder(denoiser, prediction, float(mean / draws))
                cost = -float(per_example(p.log_prob(x)).double().mean())
            decoding.append(cost / x_0[0].numel())
            if progress is not None:
                progress(i + 1, len(times))
    return OptimalVariance(
        denoiser.process,
        times,
        torch.stack(errors),
        torch.stack(standard),
        torch.stack(of_mean),
        None if denoiser.levels is None else float64(decoding),
        weights_fingerprint(denoiser),
    )


@torch.no_grad()
def analytic_dpm(
    denoiser: Denoiser,
    x_0: Tensor,
    condition: Tensor | None = None,
    *,
    times: Iterable[float] | Tensor | None = None,
    draws: int = 2048,
    clip: bool = False,
    seed: int = 0,
    batch_size: int = 256,
) -> tuple[Tensor, Tensor]:
    r"""(estimate, standard error) of M_t as Analytic-DPM finds it, to compare with :func:`measure` on the same draws.

    .. math::
        \hat M_t = \frac{\sigma_t^2}{\alpha_t^2}\,(1 - \Gamma_t), \qquad
        \Gamma_t = \mathbb E\,\|\hat\varepsilon\|^2 / d

    (Bao et al. 2022, arXiv 2201.06503, section 3.) For the perfect denoiser it is M_t; but the sampling noise of Gamma,
    and any error of the network, is multiplied by sigma^2 / alpha^2: 2.5e4 at the end of DDPM's linear schedule, 4e8
    at that of the cosine one. Nothing keeps it from being negative.

    Args:
        clip: keep the estimate between 0 and sigma^2 / alpha^2, as the paper's bounds do (Gamma between 0 and 1).

    Returns:
        Two float64 tensors, one entry for each time.
    """
    times = _checked(denoiser, x_0, condition, times, draws)
    estimates, errors = [], []
    with evaluating(denoiser):
        for i, t in enumerate(times):
            total = squares = torch.zeros((), dtype=torch.float64)
            for prediction, _ in _pairs(denoiser, x_0, condition, t, draws, stream("error", seed, i), batch_size):
                gamma = (prediction.eps.double().cpu() ** 2).flatten(1).mean(1)
                total, squares = total + gamma.sum(), squares + (gamma**2).sum()
            amplification = math.exp(-float(denoiser.process.log_snr(t)))
            estimate = amplification * (1 - total / draws)
            estimates.append(estimate.clamp(0, amplification) if clip else estimate)
            errors.append(amplification * _standard_error(total, squares, draws))
    return torch.stack(estimates), torch.stack(errors)
