"""A thin adapter: a UNet of the diffusers library as a network of ours. The only place here that knows diffusers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DiffusersUNet(nn.Module):
    """A ``diffusers`` UNet2DModel (or any model of its calling form) as ``network(x, t, condition)``.

    Args:
        unet: called as ``unet(x, timestep, class_labels=...)``, returning an object with ``.sample``.
        steps: times in [0, 1] are scaled to that many steps, which the UNet was, or will be, trained on: time i / steps
            is its timestep i - 1.
        classes: how many classes it was made for (``num_class_embeds`` less one: the last one is "any"); 0 for none.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: ``classes`` does not fit ``num_class_embeds``.
    """

    def __init__(self, unet: nn.Module, steps: int = 1000, classes: int = 0):
        super().__init__()
        try:
            import diffusers  # noqa: F401
        except ImportError:
            raise ImportError("this adapter needs diffusers: pip install kuosan[diffusers]") from None
        embeds = getattr(getattr(unet, "config", None), "num_class_embeds", None)
        if classes and embeds != classes + 1:
            raise ValueError(f"{classes} classes need num_class_embeds = {classes + 1} (one for any), got {embeds}")
        self.unet, self.steps, self.classes = unet, steps, classes

    def forward(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        options = {}
        if self.classes:
            labels = torch.full((len(x),), -1, device=x.device) if condition is None else condition
            assert isinstance(labels, Tensor)
            options["class_labels"] = labels % (self.classes + 1)
        return self.unet(x, t * self.steps - 1, **options).sample
