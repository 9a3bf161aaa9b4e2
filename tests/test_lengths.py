"""Texts of any length up to three, of three tokens and padding that is still: every answer can be enumerated."""

import itertools
import math
import zlib

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy import integrate
from scipy.special import beta
from torch import nn

from kuosan.categorical import Categorical
from kuosan.discrete import (
    Ancestral,
    CategoricalChain,
    CategoricalDenoiser,
    CategoricalProcess,
    Confident,
    Euler,
    Remasking,
    TokenGuidance,
    sample_tokens,
    sampling,
)
from kuosan.discrete.lengths import PAD, QUICK, Lengths, Padded
from kuosan.discrete.objective import TokenBound
from kuosan.networks.tokens import TokenTransformer
from kuosan.process import Grid

V, LENGTH = 4, 3
#: Every text: one to three tokens, then padding.
ALL = torch.tensor(
    [[*text, *[PAD] * (LENGTH - n)] for n in range(1, LENGTH + 1) for text in itertools.product((1, 2, 3), repeat=n)]
)
OF_LENGTH = (ALL != PAD).sum(1).numpy()
P_LENGTH = np.array([0.2, 0.3, 0.5])
#: The probability of each text; its tokens depend on each other and on the length.
JOINT = np.concatenate(
    [P_LENGTH[n - 1] * np.random.default_rng(n).dirichlet(np.full(3**n, 0.5)) for n in range(1, LENGTH + 1)]
)
ENTROPY = -float(JOINT @ np.log(JOINT))
PROCESSES = {
    "masked": CategoricalProcess.masked(V, still=PAD),
    "uniform": CategoricalProcess.uniform(V, still=PAD),
    "law": CategoricalProcess(torch.tensor([0.0, 0.5, 0.2, 0.3], dtype=torch.float64), still=PAD),
    # one state more than the data have, which is no mask
    "wide": CategoricalProcess(torch.tensor([0.0, 0.3, 0.1, 0.2, 0.4], dtype=torch.float64), V, still=PAD),
}
#: Of each process, written out anew: the law of jumps.
JUMPS = {
    "masked": [0, 0, 0, 0, 1],
    "uniform": [0, 1 / 3, 1 / 3, 1 / 3],
    "law": [0, 0.5, 0.2, 0.3],
    "wide": [0, 0.3, 0.1, 0.2, 0.4],
}
RULES = [Ancestral(), Euler(), Remasking(), Confident(noise=0.5)]
#: The likeliest texts of one, two and three tokens.
TEXTS = [int(np.where(n == OF_LENGTH, JOINT, 0).argmax()) for n in (1, 2, 3)]


@pytest.fixture(params=list(PROCESSES))
def name(request):
    return request.param


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def matrix_of(name):
    """A row for each state that is jumped from; padding jumps to itself."""
    jumps = np.tile(np.array(JUMPS[name], dtype=float), (len(JUMPS[name]), 1))
    jumps[PAD] = np.eye(len(jumps))[PAD]
    return jumps


def transition(name, s, t):
    """q(x_t | x_s) as a matrix by scipy's exponential; at time 1 after more jumps than anyone could tell."""
    jumps = 700.0 if t == 1 else math.log((1 - s) / (1 - t))
    return scipy.linalg.expm(jumps * (matrix_of(name) - np.eye(len(JUMPS[name]))))


def texts_at(name):
    """(., L): every text at a time after 0, whose padding is at its end."""
    states = torch.tensor(list(itertools.product(range(len(JUMPS[name])), repeat=LENGTH)))
    padded = states == PAD
    return states[~(padded[:, :-1] & ~padded[:, 1:]).any(1) & ~padded[:, 0]]


class Exact(nn.Module):
    """Logits of the joint law: for each token, the sum over all texts that agree, weighed by what the others say.

    Nothing of the process under test is used: q(x_t|x_0) = (1-t) I + t J, with padding's row of J its own.
    """

    def __init__(self, name):
        super().__init__()
        self.masked, self.jumps = name == "masked", torch.tensor(matrix_of(name))

    def forward(self, x_t, t, condition=None):
        if len(x_t) < 1000 or bool((t != t[0]).any()):
            return self.answer(x_t, t)
        states = len(self.jumps)  # there are few texts: each is answered once
        every = torch.tensor(list(itertools.product(range(states), repeat=LENGTH)))
        return self.answer(every, t[:1].expand(len(every)))[(x_t * torch.tensor([states**2, states, 1])).sum(1)]

    def answer(self, x_t, t):
        t = t.double().clamp_min(0.5) if self.masked else t.double()  # of masks any time gives the same
        t = t[:, None, None]
        kernel = (1 - t) * torch.eye(len(self.jumps)).double() + t * self.jumps  # (B, from, to)
        said = torch.stack([kernel[torch.arange(len(x_t)), :, x_t[:, i]] for i in range(LENGTH)], 1)  # (B, L, from)
        of_text = torch.stack([said[:, i, ALL[:, i]] for i in range(LENGTH)], 1)  # (B, L, texts)
        logits = torch.zeros(*x_t.shape, V, dtype=torch.float64)
        for i in range(LENGTH):
            others = torch.tensor(JOINT) * torch.stack([of_text[:, j] for j in range(LENGTH) if j != i]).prod(0)
            for k in range(V):
                logits[:, i, k] = others[:, ALL[:, i] == k].sum(-1).log()
        return logits


class Plain(nn.Module):
    """Logits that depend on the place and the token alone."""

    def __init__(self, states=5, classes=0):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(states, LENGTH, V, generator=dice(9)))

    def forward(self, x, t, condition=None):
        return self.logits[x, torch.arange(x.shape[1])]


def lengths_of(*laws):
    """Lengths with these laws: of the classes, if there are several, and last of "any"."""
    lengths = Lengths(len(laws[0]), len(laws) - 1)
    with torch.no_grad():
        lengths.logits.copy_(torch.tensor(np.array(laws)).log() / QUICK)
    return lengths


def exact(name, law=P_LENGTH):
    return CategoricalDenoiser(Exact(name), PROCESSES[name], lengths=lengths_of(law))


# -- the process -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.3), (0.2, 0.7), (0.5, 1.0)])
def test_a_step_is_the_exponential_of_its_jumps(name, s, t):
    process, truth = PROCESSES[name], transition(name, s, t)
    x = torch.arange(process.states)[:, None]
    np.testing.assert_allclose(process.step(x, s, t).log_probs.exp()[:, 0], truth, atol=1e-12)
    np.testing.assert_allclose(process.likelihood(x, s, t)[:, 0], truth.T, atol=1e-12)
    whole = transition(name, 0, t)
    np.testing.assert_allclose(process.marginal(x, t).log_probs.exp()[:, 0], whole, atol=1e-12)
    assert truth[PAD].tolist() == pytest.approx(np.eye(process.states)[PAD].tolist(), abs=1e-12)


@pytest.mark.parametrize("t", [0.3, 1.0])
def test_corrupted_tokens_have_the_law_of_the_marginal(name, t):
    """Frequencies against scipy's matrix, 5 standard deviations of 20,000 draws; padding stays where it is."""
    x_0 = torch.arange(V)[:, None].expand(V, 20_000)
    x_t = PROCESSES[name].corrupt(x_0, torch.full((V,), t).double(), generator=dice())
    truth = transition(name, 0, t)[:V]
    found = np.stack([np.bincount(row, minlength=truth.shape[1]) / 20_000 for row in x_t.numpy()])
    np.testing.assert_allclose(found, truth, atol=5 * math.sqrt(0.25 / 20_000))
    assert torch.equal(x_t == PAD, x_0 == PAD)


def test_the_posterior_is_bayes(name):
    """q(x_s | x_t, x_0) by numpy from the matrices, wherever x_t can come of x_0; padding among them."""
    s, t = 0.3, 0.8
    a, b, whole = transition(name, 0, s), transition(name, s, t), transition(name, 0, t)
    for x_0, x_t in itertools.product(range(V), range(len(whole))):
        if whole[x_0, x_t] < 1e-12:
            continue
        truth = a[x_0] * b[:, x_t] / whole[x_0, x_t]
        found = PROCESSES[name].posterior(torch.tensor([[x_t]]), t, torch.tensor([[x_0]]), s)
        np.testing.assert_allclose(found.log_probs.exp()[0, 0], truth, atol=1e-12)


def test_the_rates_of_the_way_back_are_campbell_s(name):
    """J[j, x_t] q(x_t = j | x_0) / q(x_t | x_0) / (1 - t) by the matrices; of padding all are 0."""
    t, jumps = 0.6, matrix_of(name)
    whole = transition(name, 0, t)
    for x_0, x_t in itertools.product(range(V), range(len(whole))):
        if whole[x_0, x_t] < 1e-12:
            continue
        truth = jumps[:, x_t] * whole[x_0] / whole[x_0, x_t] / (1 - t)
        truth[x_t] = 0
        found = PROCESSES[name].reverse_rates(torch.tensor([[x_t]]), t, torch.tensor([[x_0]]))[0, 0]
        np.testing.assert_allclose(found, truth, atol=1e-12)
        if x_t == PAD:
            assert (truth == 0).all()


def test_the_mask_of_still_texts_is_the_state_after_the_vocabulary():
    assert PROCESSES["masked"].mask == V
    assert all(PROCESSES[name].mask is None for name in ("uniform", "law", "wide"))
    np.testing.assert_allclose(PROCESSES["uniform"].prior().log_probs.exp(), JUMPS["uniform"], atol=1e-12)


# -- how long texts are ------------------------------------------------------------------------------------------------

LAWS = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], P_LENGTH])


def test_each_class_has_its_own_lengths_and_any_is_the_last():
    lengths = lengths_of(*LAWS)
    found = lengths.law(4, torch.tensor([1, 0, -1, 1])).exp().detach()
    np.testing.assert_allclose(found, LAWS[[1, 0, 2, 1]], atol=1e-6)
    np.testing.assert_allclose(lengths.law(2).exp().detach(), LAWS[[2, 2]], atol=1e-6)
    alone = lengths_of(P_LENGTH)  # without classes a condition makes no difference
    np.testing.assert_allclose(alone.law(2, torch.tensor([5, 0])).exp().detach(), [P_LENGTH] * 2, atol=1e-6)
    np.testing.assert_allclose(Lengths(5, 2).law(1).exp().detach(), [[0.2] * 5], atol=1e-6)


@pytest.mark.parametrize(("least", "most"), [(1, 3), (2, 3), (1, 2), (2, 2), (1, 99)])
def test_lengths_are_drawn_as_often_as_they_are_likely_among_those_allowed(least, most):
    n = 30_000
    u = (torch.arange(n).double() + 0.5) / n
    drawn = lengths_of(*LAWS).draw(u, torch.zeros(n, dtype=torch.int64), least, most)
    truth = LAWS[0] * [least <= k <= most for k in (1, 2, 3)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=4)[1:] / n, truth / truth.sum(), atol=1e-4)


def test_each_text_has_its_own_least_length():
    drawn = lengths_of(P_LENGTH).draw(torch.zeros(4).double(), least=torch.tensor([0, 1, 2, 3]))
    assert drawn.tolist() == [1, 1, 2, 3]


def test_of_lengths_that_are_all_very_unlikely_one_is_still_drawn():
    """Between the bounds, as likely as they are to each other, even where each is under what a number can hold."""
    lengths = Lengths(4)
    with torch.no_grad():
        lengths.logits.copy_(torch.tensor([[-200.0, -200.0, 0.0, 0.0]]))
    drawn = lengths.draw((torch.arange(100).double() + 0.5) / 100, most=2)
    assert np.bincount(drawn).tolist() == [0, 50, 50]


def test_lengths_that_cannot_be_are_refused():
    for longest, classes in ((0, 0), (3, -1)):
        with pytest.raises(ValueError, match="lengths are of at least one token, for 0 or more classes"):
            Lengths(longest, classes)
    with pytest.raises(ValueError, match="the longest text has 3 tokens, and 4 are asked for"):
        Lengths(3).draw(torch.zeros(1), least=4)
    with pytest.raises(ValueError, match="the longest text has 2 tokens, and 3 are asked for"):
        Lengths(3).draw(torch.zeros(2), least=torch.tensor([1, 3]), most=2)


# -- the prior ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3])
def test_the_prior_is_that_of_the_length_times_that_of_each_token(name, width):
    """Of every row of states, padding anywhere, by hand; in sum, the probability of the lengths that have room."""
    prior = exact(name).prior()
    rows = torch.tensor(list(itertools.product(range(len(JUMPS[name])), repeat=width)))
    found = prior.log_prob(rows).exp().detach().numpy()
    assert found.shape == (len(rows),)
    for row, p in zip(rows.tolist(), found, strict=True):
        n = len([k for k in row if k != PAD])
        proper = n > 0 and PAD not in row[:n]
        truth = P_LENGTH[n - 1] * math.prod(JUMPS[name][k] for k in row[:n]) if proper else 0.0
        assert p == pytest.approx(truth, rel=1e-5, abs=1e-12)
    assert found.sum() == pytest.approx(P_LENGTH[:width].sum(), rel=1e-5)


@pytest.mark.parametrize("row", [[PAD, 1, 2], [1, PAD, 2], [PAD, PAD, 1], [PAD, PAD, PAD]])
def test_no_text_is_empty_or_goes_on_after_its_end(row):
    assert float(exact("uniform").prior().log_prob(torch.tensor([row])).detach()) == -math.inf


def test_samples_of_the_prior_have_its_law():
    """Each with its own law of lengths: 20,000 draws, 5 standard deviations."""
    token = Categorical(torch.tensor(JUMPS["law"]).log())
    rows = torch.tensor(LAWS).log().repeat_interleave(20_000, 0)
    x = Padded(rows, token, PAD).sample(generator=dice()).reshape(3, 20_000, LENGTH)
    assert not bool(((x[..., :-1] == PAD) & (x[..., 1:] != PAD)).any())
    for law, part in zip(LAWS, x, strict=True):
        n = (part != PAD).sum(1).numpy()
        np.testing.assert_allclose(np.bincount(n, minlength=4)[1:] / 20_000, law, atol=5 * math.sqrt(0.25 / 20_000))
        # of a token of a known length, and of the pair of length and token
        found = np.bincount(part[n == 3].flatten(), minlength=V) / (3 * (n == 3).sum())
        np.testing.assert_allclose(found, JUMPS["law"], atol=5 * math.sqrt(0.25 / (n == 3).sum()))


def test_the_middle_of_the_prior_is_the_likeliest_token_as_often_as_is_likeliest():
    token = Categorical(torch.tensor(JUMPS["law"]).log())
    assert Padded(torch.tensor(LAWS).log(), token, PAD).mean.tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 1]]


# -- the denoiser ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.4, 1.0])
def test_the_denoiser_is_bayes_and_padding_is_certain_where_it_stands(name, t):
    """p(x_0 of one token | x_t) by numpy, over all texts, weighed by what every token of x_t says."""
    x_t = texts_at(name)
    law = exact(name)(x_t, t).log_probs.exp().numpy()
    whole = transition(name, 0, t)
    for row, found in zip(x_t.tolist(), law, strict=True):
        chance = JOINT * np.prod([whole[ALL[:, i], row[i]] for i in range(LENGTH)], axis=0)
        if chance.sum() < 1e-15:
            continue
        for i in range(LENGTH):
            truth = [chance[(ALL[:, i] == k).numpy()].sum() / chance.sum() for k in range(len(whole))]
            np.testing.assert_allclose(found[i], truth, atol=1e-9)
            assert found[i][PAD] == (row[i] == PAD)


def test_no_network_makes_padding_of_a_token(name):
    """Even one that says nothing else."""

    class Stops(nn.Module):
        def forward(self, x, t, condition=None):
            return torch.tensor([50.0, 0.0, 0.0, 0.0]).expand(*x.shape, V)

    x_t = texts_at(name)
    denoiser = CategoricalDenoiser(Stops(), PROCESSES[name], lengths=lengths_of(P_LENGTH))
    for t in (1e-3, 0.5, 1.0):
        law = denoiser(x_t, t).log_probs
        assert not bool(law.isnan().any())
        assert torch.equal(law[..., PAD] == 0, x_t == PAD)
        assert torch.equal(law[..., PAD] == -math.inf, x_t != PAD)


def transformer(vocabulary=V, length=LENGTH, **settings):
    torch.manual_seed(1)
    network = TokenTransformer(vocabulary + 1, vocabulary, length, width=16, depth=1, heads=2, **settings)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return network


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("still", [None, PAD])
def test_the_surprise_of_masked_tokens_is_the_cross_entropy_of_the_network_s_logits(still, timed):
    """By numpy from the logits; with padding that is still, it is not among what a masked token may be."""
    network = transformer()
    lengths = None if still is None else lengths_of(P_LENGTH)
    denoiser = CategoricalDenoiser(network, CategoricalProcess.masked(V, still), timed, lengths)
    x_0, t = ALL[TEXTS], torch.tensor([0.3, 0.6, 0.9]).double()
    x_t = torch.where(torch.tensor([[True, False, False], [False, True, False], [True, False, True]]), V, x_0)
    logits = network(x_t, t.float() if timed else torch.zeros(3)).detach().double().numpy()
    p = np.exp(logits)
    if still is not None:
        p[..., PAD] = 0
    p /= p.sum(-1, keepdims=True)
    truth = np.where(x_t == V, -np.log(np.take_along_axis(p, x_0.numpy()[..., None], -1)[..., 0]), 0.0)
    found = denoiser.surprise(x_t, t, x_0).detach()
    np.testing.assert_allclose(found, truth, atol=1e-5)
    whole = denoiser(x_t, t).log_prob(x_0).detach()
    np.testing.assert_allclose(torch.where(x_t == V, -whole, 0.0), truth, atol=1e-5)


def test_of_a_text_that_shows_itself_nothing_is_surprising():
    denoiser = CategoricalDenoiser(transformer(), PROCESSES["masked"], lengths=lengths_of(P_LENGTH))
    assert denoiser.surprise(ALL, torch.full((len(ALL),), 0.1), ALL).tolist() == [[0.0] * LENGTH] * len(ALL)


# -- the bound ---------------------------------------------------------------------------------------------------------


def exact_rate(name, text):
    """t -> the mean over all x_t, by enumeration with scipy's matrices, of what the continuous form costs there."""
    chain = CategoricalChain(exact(name), steps=1)
    states = texts_at(name)

    def rate(t):
        whole = transition(name, 0, t)
        chance = np.prod([whole[text[i], states[:, i].numpy()] for i in range(LENGTH)], axis=0)
        possible = chance > 0
        times = torch.full((int(possible.sum()),), t, dtype=torch.float64)
        return float(chance[possible] @ chain.rate(states[possible], times, text.expand(len(times), -1)).numpy())

    return rate


@pytest.mark.parametrize("k", TEXTS)
def test_the_continuous_bound_of_the_exact_denoiser_is_the_log_probability(name, k):
    """What its length costs, and of its tokens the integral over time."""
    rate = exact_rate(name, ALL[k])
    total = integrate.fixed_quad(lambda t: np.array([rate(float(one)) for one in t]), 0, 1, n=40)[0]
    assert total - math.log(P_LENGTH[OF_LENGTH[k] - 1]) == pytest.approx(-math.log(JOINT[k]), rel=1e-3)


@pytest.mark.parametrize("k", TEXTS)
def test_the_prior_s_term_is_what_the_length_costs(name, k):
    """-log p(n); where the law of jumps is not even, so on average, to 5 standard errors of 4,000 draws."""
    prior = CategoricalChain(exact(name), steps=1).elbo(ALL[k].expand(500, -1), draws=8).prior
    truth = -math.log(P_LENGTH[OF_LENGTH[k] - 1])
    if name in ("masked", "uniform"):
        np.testing.assert_allclose(prior, truth, atol=1e-6)
    assert float(prior.mean()) == pytest.approx(truth, abs=5 * float(prior.std()) / math.sqrt(500) + 1e-6)


def exact_bound(name, k, times):
    """log-bound of one text on a grid, by enumerating every x_t with numpy: independent of the chain under test."""
    denoiser, states, x = exact(name), texts_at(name), ALL[k].tolist()
    total = math.log(P_LENGTH[OF_LENGTH[k] - 1])
    for s, t in zip((0.0, *times[:-1]), times, strict=True):
        a, b, whole = transition(name, 0, s), transition(name, s, t), transition(name, 0, t)
        chance = np.prod([whole[x[i], states[:, i].numpy()] for i in range(LENGTH)], axis=0)
        law = denoiser(states, t).log_probs.exp().numpy()[..., :V]
        for row in np.nonzero(chance > 1e-15)[0]:
            for i in range(LENGTH):
                x_t = int(states[row, i])
                came = whole[:V, x_t, None]
                back = np.where(came > 1e-15, a[:V] * b[:, x_t] / came.clip(1e-15), 0)
                q, p = back[x[i]], law[row, i] @ back
                total -= chance[row] * sum(q[j] * math.log(q[j] / p[j]) for j in range(len(q)) if q[j] > 1e-15)
    return total


@pytest.mark.parametrize("k", TEXTS)
def test_the_bound_is_its_definition_enumerated(name, k):
    """Every form: each term's mean over all x_t that can be, to 5 standard errors of 4,000 draws."""
    times = (0.1, 0.4, 0.8, 1.0)
    truth = exact_bound(name, k, times)
    chain = CategoricalChain(exact(name), grid=Grid(times[::-1]))
    x = ALL[k].expand(500, LENGTH)
    for settings in ({"terms": "all"}, {"terms": "stratified"}, {"estimator": "path", "terms": "shared"}):
        total = chain.elbo(x, draws=8, seed=3, **settings).total
        error = float(total.std()) / math.sqrt(len(x))
        assert float(total.mean()) == pytest.approx(truth, abs=5 * error + 1e-6)
    with torch.no_grad():
        estimate = chain.estimate(ALL[k].expand(4000, -1), generator=dice(1))
    error = float(estimate.std()) / math.sqrt(4000)
    assert float(estimate.mean()) == pytest.approx(truth, abs=5 * error + 1e-6)


@pytest.mark.parametrize("name", ["masked", "law"])
def test_the_discrete_bound_tends_to_the_continuous_one(name):
    k = int(JOINT.argmax())
    grids = [PROCESSES[name].grid(steps).times[::-1] for steps in (2, 8, 32)]
    gaps = [abs(math.log(JOINT[k]) - exact_bound(name, k, times)) for times in grids]
    assert OF_LENGTH[k] > 1
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[1] / gaps[2] == pytest.approx(4, rel=0.25)


@pytest.mark.parametrize("k", TEXTS)
def test_the_loss_and_the_continuous_estimate_are_minus_the_log_probability(name, k):
    """In the mean over draws, of the exact denoiser, but for what lies before 0.001: 5 standard errors."""
    chain = CategoricalChain(exact(name), grid=Grid((1.0, 0.001)), form="continuous")
    x = ALL[[k]].expand(10_000, LENGTH)
    with torch.no_grad():
        loss = TokenBound()(chain, x, generator=dice(2))
    bound = chain.elbo(x, estimator="continuous").total
    for found in (loss, -bound):
        error = float(found.std()) / math.sqrt(len(x))
        assert float(found.mean()) == pytest.approx(-math.log(JOINT[k]), abs=5 * error + 1e-2)
        assert error < 0.03 * -math.log(JOINT[k])


def test_wrong_lengths_cost_their_divergence(name):
    """Over all texts, by their probability: of the loss and of the bound, draw by draw the same otherwise."""
    wrong = np.array([0.6, 0.3, 0.1])
    truth = float(P_LENGTH @ np.log(P_LENGTH / wrong))
    u, noise = torch.rand(len(ALL), generator=dice()), torch.randn(ALL.shape, generator=dice())
    chains = [CategoricalChain(exact(name, law), grid=Grid((1.0, 0.1))) for law in (P_LENGTH, wrong)]
    with torch.no_grad():
        right, more = (chain.loss(ALL, u=u, noise=noise) for chain in chains)
    assert float(torch.tensor(JOINT) @ (more - right).double()) == pytest.approx(truth, abs=1e-6)
    right, more = (chain.elbo(ALL, seed=5).total for chain in chains)
    assert float(torch.tensor(JOINT) @ (right - more).double()) == pytest.approx(truth, abs=1e-6)


def test_the_gradient_of_the_lengths_is_that_of_a_histogram():
    """Of -log p(n): QUICK times (p - [n]), of each class its own texts'; nothing else of the loss has any."""
    lengths = lengths_of(*LAWS)
    chain = CategoricalChain(CategoricalDenoiser(Plain(), PROCESSES["masked"], lengths=lengths), steps=1)
    chain.loss(ALL[TEXTS], torch.tensor([1, 1, -1]), u=torch.full((3,), 0.5)).sum().backward()
    of_n = np.eye(3)[OF_LENGTH[TEXTS] - 1]
    truth = QUICK * np.array([np.zeros(3), (LAWS[1] - of_n[:2]).sum(0), LAWS[2] - of_n[2]])
    np.testing.assert_allclose(lengths.logits.grad, truth, atol=1e-5)
    assert float(chain.model.denoiser.network.logits.grad.abs().sum()) > 0


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fast_noise(monkeypatch):
    """One generator of each purpose for all samples: what each depends on is another test's business."""

    class Fast:
        def __init__(self, seeds, shape, dtype, purpose):
            self.generator = torch.Generator().manual_seed(zlib.crc32(purpose.encode()))
            self.shape, self.dtype = (len(seeds), *shape), dtype

        def draw(self):
            return torch.randn(self.shape, generator=self.generator, dtype=self.dtype)

    monkeypatch.setattr(sampling, "Noise", Fast)


def draw(model, n=40_000, **settings):
    return sample_tokens(model, LENGTH, seeds=range(n), batch_size=n, **settings).tokens


def frequencies(tokens):
    """Of each text; what is no text (padding inside, a mask, nothing at all) is refused."""
    same = (tokens.unique(dim=0)[:, None] == ALL).all(-1)
    assert bool(same.any(1).all())
    place = {tuple(text): k for k, text in enumerate(ALL.tolist())}
    texts, counts = np.unique(tokens.numpy(), axis=0, return_counts=True)
    found = np.zeros(len(ALL))
    found[[place[tuple(text)] for text in texts.tolist()]] = counts / len(tokens)
    return found


def total_variation(tokens, law=JOINT):
    return 0.5 * np.abs(frequencies(tokens) - law).sum()


def rules_of(name):
    return [rule for rule in RULES if name == "masked" or not rule.needs_mask]


@pytest.mark.usefixtures("fast_noise")
@pytest.mark.slow
@pytest.mark.parametrize("rule", [Ancestral(), Euler()], ids=["ancestral", "euler"])
def test_in_many_steps_the_samples_have_the_law_of_the_data(name, rule):
    """Total variation under .03, of which the noise of 20,000 samples is about .012."""
    assert total_variation(draw(exact(name), n=20_000, steps=80, rule=rule)) < 0.03


@pytest.mark.usefixtures("fast_noise")
@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_in_one_step_only_the_length_is_known_to_all_tokens(name):
    """Truth: p(n) times the product of the marginals of texts of that length."""
    product = np.zeros(len(ALL))
    for n in (1, 2, 3):
        of_n = n == OF_LENGTH
        here = JOINT[of_n] / JOINT[of_n].sum()
        chances = [[here[(ALL[of_n][:, i] == k).numpy()].sum() for k in range(V)] for i in range(n)]
        product[of_n] = [P_LENGTH[n - 1] * math.prod(chances[i][x[i]] for i in range(n)) for x in ALL[of_n].tolist()]
    tokens = draw(exact(name), steps=1)
    assert total_variation(tokens, product) < 0.025
    assert total_variation(tokens) > 0.1


def test_lengths_that_are_asked_for_are_met(name):
    asked = torch.tensor([1, 2, 3] * 20)
    for rule in rules_of(name):
        tokens = sample_tokens(exact(name), LENGTH, seeds=range(60), steps=4, rule=rule, lengths=asked).tokens
        frequencies(tokens)
        assert torch.equal((tokens != PAD).sum(1), asked)


def test_texts_may_be_shorter_than_the_model_s_longest():
    tokens = sample_tokens(
        CategoricalDenoiser(Plain(), PROCESSES["masked"], lengths=lengths_of(P_LENGTH)), 2, seeds=range(400), steps=2
    ).tokens
    assert tokens.shape == (400, 2)
    share = float((tokens[:, 1] == PAD).double().mean())
    assert share == pytest.approx(0.2 / 0.5, abs=5 * math.sqrt(0.25 / 400))


@pytest.mark.usefixtures("fast_noise")
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_lengths_are_drawn_from_the_law_of_the_class(name, guided):
    """20,000 draws of each, 5 standard deviations."""
    denoiser = CategoricalDenoiser(Plain(), PROCESSES[name], lengths=lengths_of(*LAWS))
    model = TokenGuidance(denoiser, 1.0) if guided else denoiser
    tokens = draw(model, n=60_000, steps=2, condition=torch.tensor([0, 1, -1]).repeat_interleave(20_000))
    frequencies(tokens)
    n = (tokens != PAD).sum(1).reshape(3, -1).numpy()
    found = np.stack([np.bincount(part, minlength=4)[1:] / 20_000 for part in n])
    np.testing.assert_allclose(found, LAWS, atol=5 * math.sqrt(0.25 / 20_000))


@pytest.mark.usefixtures("fast_noise")
def test_known_tokens_stay_the_length_leaves_them_room_and_the_others_follow():
    """Truth: of the lengths with room the law, and of the texts of that length that have the token, theirs."""
    tokens = draw(exact("masked"), n=20_000, steps=40, known=torch.tensor([-1, 2, -1]))
    truth = np.where((ALL[:, 1] == 2).numpy(), JOINT, 0.0)
    for n in (2, 3):
        here = n == OF_LENGTH
        truth[here] *= P_LENGTH[n - 1] / P_LENGTH[1:].sum() / truth[here].sum()
    assert total_variation(tokens, truth) < 0.025


@pytest.mark.parametrize("rule", RULES)
def test_known_tokens_and_lengths_of_each_text_are_kept(rule):
    known = torch.tensor([[3, -1, -1], [-1, -1, 1], [-1, 2, -1], [-1, -1, -1]]).repeat(10, 1)
    least = torch.tensor([1, 3, 2, 1]).repeat(10)
    for name in ("masked",) if rule.needs_mask else PROCESSES:
        for lengths in (None, torch.tensor([2, 3, 2, 1]).repeat(10)):
            tokens = sample_tokens(
                exact(name), LENGTH, seeds=range(40), steps=5, rule=rule, known=known, lengths=lengths
            ).tokens
            n = (tokens != PAD).sum(1)
            frequencies(tokens)
            assert torch.equal(tokens[known >= 0], known[known >= 0])
            assert bool((n >= least).all()) if lengths is None else torch.equal(n, lengths)


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_a_sample_depends_on_its_seed_alone(name):
    model = CategoricalDenoiser(Plain(), PROCESSES[name], lengths=lengths_of(*LAWS))
    condition = torch.tensor([0, 1, -1, 1] * 3)
    for rule in rules_of(name):
        how = {"steps": 5, "rule": rule}
        together = sample_tokens(model, LENGTH, seeds=range(12), condition=condition, **how).tokens
        alone = [sample_tokens(model, LENGTH, seeds=[i], condition=condition[i : i + 1], **how) for i in range(12)]
        parts = sample_tokens(model, LENGTH, seeds=range(12), condition=condition, batch_size=5, **how).tokens
        assert torch.equal(together, torch.cat([one.tokens for one in alone]))
        assert torch.equal(together, parts)
        assert len((together != PAD).sum(1).unique()) > 1


def test_the_length_and_the_tokens_of_a_seed_are_drawn_apart():
    """Of texts of one drawn length, the tokens are as they are of all: no number serves twice."""
    even = torch.zeros(5, LENGTH, V)
    model = CategoricalDenoiser(Plain(), PROCESSES["masked"], lengths=lengths_of([0.5, 0.25, 0.25]))
    with torch.no_grad():
        model.network.logits.copy_(even)
    tokens = sample_tokens(model, LENGTH, seeds=range(3000), steps=1).tokens
    for n in (1, 2, 3):
        first = tokens[(tokens != PAD).sum(1) == n, 0]
        found = np.bincount(first, minlength=V)[1:] / len(first)
        np.testing.assert_allclose(found, 1 / 3, atol=5 * math.sqrt(0.25 / len(first)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lengths": torch.tensor([0, 1])}, "lengths are 1 to 3, got 0 to 1"),
        ({"lengths": torch.tensor([1, 4])}, "lengths are 1 to 3, got 1 to 4"),
        ({"lengths": torch.tensor([1])}, "a whole number for each of 2 texts"),
        ({"lengths": torch.tensor([1.0, 2.0])}, "a whole number for each of 2 texts"),
        ({"lengths": torch.tensor([1, 3]), "known": torch.tensor([-1, 2, -1])}, "lies beyond the length"),
        ({"known": torch.tensor([-1, PAD, -1])}, "is what follows the end: say lengths="),
        ({"known": torch.tensor([-1, -1, -1, 1]), "length": 4}, "the longest text has 3 tokens, and 4 are asked for"),
        ({"name": None, "lengths": torch.tensor([1, 2])}, "of a model that does not know them"),
    ],
)
def test_lengths_that_cannot_be_sampled_are_refused(settings, words):
    settings = {"seeds": [0, 1], "steps": 3, "length": LENGTH, "name": "masked"} | settings
    name = settings.pop("name")
    model = CategoricalDenoiser(Plain(), CategoricalProcess.masked(V)) if name is None else exact(name)
    with pytest.raises(ValueError, match=words):
        sample_tokens(model, settings.pop("length"), **settings)


# -- training ----------------------------------------------------------------------------------------------------------


def cost_of(denoiser, k):
    r"""Minus the continuous bound of masks, exactly: over every set M of masked tokens, of n, what they cost times
    :math:`\int t^{|M|-1}(1-t)^{n-|M|} dt`, from the network's own logits."""
    n = OF_LENGTH[k]
    total = -float(torch.log_softmax(QUICK * denoiser.lengths.logits[-1].detach(), -1)[n - 1])
    for m in range(1, n + 1):
        for places in map(list, itertools.combinations(range(n), m)):
            x_t = ALL[[k]].clone()
            x_t[0, places] = V
            p = torch.softmax(denoiser.network(x_t, torch.zeros(1)).double()[0, :, 1:], -1)  # any token but padding
            total -= beta(m, n - m + 1) * float(p[places, ALL[k, places] - 1].log().sum())
    return total


def test_the_exact_denoiser_s_cost_over_all_sets_of_masks_is_the_log_probability():
    """The truth that the next test uses, against the joint law."""
    denoiser = exact("masked")
    for k in TEXTS:
        assert cost_of(denoiser, k) == pytest.approx(-math.log(JOINT[k]), rel=1e-5)


def test_a_small_transformer_learns_the_joint_law_and_its_lengths():
    """Within a tenth of the entropy; its histogram within .03 of the lengths."""
    torch.manual_seed(0)
    network = TokenTransformer(V + 1, V, LENGTH, width=32, depth=1, heads=2)
    denoiser = CategoricalDenoiser(network, PROCESSES["masked"], lengths=Lengths(LENGTH))
    chain = CategoricalChain(denoiser, grid=Grid((1.0, 0.001)), form="continuous")
    optimizer = torch.optim.Adam(denoiser.parameters(), 5e-3)
    picked = torch.tensor(np.random.default_rng(0).choice(len(ALL), (250, 256), p=JOINT))
    for step, index in enumerate(picked):
        optimizer.zero_grad()
        TokenBound()(chain, ALL[index], generator=dice(step)).mean().backward()
        optimizer.step()
    with torch.no_grad():
        cost = float(JOINT @ [cost_of(denoiser, k) for k in range(len(ALL))])
        np.testing.assert_allclose(denoiser.lengths.law(1)[0].exp(), P_LENGTH, atol=0.05)
    assert ENTROPY - 1e-3 < cost < 1.1 * ENTROPY


@pytest.mark.parametrize("process", list(PROCESSES))
@pytest.mark.parametrize("network", ["plain", "transformer"])
def test_padding_that_a_whole_batch_has_may_be_left_out(process, network):
    """The same loss of the same texts, times and noise."""
    short = ALL[OF_LENGTH <= 2]
    model = Plain() if network == "plain" else transformer(padding=PAD)
    denoiser = CategoricalDenoiser(model, PROCESSES[process], lengths=lengths_of(P_LENGTH))
    chain = CategoricalChain(denoiser, steps=1)
    u, noise = torch.rand(len(short), generator=dice(3)), torch.randn(short.shape, generator=dice(4))
    with torch.no_grad():
        whole, trimmed = (TokenBound()(chain, x, t=u, noise=noise) for x in (short, short[:, :2]))
    assert float(whole.std()) > 0.1
    torch.testing.assert_close(trimmed, whole, rtol=1e-5, atol=1e-5)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: CategoricalProcess(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), still=0),
        lambda: CategoricalProcess(torch.tensor([0.5, 0.5, 0.0]), still=0),
        lambda: CategoricalProcess(torch.tensor([0.5, 0.5, 0.0]), vocabulary=2, still=2),
        lambda: CategoricalProcess.masked(3, still=3),
        lambda: CategoricalProcess.masked(3, still=-1),
        lambda: CategoricalProcess.uniform(3, still=3),
    ],
    ids=["matrix", "jumped to", "beyond the vocabulary", "the mask", "negative", "uniform"],
)
def test_a_still_state_that_cannot_be_is_refused(make):
    with pytest.raises(ValueError, match="a still state is one of the vocabulary that a law of jumps"):
        make()


def test_lengths_and_a_still_state_go_together():
    for process, lengths in ((PROCESSES["masked"], None), (CategoricalProcess.masked(V), Lengths(LENGTH))):
        with pytest.raises(ValueError, match="lengths are of a process with a still state"):
            CategoricalDenoiser(Plain(), process, lengths=lengths)
