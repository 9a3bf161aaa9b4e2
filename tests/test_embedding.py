"""Diffusion of word vectors, on vocabularies so small that every text can be enumerated."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import kuosan.discrete.embedding as module
from enumerated import ALL, JOINT
from kuosan.denoiser import EDM, Denoiser
from kuosan.diffusion import DiffusionChain
from kuosan.discrete.embedding import Clamp, EmbeddingDenoiser, WordEmbedding, rounding_accuracy, sample_words
from kuosan.discrete.embedding_chain import EmbeddingChain
from kuosan.discrete.objective import DiffusionLM, WordCrossEntropy
from kuosan.networks.sequence import SequenceTransformer
from kuosan.process import Grid, Process
from kuosan.schedules import Cosine, Sqrt
from kuosan.solvers import Ancestral, Auto, ClassifierFree, DPMSolverPP, sample

V, D = 3, 2
P = np.array([0.6, 0.3, 0.1])
#: All texts of two words, and a law under which they depend on each other.
PAIRS = torch.tensor(list(itertools.product(range(V), repeat=2)))
PAIR = np.array([0.25, 0.02, 0.05, 0.03, 0.3, 0.02, 0.01, 0.12, 0.2])
SCHEDULES = {"sqrt": Sqrt(log_snr_end=-9.0), "cosine": Cosine(log_snr_end=-9.0)}


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def embedding():
    """Three points of a circle, not evenly, float64."""
    points = WordEmbedding(V, D).double()
    angle = torch.tensor([0.3, 1.9, 4.4], dtype=torch.float64)
    with torch.no_grad():
        points.weight.copy_(0.7 * torch.stack([angle.cos(), angle.sin()], 1))
    return points


class Constant(nn.Module):
    """Logits that are the same for every word, whatever is asked."""

    def __init__(self, law=P):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(np.log(law)))

    def forward(self, x, t, condition=None):
        return self.logits.expand(*x.shape[:-1], V)


class Enumerated(nn.Module):
    """What Bayes' rule says of two words, over all nine texts: logits without a word's own x_t, or the mean of x_0."""

    def __init__(self, process, points, says):
        super().__init__()
        self.process, self.points, self.says = process, points.detach(), says

    def forward(self, x, t, condition=None):
        alpha, sigma = (c[:, None, None] for c in self.process.scales(t.double()))
        apart = x[:, :, None] - alpha[..., None] * self.points  # (B, 2, V, D)
        seen = -(apart**2).sum(-1) / (2 * sigma**2)
        log_p = torch.tensor(np.log(PAIR)).reshape(V, V)
        if self.says == "words":
            first = torch.logsumexp(log_p + seen[:, 1, None, :], 2)
            second = torch.logsumexp(log_p + seen[:, 0, :, None], 1)
            return torch.stack([first, second], 1)
        of_text = torch.softmax((log_p + seen[:, 0, :, None] + seen[:, 1, None, :]).flatten(1), 1)
        return torch.einsum("bn,nld->bld", of_text, self.points[PAIRS])


def exact(schedule, says):
    process, points = Process(SCHEDULES[schedule]), embedding()
    return EmbeddingDenoiser(Enumerated(process, points.points, says), process, points, says)


def words_denoiser(network=None, schedule="sqrt"):
    return EmbeddingDenoiser(network or Constant(), Process(SCHEDULES[schedule]), embedding(), "words")


def of_each(bound, texts):
    """The mean over the copies of each text, and its standard error."""
    total = bound.total.reshape(texts, -1)
    return total.mean(1).numpy(), (total.std(1) / math.sqrt(total.shape[1])).numpy()


# -- the points --------------------------------------------------------------------------------------------------------


def test_every_point_has_root_mean_square_one_and_keeps_it():
    points = WordEmbedding(7, 5)
    optimizer = torch.optim.Adam(points.parameters(), 0.1)
    for _ in range(5):
        torch.testing.assert_close((points.points**2).mean(-1), torch.ones(7))
        optimizer.zero_grad()
        points(torch.arange(7)[None]).sum().backward()
        optimizer.step()


def test_nearest_and_smallest_distance_are_those_of_all_pairs(monkeypatch):
    """By numpy, whatever is held at once."""
    torch.manual_seed(1)
    points, x = WordEmbedding(40, 6), torch.randn(3, 11, 6)
    table = points.points.detach().double().numpy()
    apart = np.linalg.norm(x.double().numpy()[..., None, :] - table, axis=-1)
    pairs = np.linalg.norm(table[:, None] - table, axis=-1) + 1e9 * np.eye(40)
    for held in (2**24, 150, 1):
        monkeypatch.setattr(module, "MOST_HELD", held)
        np.testing.assert_array_equal(points.nearest(x).numpy(), apart.argmin(-1))
        assert points.smallest_distance() == pytest.approx(pairs.min(), rel=1e-6)


def test_two_points_that_are_almost_one_are_seen_apart():
    points = WordEmbedding(3, 4)
    with torch.no_grad():
        points.weight[2] = points.weight[0] + torch.tensor([1e-5, 0, 0, 0])
    truth = (points.points[2].double() - points.points[0].double()).norm()
    assert points.smallest_distance() == pytest.approx(float(truth.detach()), rel=1e-3)


def test_the_law_of_a_noisy_point_is_bayes_rule():
    points, x = embedding(), torch.randn(4, 2, D, generator=dice(), dtype=torch.float64)
    precision = torch.tensor([0.1, 1.0, 3.0, 50.0], dtype=torch.float64)
    squares = ((x[:, :, None] - points.points.detach()) ** 2).sum(-1)
    density = torch.exp(-0.5 * precision[:, None, None] * squares)
    found = points.law(x, precision).log_probs.exp().detach()
    torch.testing.assert_close(found, density / density.sum(-1, keepdim=True))


# -- what the denoiser says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_words_are_the_logits_times_the_likelihood_and_x0_their_mean(schedule):
    """Per time and for one time alike; the densities written out."""
    denoiser = words_denoiser(schedule=schedule)
    points, t = denoiser.embedding.points.detach(), torch.tensor([0.05, 0.5, 1.0], dtype=torch.float64)
    x_t = torch.randn(3, 2, D, generator=dice(), dtype=torch.float64)
    alpha, sigma = (c.reshape(3, 1, 1, 1) for c in denoiser.process.scales(t))
    weight = torch.tensor(P) * torch.exp(-((x_t[:, :, None] - alpha * points) ** 2 / (2 * sigma**2)).sum(-1))
    truth = weight / weight.sum(-1, keepdim=True)
    said = denoiser(x_t, t)
    torch.testing.assert_close(denoiser.rounding(said).log_probs.exp().detach(), truth, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(said.x0.detach(), truth @ points, rtol=1e-8, atol=1e-12)
    for i in range(3):
        alone = denoiser(x_t[i : i + 1], float(t[i]))
        torch.testing.assert_close(alone.x0[0], said.x0[i], rtol=1e-8, atol=1e-12)


def test_the_rounding_law_of_x0_is_what_x_t_alone_says():
    denoiser = exact("sqrt", "x0")
    x_t, t = torch.randn(5, 2, D, generator=dice(), dtype=torch.float64), 0.3
    alpha, sigma = denoiser.process.scales(t)
    density = torch.exp(-((x_t[:, :, None] - alpha * denoiser.embedding.points) ** 2).sum(-1) / (2 * sigma**2))
    law = denoiser.rounding(denoiser(x_t, t))
    torch.testing.assert_close(law.log_probs.exp().sum(-1), torch.ones(5, 2, dtype=torch.float64))
    torch.testing.assert_close(law.log_probs.exp(), density / density.sum(-1, keepdim=True), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("edm", [None, EDM(1.0)])
def test_another_network_is_read_in_the_same_way(edm):
    network = nn.Linear(D, V).double()
    process, points = Process(Sqrt()), embedding()

    class Called(nn.Module):
        def forward(self, x, t, condition=None):
            return network(x)

    one = EmbeddingDenoiser(Called(), process, points, "words", edm)
    other = one.around(Called())
    assert type(other) is EmbeddingDenoiser
    assert other.embedding is points
    x_t = torch.randn(4, 2, D, generator=dice(), dtype=torch.float64)
    torch.testing.assert_close(other(x_t, 0.4).x0, one(x_t, 0.4).x0, rtol=0, atol=0)


# -- the bound ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", list(SCHEDULES))
@pytest.mark.parametrize(("form", "steps"), [("continuous", 3), ("matching", 3000)])
def test_of_one_word_the_bound_is_minus_the_entropy(schedule, form, steps):
    """The network says log p(w), which is exact: the mean is minus the entropy within 1 %, each word's log p(w)."""
    chain = EmbeddingChain(words_denoiser(schedule=schedule), steps=steps)
    x = torch.arange(V).repeat_interleave(16_000)[:, None]
    bound = chain.elbo(x, estimator=form, terms="stratified", draws=16, batch_size=200_000, seed=1)
    found, error = of_each(bound, V)
    assert P @ found == pytest.approx(P @ np.log(P), rel=0.01)
    np.testing.assert_allclose(found, np.log(P), atol=float(5 * error.max()) + 0.01)
    assert bound.discrete
    assert bound.dimensions == 1


@pytest.mark.parametrize("says", ["words", "x0"])
@pytest.mark.parametrize(("form", "steps"), [("continuous", 3), ("matching", 2000)])
def test_of_two_words_the_bound_is_minus_their_entropy(says, form, steps):
    """The network is Bayes' rule over all texts: what the words know of each other is not lost."""
    chain = EmbeddingChain(exact("sqrt", says), steps=steps)
    x = PAIRS.repeat_interleave(5000, 0)
    bound = chain.elbo(x, estimator=form, terms="stratified", draws=16, batch_size=200_000, seed=2)
    found, error = of_each(bound, len(PAIRS))
    assert PAIR @ found == pytest.approx(PAIR @ np.log(PAIR), rel=0.01)
    np.testing.assert_allclose(found, np.log(PAIR), atol=float(5 * error.max()) + 0.02)


def test_of_a_wrong_model_the_bound_is_its_own_log_probability():
    """A network that says another law is exact for that one: below the truth by their divergence."""
    wrong = np.array([0.2, 0.3, 0.5])
    chain = EmbeddingChain(words_denoiser(Constant(wrong)), steps=3)
    x = torch.arange(V).repeat_interleave(8000)[:, None]
    found, error = of_each(chain.elbo(x, estimator="continuous", terms="stratified", draws=16), V)
    np.testing.assert_allclose(found, np.log(wrong), atol=float(5 * error.max()))
    assert P @ found < P @ np.log(P)


@pytest.mark.parametrize("says", ["words", "x0"])
@pytest.mark.parametrize("seed", range(3))
def test_the_bounds_of_all_texts_are_probabilities_of_sum_at_most_one(says, seed):
    """Of networks that say anything: log P(w) itself would sum to 1, and the bound is under it."""
    torch.manual_seed(seed)

    class Anything(nn.Module):
        def __init__(self):
            super().__init__()
            layers = (nn.Linear(2 * D, 16), nn.Tanh(), nn.Linear(16, 2 * (V if says == "words" else D)))
            self.all = nn.Sequential(*layers).double()

        def forward(self, x, t, condition=None):
            return self.all(x.flatten(1)).unflatten(1, (2, -1))

    denoiser = EmbeddingDenoiser(Anything(), Process(SCHEDULES["sqrt"]), embedding(), says)
    x = PAIRS.repeat_interleave(1000, 0)
    for form, steps in (("matching", 3), ("matching", 50), ("path", 5), ("continuous", 3)):
        found, error = of_each(EmbeddingChain(denoiser, steps=steps).elbo(x, estimator=form, terms="all"), len(PAIRS))
        assert np.exp(found).sum() <= 1 + 5 * error.max()


@pytest.mark.parametrize("says", ["words", "x0"])
def test_every_term_is_the_formula_written_by_hand(says):
    """KL of the rungs by (SNR_s - SNR_t) / 2 |e - x0|^2, the first rung's -log p, the end's KL, the rate."""
    denoiser = exact("cosine", says)
    chain, process = EmbeddingChain(denoiser, grid=Grid((1.0, 0.7, 0.3, 0.1))), denoiser.process
    w, x_t = PAIRS[:4], torch.randn(4, 2, D, generator=dice(), dtype=torch.float64)
    e = denoiser.embedding.points.detach()[w]
    # the same posterior mean whatever the network says it in
    mean = exact("cosine", "x0").network
    snr = {t: float(process.log_snr(t).exp()) for t in (0.1, 0.3, 0.7, 1.0)}
    for i, (s, t) in enumerate([(0.1, 0.3), (0.3, 0.7), (0.7, 1.0)], start=1):
        x0 = mean(x_t, torch.full((4,), t))
        truth = 0.5 * (snr[s] - snr[t]) * ((e - x0) ** 2).sum((1, 2))
        found = chain.divergence(i, chain.guide.posterior(i, (x_t,), w), (x_t,))
        torch.testing.assert_close(found.detach(), truth, rtol=1e-6, atol=1e-9)
        rungs = torch.full((4,), i)
        torch.testing.assert_close(chain.step_cost(rungs, denoiser(x_t, t), w).detach(), truth, rtol=1e-6, atol=1e-9)
    law = denoiser.rounding(denoiser(x_t, 0.1)).log_probs.detach()
    truth = -sum(law[torch.arange(4), i, w[:, i]] for i in range(2))
    torch.testing.assert_close(chain.decoding(w, (x_t,)).detach(), truth)
    torch.testing.assert_close(chain.step_cost(torch.zeros(4).long(), denoiser(x_t, 0.1), w).detach(), truth)
    alpha, sigma = (float(c) for c in process.scales(1.0))
    truth = 0.5 * (2 * D * (sigma**2 - 1 - 2 * math.log(sigma)) + alpha**2 * (e**2).sum((1, 2)))
    torch.testing.assert_close(chain.divergence(4, chain.guide.marginal(4, w), ()).detach(), truth)
    # the continuous cost from 0.3 to 0.7 of one time, evenly drawn in log-SNR
    noise, u = torch.randn(4, 2, D, generator=dice(1), dtype=torch.float64), torch.tensor([0.1, 0.4, 0.6, 0.9])
    start, end = process.log_snr(0.3), process.log_snr(0.7)
    t = process.schedule.time_of(start + u.double() * (end - start))
    alpha, sigma = (c.reshape(4, 1, 1) for c in process.scales(t))
    error = ((e - mean(alpha * e + sigma * noise, t)) ** 2).sum((1, 2))
    truth = (start - end) * 0.5 * process.log_snr(t).exp() * error
    ends = torch.tensor([0.3, 0.7], dtype=torch.float64)
    found = chain.integral(ends[0], ends[1], u.double(), w, None, noise)
    torch.testing.assert_close(found.detach(), truth, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", ["matching", "continuous"])
def test_one_estimate_is_the_bound_on_average(form):
    chain = EmbeddingChain(exact("sqrt", "words"), grid=Grid((1.0, 0.6, 0.3, 0.1)), form=form)
    x = PAIRS[[5]].expand(20_000, 2)
    with torch.no_grad():
        estimate = chain.estimate(x, generator=dice(1))
    error = 0.0
    for estimator, terms in ((form, "all"), ("path", "shared"), ("bridge", "all")):
        if form == "continuous" and estimator != form:
            continue
        bound = chain.elbo(x[:5000], estimator=estimator, terms=terms, draws=4).total
        error = math.hypot(float(estimate.std()) / math.sqrt(20_000), float(bound.std()) / math.sqrt(5000))
        assert float(estimate.mean()) == pytest.approx(float(bound.mean()), abs=5 * error)
    assert 0 < error < 0.06


def test_the_importance_weighted_bound_rises_to_the_log_probability():
    chain = EmbeddingChain(words_denoiser(), steps=4)
    x = torch.full((200, 1), 1)
    loose = float(chain.elbo(x, draws=20).total.mean())
    tight = float(chain.importance_weighted(x, samples=500).log_prob.mean())
    assert loose < tight - 0.02
    assert tight < 0  # it is a probability


@pytest.mark.parametrize("says", ["words", "x0"])
@pytest.mark.parametrize("form", ["matching", "continuous"])
def test_the_gradient_of_an_estimate_reaches_the_points(says, form):
    """Against finite differences of what is learned of them, of a network of its own."""
    torch.manual_seed(3)
    linear = nn.Linear(D, V if says == "words" else D).double()

    class Network(nn.Module):
        def forward(self, x, t, condition=None):
            return linear(x)

    denoiser = EmbeddingDenoiser(Network(), Process(SCHEDULES["sqrt"]), embedding(), says)
    chain, weight = EmbeddingChain(denoiser, steps=6, form=form), denoiser.embedding.weight
    noise, u = torch.randn(9, 2, D, generator=dice(), dtype=torch.float64), torch.linspace(0.05, 0.95, 9)

    def value():
        return chain.estimate(PAIRS, noise=noise, u=u).sum()

    value().backward()
    assert float(weight.grad.abs().max()) > 0.01
    for k, j in itertools.product(range(V), range(D)):
        with torch.no_grad():
            weight[k, j] += 1e-5
            above = float(value())
            weight[k, j] -= 2e-5
            below = float(value())
            weight[k, j] += 1e-5
        assert float(weight.grad[k, j]) == pytest.approx((above - below) / 2e-5, rel=1e-4, abs=1e-5)


# -- training ----------------------------------------------------------------------------------------------------------


def test_the_losses_are_their_formulas():
    denoiser = exact("cosine", "words")
    points, w = denoiser.embedding.points.detach(), PAIRS[:5]
    t, noise = torch.linspace(0.1, 0.9, 5, dtype=torch.float64), torch.randn(5, 2, D, generator=dice()).double()
    alpha, sigma = (c.reshape(5, 1, 1) for c in denoiser.process.scales(t))
    e = points[w]
    x_t = alpha * e + sigma * noise
    error = ((e - exact("cosine", "x0").network(x_t, t)) ** 2).mean((1, 2))
    noisy = e + math.exp(-0.35) * noise  # log-SNR 0.7
    density = torch.exp(-((noisy[:, :, None] - points) ** 2).sum(-1) / (2 * math.exp(-0.7)))
    right = (density / density.sum(-1, keepdim=True)).gather(-1, w[..., None])[..., 0]
    found = DiffusionLM(log_snr=0.7)(denoiser, w, t=t, noise=noise)
    torch.testing.assert_close(found.detach(), error - right.log().mean(1), rtol=1e-6, atol=1e-9)
    right = denoiser.rounding(denoiser(x_t, t)).log_probs.gather(-1, w[..., None])[..., 0]
    found = WordCrossEntropy()(denoiser, w, t=t, noise=noise)
    torch.testing.assert_close(found.detach(), -right.mean(1).detach(), rtol=1e-10, atol=1e-12)
    assert DiffusionLM().noise_shape(denoiser, (2,)) == WordCrossEntropy().noise_shape(denoiser, (2,)) == (2, D)


def trained(says, objective, outputs, steps):
    torch.manual_seed(0)
    points = WordEmbedding(3, 2)
    network = SequenceTransformer((3, 2), width=64, depth=2, heads=4, outputs=outputs)
    denoiser = EmbeddingDenoiser(network, Process(Sqrt()), points, says, EDM(1.0))
    optimizer = torch.optim.Adam(denoiser.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x = ALL[torch.multinomial(torch.tensor(JOINT), 256, replacement=True, generator=dice(step))]
        optimizer.zero_grad()
        objective(denoiser, x, generator=dice(10_000 + step)).mean().backward()
        optimizer.step()
        schedule.step()
    return denoiser


def held_out(n, seed=77):
    return ALL[torch.multinomial(torch.tensor(JOINT), n, replacement=True, generator=dice(seed))]


@pytest.mark.slow
def test_a_small_transformer_learns_which_word_follows_which():
    """The bound on texts of three words is within 10 % of minus their entropy."""
    denoiser = trained("words", WordCrossEntropy(), 3, 400)
    x = ALL.repeat_interleave(100, 0)
    found, _ = of_each(EmbeddingChain(denoiser, steps=3).elbo(x, estimator="continuous", draws=16), len(ALL))
    assert JOINT @ found == pytest.approx(JOINT @ np.log(JOINT), rel=0.1)
    assert rounding_accuracy(denoiser, held_out(1000), 1e-3) > 0.99


def test_diffusion_lm_keeps_its_points_apart():
    """The squared error alone would draw them together; and x0-hat is rounded rightly at the last step."""
    denoiser = trained("x0", DiffusionLM(), None, 150)
    assert (
        denoiser.embedding.smallest_distance() > 1.8
    )  # three points of a circle of radius sqrt 2 are at most 2.45 apart
    assert rounding_accuracy(denoiser, held_out(1000), 1e-3) > 0.99


def test_rounding_accuracy_is_the_share_that_bayes_rule_gets_right():
    """One word of two alike at (1, 0) and (-1, 0) times sqrt 2, by the normal law: Phi(alpha sqrt 2 / sigma)."""
    points = WordEmbedding(2, 2)
    with torch.no_grad():
        points.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))

    class Alike(nn.Module):
        def forward(self, x, t, condition=None):
            return torch.zeros(*x.shape[:-1], 2)

    denoiser = EmbeddingDenoiser(Alike(), Process(Cosine()), points, "words")
    alpha, sigma = (float(c) for c in denoiser.process.scales(0.7))
    truth = 0.5 * (1 + math.erf(alpha / sigma))
    assert 0.6 < truth < 0.9
    tokens = torch.arange(40_000).reshape(10_000, 4) % 2
    assert rounding_accuracy(denoiser, tokens, 0.7) == pytest.approx(truth, abs=5 * math.sqrt(0.25 / 40_000))
    assert rounding_accuracy(denoiser, tokens[:100], 0.01) == 1


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("solver", "steps"), [(DPMSolverPP(), 40), (Ancestral(), 100)])
@pytest.mark.parametrize("says", ["words", "x0"])
def test_samples_have_the_law_of_the_texts(says, solver, steps):
    """Total variation to the nine probabilities: 4000 exact draws have 0.017 on average."""
    denoiser = exact("cosine", says)
    drawn = sample_words(
        denoiser, denoiser.embedding, 2, seeds=range(4000), solver=solver, steps=steps, batch_size=4000,
        dtype=torch.float64,
    )  # fmt: skip
    count = np.bincount((drawn * torch.tensor([V, 1])).sum(1).numpy(), minlength=9) / 4000
    assert 0.5 * np.abs(count - PAIR).sum() < 0.04


class Classed(nn.Module):
    """One law of a word for each class, and their mean for none."""

    laws = torch.tensor([[0.9, 0.05, 0.05], [0.05, 0.05, 0.9], [0.475, 0.05, 0.475]]).double()

    def forward(self, x, t, condition=None):
        which = torch.full((len(x),), -1) if condition is None else condition
        return self.laws[which].log()[:, None].expand(*x.shape[:-1], V)


@pytest.mark.parametrize("solver", [Auto(), DPMSolverPP(), Ancestral()])
def test_guidance_and_any_solver_take_word_vectors(solver):
    """Weight 0 is the class's law, 5 standard deviations; more makes its word likelier."""
    denoiser = words_denoiser(Classed(), "cosine")
    condition, shares = torch.arange(1000) % 2, []
    for weight in (0.0, 2.0):
        guided = ClassifierFree(denoiser, weight)
        settings = {"seeds": range(1000), "condition": condition, "batch_size": 1000, "dtype": torch.float64}
        drawn = sample_words(guided, denoiser.embedding, 1, solver=solver, steps=20, **settings)
        own = torch.tensor([0, 2])[condition]
        shares.append(float((drawn[:, 0] == own).double().mean()))
    assert shares[0] == pytest.approx(0.9, abs=5 * math.sqrt(0.09 / 1000))
    assert shares[1] > 0.97


def test_the_same_seeds_give_the_same_words_whatever_the_batch():
    denoiser = exact("cosine", "words")
    settings = {"solver": Ancestral(), "steps": 10, "dtype": torch.float64}
    whole = sample_words(denoiser, denoiser.embedding, 2, seeds=range(20), **settings)
    parts = sample_words(denoiser, denoiser.embedding, 2, seeds=range(20), batch_size=7, **settings)
    assert torch.equal(whole, parts)


def test_a_clamped_prediction_is_made_of_points():
    denoiser = exact("cosine", "words")
    x = torch.randn(6, 2, D, generator=dice(), dtype=torch.float64)
    clamped = Clamp(denoiser.embedding)(x)
    points = denoiser.embedding.points.detach()
    apart = ((clamped.detach()[:, :, None] - points) ** 2).sum(-1)
    assert float(apart.min(-1).values.max()) < 1e-20
    assert torch.equal(apart.argmin(-1), ((x[:, :, None] - points) ** 2).sum(-1).argmin(-1))
    # with few steps the last x0-hat lies between points, unless it is clamped
    settings = {"seeds": range(300), "solver": DPMSolverPP(), "steps": 2, "dtype": torch.float64}
    free, held = (
        (sample(denoiser, (2, D), transform=one, **settings)[:, :, None] - points).norm(dim=-1).min(-1).values
        for one in (None, Clamp(denoiser.embedding))
    )
    assert float(held.max()) < 1e-9
    assert float((free > 0.1).double().mean()) > 0.05


# -- the network -------------------------------------------------------------------------------------------------------


def test_every_position_sees_every_other_its_place_the_time_and_the_class():
    """At the start a network says 0; with its zeroed layers drawn, each of what it is told changes each answer."""
    torch.manual_seed(0)
    network = SequenceTransformer((3, 4), width=16, depth=1, heads=2, classes=2, outputs=5).double()
    x, t, condition = torch.randn(1, 3, 4).double(), torch.tensor([0.4]).double(), torch.tensor([1])
    assert not network(x, t, condition).any()
    for layer in (network.last, network.blocks[0].modulation):
        nn.init.normal_(layer.weight, std=0.5)
    with torch.no_grad():
        said = network(x, t, condition)
        assert said.shape == (1, 3, 5)
        moved = x.clone()
        moved[0, 1, 2] += 1
        others = network(moved, t, condition), network(x, t + 0.3, condition), network(x, t, 0 * condition)
        for other in (*others, network(x, t), network(x[:, [1, 2, 0]], t, condition)[:, [2, 0, 1]]):
            assert float((other - said).abs().amax(-1).min()) > 1e-4


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: WordEmbedding(1, 4), "at least 2 words"),
        (lambda: WordEmbedding(4, 0), "at least 1 dimension"),
        (lambda: EmbeddingDenoiser(Constant(), Process(Sqrt()), embedding(), "eps"), "predicts x0 or words"),
        (
            lambda: EmbeddingDenoiser(Constant(), Process(Sqrt()), embedding(), "x0", EDM()),
            r"use EDM\(sigma_data=1\.0\)",
        ),
        (lambda: EmbeddingChain(Denoiser(Constant(), Process(Sqrt())), steps=3), "of an EmbeddingDenoiser"),
        (lambda: EmbeddingChain(words_denoiser()), "either steps= or grid="),
        (lambda: EmbeddingChain(words_denoiser(), steps=3, variance="best"), "variance"),
        (lambda: DiffusionLM(log_snr=math.inf), "finite"),
        (lambda: SequenceTransformer((3,)), r"sequences are \(L, D\)"),
        (lambda: SequenceTransformer((3, 0)), r"sequences are \(L, D\)"),
        (lambda: SequenceTransformer((3, 4), width=10, heads=4), "multiple of heads"),
        (lambda: SequenceTransformer((3, 4), width=0), "width must lie in"),
        (lambda: SequenceTransformer((3, 4), width=8, outputs=0), "outputs must be at least 1"),
    ],
)
def test_what_cannot_be_made_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.tensor([[0, 3]]), "words 0 to 2, got 0 to 3"),
        (torch.tensor([[-1, 0]]), "words 0 to 2, got -1 to 0"),
        (torch.zeros(1, 2), "whole numbers"),
        (torch.zeros(3, dtype=torch.int64), "whole numbers"),
    ],
)
def test_tokens_that_are_none_are_refused_everywhere(tokens, words):
    denoiser = exact("sqrt", "words")
    chain = EmbeddingChain(denoiser, steps=3)
    for ask in (
        denoiser.embedding,
        chain.elbo,
        chain.estimate,
        chain.importance_weighted,
        lambda x: DiffusionLM()(denoiser, x),
        lambda x: WordCrossEntropy()(denoiser, x),
        lambda x: rounding_accuracy(denoiser, x, 0.5),
    ):
        with pytest.raises(ValueError, match=words):
            ask(tokens)


def test_what_does_not_fit_is_refused():
    denoiser = words_denoiser()
    with pytest.raises(ValueError, match=r"should have returned shape \(2, 1, 3\), it returned \(2, 1, 2\)"):
        words_denoiser(_Echo())(torch.zeros(2, 1, D).double(), 0.5)
    with pytest.raises(ValueError, match='needs a denoiser with predicts="words"'):
        WordCrossEntropy()(exact("sqrt", "x0"), PAIRS)
    clamped = denoiser(torch.zeros(2, 1, D).double(), 0.5).with_x0(torch.zeros(2, 1, D).double())
    with pytest.raises(ValueError, match="no law of words"):
        denoiser.rounding(clamped)
    settings = {"seeds": range(2), "steps": 2}
    with pytest.raises(ValueError, match="length must be at least 1"):
        sample_words(denoiser, denoiser.embedding, 0, **settings)
    with pytest.raises(ValueError, match=r"a time in \(0, 1\]"):
        rounding_accuracy(denoiser, PAIRS, 0.0)
    network = SequenceTransformer((3, 4), width=8, depth=1, heads=2)
    assert network(torch.zeros(2, 3, 4), torch.zeros(2)).shape == (2, 3, 4)
    with pytest.raises(ValueError, match=r"made for \(3, 4\) vectors, got \(2, 4\)"):
        network(torch.zeros(2, 2, 4), torch.zeros(2))


class _Echo(nn.Module):
    def forward(self, x, t, condition=None):
        return x


def test_the_ladder_keeps_its_points_once():
    """A module that is registered twice is saved twice; and the plain ladder of vectors is another one."""
    chain = EmbeddingChain(words_denoiser(), steps=3)
    assert [name for name in chain.state_dict() if "embedding" in name] == ["model.denoiser.embedding.weight"]
    assert not DiffusionChain(chain.model.denoiser, steps=3).model.discrete
