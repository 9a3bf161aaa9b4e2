"""Word vectors whose padding is no word: texts of one or two of three words, so few that each can be enumerated."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import kuosan.discrete.embedding as module
from kuosan.denoiser import EDM
from kuosan.discrete.embedding import Clamp, EmbeddingDenoiser, WordEmbedding, noised, rounding_accuracy, sample_words
from kuosan.discrete.embedding_chain import EmbeddingChain
from kuosan.discrete.lengths import PAD, QUICK, Lengths, padded
from kuosan.discrete.objective import DiffusionLM, WordCrossEntropy
from kuosan.networks.sequence import SequenceTransformer
from kuosan.process import Grid, Process
from kuosan.schedules import VE, Cosine, Sqrt
from kuosan.solvers import Ancestral, DPMSolverPP

V, D, LENGTH = 4, 2, 2
#: Every text: one word and padding, or two words.
TEXTS = torch.tensor([[k, PAD] for k in (1, 2, 3)] + [list(pair) for pair in itertools.product((1, 2, 3), repeat=2)])
OF_LENGTH = (TEXTS != PAD).sum(1)
P_LENGTH = np.array([0.35, 0.65])
#: The probability of each text: its words depend on each other and on the length.
PAIR = [0.25, 0.02, 0.05, 0.03, 0.3, 0.02, 0.01, 0.12, 0.2]
LAW = torch.tensor(np.concatenate([P_LENGTH[0] * np.array([0.6, 0.3, 0.1]), P_LENGTH[1] * np.array(PAIR)]))
ENTROPY = -float(LAW @ LAW.log())
ANGLE = torch.tensor([0.3, 1.9, 4.4], dtype=torch.float64)
#: The origin, and three points of a circle, not evenly.
POINTS = torch.cat([torch.zeros(1, 2).double(), math.sqrt(2) * torch.stack([ANGLE.cos(), ANGLE.sin()], 1)])
SCHEDULES = {"sqrt": Sqrt(log_snr_end=-9.0), "cosine": Cosine(log_snr_end=-9.0)}
BOTH = pytest.mark.parametrize("says", ["words", "x0"])


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=dice(seed), dtype=torch.float64)


def embedding():
    points = WordEmbedding(V, D, padding=True).double()
    with torch.no_grad():
        points.weight.copy_(torch.cat([torch.tensor([[5.0, -3.0]]).double(), 0.7 * POINTS[1:]]))
    return points


def lengths_of(*laws):
    """Lengths with these laws: of the classes, if there are several, and last of "any"."""
    lengths = Lengths(len(laws[0]), len(laws) - 1)
    with torch.no_grad():
        lengths.logits.copy_(torch.tensor(np.array(laws)).log() / QUICK)
    return lengths.double()


def likelihoods(x, alpha, sigma):
    """log N(x_t; alpha e_k, sigma^2) of each vector and word, up to a constant, (B, L, 3)."""
    alpha, sigma = (torch.as_tensor(c, dtype=torch.float64).reshape(-1, 1, 1) for c in (alpha, sigma))
    return -((x[:, :, None] - alpha[..., None] * POINTS[1:]) ** 2).sum(-1) / (2 * sigma**2)


def of_texts(x, alpha, sigma, without=None):
    """log p(text, x_t), up to a constant, of all texts of the length that shows in x_t (B, 2, D); (B, 12).

    ``without`` what the vector at one place says.
    """
    seen, n = likelihoods(x, alpha, sigma), (x != 0).any(-1).sum(1)
    total = LAW.log().expand(len(x), -1)
    for i in range(LENGTH):
        if i != without:
            total = total + torch.where(TEXTS[:, i] == PAD, 0.0, seen[:, i, (TEXTS[:, i] - 1).clamp_min(0)])
    return total.masked_fill(n[:, None] != OF_LENGTH, -torch.inf)


class Exact(nn.Module):
    """Bayes' rule over the texts of the length that shows: logits without a word's own x_t, or the mean of x_0.

    What it says of padding is meaningless.
    """

    def __init__(self, process, says):
        super().__init__()
        self.process, self.says = process, says

    def forward(self, x, t, condition=None):
        width = x.shape[1]
        x = nn.functional.pad(x, (0, 0, 0, LENGTH))[:, :LENGTH]
        (alpha, sigma), ended = self.process.scales(t.double()), (x == 0).all(-1, keepdim=True)
        if self.says == "words":
            said = torch.full((len(x), LENGTH, V), 5.0, dtype=torch.float64)
            for i in range(LENGTH):
                joint = of_texts(x, alpha, sigma, without=i)
                for k in (1, 2, 3):
                    said[:, i, k] = joint[:, TEXTS[:, i] == k].logsumexp(1)
            said = said.masked_fill(ended, 7.0)
        else:
            law = torch.softmax(of_texts(x, alpha, sigma), 1)
            said = torch.einsum("bn,nld->bld", law, POINTS[TEXTS]).masked_fill(ended, 7.0)
        return torch.cat([said, torch.full((len(x), 99, said.shape[2]), 7.0).double()], 1)[:, :width]


def exact(says, schedule="sqrt", law=P_LENGTH):
    process = Process(SCHEDULES[schedule])
    return EmbeddingDenoiser(Exact(process, says), process, embedding(), says, lengths=lengths_of(law))


def anything(says, longest=LENGTH, law=None, classes=0, schedule="sqrt"):
    """A transformer that says anything."""
    torch.manual_seed(4)
    outputs = V if says == "words" else D
    network = SequenceTransformer((longest, D), 16, 1, 2, classes, outputs, padding=True).double()
    for p in network.parameters():
        nn.init.normal_(p, std=0.3)
    lengths = lengths_of(np.full(longest, 1 / longest) if law is None else law)
    return EmbeddingDenoiser(network, Process(SCHEDULES[schedule]), embedding(), says, lengths=lengths)


def of_each(bound):
    """The mean over the copies of each text, and its standard error."""
    total = bound.total.reshape(len(TEXTS), -1)
    return total.mean(1).numpy(), (total.std(1) / math.sqrt(total.shape[1])).numpy()


# -- the points --------------------------------------------------------------------------------------------------------


def test_padding_is_the_origin_and_learns_nothing():
    points = embedding()
    torch.testing.assert_close(points.points.detach(), POINTS)
    torch.testing.assert_close(points(TEXTS).detach(), POINTS[TEXTS])
    (points(TEXTS) * normal(12, 2, D)).sum().backward()
    assert not points.weight.grad[PAD].any()
    assert bool((points.weight.grad[1:].abs().sum(1) > 0).all())
    apart = torch.cdist(POINTS[1:], POINTS[1:]) + 9 * torch.eye(3)
    assert points.smallest_distance() == pytest.approx(float(apart.min()))
    far = WordEmbedding(3, 4, padding=True)  # two words farther from each other than from the origin
    with torch.no_grad():
        far.weight[2] = -far.weight[1]
    assert far.smallest_distance() == pytest.approx(4.0)


@pytest.mark.parametrize("held", [2**24, 9, 1])
def test_padding_is_nearest_to_nothing(held, monkeypatch):
    """By all distances to words, however small the vector; at equal distances, of the vector 0 too, the first word."""
    monkeypatch.setattr(module, "MOST_HELD", held)
    x = normal(5, 3, D) * torch.tensor([1e-30, 1e-9, 1e-3, 1.0, 1e6]).double()[:, None, None]
    truth = (x[:, :, None] / x.norm(dim=-1)[..., None, None] - POINTS[1:]).norm(dim=-1).argmin(-1) + 1
    x[1, 2], truth[1, 2] = 0, 1
    x[4, 0], truth[4, 0] = -0.0, 1
    x[3, 1, 0], x[3, 1, 1] = 0.0, -1.0
    truth[3, 1] = 3
    assert torch.equal(embedding().nearest(x), truth)
    assert torch.equal(embedding().nearest(x[1, 2]), torch.tensor(1))
    clamped = Clamp(embedding())(x)
    torch.testing.assert_close(clamped, POINTS[truth])


@pytest.mark.parametrize("logits", [0.0, normal(4, 3, V, seed=8)])
def test_the_law_of_a_noisy_point_never_says_padding_and_of_the_origin_nothing_else(logits):
    """Bayes' rule over the words by hand; of tiny vectors too."""
    x, precision = 3 * normal(4, 3, D), torch.tensor([0.1, 1.0, 3.0, 50.0]).double()
    x[1, 1], x[2, 0], x[3, 2] = 0.0, 1e-30, 0.0
    told = torch.zeros(4, 3, 3).double() if isinstance(logits, float) else logits[..., 1:]
    weight = told.exp() * torch.exp(-0.5 * precision[:, None, None] * ((x[:, :, None] - POINTS[1:]) ** 2).sum(-1))
    truth = torch.cat([torch.zeros(4, 3, 1).double(), weight / weight.sum(-1, keepdim=True)], -1)
    truth[1, 1] = truth[3, 2] = torch.tensor([1.0, 0, 0, 0]).double()
    law = embedding().law(x, precision, logits).log_probs
    torch.testing.assert_close(law.exp().detach(), truth)
    assert torch.equal(law[..., PAD] == -torch.inf, (x != 0).any(-1))
    assert torch.equal(law[..., PAD] == 0, (x == 0).all(-1))


# -- what is 0 is padding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [Process(SCHEDULES["sqrt"]), Process(VE())], ids=["sqrt", "ve"])
def test_latents_of_every_rung_are_padded_where_the_text_is(process):
    """Drawn in every way; and no word's vector is 0."""
    denoiser = EmbeddingDenoiser(Exact(process, "x0"), process, embedding(), "x0", lengths=lengths_of(P_LENGTH))
    chain, truth = EmbeddingChain(denoiser, steps=4), TEXTS == PAD
    assert torch.equal(padded(TEXTS), truth)
    path = chain.path(TEXTS, generator=dice())
    for i in range(1, 5):
        above = (path.z[i + 1],) if i < 4 else ()
        laws = [path.laws[i], chain.guide.marginal(i, TEXTS), chain.guide.posterior(i, above, TEXTS)]
        if i < 4:
            laws += [chain.guide.bridge(i, (path.z[i - 1],), above, TEXTS), chain.model.down(i, above)]
        for z in (path.z[i], *(law.sample(generator=dice(2)) for law in laws)):
            assert torch.equal(padded(z), truth)
    for t in (0.01, 0.5, torch.linspace(0.01, 1.0, 12).double()):
        x_t = noised(process, POINTS[TEXTS], t, normal(12, 2, D))
        alpha, sigma = (c[..., None, None] for c in process.scales(torch.as_tensor(t, dtype=torch.float64)))
        plain = alpha * POINTS[TEXTS] + sigma * normal(12, 2, D)
        torch.testing.assert_close(x_t, torch.where(truth[..., None], 0.0, plain))
        assert torch.equal(padded(chain.guide.corrupt(TEXTS, t, generator=dice())), truth)


# -- how long texts are ------------------------------------------------------------------------------------------------


def test_the_prior_of_a_denoiser_is_of_the_class_s_lengths_and_the_process():
    laws = np.array([[0.9, 0.1], [0.2, 0.8], P_LENGTH])
    for process, variance in ((Process(SCHEDULES["sqrt"]), 1.0), (Process(VE()), float(Process(VE()).sigma(1.0)) ** 2)):
        denoiser = EmbeddingDenoiser(Exact(process, "x0"), process, embedding(), "x0", lengths=lengths_of(*laws))
        x = POINTS[TEXTS[[0, 4, 2]]] + normal(3, 2, D) * (TEXTS[[0, 4, 2]] > 0)[..., None]
        normals = -0.5 * (
            (x**2).sum((1, 2)) / variance + D * math.log(2 * math.pi * variance) * torch.tensor([1, 2, 1])
        )
        found = denoiser.prior(1.0, torch.tensor([1, 0, -1])).log_prob(x).detach()
        np.testing.assert_allclose(found, normals.numpy() + np.log(laws[[1, 0, 2], [0, 1, 0]]), rtol=1e-5)
        found = denoiser.prior(1.0).log_prob(x).detach()
        np.testing.assert_allclose(found, normals.numpy() + np.log(P_LENGTH[[0, 1, 0]]), rtol=1e-5)


# -- what the denoiser says --------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("edm", [None, EDM(1.0)])
def test_the_denoiser_is_bayes_rule_of_words_and_says_0_of_padding(says, edm):
    """Over the texts of the length that shows; whatever the network says of padding, or of it as a word."""
    process = Process(SCHEDULES["cosine"])
    x_t = normal(12, 2, D).masked_fill((TEXTS == PAD)[..., None], 0.0)
    t = torch.linspace(0.05, 1.0, 12).double()
    alpha, sigma = process.scales(t)
    posterior = torch.softmax(of_texts(x_t, alpha, sigma), 1)
    mean = torch.einsum("bn,nld->bld", posterior, POINTS[TEXTS])

    class Scaled(nn.Module):
        """Exact; where EDM scales what is read and said, the other way round."""

        def forward(self, x, label, condition=None):
            if edm is None:
                return Exact(process, says)(x, label)
            a, b, r = (c[:, None, None] for c in (alpha, sigma, (alpha**2 + sigma**2).sqrt()))
            said = Exact(process, says)(x * r, t)
            return said if says == "words" else (said - a / r**2 * (r * x)) / (b / r)

    denoiser = EmbeddingDenoiser(Scaled(), process, embedding(), says, edm, lengths_of(P_LENGTH))
    said = denoiser(x_t, t)
    torch.testing.assert_close(said.x0.detach(), mean, rtol=1e-7, atol=1e-9)
    assert torch.equal(padded(said.x0), TEXTS == PAD)
    law = denoiser.rounding(said).log_probs.exp().detach()
    if says == "words":
        truth = torch.stack([posterior @ TEXTS.eq(k).double() for k in range(V)], -1)
    else:
        alone = torch.softmax(likelihoods(x_t, alpha, sigma), -1)
        truth = torch.cat([torch.zeros(12, 2, 1).double(), alone], -1)
        truth[TEXTS == PAD] = torch.tensor([1.0, 0, 0, 0]).double()
    torch.testing.assert_close(law, truth, rtol=1e-7, atol=1e-9)


# -- the bound ---------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("form", "steps"), [("continuous", 3), ("matching", 2000)])
def test_the_bound_of_bayes_rule_is_the_log_probability_of_text_and_length(says, form, steps):
    """The mean is minus the entropy within 1 %, that of the lengths included; each text's log P(text)."""
    chain, x = EmbeddingChain(exact(says), steps=steps), TEXTS.repeat_interleave(1500, 0)
    bound = chain.elbo(x, estimator=form, terms="stratified", draws=16, batch_size=200_000, seed=2)
    found, error = of_each(bound)
    assert LAW.numpy() @ found == pytest.approx(-ENTROPY, rel=0.01)
    np.testing.assert_allclose(found, LAW.log(), atol=float(5 * error.max()) + 0.02)
    assert error.max() < 0.15


def by_quadrature(text, says, process, times):
    """The bound of a ladder with these noisy times, by Gauss and Hermite's rule over the words' noise."""
    n = int((text != PAD).sum())
    nodes, weights = np.polynomial.hermite_e.hermegauss(48 if n == 1 else 14)
    z = torch.tensor(list(itertools.product(nodes, repeat=n * D))).reshape(-1, n, D)
    w = torch.tensor(list(itertools.product(weights, repeat=n * D))).prod(1)
    w, e = w / w.sum(), POINTS[text[:n]]
    total = math.log(P_LENGTH[n - 1])
    snr = {t: float(process.log_snr(t).exp()) for t in times}
    for s, t in zip((None, *times[:-1]), times, strict=True):
        alpha, sigma = (float(c) for c in process.scales(t))
        x_t = nn.functional.pad(alpha * e + sigma * z, (0, 0, 0, LENGTH - n))
        posterior = torch.softmax(of_texts(x_t, alpha, sigma), 1)
        if s is not None:
            x_0 = torch.einsum("bn,nld->bld", posterior, POINTS[TEXTS])[:, :n]
            total -= float(w @ (0.5 * (snr[s] - snr[t]) * ((e - x_0) ** 2).sum((1, 2))))
            continue
        if says == "words":
            right = sum((posterior @ (TEXTS[:, i] == text[i]).double()).log() for i in range(n))
        else:
            right = torch.log_softmax(likelihoods(x_t, alpha, sigma), -1)
            right = sum(right[:, i, text[i] - 1] for i in range(n))
        total += float(w @ right)
    return total - 0.5 * (n * D * (sigma**2 - 1 - 2 * math.log(sigma)) + alpha**2 * float((e**2).sum()))


@BOTH
@pytest.mark.parametrize("k", [1, 8])
def test_every_form_of_the_bound_is_its_integral_on_average(says, k):
    """Of a text of one word and one of two, 5 standard errors; one's padding takes nothing."""
    times = (0.2, 0.4, 0.7, 1.0)
    chain = EmbeddingChain(exact(says), grid=Grid(times[::-1]))
    truth, x = by_quadrature(TEXTS[k], says, chain.guide.process, times), TEXTS[[k]].expand(4000, 2)
    forms = [("matching", "all"), ("matching", "importance"), ("path", "shared"), ("path", "all"), ("bridge", "all")]
    found = {form: chain.elbo(x, estimator=form[0], terms=form[1], draws=4).total for form in forms}
    found["analytic"] = chain.elbo(x, estimator="path", terms="shared", analytic=True, draws=4).total
    with torch.no_grad():
        found["estimate"] = chain.estimate(x, generator=dice(1))
    for form, total in found.items():
        error = float(total.std()) / math.sqrt(4000)
        assert float(total.mean()) == pytest.approx(truth, abs=5 * error + 1e-3), form
        assert error < 0.05


@pytest.mark.parametrize("k", [1, 8])
def test_the_importance_weighted_bound_of_one_rung_is_the_integral_of_the_rounding(k):
    """log p(n) + log of the mean of p(w | z) under the normal law, by quadrature."""
    denoiser, text, n = exact("words", "cosine"), TEXTS[k], int(OF_LENGTH[k])
    nodes, weights = np.polynomial.hermite_e.hermegauss(30 if n == 1 else 14)
    z = torch.tensor(list(itertools.product(nodes, repeat=n * D))).reshape(-1, n, D)
    w = torch.tensor(list(itertools.product(weights, repeat=n * D))).prod(1)
    alpha, sigma = (float(c) for c in denoiser.process.scales(0.8))
    posterior = torch.softmax(of_texts(nn.functional.pad(z, (0, 0, 0, LENGTH - n)), alpha, sigma), 1)
    right = math.prod(posterior @ (TEXTS[:, i] == text[i]).double() for i in range(n))
    truth = math.log(P_LENGTH[n - 1]) + math.log(float(w @ right / w.sum()))
    found = EmbeddingChain(denoiser, grid=Grid((0.8,))).importance_weighted(text.expand(100, 2), samples=800).log_prob
    assert float(found.mean()) == pytest.approx(truth, abs=5 * float(found.std()) / 10 + 2e-3)
    assert float(found.std()) < 0.1


def test_wrong_lengths_cost_their_divergence():
    """Draw by draw the rest is the same: p(n) weighs log p(n) / wrong(n), exactly."""
    wrong = np.array([0.8, 0.2])
    for settings in ({}, {"estimator": "path"}, {"estimator": "continuous"}):
        right, more = (
            EmbeddingChain(exact("words", law=law), steps=3).elbo(TEXTS, seed=5, **settings).total
            for law in (P_LENGTH, wrong)
        )
        assert float(LAW @ (right - more).double()) == pytest.approx(float(P_LENGTH @ np.log(P_LENGTH / wrong)))


@BOTH
@pytest.mark.parametrize("seed", range(3))
def test_the_bounds_of_all_texts_are_probabilities_of_sum_at_most_one(says, seed):
    """Of networks that say anything, of padding too: log P(text) itself would sum to 1."""
    torch.manual_seed(seed)

    class Anything(nn.Module):
        def __init__(self):
            super().__init__()
            layers = (nn.Linear(2 * D, 16), nn.Tanh(), nn.Linear(16, 2 * (V if says == "words" else D)))
            self.all = nn.Sequential(*layers).double()

        def forward(self, x, t, condition=None):
            return self.all(x.flatten(1)).unflatten(1, (2, -1))

    process, law = Process(SCHEDULES["sqrt"]), np.random.default_rng(seed).dirichlet([1, 1])
    denoiser = EmbeddingDenoiser(Anything(), process, embedding(), says, lengths=lengths_of(law))
    x = TEXTS.repeat_interleave(600, 0)
    for form, steps in (("matching", 3), ("matching", 50), ("path", 5), ("continuous", 3)):
        found, error = of_each(EmbeddingChain(denoiser, steps=steps).elbo(x, estimator=form, terms="all"))
        assert np.exp(found).sum() <= 1 + 5 * error.max()


@BOTH
@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
def test_more_padding_takes_nothing_from_any_term(says, variance):
    """Of the same words and noise, texts padded to 2 and to 5: all terms are the same but for log p(n)."""
    law = np.array([0.1, 0.2, 0.3, 0.15, 0.25])
    denoiser, more = anything(says, 5, law), nn.functional.pad(TEXTS, (0, 3))
    short = EmbeddingDenoiser(
        denoiser.network, denoiser.process, denoiser.embedding, says, lengths=lengths_of(P_LENGTH)
    )
    grid, noise, u = Grid((1.0, 0.6, 0.3)), normal(12, 5, D), torch.linspace(0, 0.99, 12)
    costs_more = torch.tensor(np.log(P_LENGTH)[OF_LENGTH - 1] - np.log(law)[OF_LENGTH - 1])
    for form in ("matching", "continuous"):
        chains = [EmbeddingChain(one, grid=grid, variance=variance, form=form) for one in (short, denoiser)]
        few, many = (
            c.estimate(x, noise=noise[:, : x.shape[1]], u=u).detach()
            for c, x in zip(chains, (TEXTS, more), strict=True)
        )
        torch.testing.assert_close(few - many, costs_more, rtol=1e-6, atol=1e-7)
    rungs = [normal(12, 5, D, seed=s) for s in range(3)]
    paths = [c.path(x, noise=[z[:, : x.shape[1]] for z in rungs]) for c, x in zip(chains, (TEXTS, more), strict=True)]
    for estimator, i in itertools.product(("matching", "path", "bridge"), range(4)):
        few, many = (c.term(estimator, i, p.at(i)).detach() for c, p in zip(chains, paths, strict=True))
        torch.testing.assert_close(many - few, costs_more if i == 3 else 0 * costs_more, rtol=1e-6, atol=1e-6)


@BOTH
@pytest.mark.parametrize("form", ["matching", "continuous"])
def test_neither_padding_nor_its_noise_has_a_gradient(says, form):
    denoiser, noise = anything(says), normal(12, 2, D).requires_grad_()
    chain = EmbeddingChain(denoiser, grid=Grid((1.0, 0.6, 0.3)), form=form)
    chain.estimate(TEXTS, noise=noise, u=torch.linspace(0, 0.99, 12)).sum().backward()
    assert torch.equal(noise.grad.abs().sum(-1) > 0, TEXTS != PAD)
    gradient = denoiser.embedding.weight.grad
    assert torch.equal(gradient.abs().sum(1) > 0, torch.tensor([False, True, True, True]))
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in denoiser.parameters())


def test_the_law_of_lengths_is_kept_once_and_by_other_networks():
    chain = EmbeddingChain(exact("words"), steps=3)
    assert [name for name in chain.state_dict() if "lengths" in name] == ["model.denoiser.lengths.logits"]
    denoiser = chain.model.denoiser
    assert denoiser.around(nn.Identity()).lengths is denoiser.lengths


# -- training ----------------------------------------------------------------------------------------------------------

CLASSES = np.array([[0.5, 0.4, 0.1], [0.1, 0.6, 0.3], [0.2, 0.5, 0.3]])


def at_times(process):
    """Five texts, times, noise, x_t padded by hand, and each text's own words."""
    w, t, noise = TEXTS[[0, 4, 2, 9, 1]], torch.linspace(0.1, 0.9, 5).double(), normal(5, 2, D)
    alpha, sigma = process.scales(t)
    x_t = (alpha[:, None, None] * POINTS[w] + sigma[:, None, None] * noise) * (w > 0)[..., None]
    return w, t, noise, x_t, alpha, sigma


def test_the_losses_are_their_formulas_of_words_alone_for_each_place():
    """By hand: what the words cost, and -log p(n) of the class, divided by the 3 places of the longest text."""
    condition = torch.tensor([0, 1, -1, 1, 0])
    for says in ("words", "x0"):
        process = Process(SCHEDULES["cosine"])
        denoiser = EmbeddingDenoiser(Exact(process, says), process, embedding(), says, lengths=lengths_of(*CLASSES))
        w, t, noise, x_t, alpha, sigma = at_times(process)
        posterior = torch.softmax(of_texts(x_t, alpha, sigma), 1)
        n = OF_LENGTH[[0, 4, 2, 9, 1]]
        of_length = torch.tensor(-np.log(CLASSES[condition, n - 1]))
        mean = torch.einsum("bn,nld->bld", posterior, POINTS[TEXTS])
        near = POINTS[w] + math.exp(-0.35) * noise  # log-SNR 0.7
        rounded = torch.log_softmax(likelihoods(near, 1.0, math.exp(-0.35)), -1)
        error, surprise = torch.zeros(5).double(), torch.zeros(5).double()
        for k, i in itertools.product(range(5), range(2)):
            if w[k, i] != PAD:
                error[k] += ((POINTS[w[k, i]] - mean[k, i]) ** 2).mean() - rounded[k, i, w[k, i] - 1]
                surprise[k] -= posterior[k, TEXTS[:, i] == w[k, i]].sum().log()
        found = DiffusionLM(log_snr=0.7)(denoiser, w, condition, t=t, noise=noise)
        torch.testing.assert_close(found.detach(), (error + of_length) / 3, rtol=1e-6, atol=1e-7)
        if says == "words":
            found = WordCrossEntropy()(denoiser, w, condition, t=t, noise=noise)
            torch.testing.assert_close(found.detach(), (surprise + of_length) / 3, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("objective", [DiffusionLM(), WordCrossEntropy()])
def test_a_batch_without_padding_that_all_its_texts_have_has_the_same_loss(objective):
    """Of the same texts, times and noise."""
    denoiser, t = anything("words", 4), torch.linspace(0.1, 0.9, 12).double()
    noise, whole = normal(12, 4, D), nn.functional.pad(TEXTS, (0, 2))
    with torch.no_grad():
        found = [objective(denoiser, x, t=t, noise=noise) for x in (whole, TEXTS, whole[:, :3])]
    assert float(found[0].std()) > 0.1
    for one in found[1:]:
        torch.testing.assert_close(one, found[0])
    other = torch.where((whole > 0)[..., None], noise, 99.0)
    torch.testing.assert_close(objective(denoiser, whole, t=t, noise=other).detach(), found[0])


@pytest.mark.parametrize("objective", [DiffusionLM(), WordCrossEntropy()])
def test_the_gradient_of_the_lengths_is_that_of_a_histogram(objective):
    """Of -log p(n) / 3: QUICK (p - [n]) / 3, of each class its own texts'; and the points of words have one too."""
    process = Process(SCHEDULES["cosine"])
    lengths = lengths_of(*CLASSES)
    denoiser = EmbeddingDenoiser(Exact(process, "words"), process, embedding(), "words", lengths=lengths)
    w, t, noise, *_ = at_times(process)
    objective(denoiser, w, torch.tensor([0, 1, -1, 1, 0]), t=t, noise=noise).sum().backward()
    of_n = np.eye(3)[OF_LENGTH[[0, 4, 2, 9, 1]] - 1]
    rows = [2 * CLASSES[0] - of_n[[0, 4]].sum(0), 2 * CLASSES[1] - of_n[[1, 3]].sum(0), CLASSES[2] - of_n[2]]
    np.testing.assert_allclose(lengths.logits.grad, QUICK * np.array(rows) / 3, atol=1e-5)
    assert not denoiser.embedding.weight.grad[PAD].any()
    assert bool((denoiser.embedding.weight.grad[1:].abs().sum(1) > 0).all())


@BOTH
def test_a_histogram_of_lengths_is_learned_with_the_words(says):
    """100 steps, of texts of lengths with a law; within 0.07."""
    denoiser = anything(says)
    objective = WordCrossEntropy() if says == "words" else DiffusionLM()
    optimizer = torch.optim.Adam(denoiser.parameters(), 5e-3)
    for step in range(100):
        x = TEXTS[torch.multinomial(LAW, 256, replacement=True, generator=dice(step))]
        optimizer.zero_grad()
        objective(denoiser, x, generator=dice(10_000 + step)).mean().backward()
        optimizer.step()
    np.testing.assert_allclose(denoiser.lengths.law(1)[0].exp().detach(), P_LENGTH, atol=0.07)


def test_rounding_accuracy_counts_words_alone():
    """Two words alike, at (1, 0) and (-1, 0) times sqrt 2: Phi(alpha sqrt 2 / sigma), however much padding there is."""
    points = WordEmbedding(3, 2, padding=True)
    with torch.no_grad():
        points.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]]))

    class Alike(nn.Module):
        def forward(self, x, t, condition=None):
            return torch.zeros(*x.shape[:-1], 3)

    denoiser = EmbeddingDenoiser(Alike(), Process(Cosine()), points, "words", lengths=Lengths(5))
    alpha, sigma = (float(c) for c in denoiser.process.scales(0.7))
    truth = 0.5 * (1 + math.erf(alpha / sigma))
    tokens = nn.functional.pad(1 + torch.arange(20_000).reshape(20_000, 1) % 2, (0, 4))
    assert 0.6 < truth < 0.9
    assert rounding_accuracy(denoiser, tokens, 0.7) == pytest.approx(truth, abs=5 * math.sqrt(0.25 / 20_000))


# -- sampling ----------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("solver", "steps"), [(DPMSolverPP(), 40), (Ancestral(), 80)])
def test_samples_of_a_length_have_the_law_of_the_texts_of_that_length(says, n, solver, steps):
    """Total variation to p(text | n): 3000 exact draws have 0.019 on average; none of the words is padding."""
    denoiser = exact(says, "cosine")
    settings = {"seeds": range(3000), "solver": solver, "steps": steps, "batch_size": 3000, "dtype": torch.float64}
    drawn = sample_words(denoiser, denoiser.embedding, n, **settings)
    assert drawn.shape == (3000, n)
    own = TEXTS[n == OF_LENGTH][:, :n]
    share = (drawn[:, None] == own).all(-1).double().mean(0)
    assert float(share.sum()) == pytest.approx(1)
    assert 0.5 * float((share - LAW[n == OF_LENGTH] / P_LENGTH[n - 1]).abs().sum()) < 0.045


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: WordEmbedding(2, 4, padding=True), "at least 2 words"),
        (
            lambda: EmbeddingDenoiser(nn.Identity(), Process(Sqrt()), WordEmbedding(3, 2, padding=True)),
            "lengths are of an embedding with padding",
        ),
        (
            lambda: EmbeddingDenoiser(nn.Identity(), Process(Sqrt()), WordEmbedding(3, 2), lengths=Lengths(2)),
            "lengths are of an embedding with padding",
        ),
    ],
)
def test_what_cannot_be_is_refused(ask, words):
    with pytest.raises(ValueError, match=words):
        ask()


@pytest.mark.parametrize("text", [[PAD, PAD], [PAD, 1]])
def test_what_is_no_text_has_no_probability(text):
    """An empty one, or one with a word after its end."""
    for settings in ({}, {"estimator": "path"}, {"estimator": "continuous"}):
        found = EmbeddingChain(anything("words"), steps=3).elbo(torch.tensor([text]), **settings).total
        assert float(found) == -math.inf
