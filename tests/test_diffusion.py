"""The bound (theory rows 9 and 11): against exact densities, quadrature, enumeration and a table of known numbers."""

import functools
import itertools
import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special, stats
from torch import nn

import kuosan as ks
from conftest import ALL_SCHEDULES, PAIR_PMF, PMF, TABLES, LogPrior, PairLogits, elbo, named
from kuosan import Denoiser, Grid, Mixture, Process, schedules
from kuosan.decoders import discretised_gaussian_log_prob
from kuosan.diffusion import decoder
from kuosan.gaussian import per_example
from kuosan.variance import reverse, reverse_variance
from quadrature import ddpm_abar, joint_nodes, mean_squared_error

# -- the decoder of discrete data -------------------------------------------------------------------------------------


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


def level(k, levels, dtype=torch.float64):
    return torch.linspace(-1, 1, levels, dtype=torch.float64)[k].to(dtype)


@given(st.floats(-3, 3), st.floats(1e-6, 100), st.integers(2, 300))
def test_the_probabilities_of_all_levels_sum_to_one(mean, variance, levels):
    """A decoder that is not a distribution bounds nothing."""
    x = torch.linspace(-1, 1, levels, dtype=torch.float64)
    log_p = discretised_gaussian_log_prob(x, f64(mean), f64(variance), levels)
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-10)


@given(st.floats(-1.5, 1.5), st.floats(1e-3, 3), st.integers(2, 64), st.data())
def test_a_level_has_the_probability_of_its_bin(mean, std, levels, data):
    """scipy.stats: Phi at the two borders, open at both ends; where that difference keeps its digits."""
    k = data.draw(st.integers(0, levels - 1))
    x, half = -1 + 2 * k / (levels - 1), 1 / (levels - 1)
    high = 1.0 if k == levels - 1 else stats.norm.cdf(x + half, mean, std)
    low = 0.0 if k == 0 else stats.norm.cdf(x - half, mean, std)
    got = discretised_gaussian_log_prob(level(k, levels), f64(mean), f64(std**2), levels)
    assert float(got.exp()) == pytest.approx(high - low, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("k", "mean"), [(16, -0.9), (0, 0.9), (4, 0.9), (12, -0.9), (8, 0.9), (8, -1.0)])
def test_thirty_standard_deviations_away_a_level_is_improbable_not_impossible(k, mean, dtype):
    """60-digit arithmetic; in float32 the difference of two Phi is exactly 0 from 6 standard deviations."""
    std, half = 0.02, 1 / 16
    x, mean = level(k, 17, dtype), torch.tensor(mean, dtype=dtype)
    got = discretised_gaussian_log_prob(x, mean, torch.tensor(std**2, dtype=dtype), 17)
    with mpmath.workdps(60):
        low = (mpmath.mpf(float(x)) - half - mpmath.mpf(float(mean))) / mpmath.mpf(std)
        high = (mpmath.mpf(float(x)) + half - mpmath.mpf(float(mean))) / mpmath.mpf(std)
        p = {0: mpmath.ncdf(high), 16: mpmath.ncdf(-low)}.get(
            k, mpmath.ncdf(high) - mpmath.ncdf(low) if high < 0 else mpmath.ncdf(-low) - mpmath.ncdf(-high)
        )
        truth = float(mpmath.log(p))
    assert truth < -400
    assert float(got) == pytest.approx(truth, rel=1e-9 if dtype == torch.float64 else 1e-5)


def test_the_open_end_in_the_far_tail_is_scipy_s_log_ndtr():
    got = discretised_gaussian_log_prob(level(16, 17), f64(-3.0), f64(1e-4), 17)
    assert float(got) == pytest.approx(special.log_ndtr(-(1 - 1 / 16 + 3) / 0.01), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [-5.0, -1.0, 0.0, 0.3, 1.0, 5.0])
def test_the_decoder_has_finite_gradients_everywhere(mean, dtype):
    for log_variance in (-14.0, -5.0, 0.0, 5.0):
        mu = torch.full((17,), mean, dtype=dtype, requires_grad=True)
        log_v = torch.full((17,), log_variance, dtype=dtype, requires_grad=True)
        x = torch.linspace(-1, 1, 17, dtype=dtype)
        log_p = discretised_gaussian_log_prob(x, mu, log_v.exp(), 17)
        log_p.sum().backward()
        assert bool(log_p.isfinite().all() & mu.grad.isfinite().all() & log_v.grad.isfinite().all())


def test_the_gradient_of_the_decoder_is_that_of_finite_differences():
    mean = torch.linspace(-1.2, 1.2, 17, dtype=torch.float64).requires_grad_()
    x = torch.linspace(-1, 1, 17, dtype=torch.float64).flip(0)
    assert torch.autograd.gradcheck(
        lambda m, v: discretised_gaussian_log_prob(x, m, v, 17), (mean, f64(0.01).requires_grad_())
    )


@pytest.mark.parametrize("x", [0.3, 1.125, -1.01, float("nan")])
def test_data_between_the_levels_is_refused(x):
    with pytest.raises(ValueError, match="17 even levels"):
        discretised_gaussian_log_prob(torch.tensor([x]), torch.zeros(1), torch.ones(1), 17)


# -- the oracle -------------------------------------------------------------------------------------------------------

#: E log q(x0) - E ELBO in nats, DDPM's 1,000-step table, exact denoiser, decoder N(E[x0|x_1], M_1), indices
#: 1 + i (N - 1) / (K - 1); found by independent quadrature, to the digits given.
GAPS = {
    (10, "beta_tilde"): (390.2156, 5e-5),
    (10, "beta"): (0.603155, 5e-7),
    (50, "beta_tilde"): (22.78952, 5e-6),
    (50, "beta"): (0.183764, 5e-7),
    (1000, "beta_tilde"): (0.425814, 5e-7),
    (1000, "beta"): (0.0103665, 5e-8),
    (10, "optimal"): (0.492790, 5e-7),
    (50, "optimal"): (0.100694, 5e-7),
    (1000, "optimal"): (0.0048146, 5e-8),
}
ENTROPY = 0.213944975263  # of the mixture: minus E log q(x0)
DDPM = Process(ALL_SCHEDULES["ddpm_table"])


@pytest.fixture(scope="module")
def m_1(oracle):
    return mean_squared_error(oracle, 1)


@pytest.fixture(scope="module")
def predictions(oracle):
    """What the exact denoiser says at the nodes of a step."""
    denoiser = oracle.mixture().denoiser(DDPM)
    return functools.cache(lambda step: denoiser(joint_nodes(oracle, step)[1][:, None], step / 1000))


def test_the_entropy_and_the_decoder_of_the_oracle(oracle, m_1):
    """scipy quadrature of -q log q; M_1 is a little under sigma_1^2 / alpha_1^2."""

    def q(x):
        parts = zip(oracle.weights, oracle.means, oracle.variances, strict=True)
        return sum(w * stats.norm.pdf(x, m, math.sqrt(v)) for w, m, v in parts)

    entropy = integrate.quad(lambda x: -q(x) * math.log(q(x)), -2.2, 2.6, points=[-0.6, 0.0, 0.5], epsabs=1e-11)[0]
    assert entropy == pytest.approx(ENTROPY, abs=1e-9)
    assert m_1 == pytest.approx(9.9504e-5, abs=1e-8)


@pytest.mark.parametrize(("steps", "variance"), GAPS)
def test_the_bound_of_the_oracle_is_the_known_number_by_quadrature(steps, variance, oracle, m_1, optimal, predictions):
    """Every term averaged over (x_0, x_t) by quadrature, through the functions that the bound itself sums."""
    choice = optimal if variance == "optimal" else variance
    denoiser = oracle.mixture().denoiser(DDPM)
    index = [round(1 + i * 999 / (steps - 1)) for i in range(steps)]
    grid = DDPM.grid(steps)
    assert [round(1000 * t) for t in grid.times[::-1]] == index

    def average(step, term):
        x_0, _, weight = joint_nodes(oracle, step)
        return float(weight @ term(predictions(step), x_0[:, None]))

    total = average(1, lambda p, x_0: per_example(decoder(denoiser, p, m_1).log_prob(x_0)))
    x_0, _, weight = joint_nodes(oracle, 1)
    prior = DDPM.marginal(x_0[:, None], 1.0).kl(DDPM.prior())
    total -= float(weight @ prior[:, 0])
    for s, t in itertools.pairwise(index):
        total -= average(
            t,
            lambda p, x_0: per_example(
                DDPM.posterior(p.x_t, p.t, x_0, s / 1000).kl(reverse(p, s / 1000, choice))  # noqa: B023
            ),
        )
    gap, tolerance = GAPS[steps, variance]
    assert -ENTROPY - total == pytest.approx(gap, abs=1.01 * tolerance + 1e-8)


@pytest.mark.parametrize(("steps", "variance"), GAPS)
def test_the_bound_of_the_oracle_is_the_known_number_by_sampling(steps, variance, oracle, m_1, optimal):
    """The bound of fresh data; the gap of each example, 5 standard errors of their mean. The optimal one brings M_1."""
    mixture = oracle.mixture()
    how = {"variance": optimal} if variance == "optimal" else {"variance": variance, "decoder_variance": m_1}
    x_0 = mixture.sample(1000 if steps == 1000 else 4000, torch.Generator().manual_seed(100 + steps))
    for terms, draws in (("all", 1), ("stratified", 50)):
        bound = elbo(mixture.denoiser(DDPM), x_0, steps=steps, terms=terms, draws=draws, **how)
        gap = mixture.log_prob(x_0) - bound.total
        error = float(gap.std()) / math.sqrt(len(gap))
        assert float(gap.mean()) == pytest.approx(GAPS[steps, variance][0], abs=5 * error)


def test_the_optimal_variance_of_a_step_is_the_known_number(optimal):
    """From 500 to 250: beta-tilde and beta of the table, and between them what maximises the bound."""
    low, high = (
        float(reverse_variance(ks.Prediction(DDPM, 0.5, torch.zeros(1, 1).double(), "x0", f64([[0.0]])), 0.25, choice))
        for choice in ("beta_tilde", "beta")
    )
    assert (low, high) == (pytest.approx(0.439055, abs=5e-7), pytest.approx(0.850049, abs=5e-7))
    assert float(optimal.reverse(0.5, 0.25)) == pytest.approx(0.571547077714, abs=2e-12)


# -- a lower bound it is ----------------------------------------------------------------------------------------------


class WithVariance(nn.Module):
    """The exact denoiser, and a fraction of the way from beta-tilde to beta."""

    def __init__(self, mixture, process, fraction):
        super().__init__()
        self.mixture, self.process, self.fraction = mixture, process, fraction

    def forward(self, x, t, condition=None):
        mean = self.mixture.posterior_mean(x, self.process, t)
        return torch.cat([mean, torch.full_like(mean, 2 * self.fraction - 1)], 1)


@pytest.mark.parametrize("variance", ["beta_tilde", "beta", "learned"])
def test_the_bound_is_below_log_p(process, variance, tilted):
    """Exact log p of the mixture; 5 standard errors. With 30 steps the gap is plain, whatever the process."""
    x_0 = tilted.sample(1000, torch.Generator().manual_seed(5))
    denoiser = Denoiser(WithVariance(tilted, process, 0.4), process, "x0", learned_variance=True)
    gap = tilted.log_prob(x_0) - elbo(denoiser, x_0, steps=30, variance=variance, seed=6).total
    assert float(gap.mean()) > -5 * float(gap.std()) / math.sqrt(1000)
    assert bool(gap.isfinite().all())


@pytest.mark.parametrize(("fraction", "like"), [(0.0, "beta_tilde"), (1.0, "beta")])
def test_at_its_ends_the_learned_variance_is_one_of_the_fixed_ones(fraction, like, tilted):
    """-1 says beta-tilde and 1 says beta: the same bound, noise for noise."""
    x_0 = tilted.sample(20, torch.Generator().manual_seed(5))
    denoiser = Denoiser(WithVariance(tilted, DDPM, fraction), DDPM, "x0", learned_variance=True)
    learned, fixed = (elbo(denoiser, x_0, steps=10, variance=variance).matching for variance in ("learned", like))
    assert torch.allclose(learned, fixed, rtol=1e-9)


def test_half_way_the_learned_variance_is_the_geometric_mean(tilted):
    """Nichol and Dhariwal 2021, eq. 15, with beta and beta-tilde of a step from 0.6 to 0.4 by hand from abar."""
    t_bar, s_bar = ddpm_abar(600), ddpm_abar(400)
    beta = 1 - t_bar / s_bar
    beta_tilde = (1 - s_bar) / (1 - t_bar) * beta
    denoiser = Denoiser(WithVariance(tilted, DDPM, 0.5), DDPM, "x0", learned_variance=True)
    got = reverse_variance(denoiser(tilted.sample(3), 0.6), 0.4, "learned")
    assert torch.allclose(got, torch.full((3, 3), math.sqrt(beta * beta_tilde), dtype=torch.float64), rtol=1e-9)


def test_a_worse_denoiser_has_a_worse_bound(oracle):
    """Denoising with another mixture costs nats."""
    x_0 = oracle.mixture().sample(2000, torch.Generator().manual_seed(5))
    right = elbo(oracle.mixture().denoiser(DDPM), x_0, steps=100, variance="beta", seed=1).total.mean()
    wrong = elbo(Mixture([1.0], [[0.5]], [0.04]).denoiser(DDPM), x_0, steps=100, variance="beta", seed=1).total.mean()
    assert float(right) > float(wrong) + 0.5


def test_the_bound_of_gaussian_data_is_tight_in_the_limit():
    """One Gaussian, exact denoiser, standard-normal data: at 1,000 steps the gap is under 0.01 nats."""
    normal = Mixture([1.0], [[0.0]], [1.0])
    x_0 = normal.sample(500, torch.Generator().manual_seed(5))
    process = Process(ALL_SCHEDULES["linear_beta"])
    gap = normal.log_prob(x_0) - elbo(normal.denoiser(process), x_0, steps=1000, variance="beta", seed=6).total
    assert float(gap.mean()) > -5 * float(gap.std()) / math.sqrt(500)
    assert float(gap.mean()) < 0.01


# -- estimators -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def estimates(oracle):
    """A hundred independent bounds of the same 50 examples for each way of choosing terms."""
    mixture = oracle.mixture()
    x_0 = mixture.sample(50, torch.Generator().manual_seed(8))
    denoiser, grid = mixture.denoiser(DDPM), DDPM.grid(30)

    def repeat(terms, draws):
        bounds = [
            elbo(denoiser, x_0, grid=grid, variance="beta", terms=terms, draws=draws, seed=seed).total
            for seed in range(100)
        ]
        return torch.stack(bounds).mean(1)

    return {"all": repeat("all", 1), "random": repeat("random", 10), "stratified": repeat("stratified", 10)}


@pytest.mark.parametrize("terms", ["random", "stratified"])
def test_drawn_terms_agree_with_the_full_sum(estimates, terms):
    """Means of 100 independent estimates, 5 standard errors."""
    all_, drawn = estimates["all"], estimates[terms]
    error = math.sqrt((float(all_.var()) + float(drawn.var())) / 100)
    assert float(drawn.mean()) == pytest.approx(float(all_.mean()), abs=5 * error)


def test_stratified_terms_have_the_smaller_variance(estimates):
    """An F test at 1e-3: 100 estimates of each."""
    ratio = float(estimates["random"].var() / estimates["stratified"].var())
    assert ratio > stats.f.ppf(0.999, 99, 99)


def test_each_step_of_a_drawn_bound_is_unbiased(oracle):
    """Row by row against the full sum, 5 standard errors."""
    mixture = oracle.mixture()
    x_0 = mixture.sample(2000, torch.Generator().manual_seed(8))
    denoiser, grid = mixture.denoiser(DDPM), DDPM.grid(5)
    full = elbo(denoiser, x_0, grid=grid, variance="beta", draws=4).matching
    drawn = elbo(denoiser, x_0, grid=grid, variance="beta", terms="stratified", draws=4, seed=1).matching
    error = ((full.var(1) + drawn.var(1)) / 2000).sqrt()
    assert bool(((full.mean(1) - drawn.mean(1)).abs() < 5 * error).all())


def test_the_standard_error_is_the_spread_of_repetitions(oracle):
    """Fresh data and noise 200 times: the spread of the means is what each of them said, to 5 standard errors."""
    mixture = oracle.mixture()
    denoiser, grid = mixture.denoiser(DDPM), DDPM.grid(4)
    bounds = [
        elbo(denoiser, mixture.sample(200, torch.Generator().manual_seed(k)), grid=grid, variance="beta", seed=k)
        for k in range(200)
    ]
    spread = float(torch.stack([b.total.mean() for b in bounds]).std())
    stated = float(np.mean([b.standard_error for b in bounds]))
    assert spread == pytest.approx(stated, rel=5 / math.sqrt(2 * 200))


def test_the_standard_error_of_one_example_is_unknown(oracle):
    bound = elbo(oracle.mixture().denoiser(DDPM), torch.zeros(1, 1).double(), steps=3)
    assert math.isnan(bound.standard_error)


def test_the_total_is_the_sum_of_its_named_terms(oracle):
    x_0 = oracle.mixture().sample(7, torch.Generator().manual_seed(8))
    bound = elbo(oracle.mixture().denoiser(DDPM), x_0, steps=6, draws=2)
    assert bound.reconstruction.shape == bound.prior.shape == bound.total.shape == (7,)
    assert bound.matching.shape == (5, 7)
    assert bound.times.tolist() == list(DDPM.grid(6).times[::-1])
    assert torch.equal(bound.total, bound.reconstruction - bound.prior - bound.matching.sum(0))
    assert (bound.dimensions, bound.draws, bound.evaluations, bound.discrete) == (1, 2, 12, False)
    bits = bound.bits_per_dim()
    assert bits.total == pytest.approx(bits.reconstruction + bits.prior + bits.matching)
    assert bits.total == pytest.approx(-float(bound.total.mean()) / math.log(2))
    assert bits.standard_error == pytest.approx(bound.standard_error / math.log(2))


def test_bits_are_per_dimension(tilted):
    x_0 = tilted.sample(7, torch.Generator().manual_seed(8))
    bound = elbo(tilted.denoiser(DDPM), x_0, steps=6)
    assert bound.bits_per_dim().total == pytest.approx(-float(bound.total.mean()) / (3 * math.log(2)))


def test_the_prior_term_is_the_kl_from_the_last_marginal(oracle):
    """By hand: 1/2 (sigma^2 + alpha^2 x^2 - 1 - log sigma^2), alpha^2 the product of all 1 - beta."""
    x_0 = oracle.mixture().sample(7, torch.Generator().manual_seed(8))
    prior = elbo(oracle.mixture().denoiser(DDPM), x_0, steps=6).prior
    abar = ddpm_abar(1000)
    truth = 0.5 * (-abar + abar * x_0[:, 0] ** 2 - math.log1p(-abar))
    assert torch.allclose(prior, truth, rtol=1e-6, atol=0)


def test_a_seed_repeats_a_bound_and_another_does_not(oracle):
    denoiser, x_0 = oracle.mixture().denoiser(DDPM), torch.zeros(5, 1).double()
    first, again, other = (elbo(denoiser, x_0, steps=6, seed=seed).total for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_small_batches_estimate_the_same_bound(oracle):
    """Another way through the draws, of the same mean: 5 standard errors."""
    denoiser, x_0 = oracle.mixture().denoiser(DDPM), oracle.mixture().sample(500, torch.Generator().manual_seed(1))
    whole, parts = (elbo(denoiser, x_0, steps=6, variance="beta", batch_size=size) for size in (10_000, 37))
    error = math.hypot(whole.standard_error, parts.standard_error)
    assert float(whole.total.mean()) == pytest.approx(float(parts.total.mean()), abs=5 * error)


def test_one_step_has_no_matching_term(oracle):
    bound = elbo(oracle.mixture().denoiser(DDPM), torch.zeros(5, 1).double(), steps=1)
    assert bound.matching.shape == (0, 5)
    assert torch.equal(bound.total, bound.reconstruction - bound.prior)


def test_any_grid_will_do(oracle):
    """The trajectory found by dynamic programming beats the even one of ten steps."""
    mixture = oracle.mixture()
    x_0 = mixture.sample(4000, torch.Generator().manual_seed(9))
    best = Grid(tuple(i / 1000 for i in (1000, 141, 109, 89, 74, 61, 49, 37, 23, 1)))
    even, chosen = (
        elbo(mixture.denoiser(DDPM), x_0, grid=grid, variance="beta", decoder_variance=9.9504e-5, seed=2).total
        for grid in (DDPM.grid(10), best)
    )
    assert float(chosen.mean()) > float(even.mean()) + 0.1


# -- discrete data whose truth can be enumerated ----------------------------------------------------------------------

DISCRETE = named("linear_beta", "cosine", "ddpm_table", "ve", "sub_vp")


def gap_of(denoiser, x_0, log_p, steps):
    """Mean and standard error of log p - bound on an even grid from noise to 1 / steps."""
    grid = Grid(tuple(1.0 - i / steps for i in range(steps)))
    bound = elbo(denoiser, x_0, grid=grid, variance="posterior", seed=steps)
    assert bound.discrete
    gap = log_p - bound.total
    return float(gap.mean()), float(gap.std()) / math.sqrt(len(gap))


@pytest.mark.parametrize("schedule", DISCRETE)
@pytest.mark.parametrize("steps", [1, 250])
def test_of_one_discrete_number_the_bound_is_the_log_probability(schedule, steps):
    """The probabilities of the five levels are known; one step is exact, and many are nearly Gaussian, each of them."""
    index = torch.multinomial(PMF, 2000, replacement=True, generator=torch.Generator().manual_seed(4))
    denoiser = Denoiser(LogPrior(), Process(schedule), "levels", levels=5)
    gap, error = gap_of(denoiser, index[:, None].double() / 2 - 1, PMF[index].log(), steps)
    assert -5 * error < gap < 0.03


@pytest.mark.parametrize("schedule", DISCRETE)
def test_of_two_dependent_numbers_the_bound_climbs_to_the_log_probability(schedule):
    """One step draws both alone and loses their mutual information, by enumeration; many steps lose next to nothing."""
    index = torch.multinomial(PAIR_PMF.flatten(), 2000, replacement=True, generator=torch.Generator().manual_seed(4))
    x_0, log_p = torch.stack([index // 3, index % 3], 1).double() - 1, PAIR_PMF.flatten()[index].log()
    denoiser = Denoiser(PairLogits(Process(schedule)), Process(schedule), "levels", levels=3)
    (one, error), (many, many_error) = (gap_of(denoiser, x_0, log_p, steps) for steps in (1, 250))
    information = float((PAIR_PMF * (PAIR_PMF / PAIR_PMF.sum(1, True) / PAIR_PMF.sum(0)).log()).sum())
    assert information > 0.2
    assert one == pytest.approx(information, abs=5 * error + 0.005)
    assert -5 * many_error < many < 0.05


@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
def test_a_point_denoiser_of_discrete_data_bounds_its_log_probability(variance):
    """The same data through the Gaussian decoder cut into bins."""
    process = Process(ALL_SCHEDULES["linear_beta"])

    class Mean(nn.Module):
        def forward(self, x, t, condition=None):
            return Denoiser(LogPrior(), process, "levels", levels=5)(x, t).x0

    index = torch.multinomial(PMF, 2000, replacement=True, generator=torch.Generator().manual_seed(4))
    bound = elbo(Denoiser(Mean(), process, "x0", levels=5), index[:, None] / 2 - 1.0, steps=100, variance=variance)
    gap = PMF[index].log() - bound.total
    assert bound.discrete
    assert float(gap.mean()) > -5 * float(gap.std()) / math.sqrt(2000)


def test_the_posterior_variance_is_the_best(oracle):
    """Theory row 11: with levels, the bound with the optimal variance is above those of beta and beta-tilde."""
    process = Process(ALL_SCHEDULES["linear_beta"])
    denoiser = Denoiser(LogPrior(), process, "levels", levels=5)
    index = torch.multinomial(PMF, 1000, replacement=True, generator=torch.Generator().manual_seed(4))
    x_0 = index[:, None].double() / 2 - 1.0
    for steps in (5, 20, 100):
        best, *others = (
            float(elbo(denoiser, x_0, steps=steps, variance=variance).total.mean())
            for variance in ("posterior", "beta", "beta_tilde")
        )
        assert best >= max(others)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "either steps= or grid="),
        ({"steps": 5, "grid": Grid((1.0,))}, "either steps= or grid="),
        ({"steps": 0}, "steps must"),
        ({"steps": 1001}, "steps must lie in 1 to 1000, got 1001"),
        (
            {"steps": 5, "variance": "gamma"},
            "variance must be one of beta_tilde, beta, learned, posterior, optimal, optimal_per_dimension, got 'gamma'",
        ),
        ({"steps": 5, "terms": "some"}, "terms must be one of all, shared, random, stratified, importance, got 'some'"),
        ({"steps": 5, "draws": 0}, "at least one example and one draw"),
        ({"steps": 5, "variance": "learned"}, "learned_variance=True"),
        ({"steps": 5, "variance": "optimal"}, "has to be measured first: pass kuosan.optimal.measure"),
        ({"steps": 5, "variance": "posterior"}, 'predicts "levels"'),
        ({"steps": 5, "decoder_variance": 0.0}, "decoder_variance"),
        ({"steps": 5, "batch_size": 0}, "batch_size"),
    ],
)
def test_a_bound_that_cannot_be_says_why(options, words, oracle):
    with pytest.raises(ValueError, match=words):
        elbo(oracle.mixture().denoiser(DDPM), torch.zeros(2, 1).double(), **options)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_data_that_is_not_finite_has_no_bound(bad, oracle):
    with pytest.raises(ValueError, match="not finite"):
        elbo(oracle.mixture().denoiser(DDPM), torch.tensor([[0.0], [bad]]), steps=5)


def test_no_data_has_no_bound(oracle):
    with pytest.raises(ValueError, match="at least one example"):
        elbo(oracle.mixture().denoiser(DDPM), torch.zeros(0, 1), steps=5)


@pytest.mark.parametrize("x", [0.3, 1.5])
@pytest.mark.parametrize("predicts", ["x0", "levels"])
def test_discrete_data_off_its_levels_has_no_bound(predicts, x):
    """Rounded in silence it would be the bound of other data."""
    network = LogPrior() if predicts == "levels" else nn.Identity()

    class Same(nn.Module):
        def forward(self, y, t, condition=None):
            return network(y, t) if predicts == "levels" else y

    denoiser = Denoiser(Same(), DDPM, predicts, levels=5)
    with pytest.raises(ValueError, match="5 even levels"):
        elbo(denoiser, torch.tensor([[x]]).double(), steps=3)


def test_tables_of_all_lengths_have_bounds_on_all_their_grids(oracle):
    """From one step to all of them: finite, and below log p."""
    mixture = oracle.mixture()
    x_0 = mixture.sample(500, torch.Generator().manual_seed(9))
    for name in TABLES:
        process = Process(ALL_SCHEDULES[name])
        for steps in (1, 2, 7, 40):
            gap = mixture.log_prob(x_0) - elbo(mixture.denoiser(process), x_0, steps=steps, variance="beta").total
            assert float(gap.mean()) > -5 * float(gap.std()) / math.sqrt(500)
    single = Process(schedules.from_alpha_bar([0.3]))
    assert bool(elbo(mixture.denoiser(single), x_0, steps=1).total.isfinite().all())
