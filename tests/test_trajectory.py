"""The best trajectory (theory row 11): against every trajectory there is, quadrature, and the bound by sampling."""

import itertools
import math

import pytest
import torch

from conftest import ALL_SCHEDULES, elbo, named
from kuosan import Process
from kuosan.optimal import measure
from kuosan.trajectory import candidate_times, step_costs, trajectory
from kuosan.variance import OptimalVariance
from quadrature import ddpm_abar, mean_squared_error

DDPM = Process(ALL_SCHEDULES["ddpm_table"])
ENTROPY = 0.213944975263  # of the oracle
SECOND_MOMENT = 0.35 * (0.6**2 + 0.01) + 0.65 * (0.5**2 + 0.04)


def step_by_hand(t_bar, s_bar, error, variance):
    """E KL of a DDPM step, from abar at both ends and M_t: the Gaussian KL written out (Ho et al. 2020, eq. 7)."""
    beta = 1 - t_bar / s_bar
    tilde = (1 - s_bar) / (1 - t_bar) * beta
    c_0 = math.sqrt(s_bar) * beta / (1 - t_bar)
    v = {"beta": beta, "beta_tilde": tilde, "optimal": tilde + c_0**2 * error}[variance]
    return 0.5 * (math.log(v / tilde) + (tilde + c_0**2 * error) / v - 1)


def gap_by_hand(line, steps, variance="optimal", prior=True):
    """E log q(x_0) - E ELBO of the oracle on these steps of DDPM's table, M_t by quadrature; no Kuosan."""
    total = 0.5 * math.log(2 * math.pi * math.e * mean_squared_error(line, steps[0])) - ENTROPY
    for s, t in itertools.pairwise(steps):
        total += step_by_hand(ddpm_abar(t), ddpm_abar(s), mean_squared_error(line, t), variance)
    last = ddpm_abar(steps[-1])
    return total + prior * 0.5 * (last * (SECOND_MOMENT - 1) - math.log1p(-last))


def steps_of(grid):
    return [round(1000 * t) for t in reversed(grid.times)]


def test_the_hand_made_gap_is_the_known_number(oracle):
    """The table of test_diffusion.py: K = 10, all three variances."""
    even = [round(1 + i * 111) for i in range(10)]
    known = {"optimal": 0.492790, "beta": 0.603155, "beta_tilde": 390.2156}
    for variance, gap in known.items():
        assert gap_by_hand(oracle, even, variance) == pytest.approx(gap, rel=2e-6)


def test_from_the_first_step_the_search_finds_the_known_trajectory(oracle, optimal):
    """Found before by another program: a gap of .089341 nats, where the even trajectory has .492790."""
    found = steps_of(trajectory(DDPM, optimal, 10, first=0.001))
    assert found == [1, 23, 37, 49, 61, 74, 89, 109, 141, 1000]
    assert gap_by_hand(oracle, found) == pytest.approx(0.089341, abs=5e-7)


def test_a_first_step_that_is_chosen_too_does_better(oracle, optimal):
    found = steps_of(trajectory(DDPM, optimal, 10))
    assert found[0] > 1
    assert gap_by_hand(oracle, found) < 0.0812


@pytest.mark.parametrize("steps", [2, 5, 25, 100])
def test_no_even_trajectory_has_a_better_bound(steps, oracle, optimal):
    found = steps_of(trajectory(DDPM, optimal, steps, second_moment=SECOND_MOMENT))
    assert len(found) == steps
    assert gap_by_hand(oracle, found) < gap_by_hand(oracle, steps_of(DDPM.grid(steps)))


def test_all_steps_are_the_whole_table(oracle, optimal):
    """There is one trajectory of a thousand steps; its gap is the known .0048146."""
    found = trajectory(DDPM, optimal, 1000)
    assert found == DDPM.grid(1000)
    assert gap_by_hand(oracle, steps_of(found)) == pytest.approx(0.0048146, abs=5e-8)


@pytest.mark.parametrize("variance", ["optimal", "beta", "beta_tilde"])
@pytest.mark.parametrize("free_end", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_there_is_no_better_trajectory(steps, free_end, variance, oracle, optimal):
    """All of them, by enumeration, among twelve steps of which the last is noise enough or not quite."""
    among = (1, 10, 20, 40, 60, 90, 130, 180, 300, 500, 700, 900)
    free = [c for c in itertools.combinations(among, steps) if free_end or c[-1] == 900]
    gaps = {chosen: gap_by_hand(oracle, chosen, variance, prior=free_end) for chosen in free}
    found = trajectory(
        DDPM,
        optimal,
        steps,
        variance=variance,
        second_moment=SECOND_MOMENT if free_end else None,
        candidates=[step / 1000 for step in among],
    )
    assert tuple(steps_of(found)) == min(gaps, key=gaps.__getitem__)


def test_coordinates_of_their_own_count_each_for_itself(optimal):
    """The mean over coordinates of what each costs alone, for every variance."""
    other = OptimalVariance(DDPM, optimal.times, 0.3 * optimal.error**1.1)
    both = OptimalVariance(DDPM, optimal.times, torch.stack([optimal.error, other.error], 1))
    times = torch.linspace(0.01, 1, 20, dtype=torch.float64)
    for variance in ("optimal", "beta", "beta_tilde"):
        each = [step_costs(one, times, variance) for one in (optimal, other, both)]
        assert torch.allclose(0.5 * (each[0] + each[1]), each[2], rtol=1e-9)
    assert torch.allclose(
        0.5 * (optimal.decoding_cost(times) + other.decoding_cost(times)), both.decoding_cost(times), rtol=1e-9
    )


@pytest.mark.parametrize("schedule", named("linear_beta", "cosine", "ve", "rectified_flow", "sub_vp"))
def test_on_a_curve_too_the_searched_times_have_the_better_bound(schedule, ring):
    """M_t measured on other data; the same noise in both; 5 standard errors of the paired difference."""
    process = Process(schedule)
    denoiser = ring.denoiser(process)
    measured = measure(denoiser, ring.sample(3000, torch.Generator().manual_seed(1)), draws=1000)
    x_0 = ring.sample(2000, torch.Generator().manual_seed(2))
    for steps in (5, 10):
        even, found = (
            elbo(denoiser, x_0, grid=grid, variance=measured.scalar, draws=8).total
            for grid in (process.grid(steps), trajectory(process, measured.scalar, steps))
        )
        gain = found - even
        assert float(gain.mean()) > 5 * float(gain.std()) / math.sqrt(2000)


def test_the_search_looks_at_a_table_s_own_steps_and_densely_at_a_curve():
    assert torch.equal(candidate_times(DDPM), torch.arange(1, 1001).double() / 1000)
    curve = Process(ALL_SCHEDULES["cosine"])
    times = candidate_times(curve)
    assert (len(times), float(times[0]), float(times[-1])) == (1000, 0.001, 1.0)
    assert torch.allclose(curve.log_snr(times).diff(), curve.log_snr(times).diff().mean(), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps must lie in 1 to 1000, the number of candidate times; got 0"),
        ({"steps": 1001}, "steps must lie in 1 to 1000"),
        ({"steps": 3, "candidates": [0.5, 1.0]}, "steps must lie in 1 to 2"),
        ({"steps": 1, "candidates": [0.0, 1.0]}, r"candidate times lie in \(0, 1\]"),
        ({"steps": 1, "candidates": [0.5, float("nan")]}, r"candidate times lie in \(0, 1\]"),
        ({"steps": 1, "candidates": []}, r"candidate times lie in \(0, 1\]"),
        ({"steps": 2, "variance": "learned"}, "variance must be one of optimal, beta, beta_tilde, got 'learned'"),
        ({"steps": 2, "first": 0.0005}, "first = 0.0005 is not one of the candidate times"),
        ({"steps": 3, "first": 0.999}, "no 3 candidate times from first = 0.999 on"),
    ],
)
def test_a_search_that_cannot_be_says_why(options, words, optimal):
    with pytest.raises(ValueError, match=words):
        trajectory(DDPM, optimal, **options)


def test_the_error_of_another_process_is_refused(optimal):
    with pytest.raises(ValueError, match="measured under another process"):
        trajectory(Process(ALL_SCHEDULES["cosine"]), optimal, 5)
