"""Control of a diffusion model of word vectors by a classifier of noisy ones, without training the model again.

Diffusion-LM's way (Li et al. 2022, arXiv 2205.14217, section 5.1): a small classifier learns p(c | x_t, t), and its
gradient leads every step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kuosan.denoiser import EDM, evaluating, slope
from kuosan.discrete.embedding import WordEmbedding, noised, precision
from kuosan.discrete.lengths import padded
from kuosan.discrete.objective import cut
from kuosan.networks.sequence import SequenceTransformer
from kuosan.objectives import Objective, Stratified, TimeSampler, draw
from kuosan.prediction import Prediction
from kuosan.process import Process, expand
from kuosan.schedules import Time
from kuosan.seeds import stream
from kuosan.solvers import Model
from kuosan.solvers.guidance import ALWAYS, ClassifierGuidance, Interval

UNIT = EDM(1.0)  # whose label of the time a network can read, whatever the schedule


class NoisyClassifier(nn.Module):
    r"""p(c | x_t, t) of texts whose words are noised points: what x_t says of each word, and a small transformer.

    .. math:: p(c \mid x_t) \propto \exp\Big(b_{n,c} + \sum_i F_{i,c}\big(h, t\big)\Big), \qquad
        h_i = \sum_w p(w \mid x_{t,i})\,f_w, \qquad p(w \mid x_t) \propto e^{a_w + \frac\alpha{\sigma^2} x_t\cdot e_w}

    with n the length, which shows at all times, and learned features f and frequencies a of the words. Every word adds
    to what is said, as in Bayes' rule of independent words. The points are made for telling words apart and say next to
    nothing of classes; the features are looked up by Bayes' rule in their place.

    Control moves x0-hat by :math:`\sigma^2/\alpha` times the gradient, which makes much of a network's slightest error
    where there is next to no signal. Through p(w | x_t) the gradient is of size :math:`\alpha/\sigma^2`, as that of
    Bayes' rule is: the move stays one among points at every time. Untrained, all classes are as likely.

    Args:
        embedding: whose points are noised; used as it is, neither trained nor kept here.
        process: the forward process.
        length: L, of the longest text.
        classes: C.
        width, depth, heads, dropout: of :class:`~kuosan.networks.sequence.SequenceTransformer`.

    Raises:
        ValueError: fewer than 2 classes, or an impossible network.
    """

    def __init__(
        self,
        embedding: WordEmbedding,
        process: Process,
        length: int,
        classes: int,
        width: int = 128,
        depth: int = 1,
        heads: int = 4,
        dropout: float = 0.1,
    ):
        super().__init__()
        if classes < 2:
            raise ValueError(f"a classifier tells at least 2 classes apart, got {classes}")
        self._embedding = [embedding]  # in a list: it is the denoiser's, and kept with it
        self.process, self.classes = process, classes
        self.bias = nn.Parameter(torch.zeros(length, classes))
        self.frequency = nn.Parameter(torch.zeros(embedding.vocabulary))
        self.features = nn.Parameter(torch.randn(embedding.vocabulary, width))
        self.network = SequenceTransformer((length, width), width, depth, heads, 0, classes, dropout, embedding.padding)

    @property
    def embedding(self) -> WordEmbedding:
        return self._embedding[0]

    def forward(self, x_t: Tensor, t: Time) -> Tensor:
        """log p(c | x_t, t), (B, C), of x_t (B, L, D) at a time for all or for each, (B,)."""
        _, _, _, label = self.process.at(UNIT.coefficients, t)
        (gain,) = self.process.at(precision, t)
        dtype = self.features.dtype
        label = torch.as_tensor(label, dtype=dtype, device=x_t.device).expand(len(x_t))
        ended = padded(x_t).unsqueeze(-1)
        words = self.embedding.law(x_t, gain, self.frequency.to(x_t)).log_probs.exp()
        said = self.network((words.to(dtype) @ self.features).masked_fill(ended, 0.0), label)
        bias = self.bias[(~ended).sum((1, 2)) - 1]
        return torch.log_softmax(bias + said.masked_fill(ended, 0.0).sum(1), dim=-1).to(x_t.dtype)

    def log_prob(self, x_t: Tensor, t: Time, condition: object) -> Tensor:
        """log p(c | x_t, t) of the class (B,) that is asked of each, (B,); 0 where it is -1, any class.

        Raises:
            ValueError: no classes, not one for each, or one that does not exist.
        """
        if not isinstance(condition, Tensor) or condition.shape != x_t.shape[:1]:
            raise ValueError(f"control needs a class for each of {len(x_t)} samples")
        if condition.min() < -1 or condition.max() >= self.classes:
            there = sorted(set(condition.tolist()))
            raise ValueError(f"classes are 0 to {self.classes - 1}, or -1 for any; got {there}")
        found = self(x_t, t).gather(1, condition.clamp_min(0)[:, None])[:, 0]
        return torch.where(condition < 0, 0 * found, found)

    @torch.no_grad()
    def accuracy(self, tokens: Tensor, labels: Tensor, t: float, *, seed: int = 0, batch_size: int = 256) -> float:
        """The share of texts (N, L), noised to time t, whose class (N,) it finds likeliest.

        Raises:
            ValueError: no texts, or not one class for each.
        """
        if not len(tokens) or labels.shape != tokens.shape[:1]:
            raise ValueError(f"one class for each text expected, got {tuple(labels.shape)} and {tuple(tokens.shape)}")
        generator, right = stream("classifier accuracy", seed), 0
        device = self.embedding.weight.device
        with evaluating(self):
            for rows in torch.arange(len(tokens)).split(batch_size):
                vectors = self.embedding(tokens[rows].to(device))
                noise = torch.randn(vectors.shape, generator=generator, dtype=vectors.dtype).to(device)
                said = self(noised(self.process, vectors, t, noise), t)
                right += int((said.argmax(1).cpu() == labels[rows].cpu()).sum())
        return right / len(tokens)


@dataclass(frozen=True)
class ClassifierLoss(Objective):
    """-log p(c | x_t, t) of texts' own classes at times of the process, in nats; the model is a NoisyClassifier."""

    times: TimeSampler = field(default_factory=Stratified)

    def noise_shape(self, model: NoisyClassifier, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(L, D)."""
        return (*shape, model.embedding.size)

    def __call__(self, model, x_0, condition=None, *, t=None, noise=None, generator=None, step=None):
        """Raises ValueError for a text without its class: train with ``label_drop=0``."""
        if condition is None or bool((condition < 0).any()):
            raise ValueError("a classifier learns from texts with their classes: training.label_drop must be 0")
        with torch.no_grad():
            vectors = model.embedding(x_0)
        t, noise, weight = draw(self.times, model.process, vectors, t, cut(noise, x_0), generator)
        surprise = -model.log_prob(noised(model.process, vectors, t, noise), t, condition)
        return surprise if weight is None else surprise * weight.to(surprise)


class GradientControl(ClassifierGuidance):
    r"""Classifier guidance by several gradient steps at each time, held back by fluency (arXiv 2205.14217, sec. 5.1).

    Before each step of a table, the state is moved by z towards where

    .. math:: \lambda\log\mathcal N(z; 0, \sigma_t^2 I) + \log p(c \mid x_t + z, t), \qquad \lambda = 1/w,

    is largest, and the score is that of the move, :math:`z/\sigma_t^2`: x0-hat moves by :math:`z/\alpha_t`, in a
    Gaussian of variance :math:`\sigma_t^2/\alpha_t^2` around the model's own. From z = 0, gradient step i is 1/i of
    :math:`\sigma_t^2/\lambda` long, which makes z a mean of the gradients g met on the way,

    .. math:: z_i = w\,\sigma_t^2\,\bar g_i, \qquad
        \bar g_i = \bar g_{i-1} + \tfrac1i\,\big[\nabla\log p(c \mid x_t + z_{i-1}, t) - \bar g_{i-1}\big]

    One step is :class:`~kuosan.solvers.guidance.ClassifierGuidance`, for which w = 1 is Bayes' rule. More of them
    notice on the way that the class is clear by now, and push less: a weight above 1 moves samples less far from the
    model. Then w = 1 is no longer Bayes' rule exactly.

    The paper moves x_{t-1} after it is drawn, with Adagrad, under the law p(x_{t-1} | x_t) of one ancestral step. Here
    the Gaussian is of all the noise, and of no step: so every table takes it, and the noise of a table is drawn
    afterwards and not optimised away.

    Args:
        denoiser, log_prob, weight, interval, conditional: of :class:`~kuosan.solvers.guidance.ClassifierGuidance`;
            the weight is one over the fluency weight lambda.
        steps: gradients at each time; the paper takes 3.

    Raises:
        ValueError: steps under 1, a weight under 0 with more than one step (nothing is then held back), or as
            :class:`~kuosan.solvers.guidance.ClassifierGuidance`.
    """

    def __init__(
        self,
        denoiser: Model,
        log_prob: Callable[[Tensor, Time, object], Tensor],
        weight: float = 1.0,
        interval: Interval = ALWAYS,
        conditional: bool = False,
        steps: int = 1,
    ):
        super().__init__(denoiser, log_prob, weight, interval, conditional)
        if steps < 1:
            raise ValueError(f"steps must be at least 1 (one gradient at each time), got {steps}")
        if steps > 1 and weight < 0:
            raise ValueError(f"a fluency weight is positive, and so is one over it; got control of {weight}")
        self.steps = steps

    def forward(self, x_t: Tensor, t: Time, condition: object = None) -> Prediction:
        said = self.denoiser(x_t, t, condition if self.conditional else None)
        weight = self._weight_at(t)
        alpha, sigma = self.process.at(Process.scales, t)
        if self._idle(weight) or (not isinstance(t, Tensor) and alpha == 0):
            return said
        reach, mean = expand(weight * sigma**2, x_t), torch.zeros_like(x_t)
        for i in range(1, self.steps + 1):
            _, gradient = slope(lambda x: self.log_prob(x, t, condition), x_t + reach * mean)
            mean = mean + (gradient - mean) / i
        return said.tilted(expand(weight, x_t) * mean)

    def energy(self, x_t: Tensor, t: Time, condition: object = None) -> Tensor:
        """As of classifier guidance.

        Raises:
            ValueError: with more than one step, which is the gradient of no such sum.
        """
        if self.steps > 1:
            raise ValueError("control by several gradient steps has no energy: use steps=1")
        return super().energy(x_t, t, condition)
