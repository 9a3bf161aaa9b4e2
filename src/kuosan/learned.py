"""A noise schedule that is learned: its end points by the bound, what lies between by the noise of the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from kuosan.diffusion import DiffusionChain
from kuosan.objectives import Likelihood, Objective, Stratified, TimeSampler, Uniform, draw, squared_error
from kuosan.process import Grid
from kuosan.schedules import EARLIEST, Schedule, Table, Time, float64


class LearnedSchedule(nn.Module, Schedule):
    r"""A monotone network as a curve of log-SNR (Kingma et al. 2021, arXiv 2107.00630, section 4.1 and appendix H).

    .. math::
        \log\mathrm{SNR}(t) = \lambda_0 + (\lambda_1 - \lambda_0)\,u(t), \qquad
        u(t) = \frac{g(t)-g(0)}{g(1)-g(0)}, \qquad g(t) = t + \sum_k w_k\,\mathrm{sigmoid}(a_k t + b_k)

    with all w and a positive, so that u rises from 0 to 1; at the start it is nearly a straight line. The
    continuous-time bound depends on the ends alone; u decides how noisy an estimate of it is.

    Args:
        log_snr_start: the first lambda_0, next to the data.
        log_snr_end: the first lambda_1, of noise.
        units: k runs over so many.

    Raises:
        ValueError: the start is not above the end, or there are no units.
    """

    convention: ClassVar[str] = "vp"
    t_min = 1e-9

    def __init__(self, log_snr_start: float = 12.0, log_snr_end: float = -5.0, units: int = 64):
        nn.Module.__init__(self)
        if not log_snr_start > log_snr_end:
            raise ValueError(f"log-SNR falls from data to noise; got {log_snr_start} first and {log_snr_end} last")
        if units < 1:
            raise ValueError(f"units must be at least 1, got {units}")
        self.ends = nn.Parameter(float64([log_snr_start, log_snr_end]))
        self.slope = nn.Parameter(torch.full((units,), 10.0, dtype=torch.float64))
        self.place = nn.Parameter(-10 * torch.linspace(0, 1, units, dtype=torch.float64))
        self.weight = nn.Parameter(torch.full((units,), -5.0, dtype=torch.float64))
        self._factor: list[Tensor] | None = None

    # two schedules are the same only if they are one: what is learned changes
    __hash__ = nn.Module.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other

    def _apply(self, fn, recurse=True):
        """Moves between devices; the dtype stays float64, as that of every schedule."""
        super()._apply(fn, recurse)
        for parameter in self.parameters(recurse=False):
            parameter.data = parameter.data.double()
        return self

    def _g(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(g, dg/dt) of shape of t."""
        a, w = softplus(self.slope), softplus(self.weight)
        s = torch.sigmoid(a * t.unsqueeze(-1) + self.place)
        return t + (w * s).sum(-1), 1 + (w * a * s * (1 - s)).sum(-1)

    def interior(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(u, du/dt)."""
        home = self.ends.device  # times are on the CPU, wherever the model is
        (low, high), _ = self._g(float64([0.0, 1.0]).to(home))
        g, rate = self._g(t.to(home))
        u, rate = (g - low) / (high - low), rate / (high - low)
        factor = self._factor
        if factor is not None:
            for value in (u, rate):
                if value.requires_grad:
                    value.register_hook(lambda gradient: gradient * factor[0].to(gradient))
        return u, rate

    @contextmanager
    def multiplied(self) -> Iterator[list[Tensor]]:
        """Inside, the gradients that reach u (at the times of a batch) are multiplied by what is put into the list.

        With 2 L, L the loss of each example, what is a descent on L for all else is one on L^2 for u.
        """
        self._factor = []
        try:
            yield self._factor
        finally:
            self._factor = None

    def curve(self, t: Tensor) -> Tensor:
        u, _ = self.interior(t)
        return (self.ends[0] + (self.ends[1] - self.ends[0]) * u).to(t.device)

    def log_snr_rate(self, t: Time) -> Tensor:
        """d log-SNR / dt in closed form, through which gradients pass."""
        t = float64(t).clamp_min(EARLIEST)
        _, rate = self.interior(t)
        return ((self.ends[1] - self.ends[0]) * rate).to(t.device)


@dataclass(frozen=True)
class Continuous(Objective):
    r"""An unbiased estimate of minus the continuous-time bound, nats per dimension (Kingma et al. 2021, eq. 15).

    Three parts: the prior term at t = 1; the integral, one time of it for each example; and the decoding from the
    earliest time, of those examples (an eighth of them) whose time is early, eight times. A :class:`LearnedSchedule`
    learns its ends from all three, and what lies between from the square of the second (appendix I.2): its mean does
    not depend on that, so that descending on the square lowers the variance.

    Args:
        decoded: share of the examples that are decoded.
    """

    decoded: float = 0.125
    times: TimeSampler = field(default_factory=Stratified)

    def __post_init__(self):
        if not 0 < self.decoded <= 1:
            raise ValueError(f"decoded is a share, above 0 and at most 1, got {self.decoded}")
        if not isinstance(self.times, Uniform | Stratified):
            raise ValueError(
                f"the continuous bound is of uniform times, uniform or stratified; got {type(self.times).__name__}"
            )

    def __call__(self, model, x_0, condition=None, *, t=None, noise=None, generator=None, step=None):
        process = model.process
        schedule, dimensions = process.schedule, x_0[0].numel()
        if isinstance(schedule, Table):
            raise ValueError("the continuous bound needs a schedule that is a curve; this one is a table of steps")
        t, noise, _ = draw(self.times, process, x_0, t, noise, generator)
        chain = DiffusionChain(model, grid=Grid((1.0, schedule.t_min)), variance="beta")
        loss = chain.divergence(chain.length, chain.guide.marginal(chain.length, x_0), ()) / dimensions
        early = ((t - schedule.t_min) / (1 - schedule.t_min) < self.decoded).nonzero().flatten().to(x_0.device)
        if len(early):
            x_1 = chain.guide.marginal(1, x_0[early]).sample(noise[early])
            given = None if condition is None else condition[early]
            cost = chain.decoding(x_0[early], (x_1,), given) / (self.decoded * dimensions)
            loss = loss.index_add(0, early, cost.to(loss))

        def integral() -> Tensor:
            prediction = model(process.marginal(x_0, t).sample(noise), t, condition)
            return squared_error(prediction, x_0, noise, Likelihood())

        if not isinstance(schedule, LearnedSchedule):
            return loss + integral()
        with schedule.multiplied() as factor:
            cost = integral()
        factor.append(2 * cost.detach())
        return loss + cost
