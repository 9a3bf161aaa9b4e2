"""The denoiser: a network, the process that it was made for, what it predicts, and how its input and output scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kuosan.prediction import FORMS, Prediction
from kuosan.process import Process, expand
from kuosan.schedules import Time, float64


@dataclass(frozen=True)
class EDM:
    r"""EDM's preconditioning (Karras et al. 2022, arXiv 2206.00364, table 1), for any alpha and sigma.

    .. math::
        \hat x_0 = \frac{\alpha\sigma_d^2}{\sigma^2+\alpha^2\sigma_d^2}\,x_t
        + \frac{\sigma\sigma_d}{\sqrt{\sigma^2+\alpha^2\sigma_d^2}}\,
        F\!\left(\frac{x_t}{\sqrt{\sigma^2+\alpha^2\sigma_d^2}},\ \tfrac14\log\tfrac\sigma\alpha\right)

    The network sees unit variance and is asked for unit variance at every level of noise.

    Args:
        sigma_data: the standard deviation of the data, sigma_d.
    """

    sigma_data: float = 0.5

    def __post_init__(self):
        if not self.sigma_data > 0:
            raise ValueError(f"sigma_data is the standard deviation of the data and must be positive, got {self}")

    def coefficients(self, process: Process, t: Time) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(skip, out, in, label) of shape of t, float64."""
        alpha, sigma = process.scales(t)
        total = sigma**2 + (alpha * self.sigma_data) ** 2
        label = -process.log_snr(t).clamp(-40, 40) / 8
        return alpha * self.sigma_data**2 / total, sigma * self.sigma_data / total.sqrt(), total.rsqrt(), label

    def energy_gain(self, process: Process, t: Time) -> tuple[Tensor]:
        r""":math:`\alpha\sigma_d/\sigma`: what an energy is multiplied by for its slope to be the F above. Float64."""
        return (self.sigma_data * torch.exp(0.5 * process.log_snr(t)),)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every part of the model is in evaluation mode (no dropout); afterwards each is as it was."""
    modes = {part: part.training for part in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def slope(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """(values (B,), gradient of x's shape) of a function from x (B, ...) to one number for each example.

    Under ``no_grad`` too; where gradients are on, the gradient can itself be differentiated: a loss of it trains.

    Raises:
        ValueError: not one number for each example, or numbers that do not depend on x.
    """
    training = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if training and x.requires_grad else x.detach().requires_grad_()
        values = function(x)
        if values.shape != x.shape[:1]:
            raise ValueError(f"one number for each of {len(x)} examples expected, got shape {tuple(values.shape)}")
        if not values.requires_grad:
            raise ValueError("the numbers do not depend on x, or not in a way that can be differentiated")
        (gradient,) = torch.autograd.grad(values.sum(), x, create_graph=training)
    return (values, gradient) if training else (values.detach(), gradient)


class Denoiser(nn.Module):
    """A network read as a denoiser: ``denoiser(x_t, t, condition) -> Prediction``.

    Args:
        network: any module called as ``network(x, t, condition)`` with x (B, ...) and t (B,): the time in [0, 1], or
            EDM's noise label under that preconditioning. It returns x's shape; with ``learned_variance`` two of them
            stacked along dimension 1; for "levels" logits of x's shape with one more dimension of size L; for "energy"
            one number for each example, (B,).
        process: the forward process.
        predicts: "x0", "eps", "score", "v", "velocity", "flow", "levels" or "energy". With levels, the logits are
            multiplied by the Gaussian likelihood of x_t (the network only has to say what x_t itself does not), and x0
            is the mean. With energy, the score is minus its gradient (:meth:`energy`).
        preconditioning: None or :class:`EDM`. EDM scales the network's output into an x0; for levels only the input and
            the label; for an energy see :meth:`energy`.
        levels: the number of levels of discrete data, evenly spaced over [-1, 1]; None for continuous data.
        learned_variance: the network also says where the reverse variance lies between beta-tilde and beta
            (Nichol and Dhariwal 2021, arXiv 2102.09672, eq. 15), as a value in [-1, 1].

    Raises:
        ValueError: an unknown or impossible combination.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        predicts: str = "eps",
        preconditioning: EDM | None = None,
        levels: int | None = None,
        learned_variance: bool = False,
    ):
        super().__init__()
        if predicts not in (*FORMS, "levels", "energy"):
            raise ValueError(f"predicts must be one of {', '.join(FORMS)}, levels or energy, got {predicts!r}")
        if preconditioning is not None and predicts not in ("x0", "levels", "energy"):
            raise ValueError(f'EDM preconditioning makes the output an x0: use predicts="x0", not {predicts!r}')
        if predicts == "levels" and levels is None:
            raise ValueError('predicts="levels" needs to know how many: pass levels=')
        if predicts == "levels" and learned_variance:
            raise ValueError("a distribution over levels already has a variance: drop learned_variance")
        if predicts == "energy" and learned_variance:
            raise ValueError("an energy is one number, with no room for a variance: drop learned_variance")
        if levels is not None and levels < 2:
            raise ValueError(f"discrete data has at least 2 levels, got {levels}")
        self.network, self.process, self.predicts = network, process, predicts
        self.preconditioning, self.levels, self.learned_variance = preconditioning, levels, learned_variance
        if isinstance(process.schedule, nn.Module):  # a learned schedule is trained, kept and moved with the network
            self.schedule = process.schedule
        # in a list, so that it is not registered twice: looking for it at every call would cost more than a small sum
        self._first_parameter = [next((p for p in network.parameters() if p.is_floating_point()), None)]
        self._labels: dict[float, Tensor] = {}

    def around(self, network: nn.Module) -> Denoiser:
        """The same reading of another network: this one compiled, distributed, or another checkpoint."""
        return Denoiser(network, self.process, self.predicts, self.preconditioning, self.levels, self.learned_variance)

    @property
    def level_values(self) -> Tensor:
        """The values that discrete data takes, float64 in [-1, 1]."""
        if self.levels is None:
            raise ValueError("this denoiser is of continuous data; pass levels= for discrete data")
        return torch.linspace(-1, 1, self.levels, dtype=torch.float64)

    def forward(self, x_t: Tensor, t: Time, condition: object = None) -> Prediction:
        """Raises ValueError if t is not of shape () or (B,), or the network's output has the wrong shape."""
        if isinstance(t, Tensor):
            t = float64(t)
        elif t > 0 and self.predicts in ("eps", "score", "energy") and self.process.at(Process.scales, t)[0] == 0:
            # from noise alone (the rectified flow at t = 1) they say nothing of x0: asked where a thousandth is signal
            first = float(self.process.schedule.time_of(-2 * math.log(1000.0)))
            said = self(x_t, first, condition)
            return replace(said, t=t, form="x0", value=said.x0)
        if self.predicts == "energy":
            return Prediction(self.process, t, x_t, "score", -slope(lambda x: self.energy(x, t, condition), x_t)[1])
        output, skip, out, _ = self._ask(x_t, t, condition)
        if self.predicts == "levels":
            return self._levels(x_t, t, output)
        fraction = None
        if self.learned_variance:
            self._check(output, (x_t.shape[0], 2 * x_t.shape[1], *x_t.shape[2:]))
            output, fraction = output.chunk(2, dim=1)
            fraction = 0.5 * (fraction + 1)
        self._check(output, x_t.shape)
        if self.preconditioning is not None:
            output = expand(skip, x_t) * x_t + expand(out, x_t) * output
        return Prediction(self.process, t, x_t, self.predicts, output, fraction)

    def energy(self, x_t: Tensor, t: Time, condition: object = None) -> Tensor:
        r"""E(x_t, t), (B,): minus the log density of x_t up to a number that the network does not know.

        The network's own output; under EDM's preconditioning with the network G

        .. math:: E = \frac{\|u\|^2}2 + \frac{\alpha\sigma_d}{\sigma}\,G(u, \tfrac14\log\tfrac\sigma\alpha),
            \qquad u = \frac{x_t}{\sqrt{\sigma^2+\alpha^2\sigma_d^2}}

        whose score is that of EDM's x0 with :math:`F = -\nabla_u G`: of unit variance at every level of noise.

        Raises:
            ValueError: the denoiser does not predict an energy, or the network's output is not of shape (B,).
        """
        if self.predicts != "energy":
            raise ValueError(f'only a denoiser with predicts="energy" knows one; this one predicts {self.predicts}')
        output, _, _, scaled = self._ask(x_t, t, condition)
        self._check(output, x_t.shape[:1])
        if self.preconditioning is None:
            return output
        (gain,) = self.process.at(self.preconditioning.energy_gain, t)
        return 0.5 * (scaled**2).flatten(1).sum(1) + expand(gain, output) * output

    def _ask(self, x_t: Tensor, t: Time, condition: object) -> tuple[Tensor, Any, Any, Tensor]:
        """(the network's output, skip, out, the network's input)."""
        if isinstance(t, Tensor):
            expand(t, x_t)  # says what is wrong with a t of another shape
        skip, out, scaled, label = None, None, x_t, t
        if self.preconditioning is not None:
            skip, out, scale, label = self.process.at(self.preconditioning.coefficients, t)
            scaled = expand(scale, x_t) * x_t
        parameter = self._first_parameter[0]
        dtype = x_t.dtype if parameter is None else parameter.dtype
        if isinstance(label, Tensor):
            label = label.to(device=x_t.device, dtype=dtype).expand(x_t.shape[0])
        else:
            label = self._label(label, x_t, dtype)
        network = self._modules["network"]  # what self.network is, without the microsecond that looking for it takes
        output = network(scaled if scaled.dtype == dtype else scaled.to(dtype), label, condition)  # type: ignore[misc]
        return output if output.dtype == x_t.dtype else output.to(x_t.dtype), skip, out, scaled

    def _label(self, label: float, x_t: Tensor, dtype: torch.dtype) -> Tensor:
        """One number for each example, (B,), kept: samplers ask for the same again in every batch."""
        kept, batch = self._labels.get(label), x_t.shape[0]
        if (
            kept is None
            or kept.shape[0] != batch
            or kept.dtype != dtype
            or kept.device != x_t.device
            or torch.is_inference_mode_enabled()
        ):
            kept = torch.tensor(label, device=x_t.device, dtype=dtype).expand(batch)  # which cannot be written into
            if not torch.is_inference_mode_enabled():
                if len(self._labels) >= 10_000:
                    self._labels.clear()
                self._labels[label] = kept
        return kept

    def _levels(self, x_t: Tensor, t: Time, logits: Tensor) -> Prediction:
        assert self.levels is not None
        self._check(logits, (*x_t.shape, self.levels))
        values = self.level_values.to(x_t)
        # log N(x_t; alpha level, sigma^2) up to what is the same for all levels
        alpha, sigma = self.process.at(Process.scales, t)
        wide = x_t.unsqueeze(-1)
        off = (wide - expand(alpha, wide) * values).div_(expand(sigma, wide))  # L numbers for each value: few passes
        log_levels = torch.log_softmax(torch.addcmul(logits, off, off, value=-0.5), dim=-1)
        x_0 = (log_levels.exp() * values).sum(-1)
        return Prediction(self.process, t, x_t, "x0", x_0, None, log_levels, values)

    @staticmethod
    def _check(output: Tensor, shape: tuple[int, ...]) -> None:
        if output.shape != shape:
            raise ValueError(
                f"the network should have returned shape {tuple(shape)}, it returned {tuple(output.shape)}"
            )
