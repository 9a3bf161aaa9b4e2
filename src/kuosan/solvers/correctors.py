"""Correctors: Markov chains that leave q(x_t) as it is, run at one level of noise (theory rows 16 and 25).

With a solver they are predictor-corrector sampling; on their own, from level to level, annealed Langevin dynamics.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kuosan.denoiser import slope
from kuosan.process import Grid, Process, expand
from kuosan.schedules import Time
from kuosan.solvers.energies import energy_of
from kuosan.solvers.executor import Model

Draw = Callable[[], Tensor]
Correct = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Corrector(ABC):
    r"""What correctors share: how many steps at each level, and of which size,

    .. math:: \delta_t = 2 r^2\,(\sigma_t^2 + \alpha_t^2 w^2)

    With w = 0 this is the rule of Song et al. 2021 (arXiv 2011.13456, alg. 4), :math:`\delta = 2(r\|z\|/\|s\|)^2`,
    with both norms replaced by what they are for noise that cannot be guessed, :math:`\sqrt d` and
    :math:`\sqrt d/\sigma`; and that of Song and Ermon 2019 (arXiv 1907.05600, alg. 1), whose :math:`\alpha_i/2` is
    proportional to :math:`\sigma_i^2` too. It depends on neither the state nor the batch: sample k is a function of its
    seed, and a Metropolis test is valid. (Algorithm 5's factor 1 - beta_i, within 2 % of 1, is left out.)

    Args:
        snr: r, of the step.
        steps: at each level, each at the cost of one evaluation.
        width: w, the standard deviation of the narrowest part of the data; with more than 0 the chain still moves where
            there is next to no noise.

    Raises:
        ValueError: snr not positive, steps under 1, or a negative width.
    """

    snr: float = 0.16
    steps: int = 1
    width: float = 0.0

    def __post_init__(self):
        if not 0 < self.snr < math.inf:
            raise ValueError(f"snr is the size of a step and must be positive, got {self.snr}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 <= self.width < math.inf:
            raise ValueError(f"width is a standard deviation and at least 0, got {self.width}")

    @property
    def evaluations(self) -> int:
        """Of the model, at each level."""
        return self.steps

    def step_size(self, process: Process, t: Time) -> float:
        """delta_t."""
        alpha, sigma = process.at(Process.scales, t)
        return 2 * self.snr**2 * float(sigma**2 + (alpha * self.width) ** 2)

    @abstractmethod
    def on(self, model: Model, noise: Draw, condition: object = None) -> Correct:
        """The function ``correct(x, t)`` that :func:`~kuosan.solvers.run` takes.

        Args:
            model: that is sampled, guidance included.
            noise: returns the next standard-normal draw, like x: ``Noise(seeds, shape).draw``, so that each sample has
                its own.
            condition: passed on to the model.
        """


@dataclass(frozen=True)
class Langevin(Corrector):
    r"""Langevin dynamics at a fixed time: the corrector of Song et al. 2021 (arXiv 2011.13456, alg. 4 and 5).

    .. math:: x \leftarrow x + \delta_t\,\nabla\log q(x, t) + \sqrt{2\delta_t}\,z

    Unadjusted: at stationarity the variance of a Gaussian direction of variance v is v / (1 - delta / 2v), 2.6 % too
    large at the default r where v is sigma^2. :class:`MALA` has no such error.

    Args:
        snr, steps, width: see :class:`Corrector`.
        own_norms: take :math:`\delta = 2(r\|z\|/\|s\|)^2` from each sample's own noise and score, as algorithm 4 is
            printed (its code averages the norms over the batch, which would make samples depend on each other). For
            data of many dimensions only: in few, a score near 0 throws its sample far away.
    """

    own_norms: bool = False

    def on(self, model: Model, noise: Draw, condition: object = None) -> Correct:
        @torch.no_grad()
        def correct(x: Tensor, t: float) -> Tensor:
            delta: Tensor | float = self.step_size(model.process, t)
            for _ in range(self.steps):
                score, z = model(x, t, condition).score, noise().to(x)
                if self.own_norms:
                    delta = 2 * (self.snr * z.flatten(1).norm(dim=1) / score.flatten(1).norm(dim=1)) ** 2
                x = x + expand(delta, x) * score + expand((2 * delta) ** 0.5, x) * z
            return x

        return correct


@dataclass(frozen=True)
class MALA(Corrector):
    r"""The Metropolis-adjusted Langevin algorithm (Roberts and Tweedie 1996), for models that know their energy.

    .. math::
        x' = x + \delta s(x) + \sqrt{2\delta}\,z, \qquad
        a = \min\!\Big(1,\ e^{E(x) - E(x')}\,\frac{q(x|x')}{q(x'|x)}\Big), \qquad
        q(y|x) = \mathcal N(y;\ x + \delta s(x),\ 2\delta I)

    x' is taken with probability a: the chain leaves :math:`e^{-E(x, t)}` exactly as it is, for any size of the step.
    Du et al. 2023 (arXiv 2302.11552) use it at every level to sample products of models.

    Args:
        snr, steps, width: see :class:`Corrector`; the acceptance rate says whether snr is well chosen (0.6 is good).
        watch: called as ``watch(t, a)`` after every step with each sample's probability of acceptance, (B,): its mean
            is the acceptance rate.

    Raises:
        ValueError: when sampling, a model that has no energy.
    """

    snr: float = 0.5
    watch: Callable[[float, Tensor], None] | None = None

    @property
    def evaluations(self) -> int:
        return self.steps + 1  # the first for where it stands

    def on(self, model: Model, noise: Draw, condition: object = None) -> Correct:
        def energy_and_score(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
            energy, gradient = slope(lambda x: energy_of(model, x, t, condition), x)
            return energy, -gradient

        @torch.no_grad()
        def correct(x: Tensor, t: float) -> Tensor:
            delta = self.step_size(model.process, t)
            energy, score = energy_and_score(x, t)
            for _ in range(self.steps):
                z = noise().to(x)
                x_new = x + delta * score + math.sqrt(2 * delta) * z
                energy_new, score_new = energy_and_score(x_new, t)
                forth = -0.5 * _square(z)  # log q(x'|x) and log q(x|x'), up to the same constant
                back = -_square(x - x_new - delta * score_new) / (4 * delta)
                log_chance = (energy - energy_new + back - forth).clamp_max(0)
                # a uniform number from each sample's own stream: Phi of its next normal one
                log_u = torch.special.log_ndtr(noise().flatten(1)[:, 0].double()).to(log_chance.device)
                accept = log_u < log_chance  # never if it is not a number
                if self.watch is not None:
                    self.watch(t, log_chance.exp().nan_to_num(0))
                energy = torch.where(accept, energy_new, energy)
                taken = accept.reshape(-1, *(1,) * (x.ndim - 1))
                x, score = torch.where(taken, x_new, x), torch.where(taken, score_new, score)
            return x

        return correct


def _square(x: Tensor) -> Tensor:
    return (x**2).flatten(1).sum(1)


@torch.no_grad()
def annealed(
    model: Model,
    grid: Grid,
    x_init: Tensor,
    corrector: Corrector,
    noise: Draw,
    condition: object = None,
    *,
    denoise: bool = True,
) -> Tensor:
    r"""Annealed Langevin dynamics (Song and Ermon 2019, arXiv 1907.05600, alg. 1), with any corrector.

    At each time of the grid, from noise down, ``corrector.steps`` steps at that level from where the last one ended. No
    reverse step is taken: each level's density need only be near the next one's, not joined to it by the diffusion.

    Args:
        model: the model.
        grid: the levels.
        x_init: (B, ...), at the first time.
        corrector: :class:`Langevin` is the paper's; :class:`MALA` for models with energies.
        noise: returns the next noise, like ``x_init``.
        condition: passed on to the model.
        denoise: end on x0-hat of the last level instead of its noisy state (Jolicoeur-Martineau et al. 2021, arXiv
            2009.05475).

    Returns:
        (B, ...).
    """
    x, correct = x_init, corrector.on(model, noise, condition)
    for t in grid.times:
        x = correct(x, t)
    return model(x, grid.times[-1], condition).x0 if denoise else x
