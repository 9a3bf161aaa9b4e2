"""The forward process (theory rows 6, 7 and 16) against Bayes by quadrature, DDPM's printed formulas and simulation."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from conftest import ALL_SCHEDULES, TABLES, named
from kuosan import Grid, Process

PAIRS = [(0.9, 0.4), (1.0, 0.37), (0.3, 0.2999), (0.05, 0.02)]


def number(tensor):
    return float(tensor.reshape(()))


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def normal_moments(log_density, centre, width):
    """(mean, variance) of an unnormalised log-density by the trapezoid rule, 12 widths to each side."""
    x = centre + width * np.linspace(-12, 12, 24_001)
    p = np.exp(log_density(x) - log_density(x).max())
    p /= p.sum()
    mean = (p * x).sum()
    return mean, (p * (x - mean) ** 2).sum()


class DDPM:
    """The symbols of Ho et al. 2020 as they print them: beta_t, alpha_t = 1 - beta_t, abar_t, for t = 1 .. 1000."""

    beta = np.concatenate([[np.nan], np.linspace(1e-4, 0.02, 1000)])
    alpha = 1 - beta
    abar = np.concatenate([[1.0], np.cumprod(alpha[1:])])


# -- row 6: forward ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [(0.2, 0.5, 0.9), (0.0, 0.3, 1.0), (0.0, 1e-3, 2e-3), (0.5, 0.9, 1.0)])
def test_single_steps_compose_to_the_jump(process, times):
    """x_u = a x_s + noise, x_t = b x_u + noise: the law of x_t given x_s, by the algebra of sums."""
    s, u, t = times
    x = f64(1.7).reshape(1, 1)
    first = process.step(x, s, u)
    scale, variance = (float(c) for c in process.step_coefficients(t, u))
    jump = process.step(x, s, t)
    assert number(jump.mean) == pytest.approx(scale * number(first.mean), rel=1e-12, abs=1e-15)
    assert number(jump.variance) == pytest.approx(scale**2 * number(first.variance) + variance, rel=1e-10)


def test_a_thousand_steps_compose_to_the_marginal(process):
    """One by one down the whole grid, in plain floats."""
    mean, variance, s = 1.7, 0.0, 0.0
    steps = len(process.schedule) if hasattr(process.schedule, "__len__") else 1000
    for t in reversed(process.grid(steps).times):
        scale, added = (float(c) for c in process.step_coefficients(t, s))
        mean, variance, s = scale * mean, scale**2 * variance + added, t
    end = process.marginal(f64(1.7).reshape(1, 1), 1.0)
    assert number(end.mean) == pytest.approx(mean, rel=1e-9, abs=1e-15)
    assert number(end.variance) == pytest.approx(variance, rel=1e-9)


def test_each_step_of_ddpm_is_the_printed_one():
    """q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t), Ho et al. 2020, eq. 2."""
    process = Process(ALL_SCHEDULES["ddpm_table"])
    for t in (1, 2, 3, 57, 500, 999, 1000):
        scale, variance = process.step_coefficients(t / 1000, (t - 1) / 1000)
        assert float(scale) == pytest.approx(math.sqrt(1 - DDPM.beta[t]), rel=1e-11)
        assert float(variance) == pytest.approx(DDPM.beta[t], rel=1e-9)


def test_the_step_from_the_data_is_the_marginal(process):
    x = f64(-0.4, 2.0).reshape(2, 1)
    jump, marginal = process.step(x, 0.0, 0.6), process.marginal(x, 0.6)
    assert torch.equal(jump.mean, marginal.mean)
    assert torch.allclose(jump.variance, marginal.variance, rtol=1e-15)


def test_the_marginal_is_alpha_and_sigma(process):
    alpha, sigma = (float(c) for c in process.schedule.scales(0.6))
    law = process.marginal(f64(-0.4).reshape(1, 1), 0.6)
    assert number(law.mean) == pytest.approx(-0.4 * alpha)
    assert number(law.variance) == pytest.approx(sigma**2)


# -- row 7: back, given the data --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_the_posterior_is_bayes_rule(process, t, s):
    """q(x_s|x_0) q(x_t|x_s) as a function of x_s, normalised by quadrature."""
    x_0, x_t = 0.7, -0.3
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ([float(c) for c in process.schedule.scales(u)] for u in (t, s))
    ratio = alpha_t / alpha_s
    step_std = math.sqrt(sigma_t**2 - ratio**2 * sigma_s**2)

    def log_joint(x):
        return stats.norm.logpdf(x, alpha_s * x_0, sigma_s) + stats.norm.logpdf(x_t, ratio * x, step_std)

    posterior = process.posterior(f64(x_t).reshape(1, 1), t, f64(x_0).reshape(1, 1), s)
    mean, variance = normal_moments(log_joint, number(posterior.mean), number(posterior.std))
    assert number(posterior.variance) == pytest.approx(variance, rel=1e-7)
    assert number(posterior.mean) == pytest.approx(mean, abs=1e-7 * math.sqrt(variance))


@pytest.mark.parametrize("t", [2, 3, 10, 100, 500, 999, 1000])
def test_the_posterior_of_ddpm_is_the_printed_one(t):
    """mu-tilde and beta-tilde, Ho et al. 2020, eq. 7, with the per-step betas."""
    process = Process(ALL_SCHEDULES["ddpm_table"])
    beta, alpha, now, before = DDPM.beta[t], DDPM.alpha[t], DDPM.abar[t], DDPM.abar[t - 1]
    c_x, c_0, variance = (float(c) for c in process.posterior_coefficients(t / 1000, (t - 1) / 1000))
    assert c_x == pytest.approx(math.sqrt(alpha) * (1 - before) / (1 - now), rel=1e-8)
    assert c_0 == pytest.approx(math.sqrt(before) * beta / (1 - now), rel=1e-8)
    assert variance == pytest.approx((1 - before) / (1 - now) * beta, rel=1e-8)


def test_the_step_back_to_the_data_is_the_data_itself(process):
    """A closed form: also where alpha_t = 0, and without a limit taken in floats."""
    x_0 = f64(0.7, -0.2).reshape(2, 1)
    for t in (1.0, 0.5, 1e-6):
        assert [float(c) for c in process.posterior_coefficients(t, 0.0)] == [0.0, 1.0, 0.0]
        end = process.posterior(torch.zeros(2, 1, dtype=torch.float64), t, x_0, 0.0)
        assert torch.equal(end.mean, x_0)
        assert end.variance.abs().max() == 0


def test_from_pure_noise_the_posterior_knows_only_the_data():
    """Rectified flow at t = 1 has alpha = 0: q(x_s|x_1,x_0) = q(x_s|x_0)."""
    process = Process(ALL_SCHEDULES["rectified_flow"])
    assert [float(c) for c in process.posterior_coefficients(1.0, 0.25)] == pytest.approx([0.0, 0.75, 0.0625])


# -- errata: what is printed, and fails -------------------------------------------------------------------------------

T = 400
X_0, X_T = 0.7, -0.3


def bayes_at_t():
    """Moments of q(x_{t-1} | x_t, x_0) at t = 400 of DDPM's table, by quadrature."""
    return normal_moments(ddpm_log_joint(math.sqrt(DDPM.abar[T - 1])), 0.0, 0.2)


def ddpm_log_joint(scale_of_x_0):
    """-1/2 [(x_t - sqrt(alpha_t) x)^2 / beta_t + (x - scale x_0)^2 / (1 - abar_{t-1})]."""

    def log_joint(x):
        forward = (X_T - math.sqrt(DDPM.alpha[T]) * x) ** 2 / DDPM.beta[T]
        return -0.5 * (forward + (x - scale_of_x_0 * X_0) ** 2 / (1 - DDPM.abar[T - 1]))

    return log_joint


def our_posterior():
    law = Process(ALL_SCHEDULES["ddpm_table"]).posterior(
        f64(X_T).reshape(1, 1), T / 1000, f64(X_0).reshape(1, 1), (T - 1) / 1000
    )
    return number(law.mean), number(law.variance)


def test_erratum_1_the_coefficient_of_x_0_in_the_completed_square_has_abar_of_t_minus_1():
    """Mean = (sqrt(alpha_t) x_t / beta_t + C x_0) / precision: the printed sqrt(abar_t) / (1 - abar_t) fails."""
    mean, variance = bayes_at_t()
    precision = DDPM.alpha[T] / DDPM.beta[T] + 1 / (1 - DDPM.abar[T - 1])
    assert 1 / precision == pytest.approx(variance, rel=1e-8)

    def completed(coefficient):
        return (math.sqrt(DDPM.alpha[T]) * X_T / DDPM.beta[T] + coefficient * X_0) / precision

    printed = completed(math.sqrt(DDPM.abar[T]) / (1 - DDPM.abar[T]))
    right = completed(math.sqrt(DDPM.abar[T - 1]) / (1 - DDPM.abar[T - 1]))
    assert abs(printed - mean) > 1e-5
    assert right == pytest.approx(mean, abs=1e-12)
    assert our_posterior() == (pytest.approx(mean, abs=1e-9), pytest.approx(variance, rel=1e-9))


def test_erratum_2_the_mean_of_x_before_has_a_bar_over_its_alpha():
    """(x_{t-1} - sqrt(alpha_{t-1}) x_0)^2, without its bar, gives another posterior than Bayes' rule."""
    printed = normal_moments(ddpm_log_joint(math.sqrt(DDPM.alpha[T - 1])), 0.0, 0.2)
    right = normal_moments(ddpm_log_joint(math.sqrt(DDPM.abar[T - 1])), 0.0, 0.2)
    assert abs(printed[0] - our_posterior()[0]) > 1e-3
    assert right[0] == pytest.approx(our_posterior()[0], abs=1e-9)


def test_erratum_2_abar_is_a_product_up_to_t():
    """Composing steps 1 .. t, one by one; the product up to T would say that x_t is as good as noise."""
    mean = 1.0
    for i in range(1, T + 1):
        mean *= math.sqrt(1 - DDPM.beta[i])
    ours = number(Process(ALL_SCHEDULES["ddpm_table"]).marginal(f64(1.0).reshape(1, 1), T / 1000).mean)
    printed = math.sqrt(np.prod(DDPM.alpha[1:]))
    assert abs(printed - mean) > 0.1
    assert ours == pytest.approx(mean, rel=1e-11)


# -- row 16: the same process as a stochastic differential equation ----------------------------------------------------


@pytest.mark.parametrize("t", [0.0133, 0.2504, 0.5003, 0.7704, 0.9888])
def test_the_sde_has_the_moments_of_the_marginals(process, t):
    """alpha' = f alpha and (sigma^2)' = 2 f sigma^2 + g^2, by central differences."""
    h = 1e-6
    alpha, sigma = (float(c) for c in process.schedule.scales(t))
    (a2, s2), (a1, s1) = ([float(c) for c in process.schedule.scales(u)] for u in (t + h, t - h))
    f = number(process.drift(torch.ones(1, 1, dtype=torch.float64), t))
    g = float(process.diffusion(t))
    assert f * alpha == pytest.approx((a2 - a1) / (2 * h), rel=1e-6, abs=1e-8)
    assert 2 * f * sigma**2 + g**2 == pytest.approx((s2**2 - s1**2) / (2 * h), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("schedule", named("linear_beta", "ve", "sub_vp"))
def test_a_simulated_sde_has_the_marginals_of_the_process(schedule, dice):
    """Euler-Maruyama, 800 steps, 20,000 paths from the law at t = 0.001: 5 standard errors and 1 % for the step."""
    process, n, steps = Process(schedule), 20_000, 800
    times = torch.linspace(1e-3, 0.6, steps + 1, dtype=torch.float64)
    dt = float(times[1] - times[0])
    alpha, sigma = (float(c) for c in schedule.scales(times[0]))
    x = alpha * 0.8 + sigma * torch.randn(n, 1, dtype=torch.float64, generator=dice)
    for t in times[:-1]:
        dw = math.sqrt(dt) * torch.randn(n, 1, dtype=torch.float64, generator=dice)
        x = x + process.drift(x, t) * dt + process.diffusion(t) * dw
    alpha, sigma = (float(c) for c in schedule.scales(0.6))
    assert float(x.mean()) == pytest.approx(0.8 * alpha, abs=5 * sigma / math.sqrt(n) + 0.01 * alpha)
    assert float(x.var()) == pytest.approx(sigma**2, rel=5 * math.sqrt(2 / n) + 0.01)


@pytest.mark.parametrize(
    ("name", "f", "g"),
    [
        ("linear_beta", -0.05, math.sqrt(0.1)),  # -beta_min / 2, sqrt(beta_min)
        ("sub_vp", -0.05, 0.0),  # g^2 = beta (1 - exp(-2 integral of beta))
        ("rectified_flow", -1.0, 0.0),  # -1 / (1 - t), 2 t / (1 - t)
    ],
)
def test_the_sde_can_start_at_the_data(name, f, g):
    """Drift and diffusion at t = 0, as Song et al. 2021 (eq. 11 and appendix B) and the straight line have them."""
    process = Process(ALL_SCHEDULES[name])
    assert number(process.drift(torch.ones(1, 1, dtype=torch.float64), 0.0)) == pytest.approx(f)
    assert float(process.diffusion(0.0)) == pytest.approx(g, abs=1e-12)


# -- what sampling starts from ----------------------------------------------------------------------------------------


def test_sampling_starts_from_standard_normal_noise_unless_the_variance_explodes(process):
    prior = process.prior()
    variance = 80.0**2 if process.schedule.convention == "ve" else 1.0
    assert (float(prior.mean), float(prior.variance)) == (0.0, pytest.approx(variance))


# -- shapes -----------------------------------------------------------------------------------------------------------


def test_a_time_for_each_sample_is_that_time_alone(process):
    """Row k of a batch with times (B,) equals a batch of one at that time."""
    x_0, x_t = f64(0.1, -0.7, 1.3).reshape(3, 1, 1), f64(1.0, 0.2, -0.4).reshape(3, 1, 1)
    t, s = f64(0.3, 0.9, 1.0), f64(0.1, 0.2, 0.0)
    together = (process.marginal(x_0, t), process.step(x_0, s, t), process.posterior(x_t, t, x_0, s))
    drift = process.drift(x_0, 0.9 * t)
    for k in range(3):
        x, y, u, v = x_0[k : k + 1], x_t[k : k + 1], float(t[k]), float(s[k])
        alone = (process.marginal(x, u), process.step(x, v, u), process.posterior(y, u, x, v))
        for batch, one in zip(together, alone, strict=True):
            assert number(batch.mean[k]) == number(one.mean)
            assert number(batch.variance.expand(3, 1, 1)[k]) == number(one.variance)
        assert number(drift[k]) == pytest.approx(number(process.drift(x, 0.9 * u)), rel=1e-14)


def test_kernels_keep_the_dtype_of_the_data(process):
    x = torch.zeros(2, 3, dtype=torch.float32)
    for law in (process.marginal(x, 0.5), process.step(x, 0.1, 0.5), process.posterior(x, 0.5, x, 0.1)):
        assert (law.mean.dtype, law.variance.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("t", [torch.full((2,), 0.5), torch.full((3, 1), 0.5), torch.full((3, 4), 0.5)])
def test_a_time_of_another_shape_is_refused(process, t):
    with pytest.raises(ValueError, match=r"a time must have shape \(\) or \(3,\), one per sample; got"):
        process.marginal(torch.zeros(3, 4), t)


@pytest.mark.parametrize(("t", "s"), [(0.3, 0.3), (0.2, 0.5), (0.0, 0.0), (float("nan"), 0.1)])
def test_a_kernel_goes_forward_in_time(process, t, s):
    with pytest.raises(ValueError, match="so s < t; got s"):
        process.posterior_coefficients(t, s)
    with pytest.raises(ValueError, match="so s < t; got s"):
        process.step_coefficients(t, s)


# -- grids ------------------------------------------------------------------------------------------------------------


def test_a_grid_ends_on_the_data():
    assert list(Grid((1.0, 0.5, 0.1)).pairs()) == [(1.0, 0.5), (0.5, 0.1), (0.1, 0.0)]
    assert len(Grid((1.0, 0.5, 0.1))) == 3


def test_a_grid_of_a_process_is_that_of_its_schedule(process):
    grid = process.grid(7)
    assert grid.times == tuple(process.schedule.times(7).tolist())


def test_a_sampling_grid_has_even_steps_down_to_the_data(process):
    """1, 1 - 1/K, ..., 1/K: by hand; the two tables have steps exactly there."""
    for k in (1, 2, 4, 5, 10):
        times = process.sampling_grid(k).times
        assert times == pytest.approx([1 - i / k for i in range(k)], rel=1e-12)


@pytest.mark.parametrize("schedule", named(*TABLES))
def test_a_table_has_grids_of_every_length_up_to_its_own(schedule):
    """Its own steps, the noisiest included, none twice; a sampling grid's last one is about 1/K."""
    process, n = Process(schedule), len(schedule)
    for k in range(1, n + 1, 1 if n < 100 else 13):
        for grid in (process.grid(k), process.sampling_grid(k)):
            index = [n * t for t in grid.times]
            assert len(grid) == k
            assert index[0] == n
            assert max(abs(i - round(i)) for i in index) < 1e-9
        assert index[-1] == pytest.approx(n / k, abs=0.5 + 1e-9)


@pytest.mark.parametrize(
    ("times", "words"),
    [
        ((), "at least one time"),
        ((1.0, 0.0), r"times must lie in \(0, 1\].*got 0.0"),
        ((1.2, 0.5), r"times must lie in \(0, 1\].*got 1.2"),
        ((1.0, float("nan")), r"times must lie in \(0, 1\].*got nan"),
        ((1.0, 0.5, 0.5), "strictly decrease.*0.5 comes after 0.5"),
        ((0.1, 0.5), "strictly decrease.*0.5 comes after 0.1"),
    ],
)
def test_a_grid_that_cannot_be_says_why(times, words):
    with pytest.raises(ValueError, match=words):
        Grid(times)
