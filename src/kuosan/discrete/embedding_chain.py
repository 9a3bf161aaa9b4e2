"""A diffusion model of word vectors as a ladder over words (theory row 20), and what its kernels make of padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kuosan.diffusion import DiffusionChain, Forward, Reverse
from kuosan.discrete.embedding import EmbeddingDenoiser, WordEmbedding, noised
from kuosan.discrete.lengths import Padded, padded
from kuosan.gaussian import Gaussian, per_example
from kuosan.kernels import Rung
from kuosan.prediction import Prediction
from kuosan.process import Grid, Process
from kuosan.variance import Choice


@dataclass(frozen=True)
class PaddedGaussian(Gaussian):
    """A Gaussian of word vectors (B, L, D), and where padding stands the vector 0, which is no matter of chance.

    Args:
        hidden: (B, L), bool: where padding stands.
    """

    hidden: Tensor

    @classmethod
    def of(cls, law: Gaussian, hidden: Tensor) -> PaddedGaussian:
        return cls(law.mean, law.variance, hidden)

    def _shown(self, x: Tensor) -> Tensor:
        return x.masked_fill(self.hidden.unsqueeze(-1), 0.0)

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        return self._shown(super().sample(noise, generator))

    def log_prob(self, x: Tensor) -> Tensor:
        return self._shown(super().log_prob(x))

    def entropy(self) -> Tensor:
        return self._shown(super().entropy())

    def kl(self, other: Gaussian) -> Tensor:
        return self._shown(super().kl(other))

    def cross_entropy(self, other: Gaussian) -> Tensor:
        return self._shown(super().cross_entropy(other))


class WordForward(Forward):
    """q of words: the Gaussian process from their points, q(x_t | w) = N(alpha_t e(w), sigma_t^2 I)."""

    def __init__(self, process: Process, grid: Grid, embedding: WordEmbedding):
        super().__init__(process, grid)
        self._embedding = [embedding]  # in a list: it is the denoiser's, and kept with it

    def read(self, x: Tensor, condition: Any = None) -> Tensor:
        return self._embedding[0](x)

    def vectors(self, z: Tensor) -> Tensor:
        """The points of words; anything above rung 0 is a vector already."""
        return z if z.is_floating_point() else self._embedding[0](z)

    def up(self, i: Rung, below: Sequence[Tensor], given: Any) -> PaddedGaussian:
        z = self.vectors(below[0])
        return PaddedGaussian.of(super().up(i, (z,), given), padded(z))

    def posterior(self, i: Rung, above: Sequence[Tensor], given: Any) -> PaddedGaussian:
        x_0 = self.vectors(given)
        return PaddedGaussian.of(super().posterior(i, above, x_0), padded(x_0))

    def marginal(self, i: Rung, given: Any) -> PaddedGaussian:
        x_0 = self.vectors(given)
        return PaddedGaussian.of(super().marginal(i, x_0), padded(x_0))

    def corrupt(
        self, x: Tensor, t: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        return noised(self.process, self.vectors(x), t, noise, generator=generator)


class WordReverse(Reverse):
    """The reverse kernels of a denoiser of word vectors, the last of which rounds."""

    denoiser: EmbeddingDenoiser

    def __init__(self, denoiser: EmbeddingDenoiser, grid: Grid, variance: Choice):
        super().__init__(denoiser, grid, variance)
        self.discrete = True

    def prior(self, condition: Any = None) -> Any:
        return self.denoiser.prior(self.times[-1], condition)

    def law(self, i: Rung, prediction: Prediction) -> Any:
        if isinstance(i, int) and i == 0:
            return self.denoiser.rounding(prediction)
        return PaddedGaussian.of(super().law(i, prediction), padded(prediction.x_t))


class EmbeddingChain(DiffusionChain):
    r"""A diffusion model of word vectors on a grid, as a ladder over words: its bound is on log P(w), in nats.

    .. math:: \log P(w) \ge \mathbb E\log p(w|x_{t_1}) - \mathrm{KL}(q(x_1|w)\,\|\,\mathcal N(0, I))
        - \sum_i \mathbb E\,\mathrm{KL}(q(x_{t_i}|x_{t_{i+1}}, w)\,\|\,p(x_{t_i}|x_{t_{i+1}}))

    (Li et al. 2022, arXiv 2205.14217, eq. 2 and appendix E, without noise on the points themselves.) The same forms as
    of :class:`~kuosan.DiffusionChain`; x are tokens (B, L) int64, latents are (B, L, D), and ``noise`` has their shape.
    Of padded texts log p(n) of the length is added, and all else is of their words alone. :meth:`estimate` is
    differentiable in the points too.

    Args:
        denoiser, steps, grid, variance, form: as of :class:`~kuosan.DiffusionChain`.

    Raises:
        ValueError: a denoiser of something else, tokens that are none, or as :class:`~kuosan.DiffusionChain`.
    """

    guide: WordForward
    model: WordReverse

    def __init__(
        self,
        denoiser: EmbeddingDenoiser,
        *,
        steps: int | None = None,
        grid: Grid | None = None,
        variance: Choice = "beta_tilde",
        form: str = "matching",
    ):
        if not isinstance(denoiser, EmbeddingDenoiser):
            raise ValueError(f"a ladder over words is of an EmbeddingDenoiser, got {type(denoiser).__name__}")
        super().__init__(denoiser, steps=steps, grid=grid, variance=variance, form=form)
        grid = Grid(tuple(self.guide.times[1:].flip(0).tolist()))
        self.guide = WordForward(denoiser.process, grid, denoiser.embedding)
        self.model = WordReverse(denoiser, grid, variance)

    def divergence(
        self,
        i: Rung,
        q: Any,
        above: tuple[Tensor, ...],
        condition: Any = None,
        *,
        z: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """As of other ladders; of the last rung, the surprise of the length included."""
        if above:
            return super().divergence(i, q, above, condition, z=z, generator=generator)
        p = self.model.prior(condition)
        if isinstance(p, Padded):
            return per_example(q.kl(p.token)) - p.log_length(q.hidden)
        return per_example(q.kl(p))
