"""Exponential moving average of a network's parameters, with a warm-up; buffers are never averaged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    r"""Averaged parameters :math:`\bar\theta \leftarrow b\,\bar\theta + (1-b)\,\theta` with
    :math:`b = \min(\text{decay}, (1+k)/(10+k))` after step k, so that the start is soon forgotten.

    Args:
        network: whose parameters to follow; the average begins at their present values.
        decay: the largest b.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.average = {name: p.detach().clone() for name, p in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        b = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in network.parameters()], 1 - b)

    @torch.no_grad()
    def restore(self, average: dict[str, Tensor]) -> None:
        """Take over a saved average.

        Raises:
            KeyError: it lacks a parameter.
        """
        for name, value in self.average.items():
            value.copy_(average[name])

    @contextmanager
    def swapped_in(self, network: nn.Module) -> Iterator[None]:
        """Inside, the network has the averaged weights and is in evaluation mode; afterwards it is as it was."""
        own = {name: p.detach().clone() for name, p in network.named_parameters()}
        training = network.training
        load_parameters(network, self.average)
        network.eval()
        try:
            yield
        finally:
            load_parameters(network, own)
            network.train(training)


@torch.no_grad()
def load_parameters(network: nn.Module, values: dict[str, Tensor]) -> None:
    for name, p in network.named_parameters():
        p.copy_(values[name])
