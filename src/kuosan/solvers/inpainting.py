"""Inpainting: known parts held fixed while any solver samples the rest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kuosan.prediction import Prediction
from kuosan.process import Process
from kuosan.schedules import Time
from kuosan.solvers.executor import Model


class Inpainting(nn.Module):
    r"""A model some of whose coordinates are known: its x0-hat there is the known value, and a table ends on x0-hat.

    The known coordinates are then a diffusion of their own whose data is one point. Any solver carries them along
    :math:`\alpha_t x_0 + \sigma_t\varepsilon` (an ODE with the one :math:`\varepsilon` that the sample started from, a
    stochastic solver with the noise that it draws), and that is what the model sees of them. Nothing is stored from
    call to call and nothing else is drawn: a sample still depends on its own seed alone. This is the *replacement*
    method (Song et al. 2021, arXiv 2011.13456, app. I.2).

    Replacement is biased: the model is asked for E[x0 | x_t], in which the known coordinates are as noisy as the rest,
    instead of E[x0 | x_t, known] (Ho et al. 2022, arXiv 2204.03458, sec. 3.1), and it hears of them too late.
    ``corrections`` = n > 0 conditions on them, as if x0 given x_t were Gaussian with its first two moments,

    .. math::
        \hat x_0 + C_{\cdot k} C_{kk}^{-1} (x_k - \hat x_{0,k}), \qquad
        C = \mathrm{Cov}[x_0 \mid x_t] = \frac{\sigma_t^2}{\alpha_t} \frac{\partial \hat x_0}{\partial x_t}

    by n conjugate gradients, each one more backward pass through the model. This is the reconstruction guidance of Ho
    et al. 2022 (eq. 7) with the covariance that the model implies instead of :math:`\sigma^2/\alpha^2 I` and a weight
    (Boys et al. 2023, arXiv 2310.06721). For Gaussian data it is exact, with as many corrections as there are known
    coordinates; for other data it is nearer than replacement, not exact.

    Measured with exact denoisers and one coordinate known, distance W1 of the other's samples from its conditional in
    units of that one's standard deviation (two sets of 4,000 exact samples: .03), DDIM in 100 steps and ancestral in
    250: two dimensions with correlation 0.9, known at 1.2 standard deviations: 1.28 and .78 by replacement, .03 and .02
    with one correction; the ring of eight modes, known at x = 1: .18 and .16, with one correction .07 and .07.

    Args:
        model: the model, guided or not, but not clipped inside: its Jacobian is used.
        known: one sample's shape, the same for all; or (B, ...), one for each sample of the one batch (``batch_size``
            of sampling must then be at least the number of samples).
        mask: bool of known's shape; True where known.
        corrections: n; 0 is replacement alone.

    Raises:
        ValueError: a mask that is not bool or of another shape, a known value that is not finite, corrections under 0;
            when sampling, samples of another shape or number, or a model that cannot be differentiated.
    """

    known: Tensor
    mask: Tensor

    def __init__(self, model: Model, known: Tensor, mask: Tensor, corrections: int = 0):
        super().__init__()
        if mask.dtype != torch.bool:
            raise ValueError(f"a mask is bool, True where known; got {mask.dtype}")
        if mask.shape != known.shape:
            raise ValueError(f"mask and known must have one shape, got {tuple(mask.shape)} and {tuple(known.shape)}")
        if not bool(known[mask].isfinite().all()):
            raise ValueError("a known value is not finite")
        if corrections < 0:
            raise ValueError(f"corrections must be at least 0 (0: replacement alone), got {corrections}")
        self.model, self.corrections = model, corrections
        self.register_buffer("known", known, persistent=False)
        self.register_buffer("mask", mask, persistent=False)

    @property
    def process(self) -> Process:
        return self.model.process

    def forward(self, x_t: Tensor, t: Time, condition: object = None) -> Prediction:
        if self.known.shape not in (x_t.shape, x_t.shape[1:]):
            raise ValueError(
                f"known has shape {tuple(self.known.shape)}, samples have {tuple(x_t.shape[1:])}, and there are "
                f"{len(x_t)} in this batch"
            )
        known, mask = self.known.to(x_t), self.mask.to(x_t.device)
        if not self.corrections:
            said = self.model(x_t, t, condition)
            return said.with_x0(torch.where(mask, known, said.x0))
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            said = self.model(x, t, condition)
            x_0 = said.x0
        if not x_0.requires_grad:
            raise ValueError("corrections need a model that can be differentiated in x_t: use corrections=0")
        moved = x_0.detach() + self._conditioned(x, x_0, torch.where(mask, known - x_0.detach(), 0), mask)
        return Prediction(said.process, t, x_t, "x0", torch.where(mask, known, moved), said.variance_fraction)

    def _conditioned(self, x: Tensor, x_0: Tensor, residual: Tensor, mask: Tensor) -> Tensor:
        """C_{.k} C_kk^{-1} residual by conjugate gradients, each sample for itself; C's scale drops out."""
        change, direction = torch.zeros_like(residual), residual
        size = _dot(residual, residual)
        for _ in range(self.corrections):
            (image,) = torch.autograd.grad(x_0, x, direction, retain_graph=True)
            bend = _dot(direction, image)
            # an imperfect model's Jacobian may bend the wrong way, and what is reached needs no more: there it stops
            going = (bend > 0) & (size > 0)
            step = torch.where(going, size / torch.where(going, bend, 1), 0)
            change = change + step * image
            residual = residual - step * torch.where(mask, image, 0)
            smaller = _dot(residual, residual)
            direction = residual + torch.where(going, smaller / torch.where(going, size, 1), 0) * direction
            size = torch.where(going, smaller, 0)
        return change


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each sample, of shape (B, 1, ...)."""
    return (a * b).flatten(1).sum(1).reshape(-1, *(1,) * (a.ndim - 1))
