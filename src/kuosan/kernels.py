"""The two sides of a ladder as kernels: what q and p have to say, and what was drawn around a rung."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from kuosan.gaussian import Gaussian, per_example

if TYPE_CHECKING:
    from kuosan.chain import Chain

Rung = int | Tensor


class Law(Protocol):
    """What a kernel is, given its parents: anything that can sample and score itself. :class:`Gaussian` is one."""

    def sample(self, *, generator: torch.Generator | None = None) -> Tensor: ...

    def log_prob(self, z: Tensor) -> Tensor:
        """(B, ...), nats; summed over all dimensions but the first."""
        ...

    @property
    def mean(self) -> Tensor:
        """The middle of the law; the bound does not need it, pictures do."""
        ...


class Guide(nn.Module):
    """q(z_1, ..., z_T | x), as kernels going up, going down, or both: a subclass gives those that it knows.

    Attributes:
        length: T.
        mixed: the kernels take a tensor of rungs, one for each example; only a ladder whose rungs are all of one shape.
    """

    length: int
    mixed = False

    def read(self, x: Tensor, condition: Any = None) -> Any:
        """What the kernels are given: x, and whatever is computed of it once for all rungs."""
        return x

    def up(self, i: Rung, below: Sequence[Tensor], given: Any) -> Law:
        """q(z_i | z_{i-1}, ..., x)."""
        raise NotImplementedError

    def posterior(self, i: Rung, above: Sequence[Tensor], given: Any) -> Law:
        """q(z_i | z_{i+1}, ..., z_T, x); of the last rung, q(z_T | x)."""
        raise NotImplementedError

    def marginal(self, i: Rung, given: Any) -> Law:
        """q(z_i | x), if the ladder is Markov; of rung 0 the point x."""
        raise NotImplementedError

    def bridge(self, i: Rung, below: Sequence[Tensor], above: Sequence[Tensor], given: Any) -> Gaussian:
        """q(z_i | z_{i-1}, z_{i+1}), if the ladder is Markov."""
        raise NotImplementedError

    def knows(self, kernel: str) -> bool:
        """Whether a subclass gives this kernel: the forms of the bound ask before they call."""
        return getattr(type(self), kernel) is not getattr(Guide, kernel)


class Generative(nn.Module):
    """p(z_T) p(z_{T-1}|z_T) ... p(x|z_1, ...).

    Attributes:
        length: T.
        shapes: of one x, one z_1, ..., one z_T; needed to draw from p.
        markov: the kernel of rung i looks at z_{i+1} alone.
        discrete: p(x|z) is a probability, not a density.
    """

    length: int
    shapes: tuple[tuple[int, ...], ...]
    markov = True
    discrete = False

    @property
    def noise_shape(self) -> tuple[int]:
        """Of the standard-normal numbers that one draw of all latents and x takes."""
        return (sum(math.prod(shape) for shape in self.shapes),)

    def prior(self, condition: Any = None) -> Law | Chain:
        """p(z_T), as a law or, if all that is known is a bound on it, as another chain."""
        raise NotImplementedError

    def down(self, i: Rung, above: Sequence[Tensor], condition: Any = None) -> Law:
        """p(z_i | z_{i+1}, ..., z_T); of rung 0 the decoder p(x | z_1, ...)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Place:
    """A rung with what was drawn around it; ``law`` is what z_i was drawn from."""

    given: Any
    condition: Any
    x: Tensor
    above: tuple[Tensor, ...]
    below: tuple[Tensor, ...] = ()
    z: Tensor | None = None
    law: Any = None


@dataclass(frozen=True)
class Path:
    """One draw of all latents. ``z[0]`` is x; ``laws[i]`` is what z[i] was drawn from."""

    z: list[Tensor]
    laws: list[Any]
    given: Any
    condition: Any

    def at(self, i: int) -> Place:
        below = tuple(reversed(self.z[:i]))
        return Place(self.given, self.condition, self.z[0], tuple(self.z[i + 1 :]), below, self.z[i], self.laws[i])


def check_shapes(i: Rung, q: Sequence[int], p: Sequence[int]) -> None:
    try:
        fits = torch.broadcast_shapes(q, p) == tuple(q)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(f"{name_of(i)}: q gives examples of shape {tuple(q[1:])}, p of shape {tuple(p[1:])}")


def name_of(i: Rung) -> str:
    return f"rung {i}" if isinstance(i, int) else f"rungs {int(i.min())} to {int(i.max())}"


def log_prob_of(i: Rung, law: Any, z: Tensor) -> Tensor:
    """log-probability of each example, (B,)."""
    shape = getattr(law, "shape", None)
    if shape is not None:
        check_shapes(i, z.shape, shape)
    value = law.log_prob(z)
    return per_example(value) if value.ndim > 1 else value


def negative_entropy(i: Rung, q: Any, z: Tensor) -> Tensor:
    """E log q in closed form where there is one, otherwise log q(z) of its draw, (B,)."""
    return per_example(-q.entropy()) if hasattr(q, "entropy") else log_prob_of(i, q, z)
