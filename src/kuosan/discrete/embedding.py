"""Gaussian diffusion of word vectors (theory row 20): words are points of a space, texts are drawn there and rounded.

Diffusion-LM (Li et al. 2022, arXiv 2205.14217): every process, schedule, solver and guidance is that of any continuous
data; what is new is the way in, a learned point for each word, and the way out, the rounding law p(w | x_t).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from kuosan.categorical import Categorical
from kuosan.denoiser import EDM, Denoiser, evaluating
from kuosan.diffusion import DiffusionChain, Forward, Reverse
from kuosan.discrete.lengths import PAD
from kuosan.gaussian import Gaussian
from kuosan.kernels import Rung
from kuosan.objectives import Objective, Plain, Stratified, TimeSampler, draw, squared_error
from kuosan.prediction import Prediction
from kuosan.process import Grid, Process, expand
from kuosan.schedules import Time, float64
from kuosan.seeds import stream
from kuosan.solvers import Model, sample
from kuosan.variance import Choice

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

    Raises:
        ValueError: fewer than 2 words, or no dimensions.
    """

    def __init__(self, vocabulary: int, size: int):
        super().__init__()
        if vocabulary < 2 or size < 1:
            raise ValueError(f"an embedding is of at least 2 words in at least 1 dimension, got {vocabulary}, {size}")
        self.vocabulary, self.size = vocabulary, size
        self.weight = nn.Parameter(torch.randn(vocabulary, size))

    @property
    def points(self) -> Tensor:
        """(V, D), differentiable in what is learned."""
        return normalize(self.weight, dim=-1) * math.sqrt(self.size)

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

    def law(self, x: Tensor, precision: Tensor | float) -> Categorical:
        r"""p(w | x) of words that are all alike beforehand, by Bayes' rule from x = e_w + noise.

        .. math:: p(w|x) \propto e^{-\frac\lambda2\|x - e_w\|^2} \propto e^{\lambda\,x\cdot e_w}

        With precision 1 it is Diffusion-LM's softmax of :math:`E^\top x` (arXiv 2205.14217, section 4.1).

        Args:
            x: (B, L, D).
            precision: :math:`\lambda`, one over the variance of the noise; a number, () or (B,).
        """
        products = self.products(x)
        return Categorical(torch.log_softmax(expand(precision, products) * products, dim=-1))

    @torch.no_grad()
    def nearest(self, x: Tensor) -> Tensor:
        """The word (...), int64, whose point is nearest to each vector (..., D)."""
        return torch.cat([self.products(part).argmax(-1) for part in self._parts(x)]).reshape(x.shape[:-1])

    @torch.no_grad()
    def settled(self, x: Tensor) -> Tensor:
        """Whether each vector (..., D) is less than half as far from the nearest point as from the second, bool."""
        points, found = self.points, []
        for part in self._parts(x):
            nearest, second = points[self.products(part).topk(2).indices].to(x.dtype).unbind(1)
            found.append(2 * (part - nearest).norm(dim=-1) < (part - second).norm(dim=-1))
        return torch.cat(found).reshape(x.shape[:-1])

    @torch.no_grad()
    def smallest_distance(self) -> float:
        """Between any two points: whether they are drawing together."""
        points, smallest = self.points.double(), math.inf
        for rows in torch.arange(self.vocabulary, device=points.device).split(self._rows):
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


def _precision(process: Process, t: Time) -> tuple[Tensor]:
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

    Raises:
        ValueError: another form, or an EDM of data of another size than the points'.
    """

    def __init__(
        self,
        network: nn.Module,
        process: Process,
        embedding: WordEmbedding,
        predicts: str = "x0",
        preconditioning: EDM | None = None,
    ):
        if predicts not in ("x0", "words"):
            raise ValueError(f"a denoiser of word vectors predicts x0 or words, got {predicts!r}")
        if preconditioning is not None and preconditioning.sigma_data != 1:
            raise ValueError(f"points have a root mean square of 1: use EDM(sigma_data=1.0), not {preconditioning}")
        super().__init__(network, process, "x0", preconditioning)
        self.embedding, self.predicts = embedding, predicts

    def around(self, network: nn.Module) -> EmbeddingDenoiser:
        return EmbeddingDenoiser(network, self.process, self.embedding, self.predicts, self.preconditioning)

    def forward(self, x_t: Tensor, t: Time, condition: object = None) -> Prediction:
        """Raises ValueError if t is not of shape () or (B,), or the network's output has the wrong shape."""
        if self.predicts == "x0":
            return super().forward(x_t, t, condition)
        if isinstance(t, Tensor):
            t = float64(t)
        logits, *_ = self._ask(x_t, t, condition)
        self._check(logits, (*x_t.shape[:-1], self.embedding.vocabulary))
        products = self.embedding.products(x_t)
        (precision,) = self.process.at(_precision, t)
        with torch.autocast(x_t.device.type, enabled=False):
            log_words = torch.log_softmax(logits + expand(precision, products) * products, dim=-1)
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
        (precision,) = self.process.at(_precision, prediction.t)
        return self.embedding.law(prediction.x_t, precision)


# -- the ladder -------------------------------------------------------------------------------------------------------


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

    def up(self, i: Rung, below: Sequence[Tensor], given: Any) -> Gaussian:
        return super().up(i, (self.vectors(below[0]),), given)

    def posterior(self, i: Rung, above: Sequence[Tensor], given: Any) -> Gaussian:
        return super().posterior(i, above, self.vectors(given))

    def marginal(self, i: Rung, given: Any) -> Gaussian:
        return super().marginal(i, self.vectors(given))


class WordReverse(Reverse):
    """The reverse kernels of a denoiser of word vectors, the last of which rounds."""

    denoiser: EmbeddingDenoiser

    def __init__(self, denoiser: EmbeddingDenoiser, grid: Grid, variance: Choice):
        super().__init__(denoiser, grid, variance)
        self.discrete = True

    def law(self, i: Rung, prediction: Prediction) -> Any:
        if isinstance(i, int) and i == 0:
            return self.denoiser.rounding(prediction)
        return super().law(i, prediction)


class EmbeddingChain(DiffusionChain):
    r"""A diffusion model of word vectors on a grid, as a ladder over words: its bound is on log P(w), in nats.

    .. math:: \log P(w) \ge \mathbb E\log p(w|x_{t_1}) - \mathrm{KL}(q(x_1|w)\,\|\,\mathcal N(0, I))
        - \sum_i \mathbb E\,\mathrm{KL}(q(x_{t_i}|x_{t_{i+1}}, w)\,\|\,p(x_{t_i}|x_{t_{i+1}}))

    (Li et al. 2022, arXiv 2205.14217, eq. 2 and appendix E, without noise on the points themselves.) The same forms as
    of :class:`~kuosan.DiffusionChain`; x are tokens (B, L) int64, latents are (B, L, D), and ``noise`` has their shape.
    :meth:`estimate` is differentiable in the points too.

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

    def integral(
        self,
        s: Tensor,
        t: Tensor,
        u: Tensor,
        x: Tensor,
        condition: Any = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return super().integral(s, t, u, self.guide.vectors(x), condition, noise, generator)

    def estimate(
        self,
        x: Tensor,
        condition: Any = None,
        *,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        u: Tensor | None = None,
    ) -> Tensor:
        vectors = self.guide.read(x)
        generator = generator or torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        if noise is None:
            noise = torch.randn(vectors.shape, generator=generator, dtype=vectors.dtype).to(vectors.device)
        return super().estimate(x, condition, generator=generator, noise=noise, u=u)


# -- training ---------------------------------------------------------------------------------------------------------


def _whole(x_0: Tensor, noise: Tensor | None) -> Tensor:
    """Texts with the padding that all of a batch have, and that it came without: here padding is words like others."""
    return x_0 if noise is None else pad(x_0, (0, noise.shape[1] - x_0.shape[1]), value=PAD)


@dataclass(frozen=True)
class DiffusionLM(Objective):
    r"""Diffusion-LM's loss: the squared error of x0-hat, and the rounding (Li et al. 2022, arXiv 2205.14217, eq. 2).

    .. math:: \tfrac1{LD}\,\mathbb E\,\|e(w) - \hat x_0(x_t, t)\|^2
        - \tfrac1L\,\mathbb E\,\log p\big(w \,\big|\, e(w) + \mathrm{SNR}^{-1/2} z\big)

    The model is the :class:`EmbeddingDenoiser` itself, its network and its points. Rounding takes no network: it is
    :meth:`WordEmbedding.law`, and keeps the points apart, which the squared error alone would draw together. The
    paper's term at time 1 is the same for all points of one norm: there is nothing to learn from it.

    Args:
        log_snr: of the noise at which words are told apart: the less, the farther. At 0 the law is the paper's softmax
            of :math:`E^\top x`; its own noise there is smaller, which keeps the points less far apart.
        times: of the squared error.
    """

    log_snr: float = 0.0
    times: TimeSampler = field(default_factory=Stratified)

    def __post_init__(self):
        if not math.isfinite(self.log_snr):
            raise ValueError(f"log_snr is of some noise and some signal: finite, got {self.log_snr}")

    def noise_shape(self, model: EmbeddingDenoiser, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(L, D)."""
        return (*shape, model.embedding.size)

    def __call__(self, denoiser, x_0, condition=None, *, t=None, noise=None, generator=None, step=None):
        x_0, embedding = _whole(x_0, noise), denoiser.embedding
        vectors = embedding(x_0)
        t, noise, weight = draw(self.times, denoiser.process, vectors, t, noise, generator)
        prediction = denoiser(denoiser.process.corrupt(vectors, t, noise), t, condition)
        error = squared_error(prediction, vectors, noise, Plain("x0"))
        error = error if weight is None else error * weight.to(error)
        law = embedding.law(vectors + math.exp(-0.5 * self.log_snr) * noise, math.exp(self.log_snr))
        return error - law.log_prob(x_0).mean(1)


@dataclass(frozen=True)
class WordCrossEntropy(Objective):
    """-log p(w | x_t) in the mean over words, nats: CDCD's loss (Dieleman et al. 2022, arXiv 2211.15089).

    The model is the :class:`EmbeddingDenoiser` itself, with ``predicts="words"``. The points learn from it too, and
    move apart where that tells words from each other.
    """

    times: TimeSampler = field(default_factory=Stratified)

    def noise_shape(self, model: EmbeddingDenoiser, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(L, D)."""
        return (*shape, model.embedding.size)

    def __call__(self, denoiser, x_0, condition=None, *, t=None, noise=None, generator=None, step=None):
        if denoiser.predicts != "words":
            raise ValueError(f'cross-entropy needs a denoiser with predicts="words", not {denoiser.predicts!r}')
        x_0 = _whole(x_0, noise)
        vectors = denoiser.embedding(x_0)
        t, noise, weight = draw(self.times, denoiser.process, vectors, t, noise, generator)
        prediction = denoiser(denoiser.process.corrupt(vectors, t, noise), t, condition)
        surprise = -denoiser.rounding(prediction).log_prob(x_0).mean(1)
        return surprise if weight is None else surprise * weight.to(surprise)


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


@dataclass(frozen=True)
class DrawnWords:
    """Samples, and how sure their rounding is.

    Args:
        tokens: (N, L) int64.
        settled: (N,), the share of each sample's last vectors that are less than half as far from the nearest point as
            from the second.
    """

    tokens: Tensor
    settled: Tensor


def sample_words(
    model: Model, embedding: WordEmbedding, length: int, *, clamp: bool = False, **sampling: Any
) -> DrawnWords:
    """Texts of so many words: :func:`kuosan.solvers.sample` of their vectors, each then rounded to the nearest point.

    Args:
        model: an :class:`EmbeddingDenoiser`, or one wrapped in guidance.
        embedding: the denoiser's.
        length: L.
        clamp: with :class:`Clamp` on every x0-hat.
        sampling: ``seeds=``, and all else that :func:`kuosan.solvers.sample` takes.

    Raises:
        ValueError: clamp beside another transform, a length under 1, or as :func:`kuosan.solvers.sample`.
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if clamp:
        if sampling.get("transform") is not None:
            raise ValueError("clamp is a transform of x0-hat: drop it, or the other one")
        sampling["transform"] = Clamp(embedding)
    x = sample(model, (length, embedding.size), **sampling).to(embedding.weight.device)
    return DrawnWords(embedding.nearest(x).cpu(), embedding.settled(x).double().mean(1).cpu())


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
    generator, right = stream("rounding", seed), 0
    embedding, device = denoiser.embedding, denoiser.embedding.weight.device
    with evaluating(denoiser):
        for rows in torch.arange(len(tokens)).split(batch_size):
            words = tokens[rows].to(device)
            vectors = embedding(words)
            noise = torch.randn(vectors.shape, generator=generator, dtype=vectors.dtype).to(device)
            x_t = denoiser.process.corrupt(vectors, t, noise)
            said = denoiser(x_t, t, None if condition is None else condition[rows].to(device))
            right += int((embedding.nearest(said.x0) == words).sum())
    return right / tokens.numel()
