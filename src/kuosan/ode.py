r"""Likelihood by change of variables: the model's own log-density, along its probability-flow ODE.

With :math:`\bar x = x/(\alpha+\sigma)` and :math:`s = \sigma/(\alpha+\sigma)` every schedule has the same ODE,
:math:`\mathrm d\bar x/\mathrm ds = \hat\varepsilon - \hat x_0`, the prediction read as "flow"; only how fast time runs
through s differs. So there is one ODE here (Song et al. 2021, arXiv 2011.13456, eq. 39 and 40, so substituted):

.. math::
    \log p_t(x_t) = \log p_T(x_T) + \int_{s_t}^{s_T} \nabla\cdot(\hat\varepsilon-\hat x_0)\,\mathrm ds
    + d \log\frac{\alpha_T+\sigma_T}{\alpha_t+\sigma_t}

Needs torchdiffeq: ``pip install 'kuosan[likelihood]'``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn, TypedDict, Unpack

import torch
from torch import Tensor

from kuosan.bound import Likelihood, error_of_mean
from kuosan.denoiser import Denoiser, evaluating
from kuosan.gaussian import Gaussian, per_example
from kuosan.process import Process, expand
from kuosan.seeds import stream

DIVERGENCES = ("exact", "rademacher", "gaussian")
METHODS = ("dopri5", "dopri8", "bosh3")
AtEnd = str | Callable[[Tensor], Tensor]
Report = Callable[[int, int], None]


class SolveError(RuntimeError):
    """The ODE was not solved to the tolerance; the message says where, how stiff it is there, and what to try."""


@dataclass(frozen=True)
class LogLikelihood(Likelihood):
    r"""``log_prob`` = ``end_log_prob`` + ``log_det`` of each example, **at the time** ``start``, not at the data.

    ``example_error`` is the standard error over probes: NaN with one probe, 0 if exact.

    Args:
        x_T: (B, ...), where the ODE ends.
        end_log_prob: (B,), log-density of x_T.
        log_det: (B,), log of the Jacobian's determinant, :math:`\log|\partial x_T/\partial x|`.
    """

    x_T: Tensor
    end_log_prob: Tensor
    log_det: Tensor


class Solving(TypedDict, total=False):
    """How the ODE is solved: keyword arguments of every function here.

    Args:
        start, end: 0 < start < end <= 1; start is by default the earliest time that the model was trained at, end is 1.
        rtol, atol: 1e-5. Every example meets them: the root mean square of its coordinates, of x / (alpha + sigma), and
            its log-determinant in nats per dimension.
        method: "dopri5" (the default), "dopri8" (cheaper from about 1e-8 on) or "bosh3", of torchdiffeq.
        max_evaluations: network evaluations, for one batch, after which the solve is given up; 10,000.
        batch_size: examples that are solved together, 4096.
        progress: called with (done, all) examples.
    """

    start: float | None
    end: float
    rtol: float
    atol: float
    method: str
    max_evaluations: int
    batch_size: int
    progress: Report | None


def encode(denoiser: Denoiser, x: Tensor, condition: Tensor | None = None, **solving: Unpack[Solving]) -> Tensor:
    """x (B, ...), a state at time ``start``, carried along the ODE to x_T at time ``end``; errors of log_likelihood."""
    return Problem(denoiser, **solving).carry(x, condition)[0]


def decode(denoiser: Denoiser, x_T: Tensor, condition: Tensor | None = None, **solving: Unpack[Solving]) -> Tensor:
    """The way back of :func:`encode`: x_T (B, ...) at time ``end`` carried to the state at time ``start``."""
    return Problem(denoiser, **solving).carry(x_T, condition, back=True)[0]


def log_likelihood(
    denoiser: Denoiser,
    x: Tensor,
    condition: Tensor | None = None,
    *,
    at_end: AtEnd = "prior",
    divergence: str = "exact",
    probes: int = 1,
    seed: int = 0,
    **solving: Unpack[Solving],
) -> LogLikelihood:
    r"""log p_start(x) in nats: the density **of noisy states at the time** ``start`` (log p_eps), not of the data.

    For the data's own log-density or log-probability see :func:`data_bound`.

    Args:
        denoiser: the model, whatever it predicts, under any process.
        x: (B, ...), floating point. The state of the solver, and what is computed with it, keeps this dtype.
        condition: (B, ...) or None.
        at_end: "prior", the law that sampling starts from; or a function of x_T (B, ...) to its log-density (B,), nats.
        divergence: "exact", d vector-Jacobian products at each evaluation; or Hutchinson's estimate (Grathwohl et al.
            2019, arXiv 1810.01367, eq. 8), with "rademacher" or "gaussian" probes.
        probes: how many. Each is fixed for the whole solve, a function of (seed, index of the example) alone.
        solving: :class:`Solving`.

    Raises:
        ValueError: not a :class:`Denoiser`, an impossible option, data that is not finite.
        SolveError: the tolerance was not met.
        ImportError: torchdiffeq is missing.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if probes < 1 or (divergence == "exact" and probes > 1):
        raise ValueError(f"probes must be at least 1, and the exact divergence takes none but 1; got {probes}")
    if at_end != "prior" and not callable(at_end):
        raise ValueError(f'at_end must be "prior" or a function of x_T, got {at_end!r}')
    problem = Problem(denoiser, **solving)
    how = divergence if divergence == "exact" else (divergence, probes, seed)
    x_T, log_dets, evaluations = problem.carry(x, condition, how)
    with torch.no_grad():
        end_log_prob = problem.prior(x_T) if isinstance(at_end, str) else at_end(x_T).double()
    if end_log_prob.shape != x.shape[:1]:
        raise ValueError(
            f"at_end gave shape {tuple(end_log_prob.shape)}: one number for each of {len(x)} examples expected"
        )
    log_det = log_dets.mean(1)
    error = error_of_mean(log_dets.T)
    start = problem.times[0]
    return LogLikelihood(
        log_prob=end_log_prob + log_det,
        example_error=torch.zeros_like(log_det) if divergence == "exact" else error,
        dimensions=x[0].numel(),
        evaluations=evaluations,
        quantity=f"log p of the state at time {start:g} (sigma / alpha = {noise_level(denoiser.process, start):.3g}), "
        + problem.ending(at_end),
        x_T=x_T,
        end_log_prob=end_log_prob,
        log_det=log_det,
    )


# -- the ODE ----------------------------------------------------------------------------------------------------------


def noise_level(process: Process, t: float) -> float:
    return float(torch.exp(-0.5 * process.log_snr(t)))


def start_of(denoiser: Denoiser, start: float | None) -> float:
    """The time of the states whose density is asked for; the earliest of training if it is not given."""
    if not isinstance(denoiser, Denoiser):
        raise ValueError(
            "a likelihood belongs to the model, not to the way it is sampled: pass the Denoiser itself, without "
            f"guidance or inpainting around it; got a {type(denoiser).__name__}"
        )
    start = float(denoiser.process.schedule.at(torch.zeros(()))) if start is None else start
    if not 0 < start < 1:
        raise ValueError(
            f"start must lie between 0 (the data, where the ODE is not defined) and 1 (noise), got {start}"
        )
    return start


def _scale(process: Process, t: float) -> tuple[float, float]:
    """(s, log(alpha + sigma)) at time t."""
    alpha, sigma = process.scales(t)
    return float(sigma / (alpha + sigma)), float(torch.log(alpha + sigma))


class _Path:
    """d/ds of the state (B, d + P): x-bar of each example, and its log-determinants in nats per dimension.

    The clock is s because it was the cheapest of six: with dopri5 at 1e-5 on exact mixtures (d = 2 and 16; VP, VE and
    flow) it took 98 to 110 evaluations, t 98 to 170 (under VP with up to 40 times the error), log(sigma / alpha) 110 to
    182; arctan(sigma / alpha) was as good.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        x: Tensor,
        condition: Tensor | None,
        span: tuple[float, float],
        probes: Tensor | str | None,
        max_evaluations: int,
    ):
        self.denoiser, self.condition, self.span, self.probes = denoiser, condition, span, probes
        self.shape, self.max_evaluations, self.evaluations = x.shape, max_evaluations, 0
        self.d = x[0].numel()
        (self.s, self.log_scale), (self.s_end, self.log_scale_end) = (_scale(denoiser.process, t) for t in span)
        columns = 0 if probes is None else 1 if isinstance(probes, str) else len(probes)
        self.state = torch.cat([x.flatten(1) / math.exp(self.log_scale), x.new_zeros(len(x), columns)], 1)
        self.step = math.nan

    def callback_step(self, s: Tensor, state: Tensor, step: Tensor) -> None:
        """torchdiffeq says where it is before each step."""
        self.s, self.state, self.step = float(s), state, float(step)

    def time(self, s: Tensor | float) -> Tensor:
        """The time with that s: log-SNR = 2 log((1 - s) / s)."""
        s = torch.as_tensor(s, dtype=torch.float64).cpu()
        t = self.denoiser.process.schedule.time_of(2 * (torch.log1p(-s) - torch.log(s)))
        return t.clamp(min(self.span), max(self.span))

    def velocity(self, s: Tensor | float, x_bar: Tensor) -> Tensor:
        t = self.time(s)
        alpha, sigma = self.denoiser.process.scales(t)
        return self.denoiser(expand(alpha + sigma, x_bar) * x_bar, t, self.condition).flow

    def __call__(self, s: Tensor, state: Tensor) -> Tensor:
        if self.evaluations >= self.max_evaluations:
            self.fail(f"it took more than max_evaluations = {self.max_evaluations}")
        self.evaluations += 1
        x_bar = state[:, : self.d].reshape(self.shape)
        if self.probes is None:
            flow, columns = self.velocity(s, x_bar).flatten(1), state[:, self.d :]
        else:
            flow, columns = self.with_divergence(s, x_bar, self.probes)
        if not bool(torch.isfinite(flow).all() and torch.isfinite(columns).all()):
            self.fail("the network's output or its derivative is not finite")
        return torch.cat([flow, columns / self.d], 1)

    @torch.enable_grad()
    def with_divergence(self, s: Tensor, x_bar: Tensor, probes: Tensor | str) -> tuple[Tensor, Tensor]:
        """The velocity (B, d), and v^T J v for each probe (B, P), or the trace of J (B, 1)."""
        x_bar = x_bar.detach().requires_grad_()
        flow = self.velocity(s, x_bar) + 0 * x_bar  # so that it depends on x-bar whatever the network does
        if isinstance(probes, Tensor):
            columns = [(self.pull(flow, x_bar, v) * v).flatten(1).sum(1) for v in probes]
        else:
            trace = x_bar.new_zeros(len(x_bar))
            for i in range(self.d):
                v = torch.zeros_like(x_bar)
                v.view(len(v), -1)[:, i] = 1
                trace += self.pull(flow, x_bar, v).flatten(1)[:, i]
            columns = [trace]
        return flow.detach().flatten(1), torch.stack(columns, 1)

    @staticmethod
    def pull(flow: Tensor, x_bar: Tensor, v: Tensor) -> Tensor:
        """J^T v of each example."""
        return torch.autograd.grad(flow, x_bar, v, retain_graph=True)[0]

    def norm(self, error: Tensor) -> Tensor:
        """The worst example's: the mean over a batch would let one example drown in the others."""
        of_x = error[:, : self.d].square().mean(1).sqrt()
        return torch.cat([of_x, error[:, self.d :].abs().flatten()]).max()

    @torch.enable_grad()
    def stiffness(self) -> float:
        """The largest |J^T v| / |v| of any example after a few power iterations, where the solver stopped."""
        x_bar = self.state[:, : self.d].reshape(self.shape).detach().requires_grad_()
        flow = self.velocity(self.s, x_bar) + 0 * x_bar
        v = torch.randn(self.shape, generator=stream("stiffness"), dtype=x_bar.dtype).to(x_bar.device)
        size = math.nan
        for _ in range(6):
            v = v / expand(v.flatten(1).norm(dim=1).clamp_min(1e-30), v)
            v = self.pull(flow, x_bar, v)
            size = float(v.flatten(1).norm(dim=1).max())
        return size

    def fail(self, why: str) -> NoReturn:
        t, left, stiffness = float(self.time(self.s)), abs(self.s_end - self.s), self.stiffness()
        step = "choosing its first step" if math.isnan(self.step) else f"at a step of {self.step:.2g}"
        raise SolveError(
            f"the ODE from time {self.span[0]:g} to {self.span[1]:g} was not solved: {why}. It stopped at time {t:.6g} "
            f"(sigma / alpha = {noise_level(self.denoiser.process, t):.3g}) after {self.evaluations} evaluations, "
            f"{step}, with {left:.2g} of s = sigma / (alpha + sigma) left. Stiffness, the largest |Jv|/|v| there times "
            f"what was left: {stiffness * left:.2g} (an explicit method needs about a third as many steps). Try a "
            "larger rtol and atol, a larger start (more noise is less stiff), float64 data, or another method"
        ) from None


@dataclass(frozen=True)
class Problem:
    """A model and how its ODE is solved, checked."""

    denoiser: Denoiser
    start: float | None = None
    end: float = 1.0
    rtol: float = 1e-5
    atol: float = 1e-5
    method: str = "dopri5"
    max_evaluations: int = 10_000
    batch_size: int = 4096
    progress: Report | None = None

    def __post_init__(self):
        start, end = self.times
        if not start < end <= 1:
            raise ValueError(f"need start < end <= 1 (0: data, 1: noise), got start = {start} and end = {end}")
        predicts = self.denoiser.predicts
        if predicts in ("eps", "score", "energy") and float(self.denoiser.process.alpha(end)) == 0:
            raise ValueError(
                f"a network that predicts {predicts} says nothing of x0 at time {end:g}, where there is no signal: "
                "pass an earlier end, such as end=0.999"
            )
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if not (self.rtol > 0 and self.atol > 0):
            raise ValueError(f"rtol and atol must be positive, got {self.rtol} and {self.atol}")
        if self.max_evaluations < 1 or self.batch_size < 1:
            raise ValueError(
                f"max_evaluations and batch_size must be at least 1, got {self.max_evaluations} and {self.batch_size}"
            )

    @cached_property
    def times(self) -> tuple[float, float]:
        return start_of(self.denoiser, self.start), self.end

    def prior(self, x_T: Tensor) -> Tensor:
        """The log-density of x_T under the law that sampling starts from, (B,), float64."""
        law = self.denoiser.process.prior(self.end)
        return per_example(Gaussian(*(c.to(x_T.device) for c in (law.mean, law.variance))).log_prob(x_T.double()))

    def ending(self, at_end: AtEnd) -> str:
        """What is taken for the law of x_T, in words."""
        return f"{'the prior' if isinstance(at_end, str) else 'a given density'} at time {self.end:g}"

    def check(self, x: Tensor, condition: Tensor | None) -> None:
        if len(x) < 1 or not x.is_floating_point() or not bool(torch.isfinite(x).all()):
            raise ValueError(
                f"x should be at least one example of finite floating-point numbers, got {len(x)} of {x.dtype}"
            )
        if condition is not None and len(condition) != len(x):
            raise ValueError(f"one condition for each example expected: {len(x)} examples, {len(condition)} conditions")

    @torch.no_grad()
    def carry(
        self,
        x: Tensor,
        condition: Tensor | None,
        divergence: str | tuple[str, int, int] | None = None,
        back: bool = False,
    ) -> tuple[Tensor, Tensor, int]:
        """(x at the other end of the time, log-determinants (B, P) of the way there in float64, evaluations)."""
        try:
            from torchdiffeq import odeint
        except ImportError:
            raise ImportError("solving the ODE needs torchdiffeq: pip install 'kuosan[likelihood]'") from None
        self.check(x, condition)
        ends, log_dets, evaluations = [], [], 0
        with evaluating(self.denoiser):
            for rows in torch.arange(len(x)).split(self.batch_size):
                part, given = x[rows], None if condition is None else condition[rows]
                probes = _probes(part, rows, *divergence) if isinstance(divergence, tuple) else divergence
                times = self.times[::-1] if back else self.times
                path = _Path(self.denoiser, part, given, times, probes, self.max_evaluations)
                s = torch.tensor([path.s, path.s_end], dtype=torch.float64, device=x.device)
                # step_t: land on the end; torchdiffeq would step past it, where there is no time, and interpolate
                options = {"norm": path.norm, "step_t": s[1:]}
                try:
                    state = odeint(
                        path, path.state, s, rtol=self.rtol, atol=self.atol, method=self.method, options=options
                    )[1]
                except AssertionError as error:
                    path.fail(str(error))
                ends.append((state[:, : path.d] * math.exp(path.log_scale_end)).reshape(part.shape))
                log_dets.append(path.d * (state[:, path.d :].double() + path.log_scale_end - path.log_scale))
                evaluations = max(evaluations, path.evaluations)
                if self.progress is not None:
                    self.progress(int(rows[-1]) + 1, len(x))
        return torch.cat(ends), torch.cat(log_dets), evaluations


def _probes(x: Tensor, rows: Tensor, kind: str, probes: int, seed: int) -> Tensor:
    """(P, B, ...): the first probe of an example is the same however many there are, and in whichever batch it is."""

    def of(row: int) -> Tensor:
        generator, shape = stream("hutchinson", seed, row), (probes, *x.shape[1:])
        if kind == "gaussian":
            return torch.randn(shape, generator=generator, dtype=x.dtype)
        return torch.randint(0, 2, shape, generator=generator).to(x.dtype) * 2 - 1

    return torch.stack([of(int(row)) for row in rows], 1).to(x.device)
