"""The denoiser: a network, the process that it was made for, what it predicts, and how its input and output scale."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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


class Denoiser(nn.Module):
    """A network read as a denoiser: ``denoiser(x_t, t, condition) -> Prediction``.

    Args:
        network: any module called as ``network(x, t, condition)`` with x (B, ...) and t (B,): the time in [0, 1], or
            EDM's noise label under that preconditioning. It returns x's shape; with ``learned_variance`` two of them
            stacked along dimension 1; for "levels" logits of x's shape with one more dimension of size L.
        process: the forward process.
        predicts: "x0", "eps", "score", "v", "velocity" or "levels". With levels, the logits are multiplied by the
            Gaussian likelihood of x_t (the network only has to say what x_t itself does not), and x0 is the mean.
        preconditioning: None or :class:`EDM`. EDM scales the network's output into an x0; for levels only the input and
            the label.
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
        if predicts not in (*FORMS, "levels"):
            raise ValueError(f"predicts must be one of {', '.join(FORMS)} or levels, got {predicts!r}")
        if preconditioning is not None and predicts not in ("x0", "levels"):
            raise ValueError(f'EDM preconditioning makes the output an x0: use predicts="x0", not {predicts!r}')
        if predicts == "levels" and levels is None:
            raise ValueError('predicts="levels" needs to know how many: pass levels=')
        if predicts == "levels" and learned_variance:
            raise ValueError("a distribution over levels already has a variance: drop learned_variance")
        if levels is not None and levels < 2:
            raise ValueError(f"discrete data has at least 2 levels, got {levels}")
        self.network, self.process, self.predicts = network, process, predicts
        self.preconditioning, self.levels, self.learned_variance = preconditioning, levels, learned_variance

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
            expand(t, x_t)  # says what is wrong with a t of another shape
        if self.preconditioning is None:
            scaled, label = x_t, t
        else:
            skip, out, scale, label = self.process.at(self.preconditioning.coefficients, t)
            scaled = expand(scale, x_t) * x_t
        dtype = next((p.dtype for p in self.network.parameters() if p.is_floating_point()), x_t.dtype)
        if isinstance(label, Tensor):
            label = label.to(device=x_t.device, dtype=dtype).expand(x_t.shape[0])
        else:
            label = torch.full((x_t.shape[0],), label, device=x_t.device, dtype=dtype)
        output = self.network(scaled.to(dtype), label, condition).to(x_t.dtype)
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

    def _levels(self, x_t: Tensor, t: Tensor, logits: Tensor) -> Prediction:
        assert self.levels is not None
        self._check(logits, (*x_t.shape, self.levels))
        values = self.level_values.to(x_t)
        # log N(x_t; alpha level, sigma^2) up to what is the same for all levels
        alpha, sigma = self.process.at(Process.scales, t)
        wide = x_t.unsqueeze(-1)
        evidence = -0.5 * ((wide - expand(alpha, wide) * values) / expand(sigma, wide)) ** 2
        log_levels = torch.log_softmax(logits + evidence, dim=-1)
        x_0 = (log_levels.exp() * values).sum(-1)
        return Prediction(self.process, t, x_t, "x0", x_0, None, log_levels, values)

    @staticmethod
    def _check(output: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(output.shape) != tuple(shape):
            raise ValueError(
                f"the network should have returned shape {tuple(shape)}, it returned {tuple(output.shape)}"
            )
