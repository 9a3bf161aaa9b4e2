"""Schedules (theory rows 6 and 12) against printed formulas in 50-digit arithmetic, exact fractions and scipy."""

import math
from fractions import Fraction

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

from conftest import ALL_SCHEDULES, TABLES, named
from kuosan import schedules

TIMES = torch.tensor([1e-6, 0.013, 0.1, 0.2504, 0.5003, 0.77, 0.999], dtype=torch.float64)
CURVES = [name for name in ALL_SCHEDULES if name not in TABLES]

IDENTITIES = {
    "vp": lambda alpha, sigma: alpha**2 + sigma**2 - 1,
    "sub_vp": lambda alpha, sigma: sigma - (1 - alpha**2),
    "flow": lambda alpha, sigma: alpha + sigma - 1,
    "ve": lambda alpha, sigma: alpha - 1,
}


def cosine_angle(t):
    """Nichol and Dhariwal's angle, (t + s) / (1 + s) pi / 2, stopped where log-SNR is -15 instead of at pi / 2."""
    start = mpmath.mpf(0.008) / (1 + mpmath.mpf(0.008)) * mpmath.pi / 2
    end = mpmath.acos(mpmath.cos(start) / mpmath.sqrt(1 + mpmath.exp(15)))
    return start, start + t * (end - start)


def linear_beta_integral(t):
    return mpmath.mpf(0.1) * t + (20 - mpmath.mpf(0.1)) * t**2 / 2


def vp(alpha_bar):
    return mpmath.sqrt(alpha_bar), mpmath.sqrt(1 - alpha_bar)


def printed_sub_vp(t):
    alpha_bar = mpmath.exp(-linear_beta_integral(t))
    return mpmath.sqrt(alpha_bar), 1 - alpha_bar


def printed_cosine(t):
    start, angle = cosine_angle(t)
    return vp((mpmath.cos(angle) / mpmath.cos(start)) ** 2)


def printed_sqrt(t):
    end = 1 / (1 + mpmath.exp(-15))  # 1 - alpha_bar_1 where log-SNR is -15
    s = mpmath.mpf(1e-4)
    return vp(1 - mpmath.sqrt((end**2 - s) * t + s))


#: (alpha, sigma) as printed in the papers, in 50-digit arithmetic.
PRINTED = {
    "linear_beta": lambda t: vp(mpmath.exp(-linear_beta_integral(t))),
    "cosine": printed_cosine,
    "sqrt": printed_sqrt,
    "ve": lambda t: (mpmath.mpf(1), mpmath.mpf(0.002) * (80 / mpmath.mpf(0.002)) ** t),
    "sub_vp": printed_sub_vp,
    "rectified_flow": lambda t: (1 - t, t),
    "log_snr_line": lambda t: vp(1 / (1 + mpmath.exp(-(10 - 18 * t)))),
}


@pytest.mark.parametrize("t", [1e-9, 1e-7, 1e-5, 1e-3, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", PRINTED)
def test_alpha_and_sigma_are_the_printed_ones_to_twelve_digits(name, t):
    """The papers' formulas in 50-digit arithmetic; near the data 1 - alpha_bar would have lost most of its digits."""
    alpha, sigma = ALL_SCHEDULES[name].scales(t)
    with mpmath.workdps(50):
        true_alpha, true_sigma = (float(c) for c in PRINTED[name](mpmath.mpf(t)))
    assert float(sigma) == pytest.approx(true_sigma, rel=1e-12)
    assert float(alpha) == pytest.approx(true_alpha, rel=1e-9, abs=1e-300)  # it ends at 5e-4: 1 - x of x near 1


def test_the_naive_sigma_is_wrong_near_the_data_in_single_precision():
    """sqrt(1 - exp(2 L)) in float32 is 0.6 % off at t = 1e-5: why schedules are float64 and say expm1."""
    with mpmath.workdps(50):
        truth = float(PRINTED["linear_beta"](mpmath.mpf(1e-5))[1])
    log_alpha = torch.tensor(-0.5 * (0.1 * 1e-5 + 9.95 * 1e-10), dtype=torch.float32)
    naive = float(torch.sqrt(1 - torch.exp(2 * log_alpha)))
    assert abs(naive / truth - 1) > 0.004
    assert float(schedules.LinearBeta().scales(1e-5)[1]) == pytest.approx(truth, rel=1e-13)


def test_the_convention_ties_alpha_to_sigma(schedule):
    """Each convention's own equation."""
    alpha, sigma = schedule.scales(TIMES)
    assert IDENTITIES[schedule.convention](alpha, sigma).abs().max() < 1e-13


@pytest.mark.parametrize("convention", IDENTITIES)
def test_any_log_snr_curve_can_be_read_in_any_convention(convention):
    """The convention's equation, and the SNR that was asked for."""
    schedule = schedules.from_log_snr(lambda t: 12 - 20 * t, convention)
    alpha, sigma = schedule.scales(TIMES)
    assert IDENTITIES[convention](alpha, sigma).abs().max() < 1e-13
    assert torch.allclose(2 * torch.log(alpha / sigma), 12 - 20 * TIMES, rtol=0, atol=1e-12)


def test_log_snr_is_that_of_alpha_and_sigma(schedule):
    alpha, sigma = schedule.scales(TIMES)
    assert torch.allclose(schedule.log_snr(TIMES), 2 * torch.log(alpha / sigma), rtol=1e-11, atol=1e-11)


def test_noise_only_grows(schedule):
    """log-SNR strictly falls, alpha never rises."""
    t = torch.linspace(schedule.t_min, 1, 3001, dtype=torch.float64)
    assert bool((schedule.log_snr(t).diff() < 0).all())
    assert bool((schedule.scales(t)[0].diff() <= 0).all())


def test_time_zero_is_the_data_exactly(schedule):
    alpha, sigma = schedule.scales(0.0)
    assert (float(alpha), float(sigma), float(schedule.log_snr(0.0))) == (1.0, 0.0, math.inf)


def test_everything_is_float64_and_of_the_shape_of_t(schedule):
    for t in (0.5, torch.tensor(0.5), torch.tensor([0.2, 0.5]), torch.zeros(2, 3) + 0.5):
        shape = torch.as_tensor(t).shape
        for answer in (schedule.log_snr(t), *schedule.scales(t), schedule.log_snr_rate(t), *schedule.log_rates(t)):
            assert answer.dtype == torch.float64
            assert answer.shape == shape


def test_rates_are_finite_differences(schedule):
    """Central differences with h = 1e-6; the times are away from the corners of the tables."""
    t, h = torch.tensor([0.0133, 0.2504, 0.5003, 0.7704, 0.9888], dtype=torch.float64), 1e-6

    def difference(function):
        return (function(t + h) - function(t - h)) / (2 * h)

    assert torch.allclose(schedule.log_snr_rate(t), difference(schedule.log_snr), rtol=1e-6)
    for i in range(2):
        assert torch.allclose(schedule.rates(t)[i], difference(lambda u: schedule.scales(u)[i]), rtol=1e-6, atol=1e-8)  # noqa: B023
        slow = difference(lambda u: schedule.scales(u)[i].log())  # noqa: B023
        assert torch.allclose(schedule.log_rates(t)[i], slow, rtol=1e-6, atol=1e-8)


@given(st.sampled_from(list(ALL_SCHEDULES)), st.floats(1e-3, 1))
def test_the_time_of_a_log_snr_undoes_the_curve(name, t):
    schedule = ALL_SCHEDULES[name]
    assert float(schedule.time_of(schedule.log_snr(t))) == pytest.approx(t, abs=1e-9)


def test_the_time_of_a_log_snr_that_is_not_reached_is_an_end(schedule):
    assert float(schedule.time_of(-1000.0)) == 1.0
    assert 0 < float(schedule.time_of(1000.0)) < 1e-6


@pytest.mark.parametrize("t", [0.001, 0.05, 0.4, 1.0])
def test_linear_beta_is_the_exponential_of_an_integral(t):
    """alpha_bar = exp(-integral of beta), beta(u) = 0.1 + 19.9 u, by scipy.integrate.quad."""
    integral = integrate.quad(lambda u: 0.1 + 19.9 * u, 0, t, epsabs=1e-14)[0]
    assert float(schedules.LinearBeta().scales(t)[0] ** 2) == pytest.approx(math.exp(-integral), rel=1e-12)


@pytest.mark.parametrize("t", [0.05, 0.3, 0.6, 0.9])
def test_cosine_is_the_printed_one_but_for_its_end(t):
    """The printed angle ends at pi / 2, where log-SNR is minus infinity; this one 5e-4 before it."""
    printed = (math.cos((t + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2
    cosine = schedules.Cosine()
    assert float(cosine.scales(t)[0] ** 2) == pytest.approx(printed, abs=1e-3 * t)
    assert float(cosine.log_snr(1.0)) == pytest.approx(-15, abs=1e-9)
    nearer = schedules.Cosine(log_snr_end=-30.0)
    assert float(nearer.scales(t)[0] ** 2) == pytest.approx(printed, abs=1e-6)


@pytest.mark.parametrize("t", [0.0001, 0.05, 0.3, 0.6, 0.9])
def test_sqrt_is_the_printed_one_but_for_its_end(t):
    """1 - sqrt(t + s) falls below 0 at t = 1 - s; c t + s does not, with c = 1 up to 1e-4."""
    schedule = schedules.Sqrt()
    assert float(schedule.scales(t)[0] ** 2) == pytest.approx(1 - math.sqrt(t + 1e-4), abs=1e-4)
    assert float(schedule.log_snr(1.0)) == pytest.approx(-15, abs=1e-9)


def test_the_ddpm_table_is_the_cumulative_product():
    """The product of 1 - beta_i in exact fractions, beta from 1e-4 to 0.02 in 1,000 even steps."""
    table = schedules.linear_beta_table(1000)
    alpha, sigma = table.scales(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    product = Fraction(1)
    for i in range(1000):
        product *= 1 - (Fraction(1, 10_000) + i * Fraction(199, 10_000) / 999)
        assert float(alpha[i] ** 2) == pytest.approx(float(product), rel=1e-12)
        assert float(sigma[i] ** 2) == pytest.approx(float(1 - product), rel=1e-12)
        product = Fraction(round(product * 10**60), 10**60)  # 60 digits are enough, and quick


def test_a_table_of_alpha_bar_gives_it_back():
    given_table = [0.999, 0.9, 0.5, 0.01]
    table = schedules.from_alpha_bar(given_table)
    alpha, sigma = table.scales(torch.tensor([0.25, 0.5, 0.75, 1.0]))
    assert (alpha**2).tolist() == pytest.approx(given_table, rel=1e-14)
    assert (sigma**2).tolist() == pytest.approx([0.001, 0.1, 0.5, 0.99], rel=1e-12)


def test_between_two_steps_of_a_table_log_snr_is_a_straight_line():
    table = schedules.from_alpha_bar([0.9, 0.5])
    expected = 0.75 * math.log(0.9 / 0.1) + 0.25 * math.log(0.5 / 0.5)
    assert float(table.log_snr(0.625)) == pytest.approx(expected, rel=1e-12)


def half_even_grid(n, k):
    """Indices 1 + i (N - 1) / (K - 1) in exact fractions, halves rounded to the even index, noise first."""
    return [round(1 + Fraction(i * (n - 1), k - 1)) / n for i in range(k)][::-1]  # round() of a Fraction: half to even


@pytest.mark.parametrize(("n", "k"), [(1000, 10), (1000, 50), (1000, 999), (1000, 1000), (4, 4), (7, 2)])
def test_the_grid_of_a_table_is_its_own_steps_evenly_spread(n, k):
    assert schedules.linear_beta_table(n).times(k).tolist() == half_even_grid(n, k)


@pytest.mark.parametrize(("n", "k"), [(1000, 3), (8, 3), (10, 7), (1000, 667)])
def test_an_index_half_way_between_two_steps_goes_to_the_even_one(n, k):
    """Of steps 1 to 1000, the middle is 500.5, and the even one is 500."""
    assert schedules.linear_beta_table(n).times(k).tolist() == half_even_grid(n, k)


def test_one_step_is_the_noisiest(schedule):
    assert schedule.times(1).tolist() == [1.0]


@pytest.mark.parametrize("name", CURVES)
def test_the_grid_of_a_curve_is_even_from_noise_to_the_earliest_time(name):
    schedule = ALL_SCHEDULES[name]
    times = schedule.times(5)
    assert (float(times[0]), float(times[-1])) == (1.0, schedule.t_min)
    assert times.diff().tolist() == pytest.approx([(schedule.t_min - 1) / 4] * 4)


@given(st.sampled_from(TABLES), st.floats(0, 1, exclude_max=True))
def test_a_training_time_of_a_table_is_one_of_its_steps(name, u):
    table = ALL_SCHEDULES[name]
    step = round(float(table.at(torch.tensor(u, dtype=torch.float64))) * len(table))
    assert 1 <= step <= len(table)
    assert float(table.at(torch.tensor(u, dtype=torch.float64))) == step / len(table)


@pytest.mark.parametrize("name", CURVES)
def test_a_training_time_of_a_curve_lies_between_its_ends(name):
    schedule = ALL_SCHEDULES[name]
    ends = schedule.at(torch.tensor([0.0, 0.5, 1.0])).tolist()
    assert ends == pytest.approx([schedule.t_min, 0.5 * (1 + schedule.t_min), 1.0])


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: schedules.LinearBeta(t_min=0.0), "t_min must lie between 0 .* and 1"),
        (lambda: schedules.LinearBeta(beta_min=-1.0), "0 < beta_min <= beta_max, got -1.0"),
        (lambda: schedules.SubVP(beta_min=5.0, beta_max=1.0), "0 < beta_min <= beta_max"),
        (lambda: schedules.Cosine(s=0.0), "s must be positive"),
        (lambda: schedules.Cosine(log_snr_end=40.0), "log_snr_end"),
        (lambda: schedules.Sqrt(s=1.0), r"s must lie in \(0, 1\)"),
        (lambda: schedules.Sqrt(log_snr_end=20.0), "log_snr_end"),
        (lambda: schedules.VE(sigma_min=80.0, sigma_max=0.1), "0 < sigma_min < sigma_max"),
        (lambda: schedules.from_log_snr(lambda t: 10 * t), "strictly decreasing"),
        (lambda: schedules.from_log_snr(lambda t: -torch.log(t - 0.5)), "finite and strictly decreasing"),
        (lambda: schedules.from_log_snr(lambda t: -t, convention="vx"), "convention must be one of vp"),
        (lambda: schedules.from_alpha_bar([0.9, 0.9]), "must fall at every step; it does not from step 1 to step 2"),
        (lambda: schedules.from_alpha_bar([0.9, 0.5, 0.6]), "from step 2 to step 3"),
        (lambda: schedules.from_alpha_bar([1.0, 0.5]), "strictly between 0 and 1"),
        (lambda: schedules.from_alpha_bar([0.5, float("nan")]), "strictly between 0 and 1"),
        (lambda: schedules.from_alpha_bar([0.9, 0.5], convention="vx"), "convention must be one of"),
        (lambda: schedules.from_alpha_bar([]), "at least one"),
        (lambda: schedules.linear_beta_table(0), "steps >= 1"),
        (lambda: schedules.linear_beta_table(20, 5e-3, 1.0), "beta_last < 1"),
    ],
)
def test_a_schedule_that_cannot_be_says_why(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_ddpm_rescaled_to_few_steps_is_refused():
    """1000 / T times DDPM's betas reaches 1 at T = 20: the last one would be exactly 1."""
    with pytest.raises(ValueError, match="beta_last < 1"):
        schedules.linear_beta_table(20, 1e-4 * 50, 0.02 * 50)


@pytest.mark.parametrize("schedule", named(*TABLES))
def test_a_table_has_no_more_steps_than_it_was_made_with(schedule):
    with pytest.raises(ValueError, match=f"steps must lie in 1 to {len(schedule)}, got {len(schedule) + 1}"):
        schedule.times(len(schedule) + 1)


@pytest.mark.parametrize("steps", [0, -3])
def test_a_grid_needs_a_step(schedule, steps):
    with pytest.raises(ValueError, match=f"steps must .* got {steps}"):
        schedule.times(steps)
