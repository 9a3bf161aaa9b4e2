"""Categorical diffusion on a vocabulary so small that every answer can be enumerated."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate
from torch import nn

from enumerated import ALL, JOINT, LENGTH, PROCESSES, Exact, V, exact, jumps_of, transition
from kuosan.categorical import Categorical
from kuosan.discrete import CategoricalChain, CategoricalDenoiser, CategoricalProcess
from kuosan.discrete.objective import TokenBound
from kuosan.networks.tokens import TokenTransformer
from kuosan.process import Grid


@pytest.fixture(params=list(PROCESSES))
def process(request):
    return PROCESSES[request.param]


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


# -- the law of a token ------------------------------------------------------------------------------------------------


def test_a_categorical_samples_each_state_as_often_as_it_says():
    p = np.array([0.0, 0.25, 0.0, 0.6, 0.15, 0.0])
    law = Categorical(torch.tensor(p).log().expand(100_000, 6))
    count = np.bincount(law.sample(generator=dice()).numpy(), minlength=6) / 100_000
    np.testing.assert_allclose(count, p, atol=5 * math.sqrt(0.25 / 100_000))
    assert (count[p == 0] == 0).all()


def test_no_noise_reaches_a_state_that_is_impossible():
    law = Categorical(torch.tensor([0.0, 0.3, 0.7, 0.0]).log().expand(4, 4))
    assert law.sample(torch.tensor([-50.0, -8.0, 8.0, 50.0])).tolist() == [1, 1, 2, 2]


def test_entropy_and_divergence_are_the_sums_that_define_them():
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.25, 0.5, 0.25])
    one, other = Categorical(torch.tensor(p).log()), Categorical(torch.tensor(q).log())
    assert float(one.entropy()) == pytest.approx(math.log(2))
    assert float(one.kl(other)) == pytest.approx(0.5 * math.log(2))
    assert float(other.kl(one)) == math.inf
    assert float(one.kl(one)) == 0


def test_the_gradient_of_a_divergence_is_finite_where_a_state_is_impossible():
    logits = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64, requires_grad=True)
    point = Categorical(torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64).log())
    point.kl(Categorical(torch.log_softmax(logits, -1))).backward()
    truth = torch.softmax(logits.detach(), -1) - torch.tensor([0.0, 1.0, 0.0])
    torch.testing.assert_close(logits.grad, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("x", [[3], [-1]])
def test_a_state_that_is_not_one_has_no_probability(x):
    with pytest.raises(ValueError, match="tokens are states 0 to 2"):
        Categorical(torch.zeros(1, 3)).log_prob(torch.tensor(x))


# -- kernels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.3), (0.2, 0.7), (0.5, 1.0)])
def test_a_step_is_the_exponential_of_its_jumps(process, s, t):
    x = torch.arange(process.states)[:, None]
    np.testing.assert_allclose(process.step(x, s, t).log_probs.exp()[:, 0], transition(process, s, t), atol=1e-12)
    found = process.likelihood(x, s, t)[:, 0].numpy()
    np.testing.assert_allclose(found, transition(process, s, t).T, atol=1e-12)


def test_each_example_has_its_own_time(process):
    x, t = torch.tensor([[0, 1], [2, 1], [1, 1]]), torch.tensor([0.2, 0.9, 0.5]).double()
    together = process.marginal(x, t).log_probs
    for i in range(3):
        torch.testing.assert_close(together[i], process.marginal(x[i : i + 1], float(t[i])).log_probs[0])


@pytest.mark.parametrize("t", [0.3, 0.9, 1.0])
def test_corrupted_tokens_have_the_law_of_the_marginal(process, t):
    """Frequencies against scipy's matrix, 5 standard deviations of 20,000 draws; no state that cannot be."""
    x_0 = torch.arange(V)[:, None].expand(V, 20_000)
    x_t = process.corrupt(x_0, torch.full((V,), t).double(), generator=dice())
    truth = transition(process, 0, t)[:V]
    found = np.stack([np.bincount(row, minlength=process.states) / 20_000 for row in x_t.numpy()])
    np.testing.assert_allclose(found, truth, atol=5 * math.sqrt(0.25 / 20_000))
    assert (found[truth < 1e-12] == 0).all()


def test_the_posterior_is_bayes(process):
    """q(x_s | x_t, x_0) by numpy from the matrices, wherever x_t can come of x_0."""
    s, t = 0.3, 0.8
    a, b, whole = transition(process, 0, s), transition(process, s, t), transition(process, 0, t)
    for x_0, x_t in itertools.product(range(V), range(process.states)):
        if whole[x_0, x_t] < 1e-12:
            continue
        truth = a[x_0] * b[:, x_t] / whole[x_0, x_t]
        found = process.posterior(torch.tensor([[x_t]]), t, torch.tensor([[x_0]]), s)
        np.testing.assert_allclose(found.log_probs.exp()[0, 0], truth, atol=1e-12)


def test_the_posterior_of_a_law_is_the_mean_of_posteriors(process):
    s, t, x_t = 0.3, 0.8, torch.tensor([[0], [1], [process.states - 1]])
    law = Categorical.of(process.likelihood(x_t, 0.0, t) * torch.tensor([0.2, 0.5, 0.3] + [0.0] * (process.states - V)))
    chance = law.log_probs.exp()
    of_each = [process.posterior(x_t, t, torch.full_like(x_t, k), s).log_probs.exp().nan_to_num() for k in range(V)]
    truth = sum(chance[..., k : k + 1] * of_each[k] for k in range(V))
    torch.testing.assert_close(process.posterior(x_t, t, law, s).log_probs.exp(), truth, rtol=1e-10, atol=1e-12)


def test_to_the_data_the_posterior_of_a_law_is_the_law(process):
    x_t = torch.tensor([[0, 1, 2], [2, 2, process.states - 1]])
    law = exact(process)(x_t, 0.6)
    back = process.posterior(x_t, 0.6, law, 0.0)
    torch.testing.assert_close(back.log_probs.exp(), law.log_probs.exp(), rtol=1e-10, atol=1e-12)


def test_the_rates_of_the_way_back_are_those_of_short_steps(process):
    """(q(x_{t-h} = j | x_t, x_0) - [j = x_t]) / h, extrapolated to h = 0."""
    t, h = 0.6, 1e-4
    for x_0, x_t in itertools.product(range(V), range(process.states)):
        if transition(process, 0, t)[x_0, x_t] < 1e-12:
            continue
        x, y = torch.tensor([[x_t]]), torch.tensor([[x_0]])
        one, half = (process.posterior(x, t, y, t - step).log_probs.exp()[0, 0] / step for step in (h, h / 2))
        truth = 2 * half - one
        truth[x_t] = 0
        torch.testing.assert_close(process.reverse_rates(x, t, y)[0, 0], truth, rtol=1e-5, atol=1e-5)


def test_at_time_one_nothing_is_left_of_the_data(process):
    x = torch.tensor([[0], [1], [2]])
    prior = process.prior().log_probs.exp()
    torch.testing.assert_close(process.marginal(x, 1.0).log_probs.exp(), prior.expand(3, 1, -1), rtol=0, atol=1e-12)
    np.testing.assert_allclose(prior.numpy() @ jumps_of(process), prior, atol=1e-12)


# -- the bound ---------------------------------------------------------------------------------------------------------


def exact_bound(process, x, times):
    """log-bound of one text on a grid, by enumerating every x_t with numpy: independent of the chain under test."""
    denoiser = exact(process)
    states = torch.tensor(list(itertools.product(range(process.states), repeat=LENGTH)))
    total = 0.0
    for s, t in zip((0.0, *times[:-1]), times, strict=True):
        chance = np.ones(len(states))
        for i in range(LENGTH):
            chance *= transition(process, 0, t)[x[i], states[:, i].numpy()]
        possible = chance > 1e-15
        law = denoiser(states, t).log_probs.exp().detach().numpy()[..., :V]
        a, b = transition(process, 0, s), transition(process, s, t)
        whole = transition(process, 0, t)
        for row in np.nonzero(possible)[0]:
            cost = 0.0
            for i in range(LENGTH):
                x_t = int(states[row, i])
                back = np.where(whole[:V, x_t, None] > 1e-15, a[:V] * b[:, x_t] / whole[:V, x_t, None].clip(1e-15), 0)
                q, p = back[x[i]], law[row, i] @ back
                cost += sum(q[j] * math.log(q[j] / p[j]) for j in range(len(q)) if q[j] > 1e-15)
            total -= chance[row] * cost
    return total


@pytest.mark.parametrize("times", [(1.0,), (0.5, 1.0), (0.1, 0.4, 0.8, 1.0)])
def test_the_bound_is_its_definition_enumerated(process, times):
    """Every form: each term's mean over all x_t that can be, to 5 standard errors of 4,000 draws."""
    text = ALL[7]
    truth = exact_bound(process, text.tolist(), times)
    chain = CategoricalChain(exact(process), grid=Grid(times[::-1]))
    x = text.expand(500, LENGTH)
    for settings in ({"terms": "all"}, {"terms": "stratified"}, {"estimator": "path", "terms": "shared"}):
        bound = chain.elbo(x, draws=8, seed=3, **settings)
        error = float(bound.total.std()) / math.sqrt(len(x))
        assert float(bound.total.mean()) == pytest.approx(truth, abs=5 * error + 1e-9)
    assert truth <= math.log(JOINT[7]) + 1e-9


def exact_rate(process, text):
    """t -> the mean over all x_t, by enumeration with scipy's matrices, of what the continuous form costs there."""
    chain = CategoricalChain(exact(process), steps=1)
    states = torch.tensor(list(itertools.product(range(process.states), repeat=LENGTH)))

    def rate(t):
        chance = np.prod([transition(process, 0, t)[text[i], states[:, i].numpy()] for i in range(LENGTH)], axis=0)
        possible = chance > 0
        times = torch.full((int(possible.sum()),), t, dtype=torch.float64)
        return float(chance[possible] @ chain.rate(states[possible], times, text.expand(len(times), -1)).numpy())

    return rate


def test_the_continuous_bound_of_the_exact_denoiser_is_the_log_probability(process):
    """One factorised step loses what the tokens know of each other; in infinitely many they jump one at a time."""
    total = integrate.quad(exact_rate(process, ALL[7]), 1e-9, 1 - 1e-9, epsabs=1e-6, epsrel=1e-6, limit=200)[0]
    assert total == pytest.approx(-math.log(JOINT[7]), rel=1e-4)


def test_the_estimate_of_the_continuous_bound_is_its_integral(process):
    """From 0.2 to 0.7, in 20,000 draws: 5 standard errors."""
    truth = integrate.quad(exact_rate(process, ALL[7]), 0.2, 0.7, epsabs=1e-6)[0]
    u = (torch.arange(20_000).double() + 0.5) / 20_000
    start, end = torch.tensor([0.2, 0.7]).double()
    chain = CategoricalChain(exact(process), steps=1)
    found = chain.integral(start, end, u, ALL[7].expand(20_000, -1), None, None, dice(5))
    error = float(found.std()) / math.sqrt(len(found))
    assert float(found.mean()) == pytest.approx(truth, abs=5 * error)
    assert error < 0.03 * truth


@pytest.mark.parametrize("form", ["matching", "continuous"])
def test_the_gradient_of_an_estimate_is_that_of_finite_differences(process, form):
    """Of the logits of a network that always says the same."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64))

        def forward(self, x, t, condition=None):
            return self.logits.expand(*x.shape, V)

    network = Constant()
    chain = CategoricalChain(CategoricalDenoiser(network, process), steps=8, form=form)
    x, noise = ALL[:6], torch.randn(6, LENGTH, generator=dice(), dtype=torch.float64)
    u = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)

    def value():
        return chain.estimate(x, noise=noise, u=u).sum()

    value().backward()
    for k in range(V):
        with torch.no_grad():
            network.logits[k] += 1e-5
            above = float(value())
            network.logits[k] -= 2e-5
            below = float(value())
            network.logits[k] += 1e-5
        assert float(network.logits.grad[k]) == pytest.approx((above - below) / 2e-5, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_the_discrete_bound_tends_to_the_continuous_one(name):
    process = PROCESSES[name]
    grids = [process.grid(k).times[::-1] for k in (2, 8, 32)]
    gaps = [math.log(JOINT[7]) - exact_bound(process, ALL[7].tolist(), times) for times in grids]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[1] / gaps[2] == pytest.approx(4, rel=0.25)


def test_of_masks_the_continuous_cost_is_the_cross_entropy_of_the_masked_over_t():
    """Sahoo et al. 2024, eq. 10: by hand, from the logits."""
    process = PROCESSES["masked"]
    chain = CategoricalChain(exact(process), grid=Grid((1.0, 0.01)))
    x, noise, u = ALL[[7, 20]], torch.randn(2, LENGTH, generator=dice(4)), torch.tensor([0.3, 0.8]).double()
    t = 0.01 + 0.99 * u
    x_t = process.corrupt(x, t, noise)
    assert bool((x_t == process.mask).any())
    log_p = torch.log_softmax(Exact(process)(x_t, t), -1).gather(-1, x[..., None])[..., 0]
    truth = 0.99 * (-log_p * (x_t == process.mask)).sum(1) / t
    found = chain.integral(torch.tensor(0.01).double(), torch.tensor(1.0).double(), u, x, None, noise, None)
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("form", ["matching", "continuous"])
def test_one_estimate_is_the_bound_on_average(process, form):
    chain = CategoricalChain(exact(process), grid=Grid((1.0, 0.6, 0.3, 0.1)), form=form)
    x = ALL[[7]].expand(20_000, LENGTH)
    with torch.no_grad():
        estimate = chain.estimate(x, generator=dice(1))
    bound = chain.elbo(x[:5000], estimator=form, draws=4).total
    error = math.hypot(float(estimate.std()) / math.sqrt(20_000), float(bound.std()) / math.sqrt(5000))
    assert float(estimate.mean()) == pytest.approx(float(bound.mean()), abs=5 * error)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("jump", "words"),
    [
        ([0.5, 0.6], "sum 1"),
        ([1.5, -0.5], "never negative"),
        ([[1.0, 0.0]], "shape"),
        ([[1.0, 0.0], [0.0, 1.0]], "leaves 2 laws"),
    ],
)
def test_jumps_that_are_not_a_law_are_refused(jump, words):
    with pytest.raises(ValueError, match=words):
        CategoricalProcess(torch.tensor(jump))


def test_times_and_tokens_that_cannot_be_are_refused(process):
    with pytest.raises(ValueError, match="0 <= s <= t <= 1, s < 1"):
        process.step(torch.tensor([[0]]), 0.6, 0.5)
    with pytest.raises(ValueError, match="whole numbers from 0 to"):
        process.step(torch.tensor([[process.states]]), 0.1, 0.5)
    with pytest.raises(ValueError, match="steps must lie in"):
        process.grid(0)


def test_a_network_of_another_vocabulary_is_refused(process):
    class Wrong(nn.Module):
        def forward(self, x, t, condition=None):
            return torch.zeros(*x.shape, V + 2)

    with pytest.raises(ValueError, match=r"should have returned shape \(2, 3, 3\), it returned \(2, 3, 5\)"):
        CategoricalDenoiser(Wrong(), process)(ALL[:2], 0.5)


def test_a_ladder_of_something_else_is_refused(process):
    with pytest.raises(ValueError, match="a bound belongs to a model"):
        CategoricalChain(nn.Identity(), steps=3)
    with pytest.raises(ValueError, match=r"begins at time 1, got 0\.5"):
        CategoricalChain(exact(process), grid=Grid((0.5, 0.2)))
    with pytest.raises(ValueError, match="either steps= or grid="):
        CategoricalChain(exact(process))


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_the_loss_is_minus_the_continuous_bound(name):
    """In the mean over draws, of the exact denoiser: minus log p(x) over the length, but for what lies before 0.001."""
    chain = CategoricalChain(exact(PROCESSES[name]), grid=Grid((1.0, 0.001)))
    x = ALL[[7]].expand(20_000, LENGTH)
    with torch.no_grad():
        loss = TokenBound()(chain, x, generator=dice(2))
    error = float(loss.std()) / math.sqrt(len(x))
    assert float(loss.mean()) == pytest.approx(-math.log(JOINT[7]), abs=5 * error + 1e-2)


def test_a_small_transformer_learns_which_token_follows_which():
    """Texts of two tokens that are equal: the bound of a model that knows it is log 1/5, of another log 1/25."""
    torch.manual_seed(0)
    process = CategoricalProcess.masked(5)
    network = TokenTransformer(process.states, 5, 2, width=32, depth=1, heads=2)
    chain = CategoricalChain(CategoricalDenoiser(network, process), grid=Grid((1.0, 0.01)))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for step in range(300):
        x = torch.randint(5, (128, 1), generator=dice(step)).expand(-1, 2).contiguous()
        optimizer.zero_grad()
        TokenBound()(chain, x, generator=dice(1000 + step)).mean().backward()
        optimizer.step()
    every = torch.arange(5)[:, None].expand(-1, 2).repeat(4000, 1)
    bound = chain.elbo(every, estimator="continuous").total
    assert float(bound.mean()) == pytest.approx(math.log(1 / 5), abs=0.15)


def test_a_text_longer_than_the_network_is_refused():
    network = TokenTransformer(4, 3, 5, width=16, depth=1, heads=2)
    with pytest.raises(ValueError, match="at most 5 tokens, got"):
        network(torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2))
    assert network(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2)).shape == (2, 4, 3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TokenBound(0.0), "earliest must lie in"),
        (lambda: TokenTransformer(4, 3, 5, width=10, heads=4), "width must be a multiple of heads"),
        (lambda: TokenTransformer(3, 4, 5), "2 <= vocabulary <= states"),
        (lambda: TokenTransformer(4, 3, 0), "length >= 1"),
    ],
)
def test_a_network_or_a_loss_that_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
