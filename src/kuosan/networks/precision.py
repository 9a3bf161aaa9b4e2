"""A network that computes in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BFloat16(nn.Module):
    """A network whose matrix products run in bfloat16 (torch.autocast); its weights and its input stay as they are.

    Args:
        network: called as ``network(x, t, condition)``.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.network(x, t, condition)
