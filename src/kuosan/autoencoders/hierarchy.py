"""The hierarchical VAE of T layers as a ladder: T = 1 is the VAE, T = 2 the two-layer one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kuosan.autoencoders.heads import POSTERIORS, Decoder, GaussianHead, Perceptron
from kuosan.chain import Chain
from kuosan.gaussian import Gaussian
from kuosan.kernels import Generative, Guide, Law

INFERENCE = ("bottom_up", "top_down")


class BottomUp(Guide):
    """q(z_1|x) q(z_2|z_1) ... q(z_T|z_{T-1}): each layer looks at the one below.

    Args:
        sizes: of x, z_1, ..., z_T.
        head: makes the law of each, a class of :data:`~kuosan.autoencoders.heads.POSTERIORS`.
    """

    def __init__(self, sizes: Sequence[int], head: Any, width: int, depth: int, dropout: float):
        super().__init__()
        self.length = len(sizes) - 1
        network = (width, depth, dropout)
        self.heads = nn.ModuleList(head(below, size, *network) for below, size in itertools.pairwise(sizes))

    def up(self, i: Any, below: Sequence[Tensor], given: Any) -> Law:
        return self.heads[i - 1](below[0].flatten(1))


class TopDown(Guide):
    """q(z_T|x) q(z_{T-1}|z_T, x) ... q(z_1|z_2, ..., x): from the top down, as p is, each layer with x at hand.

    (Sonderby et al. 2016, arXiv 1602.02282: the ladder VAE.)

    Args:
        sizes: of x, z_1, ..., z_T.
        head: makes the law of each.
        skip: each layer looks at all above it, not only at the next.
    """

    def __init__(self, sizes: Sequence[int], head: Any, skip: bool, width: int, depth: int, dropout: float):
        super().__init__()
        self.length, self.skip = len(sizes) - 1, skip
        self.features = Perceptron(sizes[0], width, width, depth, dropout)
        self.heads = nn.ModuleList(
            head(width + _size_above(sizes, i, skip), sizes[i], width, depth, dropout) for i in range(1, len(sizes))
        )

    def read(self, x: Tensor, condition: Any = None) -> Tensor:
        return self.features(x.flatten(1))

    def posterior(self, i: Any, above: Sequence[Tensor], given: Any) -> Law:
        return self.heads[i - 1](torch.cat([given, *(above if self.skip else above[:1])], dim=1))


def _size_above(sizes: Sequence[int], i: int, skip: bool) -> int:
    return sum(sizes[i + 1 :]) if skip else sum(sizes[i + 1 : i + 2])


class UnderPrior(Generative):
    """A p whose z_T is standard normal, or another chain's x.

    Args:
        shapes: of one x, z_1, ..., z_T.
        decoder: p(x|...), of the data's shape.
        prior: a chain in the standard normal's place, whose x is z_T; None: the standard normal.
    """

    def __init__(self, shapes: tuple[tuple[int, ...], ...], decoder: Decoder, prior: Chain | None):
        super().__init__()
        self.length, self.shapes, self.discrete = len(shapes) - 1, shapes, decoder.kind != "gaussian"
        self.decoder, self.prior_chain = decoder, prior

    def prior(self, condition: Any = None) -> Law | Chain:
        if self.prior_chain is not None:
            return self.prior_chain
        zeros = torch.zeros(1, *self.shapes[-1], device=next(self.decoder.parameters()).device)
        return Gaussian(zeros, zeros + 1)


class Hierarchy(UnderPrior):
    """p(z_T) p(z_{T-1}|z_T) ... p(x|z_1), z_T standard normal; with ``skip`` each looks at all above it (theory row 3).

    Args:
        sizes: of x, z_1, ..., z_T.
        decoder: p(x|...), called with what is above, concatenated.
        skip: with skip connections.
        prior: a chain in the standard normal's place, whose x is z_T; None: the standard normal.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        decoder: Decoder,
        skip: bool,
        width: int,
        depth: int,
        dropout: float,
        prior: Chain | None = None,
    ):
        super().__init__((decoder.shape, *((size,) for size in sizes[1:])), decoder, prior)
        self.markov = not skip
        self.heads = nn.ModuleList(
            GaussianHead(_size_above(sizes, i, skip), sizes[i], width, depth, dropout) for i in range(1, self.length)
        )

    def down(self, i: Any, above: Sequence[Tensor], condition: Any = None) -> Law:
        given = above[0] if self.markov else torch.cat(list(above), dim=1)
        return self.decoder(given) if i == 0 else self.heads[i - 1](given)


class Autoencoder(Chain):
    """A hierarchical VAE of T layers (theory rows 2 to 4); with one layer, the VAE.

    Args:
        shape: of one example.
        levels: of the data.
        latent: size of z_1.
        layers: T; each has half the size of the one below.
        inference: "bottom_up" or "top_down".
        skip: layers look at all above them, not only at the next; of p, and of a q that comes down.
        posterior: "gaussian", or "flow" for one bent by an inverse autoregressive flow.
        decoder: "levels", "mixture", "discretised" or "gaussian".
        width, depth, dropout: of each of its networks.
        prior: makes a chain in the standard normal's place, of examples of z_T's shape.

    Raises:
        ValueError: an unknown kind, no layers or too many.
    """

    def __init__(
        self,
        shape: Sequence[int],
        levels: int,
        latent: int = 32,
        layers: int = 1,
        inference: str = "top_down",
        skip: bool = False,
        posterior: str = "gaussian",
        decoder: str = "levels",
        width: int = 256,
        depth: int = 2,
        dropout: float = 0.0,
        prior: Callable[[tuple[int, ...]], Chain] | None = None,
    ):
        if inference not in INFERENCE:
            raise ValueError(f"inference must be one of {', '.join(INFERENCE)}, got {inference!r}")
        if posterior not in POSTERIORS:
            raise ValueError(f"posterior must be one of {', '.join(POSTERIORS)}, got {posterior!r}")
        if layers < 1 or latent < 2 ** (layers - 1):
            raise ValueError(
                f"there is at least one layer, and each has half the size of the one below: {layers} of them from "
                f"latent = {latent} on cannot be"
            )
        dimensions = math.prod(shape)
        sizes = (dimensions, *(latent // 2**i for i in range(layers)))
        head, network = POSTERIORS[posterior], (width, depth, dropout)
        guide = BottomUp(sizes, head, *network) if inference == "bottom_up" else TopDown(sizes, head, skip, *network)
        above = _size_above(sizes, 0, skip)
        last = Decoder(decoder, shape, levels, lambda n, _: Perceptron(above, dimensions * n, *network))
        chain = None if prior is None else prior((sizes[-1],))
        super().__init__(guide, Hierarchy(sizes, last, skip, *network, prior=chain))
