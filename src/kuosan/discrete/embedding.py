"""Gaussian diffusion of word vectors (theory row 20): words are points of a space, texts are drawn there and rounded.

Diffusion-LM (Li et al. 2022, arXiv 2205.14217): every process, schedule, solver and guidance is that of any continuous
data; what is new is the way in, a learned point for each word, and the way out, the rounding law p(w | x_t).

Padding is no word here, as in :mod:`kuosan.discrete`: it is the vector 0 at every time, and no noise falls on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from kuosan.categorical import Categorical
from kuosan.denoiser import EDM, Denoiser, evaluating
from kuosan.discrete.lengths import PAD, Lengths, Padded, padded
from kuosan.gaussian import Gaussian
from kuosan.prediction import Prediction
from kuosan.process import Process, expand
from kuosan.schedules import Time, float64
from kuosan.seeds import stream
from kuosan.solvers import Model, sample

#: The most products of a vector and a point that are held at once where all pairs are looked at.
MOST_HELD = 2**24


class WordEmbedding(nn.Module):
    r"""V words as points of :math:`\mathbb R^D`, learned, each of root mean square 1: of norm :math:`\sqrt D`.

    Free points would shrink towards each other, for that is how a squared error is made small; on a sphere they cannot
    (Dieleman et al. 2022, CDCD, arXiv 2211.15089). As all norms are equal, the nearest point is the one of the largest
    inner product, and a Gaussian's density at a point is an inner product too.

    Args:
        vocabulary: V.
        size: D.
        padding: token 0 fills texts after their end: its point is the origin, and it is drawn for no other vector.

    Raises:
        ValueError: fewer than 2 words, or no dimensions.
    """

    def __init__(self, vocabulary: int, size: int, padding: bool = False):
        super().__init__()
        if vocabulary - padding < 2 or size < 1:
            raise ValueError(f"an embedding is of at least 2 words in at least 1 dimension, got {vocabulary}, {size}")
        self.vocabulary, self.size, self.padding = vocabulary, size, padding
        self.weight = nn.Parameter(torch.randn(vocabulary, size))

    @property
    def points(self) -> Tensor:
        """(V, D), differentiable in what is learned."""
        points = normalize(self.weight, dim=-1) * math.sqrt(self.size)
        return torch.cat([torch.zeros_like(points[:1]), points[1:]]) if self.padding else points

    def forward(self, tokens: Tensor) -> Tensor:
        """The points (B, L, D) of tokens (B, L), int64.

        Raises:
            ValueError: tokens that are not whole numbers, or not of the vocabulary.
        """
        self.check(tokens)
        return self.points[tokens]

    def check(self, tokens: Tensor) -> None:
        """Raises ValueError for tokens that are not (B, L) whole numbers of the vocabulary."""
        if tokens.is_floating_point() or tokens.ndim != 2:
            raise ValueError(f"tokens are whole numbers (B, L), got {tokens.dtype} of shape {tuple(tokens.shape)}")
        if tokens.numel() and (tokens.min() < 0 or tokens.max() >= self.vocabulary):
            raise ValueError(
                f"tokens are words 0 to {self.vocabulary - 1}, got {int(tokens.min())} to {int(tokens.max())}"
            )

    def products(self, x: Tensor) -> Tensor:
        """The inner products (..., V) of vectors (..., D) with all points, at full precision under autocast too."""
        with torch.autocast(x.device.type, enabled=False):
            return x @ self.points.to(x.dtype).T

    def law(self, x: Tensor, precision: Tensor | float, logits: Tensor | float = 0.0) -> Categorical:
        r"""p(w | x) of words of the law :math:`e^{\text{logit}_w}`, by Bayes' rule from x = e_w + noise.

        .. math:: p(w|x) \propto e^{\text{logit}_w - \frac\lambda2\|x - e_w\|^2}
            \propto e^{\text{logit}_w + \lambda\,x\cdot e_w}

        With precision 1 and no logits it is Diffusion-LM's softmax of :math:`E^\top x` (arXiv 2205.14217, section 4.1).

        Args:
            x: (B, L, D).
            precision: :math:`\lambda`, one over the variance of the noise; a number, () or (B,).
            logits: (B, L, V).
        """
        products = self.products(x)
        with torch.autocast(x.device.type, enabled=False):
            said = logits + expand(precision, products) * products
            if not self.padding:
                return Categorical(torch.log_softmax(said, dim=-1))
            words = nn.functional.pad(torch.log_softmax(said[..., 1:], dim=-1), (1, 0), value=-torch.inf)
            only = words.new_full((self.vocabulary,), -torch.inf)
            only[PAD] = 0
            return Categorical(torch.where(padded(x).unsqueeze(-1), only, words))

    @torch.no_grad()
    def nearest(self, x: Tensor) -> Tensor:
        """The word (...), int64, whose point is nearest to each vector (..., D); never padding, which is no word."""
        words = torch.cat([self.products(part)[:, self.padding :].argmax(-1) for part in self._parts(x)])
        return words.reshape(x.shape[:-1]) + self.padding

    @torch.no_grad()
    def smallest_distance(self) -> float:
        """Between the points of any two words: whether they are drawing together."""
        points, smallest = self.points[self.padding :].double(), math.inf
        for rows in torch.arange(len(points), device=points.device).split(self._rows):
            products = points[rows] @ points.T
            products[torch.arange(len(rows)), rows] = -torch.inf
            closest, other = products.max(-1)
            i = int(closest.argmax())
            smallest = min(smallest, float((points[rows[i]] - points[other[i]]).norm()))  # which cancels nothing
        return smallest

    @property
    def _rows(self) -> int:
        return max(1, MOST_HELD // self.vocabulary)

    def _parts(self, x: Tensor) -> Sequence[Tensor]:
        return x.reshape(-1, self.size).split(self._rows)


def noised(process: Process, vectors: Tensor, t: Tensor | float, noise: Tensor | None = None, **how: Any) -> Tensor:
    """x_t of word vectors (B, L, D), as :meth:`kuosan.Process.corrupt`; but padding stays the vector 0."""
    return process.corrupt(vectors, t, noise, **how).masked_fill(padded(vectors).unsqueeze(-1), 0.0)


def precision(process: Process, t: Time) -> tuple[Tensor]:
    """lambda = alpha / sigma^2: what x_t . e_w is multiplied by in log N(x_t; alpha e_w, sigma^2 I)."""
    alpha, sigma = process.scales(t)
    return (alpha / sigma**2,)


class EmbeddingDenoiser(Denoiser):
    r"""A network read as a denoiser of word vectors: x_0 are points of an embedding, noised as any data are.

    It answers with a :class:`~kuosan.Prediction` of x_0 (B, L, D) as every denoiser does, so that all solvers, guidance
    and grids take it, and knows the rounding law p(w | x_t).

    Args:
        network: called as ``network(x, t, condition)`` with x (B, L, D); it returns (B, L, D) for "x0" and logits
            (B, L, V) for "words".
        process: the forward process.
        embedding: the points, trained with the network.
        predicts: "x0": the network says a vector for each word (Li et al. 2022, arXiv 2205.14217, section 4.2).
            "words": it says logits, which are multiplied by the Gaussian likelihood of x_t,

            .. math:: p(w=k|x_t) \propto e^{\text{logit}_k}\,\mathcal N(x_t; \alpha e_k, \sigma^2 I)
                \propto e^{\text{logit}_k + \frac{\alpha}{\sigma^2}\,x_t\cdot e_k}

            so that it has only to say what the other words say of this one; x_0-hat is the mean of the points
            (Dieleman et al. 2022, arXiv 2211.15089, without the likelihood).
        preconditioning: None or ``EDM(sigma_data=1)``.
        lengths: the law of the lengths of texts, for an embedding with padding, and only for one. The network is then
            given vectors of 0 after the end of a text; what it says of them is of no account.

    Raises:
        ValueError: another form, an EDM of data of another size than the points', padding without lengths or lengths
            without padding.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        embedding: WordEmbedding,
        predicts: str = "x0",
        preconditioning: EDM | None = None,
        lengths: Lengths | None = None,
    ):
        if predicts not in ("x0", "words"):
            raise ValueError(f"a denoiser of word vectors predicts x0 or words, got {predicts!r}")
        if preconditioning is not None and preconditioning.sigma_data != 1:
            raise ValueError(f"points have a root mean square of 1: use EDM(sigma_data=1.0), not {preconditioning}")
        if embedding.padding != (lengths is not None):
            raise ValueError("lengths are of an embedding with padding, which fills the texts after their end")
        super().__init__(network, process, "x0", preconditioning)
        self.embedding, self.predicts, self.lengths = embedding, predicts, lengths

    def around(self, network: nn.Module) -> EmbeddingDenoiser:
        return EmbeddingDenoiser(
            network, self.process, self.embedding, self.predicts, self.preconditioning, self.lengths
        )

    def prior(self, t: Time, condition: Tensor | None = None) -> Gaussian | Padded:
        """p(x_t) at the time that sampling begins at, the law of the lengths included."""
        vector = self.process.prior(t)
        if self.lengths is None:
            return vector
        return Padded(self.lengths.law(1 if condition is None else len(condition), condition), vector)

    def forward(self, x_t: Tensor, t: Time, condition: object = None) -> Prediction:
        """Raises ValueError if t is not of shape () or (B,), or the network's output has the wrong shape."""
        if self.predicts == "x0":
            said = super().forward(x_t, t, condition)
            if not self.embedding.padding:
                return said
            return replace(said, value=said.value.masked_fill(padded(x_t).unsqueeze(-1), 0.0))
        if isinstance(t, Tensor):
            t = float64(t)
        logits, *_ = self._ask(x_t, t, condition)
        self._check(logits, (*x_t.shape[:-1], self.embedding.vocabulary))
        (gain,) = self.process.at(precision, t)
        log_words = self.embedding.law(x_t, gain, logits).log_probs
        with torch.autocast(x_t.device.type, enabled=False):
            x_0 = log_words.exp() @ self.embedding.points.to(log_words.dtype)
        return Prediction(self.process, t, x_t, "x0", x_0, None, log_words)

    def rounding(self, prediction: Prediction) -> Categorical:
        """p(w | x_t) of each word, what the bound ends on.

        Of "words" what the network said. Of "x0" what x_t alone says (:meth:`WordEmbedding.law`), as in Diffusion-LM:
        it never contradicts x_t, and at the first noisy time, where the bound rounds, there is nothing to add to it.

        Raises:
            ValueError: a prediction of words that was guided or transformed, and so is no law of words any more.
        """
        if self.predicts == "words":
            if prediction.log_levels is None:
                raise ValueError("this prediction was guided or transformed: only its x0 is left, no law of words")
            return Categorical(prediction.log_levels)
        (gain,) = self.process.at(precision, prediction.t)
        return self.embedding.law(prediction.x_t, gain)


# -- sampling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clamp:
    """Every vector of x0-hat replaced by the nearest point: the clamping trick (arXiv 2205.14217, section 4.2).

    ``transform=`` of any sampler. A commitment to words at every step, the noisiest included: no longer the model's
    own law.
    """

    embedding: WordEmbedding

    def __call__(self, x_0: Tensor) -> Tensor:
        return self.embedding.points[self.embedding.nearest(x_0)].to(x_0.dtype)


def sample_words(model: Model, embedding: WordEmbedding, length: int, **sampling: Any) -> Tensor:
    """Texts of so many words (N, L): :func:`kuosan.solvers.sample` of their vectors, each rounded to the nearest point.

    Args:
        model: an :class:`EmbeddingDenoiser`, or one wrapped in guidance.
        embedding: the denoiser's.
        length: L; none of the words is padding.
        sampling: ``seeds=``, and all else that :func:`kuosan.solvers.sample` takes, such as ``transform=Clamp(...)``.

    Raises:
        ValueError: a length under 1, or as :func:`kuosan.solvers.sample`.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    return embedding.nearest(sample(model, (length, embedding.size), **sampling).to(embedding.weight.device)).cpu()


@torch.no_grad()
def rounding_accuracy(
    denoiser: EmbeddingDenoiser,
    tokens: Tensor,
    t: float,
    condition: Tensor | None = None,
    *,
    seed: int = 0,
    batch_size: int = 256,
) -> float:
    """The share of words that x0-hat at time t is nearest to: 1 if what the last step draws can be rounded.

    Args:
        tokens: (N, L) int64, texts that the model was not trained on.
        t: a noisy time, such as the last of a sampler's grid.
        condition: one for each text.

    Raises:
        ValueError: no tokens or bad ones, a t outside (0, 1], a batch_size under 1.
    """
    if not 0 < t <= 1 or batch_size < 1 or not tokens.numel():
        raise ValueError(f"need tokens, a time in (0, 1] and batch_size >= 1, got {tokens.shape}, {t}, {batch_size}")
    generator, right, count = stream("rounding", seed), 0, 0
    embedding, device = denoiser.embedding, denoiser.embedding.weight.device
    with evaluating(denoiser):
        for rows in torch.arange(len(tokens)).split(batch_size):
            words = tokens[rows].to(device)
            vectors = embedding(words)
            noise = torch.randn(vectors.shape, generator=generator, dtype=vectors.dtype).to(device)
            x_t = noised(denoiser.process, vectors, t, noise)
            said = denoiser(x_t, t, None if condition is None else condition[rows].to(device))
            real = ~padded(vectors)
            right, count = right + int((embedding.nearest(said.x0) == words)[real].sum()), count + int(real.sum())
    return right / count
