"""Grids: each against its formula by hand, and what all of them promise under every schedule."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from conftest import ALL_SCHEDULES, TABLES, named
from kuosan import Process
from kuosan.schedules import VE, LinearBeta, RectifiedFlow, linear_beta_table
from kuosan.solvers import (
    GRIDS,
    AdamsBashforth,
    Karras,
    LinearBetaTime,
    Quadratic,
    Rectified,
    UniformLogSNR,
    UniformTime,
)

#: The processes of the hand-made formulas: all of their noise levels are below the grids' own bound of 80.
EXPLODING = VE(sigma_min=0.002, sigma_max=60.0)
SPACINGS = [
    *(kind() for kind in GRIDS.values()),
    UniformLogSNR(last=0.05, first=20.0),
    Karras(last=0.05, first=20.0, p=3.0),
    Rectified(shift=3.0),
    Rectified(shift=0.3, power=2.0),
    LinearBetaTime(shift=1.0, power=1.0),
]


def noise_levels(spacing, process, steps):
    """sigma / alpha of the grid's times."""
    t = torch.tensor(spacing.grid(process, steps).times, dtype=torch.float64)
    alpha, sigma = process.scales(t)
    return (sigma / alpha).numpy()


# -- what every grid promises -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", SPACINGS, ids=repr)
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 40])
def test_a_grid_has_its_number_of_falling_times_from_one(process, spacing, steps):
    """From 1, strictly down, no earlier than the model has been trained: 40 is all that the shortest table has."""
    times = spacing.grid(process, steps).times
    assert len(times) == steps
    assert times[0] == 1.0
    assert all(s < t for t, s in pairwise(times))
    assert times[-1] >= process.schedule.t_min


@pytest.mark.parametrize("spacing", SPACINGS, ids=repr)
@pytest.mark.parametrize("name", TABLES)
def test_a_discrete_model_is_asked_at_its_own_steps(spacing, name):
    """Whole multiples of 1/N, all different; with N steps all of them."""
    schedule = ALL_SCHEDULES[name]
    n = len(schedule)
    for steps in (1, 7, n // 2, n - 1, n):
        index = [t * n for t in spacing.grid(Process(schedule), steps).times]
        assert index == pytest.approx([round(i) for i in index], abs=1e-9)
        assert len({round(i) for i in index}) == steps
    assert [round(i) for i in index] == list(range(n, 0, -1))


@pytest.mark.parametrize("spacing", [Karras(), UniformLogSNR(), LinearBetaTime(), Rectified()], ids=repr)
def test_a_discrete_model_is_asked_at_the_step_nearest_to_what_was_meant(spacing):
    """Where no two of the wanted times share a step."""
    process = Process(linear_beta_table(1000))
    wanted = spacing.times(process, 6, 1.0)
    wanted[0] = 1.0
    mine = np.array(spacing.grid(process, 6).times)
    assert np.diff(wanted).max() < -1 / 1000
    assert np.abs(mine - np.maximum(wanted, 1 / 1000)).max() <= 0.5 / 1000 + 1e-12


@pytest.mark.parametrize("spacing", SPACINGS, ids=repr)
def test_a_discrete_model_has_no_more_steps_than_it_was_made_with(spacing):
    process = Process(ALL_SCHEDULES["alpha_bar_table"])
    with pytest.raises(ValueError, match="made with 40 steps: steps must lie in 1 to 40, got 41"):
        spacing.grid(process, 41)


@pytest.mark.parametrize("spacing", SPACINGS, ids=repr)
@pytest.mark.parametrize("name", ["cosine", "alpha_bar_table"])
def test_no_steps_are_refused(spacing, name):
    with pytest.raises(ValueError, match=r"steps must (be at least 1|lie in 1 to 40), got 0"):
        spacing.grid(Process(ALL_SCHEDULES[name]), 0)


@pytest.mark.parametrize("spacing", [Karras(), UniformLogSNR(), LinearBetaTime()], ids=repr)
def test_a_grid_of_noise_levels_visits_the_same_levels_under_every_schedule(spacing):
    """A schedule is only a clock: both begin above the grids' bound, 80, one of them without any signal."""
    one, two = (noise_levels(spacing, Process(s), 8) for s in (LinearBeta(t_min=1e-9), RectifiedFlow(t_min=1e-9)))
    assert one[0] == pytest.approx(math.sqrt(math.expm1(10.05)))
    assert one[1:] == pytest.approx(two[1:], rel=1e-6)


# -- each against its formula -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", named("linear_beta", "cosine", "ve"))
def test_even_in_time_means_multiples_of_one_over_k(schedule):
    assert UniformTime().grid(Process(schedule), 5).times == pytest.approx((1.0, 0.8, 0.6, 0.4, 0.2))


def test_quadratic_means_even_in_the_root_of_time():
    assert Quadratic().grid(Process(LinearBeta()), 4).times == pytest.approx((1.0, 0.5625, 0.25, 0.0625))


def test_even_in_log_snr_means_equal_ratios():
    """From the process's own level down to the last that was asked for."""
    levels = noise_levels(UniformLogSNR(last=0.01), Process(EXPLODING), 9)
    assert levels == pytest.approx(np.geomspace(60.0, 0.01, 9), rel=1e-9)


@pytest.mark.parametrize("p", [1.0, 3.0, 7.0])
def test_karras_is_equation_5(p):
    """sigma_i = (smax^(1/p) + i/(N-1) (smin^(1/p) - smax^(1/p)))^p."""
    n, high, low = 11, 60.0, 0.002
    truth = [(high ** (1 / p) + i / (n - 1) * (low ** (1 / p) - high ** (1 / p))) ** p for i in range(n)]
    assert noise_levels(Karras(p=p), Process(EXPLODING), n) == pytest.approx(np.array(truth), rel=1e-6)


@pytest.mark.parametrize("spacing", [Karras(first=20.0), UniformLogSNR(first=20.0), LinearBetaTime(first=20.0)])
def test_only_the_first_evaluation_is_above_the_bound(spacing):
    """The process begins at 60: the second level is that of a process which begins at 20."""
    short = noise_levels(spacing, Process(VE(sigma_min=0.002, sigma_max=20.0)), 7)
    long = noise_levels(spacing, Process(EXPLODING), 7)
    assert long[0] == pytest.approx(60.0)
    assert long[1:] == pytest.approx(short[1:], rel=1e-6)


def test_rectified_means_even_in_the_straight_line_s_time():
    """1, 1 - 1/K, ..., 1/K in the flow's own time; under any other schedule even in sigma / (alpha + sigma)."""
    assert Rectified().grid(Process(RectifiedFlow()), 5).times == pytest.approx((1.0, 0.8, 0.6, 0.4, 0.2))
    levels = noise_levels(Rectified(), Process(EXPLODING), 6)
    u = levels / (1 + levels)
    assert np.diff(u) == pytest.approx(np.full(5, -u[0] / 6), rel=1e-8)


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_the_shift_is_equation_23(shift):
    """Esser et al. 2024: t' = shift t / (1 + (shift - 1) t), on the flow's own even grid."""
    t = 1 - np.arange(10) / 10
    truth = shift * t / (1 + (shift - 1) * t)
    assert Rectified(shift).grid(Process(RectifiedFlow()), 10).times == pytest.approx(tuple(truth), rel=1e-9)


def test_a_power_of_the_rectified_time():
    truth = (1 - np.arange(6) / 6) ** 2
    assert Rectified(power=2.0).grid(Process(RectifiedFlow()), 6).times == pytest.approx(tuple(truth), rel=1e-9)


@pytest.mark.parametrize("steps", [1, 4, 9])
def test_linear_beta_time_is_even_in_that_process_s_time(steps):
    """With beta_min gone, no power, no shift and no bound: log abar = -10 t^2, so that rho is sqrt(exp(10 t^2) - 1)."""
    spacing = LinearBetaTime(shift=1.0, power=1.0, first=1e6)
    even = 1 - np.arange(steps) / steps
    mine = spacing.grid(Process(LinearBeta(beta_min=1e-9, beta_max=20.0)), steps).times
    assert mine == pytest.approx(tuple(even), rel=1e-7)
    levels = noise_levels(spacing, Process(EXPLODING), steps)
    top = math.sqrt(math.log1p(60.0**2))
    assert levels == pytest.approx(np.sqrt(np.expm1((top * even) ** 2)), rel=1e-7)


def test_linear_beta_time_with_a_shift_and_a_power():
    levels = noise_levels(LinearBetaTime(shift=0.6, power=1.5), Process(EXPLODING), 8)
    top = math.sqrt(math.log1p((60.0 / 0.6) ** 2))
    tau = top * (1 - np.arange(8) / 8) ** 1.5
    assert levels == pytest.approx(0.6 * np.sqrt(np.expm1(tau**2)), rel=1e-7)


def test_a_grid_stops_where_training_did():
    """VE down to 0.1 has no level under 0.1: the grid ends there instead of repeating its last time."""
    levels = noise_levels(Karras(), Process(VE(sigma_min=0.1, sigma_max=60.0)), 10)
    assert levels[0] == pytest.approx(60.0)
    assert levels[-1] == pytest.approx(0.1, rel=1e-6)
    assert (np.diff(levels) < 0).all()


@pytest.mark.parametrize("steps", [1201, 2962])
def test_a_grid_stops_there_to_the_last_bit(steps):
    """Two of the numbers of steps at which squeezing the times rounds to a little under t_min."""
    schedule = LinearBeta(t_min=1e-3)
    assert Quadratic().grid(Process(schedule), steps).times[-1] == schedule.t_min


def test_a_solver_lays_out_its_own_grid_unless_told():
    process = Process(LinearBeta())
    own = AdamsBashforth(2).table(process, steps=6)
    assert own.times == LinearBetaTime().grid(process, 6).times
    assert AdamsBashforth(2).table(process, Karras(), steps=6).times == Karras().grid(process, 6).times
    assert AdamsBashforth(2).table(process, Karras().grid(process, 6)).times == Karras().grid(process, 6).times


def test_grids_are_known_by_name():
    assert set(GRIDS) == {"time", "quadratic", "log_snr", "karras", "rectified", "linear_beta"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: UniformLogSNR(last=2.0, first=1.0), "0 < last < first, got 2.0 and 1.0"),
        (lambda: UniformLogSNR(last=0.0), "0 < last < first"),
        (lambda: UniformLogSNR(first=math.inf), "0 < last < first"),
        (lambda: Karras(last=math.nan), "0 < last < first"),
        (lambda: Karras(p=0.0), "p must be positive, got 0.0"),
        (lambda: Rectified(shift=-1.0), "shift and power must be positive"),
        (lambda: Rectified(power=0.0), "shift and power must be positive"),
        (lambda: LinearBetaTime(shift=0.0), "shift and power must be positive"),
        (lambda: LinearBetaTime(first=math.inf), "must be positive, got inf"),
    ],
)
def test_a_grid_that_cannot_be_says_why(make, words):
    with pytest.raises(ValueError, match=words):
        make()
