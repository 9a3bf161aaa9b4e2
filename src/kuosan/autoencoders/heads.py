"""Networks that end in a law: a Gaussian, a normalising flow, or a decoder of the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kuosan.decoders import DiscretisedGaussian, DiscretisedMixture, Levels
from kuosan.gaussian import Gaussian, per_example
from kuosan.networks.parts import check_size, zeroed


class Perceptron(nn.Module):
    """Residual blocks over a vector, which add nothing before they are trained.

    Args:
        size: numbers that come in.
        outputs: numbers that go out.
        width, depth: of the blocks.
        dropout: in every block.
    """

    def __init__(self, size: int, outputs: int, width: int, depth: int, dropout: float = 0.0):
        super().__init__()
        check_size(width, depth)
        self.enter = nn.Linear(size, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, width),
                nn.SiLU(),
                nn.Dropout(dropout),
                zeroed(nn.Linear(width, width)),
            )
            for _ in range(depth)
        )
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        for block in self.blocks:
            h = h + block(h)
        return self.leave(h)


def whole(raw: Tensor) -> Tensor:
    """At least float32: laws are not made of the halves that networks may be computed in."""
    return raw.to(torch.promote_types(raw.dtype, torch.float32))


def gaussian(raw: Tensor) -> Gaussian:
    """A Gaussian from twice as many numbers: means, and log-variances kept within +-8."""
    mean, log_variance = whole(raw).chunk(2, dim=1)
    return Gaussian(mean, (8 * torch.tanh(log_variance / 8)).exp())


class GaussianHead(nn.Module):
    """N(mean, variance) with both from a network, each coordinate by itself."""

    def __init__(self, size: int, outputs: int, width: int, depth: int, dropout: float = 0.0):
        super().__init__()
        self.network = Perceptron(size, 2 * outputs, width, depth, dropout)

    def forward(self, given: Tensor) -> Gaussian:
        return gaussian(self.network(given))


class FlowLaw:
    """A Gaussian bent by a transform: z = f(u), log q(z) = log N(u) - log |df/du|.

    It remembers the log-density of its last draw: the way back, from z to u, takes as many passes through the network
    as z has coordinates.
    """

    def __init__(self, base: Gaussian, transform: Any):
        self.base, self.transform = base, transform
        self._last: tuple[Tensor, Tensor] | None = None

    @property
    def mean(self) -> Tensor:
        """Where the Gaussian's mean is bent to: the middle of the law, if not its mean."""
        return self.transform(self.base.mean)

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        u = self.base.sample(noise, generator)
        z, log_det = self.transform.call_and_ladj(u)
        self._last = z, per_example(self.base.log_prob(u)) - log_det
        return z

    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z) of each example, (B,)."""
        if self._last is not None and self._last[0] is z:
            return self._last[1]
        u, log_det = self.transform.inv.call_and_ladj(z)
        return per_example(self.base.log_prob(u)) + log_det


class FlowHead(nn.Module):
    """The Gaussian of :class:`GaussianHead` bent by an inverse autoregressive flow (Kingma et al. 2016,
    arXiv 1606.04934), whose layers, by zuko, are told what the Gaussian was made of.

    Args:
        transforms: how many autoregressive layers.
        context: numbers that they are told.

    Raises:
        ImportError: zuko is not installed.
    """

    def __init__(
        self,
        size: int,
        outputs: int,
        width: int,
        depth: int,
        dropout: float = 0.0,
        transforms: int = 3,
        context: int = 64,
    ):
        super().__init__()
        try:
            import zuko
        except ImportError:
            raise ImportError("a flow posterior needs zuko: pip install 'kuosan[likelihood]'") from None
        self.outputs = outputs
        self.network = Perceptron(size, 2 * outputs + context, width, depth, dropout)
        self.flow = zuko.flows.MAF(outputs, context, transforms=transforms, hidden_features=(width, width)).transform
        for layer in self.flow.transforms:  # begin as the identity: the last layer's weights and biases are 0
            for parameter in list(layer.parameters())[-2:]:
                nn.init.zeros_(parameter)

    def forward(self, given: Tensor) -> FlowLaw:
        raw = self.network(given)
        return FlowLaw(gaussian(raw[:, : 2 * self.outputs]), self.flow(whole(raw[:, 2 * self.outputs :])))


#: What q(z|...) may be.
POSTERIORS: dict[str, Callable[..., nn.Module]] = {"gaussian": GaussianHead, "flow": FlowHead}


class Decoder(nn.Module):
    """p(x | z): the last network of an autoencoder.

    Args:
        kind: "levels", any law over the levels; "mixture", of five Gaussians cut into their bins, for many levels;
            "discretised", one Gaussian cut into them; "shared", the same with one learned standard deviation for all
            values, so that nothing but the squared error is learned (Rybkin et al. 2021, arXiv 2006.13202, eq. 4);
            "gaussian", a density.
        shape: of one example.
        levels: of the data.
        network: makes the network, told how many numbers a law takes and whether they are the last or the first
            dimension beside the shape's; what it returns is flat.

    Raises:
        ValueError: an unknown kind.
    """

    def __init__(self, kind: str, shape: Sequence[int], levels: int, network: Callable[[int, bool], nn.Module]):
        super().__init__()
        if kind not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {kind!r}")
        self.kind, self.shape, self.levels = kind, tuple(shape), levels
        numbers = {"levels": levels, "mixture": 3 * COMPONENTS, "shared": 1}.get(kind, 2)
        if kind == "shared":
            self.log_std = nn.Parameter(torch.tensor(-1.0))
        self.network = network(numbers, kind in ("levels", "mixture"))
        self.register_buffer("values", torch.linspace(-1, 1, levels), persistent=False)

    def forward(self, given: Tensor) -> Gaussian | DiscretisedGaussian | DiscretisedMixture | Levels:
        raw = self.network(given)
        if self.kind == "levels":
            logits = raw.reshape(len(raw), *self.shape, self.levels)
            return Levels(torch.log_softmax(whole(logits), -1), self.get_buffer("values"))
        if self.kind == "mixture":
            weights, mean, log_std = whole(raw).reshape(len(raw), *self.shape, 3, COMPONENTS).unbind(-2)
            start = torch.linspace(-1, 1, COMPONENTS, device=raw.device)  # side by side
            std = self.levels ** -torch.sigmoid(log_std)  # between half a bin and half of all of them
            return DiscretisedMixture(
                torch.log_softmax(weights, -1), DiscretisedGaussian(start + mean, std**2, self.levels)
            )
        if self.kind == "shared":
            mean = whole(raw).reshape(len(raw), *self.shape)
            return DiscretisedGaussian(mean, (2 * self.log_std).exp().expand_as(mean), self.levels)
        law = gaussian(raw)
        mean, variance = (part.reshape(len(raw), *self.shape) for part in (law.mean, law.variance))
        return Gaussian(mean, variance) if self.kind == "gaussian" else DiscretisedGaussian(mean, variance, self.levels)


DECODERS = ("levels", "mixture", "discretised", "shared", "gaussian")
#: Gaussians of a mixture.
COMPONENTS = 5
