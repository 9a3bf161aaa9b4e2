"""The best trajectory: which K times to visit, found by dynamic programming on the bound, from the model's M_t alone.

It lies beside the bound and not among the solvers: it serves both, ``elbo(grid=...)`` and ``table(process, grid)``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kuosan.optimal import knots
from kuosan.process import Grid, Process
from kuosan.schedules import Table, float64
from kuosan.variance import OptimalVariance

VARIANCES = ("optimal", "beta", "beta_tilde")


def step_costs(optimal: OptimalVariance, times: Tensor, variance: str = "optimal") -> Tensor:
    r"""Entry (i, j), i < j: E KL of the step from ``times[j]`` down to ``times[i]``, nats per dimension; else infinity.

    With :math:`v` the variance of the step, the average of the KL over (x_0, x_t) knows the model through M_t only:

    .. math::
        \tfrac12\Big[\frac{\tilde\beta + c_0^2 M_t}{v} - 1 + \log\frac v{\tilde\beta}\Big]
        = \tfrac12\Big[\frac{1 + g}r - 1 + \log r\Big],
        \qquad g = \frac{c_0^2 M_t}{\tilde\beta} = (\mathrm{SNR}_s - \mathrm{SNR}_t) M_t, \quad r = \frac v{\tilde\beta}

    The optimal one, r = 1 + g, leaves :math:`\tfrac12\log(1 + g)`: many small steps make of it
    :math:`-\tfrac12\int M\,\mathrm d\,\mathrm{SNR}`, the bound in continuous time. The mean over M_t's coordinates.

    Args:
        times: (n,), increasing.
        variance: "optimal", "beta" (r is sigma_t^2 / sigma_s^2) or "beta_tilde" (r = 1).
    """
    if variance not in VARIANCES:
        raise ValueError(f"variance must be one of {', '.join(VARIANCES)}, got {variance!r}")
    process = optimal.process
    snr, sigma = process.log_snr(times).exp(), process.sigma(times)
    error = optimal.mean_squared_error(times).reshape(len(times), -1)
    costs = torch.full((len(times), len(times)), torch.inf, dtype=torch.float64)
    for j in range(1, len(times)):
        gain = (snr[:j, None] - snr[j]) * error[j]
        if variance == "optimal":
            cost = 0.5 * torch.log1p(gain)
        elif variance == "beta_tilde":
            cost = 0.5 * gain
        else:
            ratio = (sigma[j] / sigma[:j, None]) ** 2
            cost = 0.5 * ((1 + gain) / ratio - 1 + ratio.log())
        costs[:j, j] = cost.mean(1)
    return costs


def prior_costs(process: Process, times: Tensor, second_moment: float) -> Tensor:
    """E KL(q(x_t|x_0) || p(x_t)) in nats per dimension, for data of this E ||x_0||^2 / d."""
    alpha, sigma = process.scales(times)
    variance = process.prior(times).variance
    return 0.5 * ((sigma**2 + alpha**2 * second_moment) / variance - 1 + (variance / sigma**2).log())


def candidate_times(process: Process, count: int = 1000) -> Tensor:
    """Where the search looks: a table's own steps, or ``count`` times even in log-SNR; increasing."""
    schedule = process.schedule
    return knots(process, len(schedule) if isinstance(schedule, Table) else count)


def trajectory(
    process: Process,
    optimal: OptimalVariance,
    steps: int,
    *,
    variance: str = "optimal",
    first: float | None = None,
    second_moment: float | None = None,
    candidates: Iterable[float] | Tensor | None = None,
) -> Grid:
    r"""The K times, among the candidates, of the greatest bound (Watson et al. 2021, arXiv 2106.03802; Bao et al. 2022,
    arXiv 2201.06503, section 3.4).

    The bound is a sum over the steps, each cost known from its two ends (:func:`step_costs`), and one for the first
    time, from which the data is decoded (:meth:`OptimalVariance.decoding_cost <kuosan.variance.OptimalVariance>`); so
    the best chain of k + 1 times that ends at t is the best over s < t of the best chain of k times that ends at s and
    the step from t to s. Exact, in O(N^2 K).

    Args:
        process: the forward process.
        optimal: the measured M_t.
        steps: K.
        variance: of the chain, whose best trajectory this is: "optimal", "beta" or "beta_tilde".
        first: keep this as the earliest time, as the searches in print do; None: it is chosen, by the cost of decoding.
        second_moment: E ||x_0||^2 / d of the data: the last time is then chosen too, by the cost of the prior. None: it
            is the last candidate, t = 1.
        candidates: default :func:`candidate_times`.

    Raises:
        ValueError: an M_t of another process, more steps than candidates or fewer than 1, candidates outside (0, 1].
    """
    optimal.check(process)
    if candidates is None:
        times = candidate_times(process)
    else:
        times = float64(candidates if isinstance(candidates, Tensor) else list(candidates)).unique()
        if not len(times) or not bool(((times > 0) & (times <= 1)).all()):
            raise ValueError("candidate times lie in (0, 1]")
    if not 1 <= steps <= len(times):
        raise ValueError(f"steps must lie in 1 to {len(times)}, the number of candidate times; got {steps}")
    best = optimal.decoding_cost(times)  # of the best chain so far that ends at each time
    if first is not None:
        if not bool((times == first).any()):
            raise ValueError(f"first = {first} is not one of the candidate times")
        best = torch.where(times == first, best, torch.inf)
    costs = step_costs(optimal, times, variance)
    came_from = []
    for _ in range(1, steps):
        best, source = (best[:, None] + costs).min(0)
        came_from.append(source)
    if second_moment is None:
        last = len(times) - 1
    else:
        last = int((best + prior_costs(process, times, second_moment)).argmin())
    if not bool(best[last].isfinite()):
        raise ValueError(f"there are no {steps} candidate times from first = {first} on")
    chosen = [last]
    for source in reversed(came_from):
        chosen.append(int(source[chosen[-1]]))
    return Grid(tuple(times[chosen].tolist()))
