"""An energy out of any network: one number for each example, whose slope has the network's own strengths."""

from __future__ import annotations

from torch import Tensor, nn


class Energy(nn.Module):
    r"""E(x, t) = <x, f(x, t)>, for a network f that returns x's shape.

    Its slope is f + (df/dx)^T x: the network itself, plus what makes it a gradient; at the start, where networks here
    return 0, so does it. (Salimans and Ho 2021, "Should EBMs model the energy or the score?", take ||x - f||^2, which
    starts far from 0.)

    Args:
        network: called as ``network(x, t, condition)``.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, condition: object = None) -> Tensor:
        return (x * self.network(x, t, condition)).flatten(1).sum(1)
