"""Objectives and time samplers (theory rows 12 and 13), against typed formulas, direct sums, quadrature and scipy."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from conftest import ALL_SCHEDULES, elbo, named
from kuosan import EDM, Denoiser, Mixture, Process, objectives, schedules
from kuosan.prediction import FORMS

T = torch.tensor([0.02, 0.3141, 0.7, 0.95], dtype=torch.float64)
LINEAR = Process(ALL_SCHEDULES["linear_beta"])


def plain(schedule, t):
    """(alpha, sigma) as numpy arrays."""
    return (c.numpy() for c in schedule.scales(t))


class Halved(nn.Module):
    """A network that is wrong, differently for every input; with a knob to take gradients by."""

    def __init__(self, outputs=1):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.variance = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))
        self.outputs = outputs

    def forward(self, x, t, condition=None):
        mean = self.mean * x + 0.1
        return mean if self.outputs == 1 else torch.cat([mean, torch.tanh(self.variance * x)], 1)


def batch(n=4, d=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, d, dtype=torch.float64, generator=generator) for _ in range(2))


# -- weightings -------------------------------------------------------------------------------------------------------

WEIGHTS = {
    "snr": (objectives.SNR(floor=0.0), lambda snr: snr),
    "truncated_snr": (objectives.SNR(), lambda snr: np.maximum(snr, 1)),
    "min_snr": (objectives.MinSNR(5.0), lambda snr: np.minimum(snr, 5)),
    "edm": (objectives.EDMWeight(0.5), lambda snr: snr + 4),
    "eps": (objectives.Plain("eps"), lambda snr: snr),
    "x0": (objectives.Plain("x0"), np.ones_like),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weighting_is_its_paper_s_formula(name, schedule):
    """As a function of SNR = alpha^2 / sigma^2, on the squared error of x0."""
    weighting, formula = WEIGHTS[name]
    alpha, sigma = plain(schedule, T)
    got = weighting.log_weight(Process(schedule), T).exp().numpy()
    assert got.shape == (4,)
    assert np.allclose(got, formula(alpha**2 / sigma**2), rtol=1e-9)


def test_v_weighs_snr_plus_one_where_variance_is_preserved():
    alpha, sigma = plain(LINEAR.schedule, T)
    got = objectives.Plain("v").log_weight(LINEAR, T).exp().numpy()
    assert np.allclose(got, alpha**2 / sigma**2 + 1, rtol=1e-9)


def test_sigmoid_weighs_eps_by_a_sigmoid():
    """Kingma and Gao: 1/2 sigmoid(b - log-SNR) on the error of eps (times SNR on x0) where log-SNR is uniform; drawing
    t uniformly needs the rate of log-SNR beside it, here by finite differences."""
    alpha, sigma = plain(LINEAR.schedule, T)
    got = objectives.Sigmoid(2.0).log_weight(LINEAR, T).exp().numpy()
    log_snr = np.log(alpha**2 / sigma**2)
    rate = (LINEAR.log_snr(T + 1e-6) - LINEAR.log_snr(T - 1e-6)).numpy() / 2e-6
    assert np.allclose(got / (alpha / sigma) ** 2, -0.5 * rate / (1 + np.exp(log_snr - 2)), rtol=1e-6)


def test_edm_weighs_each_noise_level_alike_for_its_network():
    """Karras et al., table 1: lambda(sigma) c_out^2 = 1."""
    out = EDM(0.5).coefficients(LINEAR, T)[1]
    assert torch.allclose(objectives.EDMWeight(0.5).log_weight(LINEAR, T).exp() * out**2, torch.ones(4).double())


def test_likelihood_weighs_by_the_fall_of_snr(schedule):
    """-1/2 d SNR / dt by central differences."""
    t, h = T + 0.0004, 1e-6
    (a1, s1), (a2, s2) = plain(schedule, t - h), plain(schedule, t + h)
    truth = -0.5 * ((a2 / s2) ** 2 - (a1 / s1) ** 2) / (2 * h)
    assert np.allclose(objectives.Likelihood().log_weight(Process(schedule), t).exp().numpy(), truth, rtol=1e-5)


def test_likelihood_weighting_integrates_to_the_continuous_matching_term():
    """Gaussian data N(0.4, s^2) and its exact denoiser: 1/2 log[(1 + s^2 SNR_max) / (1 + s^2 SNR_min)].

    (1/2 of the integral over SNR of the variance s^2 / (1 + s^2 SNR).) The expectation over x_0 and noise by two
    Gauss-Hermite nodes each, exact for a linear denoiser; over t by Gauss-Legendre in log t.
    """
    s = 0.6
    denoiser = Mixture([1.0], [[0.4]], [s**2]).denoiser(LINEAR)
    x_0 = torch.tensor([0.4 - s, 0.4 - s, 0.4 + s, 0.4 + s], dtype=torch.float64)[:, None]
    noise = torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64)[:, None]
    objective = objectives.Weighted(objectives.Likelihood())
    nodes, weights = np.polynomial.legendre.leggauss(80)
    low, high = math.log(1e-3), 0.0
    total = 0.0
    for u, w in zip(nodes, weights, strict=True):
        t = math.exp(0.5 * (high - low) * (u + 1) + low)
        loss = objective(denoiser, x_0, t=torch.full((4,), t, dtype=torch.float64), noise=noise).mean()
        total += 0.5 * (high - low) * w * t * float(loss)
    alpha, sigma = plain(LINEAR.schedule, torch.tensor([1e-3, 1.0]).double())
    snr = (alpha / sigma) ** 2
    truth = 0.5 * math.log((1 + s**2 * snr[0]) / (1 + s**2 * snr[1]))
    assert total == pytest.approx(truth, rel=1e-8)


# -- simple losses ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", list(FORMS))
@pytest.mark.parametrize("predicts", list(FORMS))
@pytest.mark.parametrize("schedule", named("cosine", "ve", "sub_vp", "rectified_flow"))
def test_simple_is_the_mean_squared_error_of_its_target(target, predicts, schedule):
    """Straight from the network's output: x0-hat and eps-hat by hand, then the target made of each."""
    process = Process(schedule)
    x_0, noise = batch()
    denoiser = Denoiser(Halved(), process, predicts)
    alpha, sigma = (c[:, None] for c in schedule.scales(T))
    d_alpha, d_sigma = (c[:, None] for c in schedule.rates(T))
    x_t = alpha * x_0 + sigma * noise
    said = 0.5 * x_t + 0.1
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    forms = {
        "x0": (one, zero),
        "eps": (zero, one),
        "score": (zero, -1 / sigma),
        "v": (-sigma, alpha),
        "velocity": (d_alpha, d_sigma),
        "flow": (-1.0, 1.0),
    }
    a, b = forms[predicts]
    x0_hat = (b * x_t - sigma * said) / (alpha * b - sigma * a)  # Cramer's rule on x_t = alpha x0 + sigma eps, said
    eps_hat = (alpha * said - a * x_t) / (alpha * b - sigma * a)
    a, b = forms[target]
    truth = ((a * (x_0 - x0_hat) + b * (noise - eps_hat)) ** 2).mean(1)
    loss = objectives.Simple(target)(denoiser, x_0, t=T, noise=noise)
    assert loss.shape == (4,)
    assert torch.allclose(loss, truth, rtol=1e-7)


def test_simple_by_default_measures_what_the_network_says():
    x_0, noise = batch()
    for predicts in FORMS:
        denoiser = Denoiser(Halved(), LINEAR, predicts)
        own, named_ = (objectives.Simple(name)(denoiser, x_0, t=T, noise=noise) for name in (None, predicts))
        assert torch.equal(own, named_)


def test_a_loss_is_for_each_example_and_differentiable():
    x_0, _ = batch()
    denoiser = Denoiser(Halved(), LINEAR, "v")
    loss = objectives.Weighted(objectives.MinSNR())(denoiser, x_0, generator=torch.Generator().manual_seed(0))
    assert loss.shape == (4,)
    loss.mean().backward()
    assert float(denoiser.network.mean.grad.abs()) > 0


def test_a_generator_repeats_a_loss():
    x_0, _ = batch()
    denoiser = Denoiser(Halved(), LINEAR, "v")
    first, again, other = (
        objectives.Simple()(denoiser, x_0, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_simple_of_velocity_is_finite_from_pure_noise():
    """Rectified flow at t = 1, where alpha is 0 and log-SNR infinite."""
    x_0, noise = batch()
    process = Process(ALL_SCHEDULES["rectified_flow"])
    loss = objectives.Simple()(Denoiser(Halved(), process, "velocity"), x_0, t=torch.ones(4).double(), noise=noise)
    assert torch.allclose(loss, ((0.5 * noise + 0.1 - (noise - x_0)) ** 2).mean(1))


def test_cross_entropy_is_minus_the_log_probability_of_the_level():
    """Softmax by hand of logits plus Gaussian evidence."""

    class Logits(nn.Module):
        def forward(self, x, t, condition=None):
            return torch.arange(5).double().expand(*x.shape, 5) * 0.3

    _, noise = batch()
    index = torch.tensor([[0, 1, 2], [3, 4, 0], [1, 1, 1], [2, 3, 4]])
    x_0 = index.double() / 2 - 1
    alpha, sigma = (c[:, None, None] for c in LINEAR.schedule.scales(T))
    x_t = (alpha * x_0[..., None] + sigma * noise[..., None]).numpy()
    log_joint = 0.3 * np.arange(5) - 0.5 * ((x_t - alpha.numpy() * np.linspace(-1, 1, 5)) / sigma.numpy()) ** 2
    log_p = log_joint - np.log(np.exp(log_joint).sum(-1, keepdims=True))
    truth = -np.take_along_axis(log_p, index.numpy()[..., None], -1)[..., 0].mean(1)
    denoiser = Denoiser(Logits(), LINEAR, "levels", levels=5)
    loss = objectives.CrossEntropy()(denoiser, x_0, t=T, noise=noise)
    assert np.allclose(loss.numpy(), truth, rtol=1e-6, atol=1e-12)


# -- the bound as an objective -----------------------------------------------------------------------------------------


def repeated_loss(objective, denoiser, x_0, repeats=40):
    """Mean and standard error over fresh times and noise, the batch averaged each time."""
    means = [float(objective(denoiser, x_0, generator=torch.Generator().manual_seed(k)).mean()) for k in range(repeats)]
    return np.mean(means), np.std(means, ddof=1) / math.sqrt(repeats)


SHORT = Process(schedules.from_alpha_bar([0.99, 0.9, 0.7, 0.4, 0.1, 0.02]))


@pytest.mark.parametrize(
    ("process", "steps"),
    [
        pytest.param(SHORT, 6, id="all steps of a table"),
        pytest.param(SHORT, 3, id="some steps of a table"),
        pytest.param(LINEAR, 6, id="a curve"),
        pytest.param(Process(ALL_SCHEDULES["rectified_flow"]), 6, id="a straight line"),
    ],
)
@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
def test_the_bound_objective_estimates_the_bound(process, steps, variance, tilted):
    """Minus reconstruction plus matching of the bound, per dimension; 5 standard errors of both."""
    x_0 = tilted.sample(500, torch.Generator().manual_seed(1))
    denoiser = tilted.denoiser(process)
    elbos = [elbo(denoiser, x_0, steps=steps, variance=variance, seed=k) for k in range(20)]
    truths = [float((b.matching.sum(0) - b.reconstruction).mean()) / 3 for b in elbos]
    got, error = repeated_loss(objectives.Bound(steps, variance), denoiser, x_0)
    error = math.hypot(error, np.std(truths, ddof=1) / math.sqrt(20))
    assert got == pytest.approx(np.mean(truths), abs=5 * error)


def test_the_bound_objective_of_discrete_data_estimates_its_bound():
    """The same for a network that predicts levels, decoder and optimal variance included."""

    class LogPrior(nn.Module):
        def forward(self, x, t, condition=None):
            return torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05]).double().log().expand(*x.shape, 5)

    x_0 = torch.randint(5, (500, 2), generator=torch.Generator().manual_seed(1)).double() / 2 - 1
    denoiser = Denoiser(LogPrior(), SHORT, "levels", levels=5)
    elbos = [elbo(denoiser, x_0, steps=6, variance="posterior", seed=k) for k in range(20)]
    truths = [float((b.matching.sum(0) - b.reconstruction).mean()) / 2 for b in elbos]
    got, error = repeated_loss(objectives.Bound(6, "posterior"), denoiser, x_0)
    error = math.hypot(error, np.std(truths, ddof=1) / math.sqrt(20))
    assert got == pytest.approx(np.mean(truths), abs=5 * error)


def test_the_bound_objective_works_on_a_table_of_one_step(tilted):
    process = Process(schedules.from_alpha_bar([0.3]))
    loss = objectives.Bound(1)(tilted.denoiser(process), tilted.sample(5), generator=torch.Generator().manual_seed(0))
    assert bool(loss.isfinite().all())


def test_hybrid_is_simple_plus_a_little_of_the_bound():
    x_0, noise = batch()
    t = torch.tensor([0.05, 0.2, 0.7, 1.0], dtype=torch.float64)
    process = Process(ALL_SCHEDULES["ddpm_table"])
    denoiser = Denoiser(Halved(2), process, "eps", learned_variance=True)
    hybrid = objectives.Hybrid(0.25, 1000)(denoiser, x_0, t=t, noise=noise)
    simple = objectives.Simple()(denoiser, x_0, t=t, noise=noise)
    bound = objectives.Bound(1000, "learned")(denoiser, x_0, t=t, noise=noise)
    assert torch.allclose(hybrid, simple + 0.25 * bound, rtol=1e-6)


def test_the_bound_inside_hybrid_teaches_the_variance_alone():
    """The mean's gradient is that of the simple loss, exactly; the variance's is not zero."""
    x_0, noise = batch()
    process = Process(ALL_SCHEDULES["ddpm_table"])
    t = torch.tensor([0.001, 0.2, 0.7, 1.0], dtype=torch.float64)
    denoiser = Denoiser(Halved(2), process, "eps", learned_variance=True)
    network = denoiser.network
    hybrid = torch.autograd.grad(
        objectives.Hybrid(10.0)(denoiser, x_0, t=t, noise=noise).sum(), (network.mean, network.variance)
    )
    (simple,) = torch.autograd.grad(objectives.Simple()(denoiser, x_0, t=t, noise=noise).sum(), network.mean)
    assert float(hybrid[0]) == pytest.approx(float(simple), rel=1e-9)
    assert abs(float(hybrid[1])) > 1e-6


def test_gradients_of_the_bound_are_finite_where_it_steps_to_the_data(process):
    """t is the earliest time of the grid: the term is the decoder's, the other branch must not poison it."""
    x_0, noise = batch()
    first = process.grid(10).times[-1]
    t = torch.tensor([first, first, 0.5, 1.0], dtype=torch.float64)
    predicts = "velocity" if process.schedule.convention == "flow" else "eps"
    denoiser = Denoiser(Halved(2), process, predicts, learned_variance=True)
    for variance in ("beta_tilde", "beta", "learned"):
        loss = objectives.Bound(10, variance)(denoiser, x_0, t=t, noise=noise)
        gradients = torch.autograd.grad(
            loss.sum(), (denoiser.network.mean, denoiser.network.variance), allow_unused=True
        )
        assert bool(loss.isfinite().all())
        assert all(math.isfinite(float(g)) for g in gradients if g is not None)


# -- time samplers ----------------------------------------------------------------------------------------------------


def draw(sampler, n=20_000, process=LINEAR, seed=3):
    t, weight = sampler.sample(process, n, torch.Generator().manual_seed(seed))
    assert t.shape == weight.shape == (n,)
    assert t.dtype == weight.dtype == torch.float64
    assert float(t.min()) >= process.schedule.t_min
    assert float(t.max()) <= 1
    return t, weight


@pytest.mark.parametrize("sampler", [objectives.Uniform(), objectives.Stratified(), objectives.LossAware()])
def test_times_are_uniform(sampler):
    """Kolmogorov-Smirnov against scipy's uniform over [t_min, 1]."""
    t, weight = draw(sampler)
    assert stats.kstest(t.numpy(), stats.uniform(1e-3, 0.999).cdf).pvalue > 1e-4
    assert torch.allclose(weight, torch.ones_like(weight))


def test_stratified_times_are_one_in_each_stratum_in_random_order():
    t, _ = draw(objectives.Stratified(), n=100)
    stratum = ((t - 1e-3) / 0.999 * 100).floor()
    assert sorted(stratum.tolist()) == list(range(100))
    assert stratum.tolist() != list(range(100))


@pytest.mark.parametrize("sampler", [objectives.Uniform(), objectives.Stratified()])
def test_times_of_a_table_are_its_steps_equally_often(sampler):
    """A chi-square test over the six steps."""
    t, _ = draw(sampler, process=SHORT)
    counts = torch.bincount((6 * t).round().long(), minlength=7)
    assert counts[0] == 0
    assert stats.chisquare(counts[1:].numpy()).pvalue > 1e-4


def test_logit_normal_times_have_normal_logits():
    t, weight = draw(objectives.LogitNormal(0.5, 0.8))
    u = (t.numpy() - 1e-3) / 0.999
    assert stats.kstest(np.log(u / (1 - u)), stats.norm(0.5, 0.8).cdf).pvalue > 1e-4
    assert torch.equal(weight, torch.ones_like(weight))


def test_log_normal_noise_is_log_normal(schedule):
    """log(sigma / alpha) ~ N(-0.2, 0.7^2): quantiles, where every schedule has such noise."""
    t, _ = draw(objectives.LogNormalNoise(-0.2, 0.7), process=Process(schedule))
    alpha, sigma = plain(schedule, t)
    log_noise = np.log(sigma) - np.log(alpha)
    for q in (0.1, 0.5, 0.9):
        assert np.quantile(log_noise, q) == pytest.approx(stats.norm(-0.2, 0.7).ppf(q), abs=0.02)


def taught(sampler, losses, process=LINEAR):
    """Fill every cell's history: cell c always loses losses[c]."""
    bins = len(losses)
    for k in range(400):
        t, _ = sampler.sample(process, 4 * bins, torch.Generator().manual_seed(k))
        cell = (((t - process.schedule.t_min) / (1 - process.schedule.t_min)) * bins).floor().long().clamp(0, bins - 1)
        sampler.update(t, torch.tensor(losses).double()[cell])
    return sampler


def test_loss_aware_draws_in_proportion_to_the_root_mean_square():
    losses = [1.0, 2.0, 3.0, 4.0]
    p = taught(objectives.LossAware(bins=4, history=5, floor=0.0), losses).probabilities()
    assert p.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    sampler = objectives.LossAware(bins=1, history=2, floor=0.0)
    sampler.sample(LINEAR, 2, torch.Generator().manual_seed(0))
    sampler.update(None, torch.tensor([3.0, 4.0]))
    assert sampler.probabilities().tolist() == [1.0]


def test_loss_aware_keeps_a_floor_under_every_cell():
    p = taught(objectives.LossAware(bins=4, history=5, floor=0.2), [0.0, 0.0, 0.0, 4.0]).probabilities()
    assert p.tolist() == pytest.approx([0.05, 0.05, 0.05, 0.85])


def test_loss_aware_is_uniform_until_every_cell_has_its_history():
    sampler = objectives.LossAware(bins=4, history=5)
    sampler.sample(LINEAR, 3, torch.Generator().manual_seed(0))
    sampler.update(None, torch.tensor([9.0, 9.0, 9.0]))
    assert sampler.probabilities().tolist() == [0.25] * 4


def test_losses_of_zero_leave_loss_aware_uniform():
    """Nothing to prefer."""
    p = taught(objectives.LossAware(bins=4, history=5), [0.0] * 4).probabilities()
    assert p.tolist() == pytest.approx([0.25] * 4)


def test_importance_weights_give_back_the_uniform_mean():
    """E w f(t) = integral of f, for f = t^2 on [t_min, 1]; 5 standard errors over 200,000 draws."""
    sampler = taught(objectives.LossAware(bins=8, history=5), [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8])
    t, weight = draw(sampler, n=200_000)
    value = weight * t**2
    truth = (1 - 1e-9) / 3 / 0.999
    assert float(value.mean()) == pytest.approx(truth, abs=5 * float(value.std()) / math.sqrt(200_000))
    assert float(weight.mean()) == pytest.approx(1, abs=5 * float(weight.std()) / math.sqrt(200_000))


def test_a_loss_aware_objective_is_unbiased(tilted):
    """Against the same loss at stratified times: 5 standard errors of both."""
    x_0 = tilted.sample(2000, torch.Generator().manual_seed(1))
    sampler = taught(objectives.LossAware(bins=4, history=5), [1.0, 2.0, 3.0, 4.0])
    aware, stratified = (
        repeated_loss(objectives.Simple("eps", times), tilted.denoiser(LINEAR), x_0)
        for times in (sampler, objectives.Stratified())
    )
    assert aware[0] == pytest.approx(stratified[0], abs=5 * math.hypot(aware[1], stratified[1]))


def test_loss_aware_comes_back_from_its_state():
    sampler = taught(objectives.LossAware(bins=4, history=5), [1.0, 2.0, 3.0, 4.0])
    other = objectives.LossAware(bins=4, history=5)
    other.restore(sampler.state())
    assert torch.equal(other.probabilities(), sampler.probabilities())
    first, second = (s.sample(LINEAR, 50, torch.Generator().manual_seed(9)) for s in (sampler, other))
    assert torch.equal(first[0], second[0])
    for s, (t, _) in ((sampler, first), (other, second)):
        s.update(t, t)
    assert torch.equal(other.probabilities(), sampler.probabilities())


def test_a_saved_state_does_not_change_afterwards():
    """A checkpoint taken now is of now."""
    sampler = taught(objectives.LossAware(bins=4, history=5), [1.0, 2.0, 3.0, 4.0])
    state = sampler.state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    t, _ = sampler.sample(LINEAR, 50, torch.Generator().manual_seed(9))
    sampler.update(t, 100 * t)
    assert all(torch.equal(before[name], state[name]) for name in before)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: objectives.Simple("noise"), "a target is one of x0, eps, score, v, flow, velocity, got 'noise'"),
        (lambda: objectives.Plain("levels"), "a target is one of"),
        (lambda: objectives.MinSNR(0.0), "gamma must be positive"),
        (lambda: objectives.EDMWeight(-1.0), "sigma_data must be positive"),
        (lambda: objectives.Bound(0), "steps must be at least 1"),
        (lambda: objectives.Bound(5, "gamma"), "variance must be one of"),
        (lambda: objectives.LossAware(bins=0), "bins >= 1"),
        (lambda: objectives.LossAware(history=0), "history >= 1"),
        (lambda: objectives.LossAware(floor=1.5), "0 <= floor <= 1"),
        (lambda: objectives.LogitNormal(std=-1.0), "std"),
        (lambda: objectives.LogNormalNoise(std=0.0), "std"),
        (lambda: objectives.Hybrid(steps=0), "steps must be at least 1"),
    ],
)
def test_an_objective_that_cannot_be_says_why(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_cross_entropy_needs_levels():
    x_0, _ = batch()
    with pytest.raises(ValueError, match='predicts="levels"'):
        objectives.CrossEntropy()(Denoiser(Halved(), LINEAR, "eps"), x_0)


def test_hybrid_needs_a_variance_to_teach():
    x_0, _ = batch()
    with pytest.raises(ValueError, match="learned_variance=True"):
        objectives.Hybrid()(Denoiser(Halved(), LINEAR, "eps"), x_0)


def test_a_bound_has_no_more_steps_than_its_table():
    x_0, _ = batch()
    with pytest.raises(ValueError, match="steps must lie in 1 to 6, got 7"):
        objectives.Bound(7)(Denoiser(Halved(), SHORT, "eps"), x_0)
