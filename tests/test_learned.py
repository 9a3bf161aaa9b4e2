"""A learned schedule and the continuous-time bound: their formulas written out again, exact denoisers, whole runs."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kuosan as ks
from conftest import ALL_SCHEDULES, named
from kuosan import Denoiser, DiffusionChain, Grid, Process
from kuosan import recipe as recipes
from kuosan.build import make_objective, make_solver
from kuosan.cli import main
from kuosan.denoiser import EDM
from kuosan.learned import Continuous, LearnedSchedule
from kuosan.objectives import LogitNormal, LossAware
from kuosan.recipe import RecipeError
from kuosan.schedules import from_log_snr
from kuosan.solvers import SOLVERS
from kuosan.train import train
from kuosan.training.ema import EMA
from test_training import assert_same, end_of, losses, stop_at, train_with

#: E -log p(x) of the mixture ``oracle``, by scipy's quadrature (tests/test_diffusion.py).
ENTROPY = 0.213944975263


def f64(value):
    return torch.as_tensor(value, dtype=torch.float64)


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def shuffled(seed, ends=(12.0, -5.0), units=8):
    """A schedule as training might leave it: of steps of any height and width at random places between its ends."""
    schedule, generator = LearnedSchedule(*ends, units=units), dice(seed)
    draw = torch.rand(3, units, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        schedule.slope.copy_(1 + 20 * draw[0])
        schedule.place.copy_(-schedule.slope * draw[1])
        schedule.weight.copy_(-4 + 3 * draw[2])
    return schedule


def wild(seed, ends):
    """Numbers that nobody would choose."""
    schedule, generator = LearnedSchedule(*ends, units=8), dice(seed)
    with torch.no_grad():
        for parameter, scale in ((schedule.slope, 20.0), (schedule.place, 10.0), (schedule.weight, 3.0)):
            parameter.copy_(scale * torch.randn(8, generator=generator, dtype=torch.float64))
    return schedule


def log_snr_by_hand(schedule, t):
    """The formula of the docstring, in the parameters, one sum at a time."""
    a, w = (torch.log1p(torch.exp(-p.abs())) + p.clamp_min(0) for p in (schedule.slope, schedule.weight))

    def g(t):
        return t + (w / (1 + torch.exp(-(a * t[..., None] + schedule.place)))).sum(-1)

    low, high = g(f64(0.0)), g(f64(1.0))
    first, last = schedule.ends
    return first + (last - first) * (g(t) - low) / (high - low)


# -- the curve --------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.floats(-10, 20), st.floats(0.01, 30))
def test_log_snr_falls_at_every_time_from_one_end_to_the_other_whatever_was_learned(seed, first, height):
    """A schedule that rises anywhere has kernels of negative variance; the ends are where they were put."""
    schedule = wild(seed, (first, first - height))
    t = torch.linspace(0, 1, 501, dtype=torch.float64)[1:]
    values = schedule.log_snr(t)
    assert bool((values[1:] < values[:-1]).all())
    ends = schedule.log_snr(f64([1e-300, 1.0])).tolist()
    assert ends == pytest.approx([first, first - height], abs=1e-12)
    assert schedule.log_snr(0.0).item() == math.inf
    torch.testing.assert_close(values, log_snr_by_hand(schedule, t), rtol=0, atol=1e-6)


def test_at_the_start_log_snr_is_nearly_a_straight_line():
    """The line through its two ends, to within a fiftieth of the way."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)[1:]
    assert (LearnedSchedule(8.0, -6.0).log_snr(t) - (8 - 14 * t)).abs().max().item() < 14 / 50


@given(st.integers(0, 10**6))
def test_the_rate_of_log_snr_is_the_slope_of_its_curve(seed):
    """Central differences, and automatic differentiation of the curve; the base class has only the second."""
    schedule = shuffled(seed)
    t = f64([0.001, 0.1, 0.37, 0.5, 0.9, 0.999])
    rate = schedule.log_snr_rate(t)
    step = 1e-6
    numbers = (schedule.log_snr(t + step) - schedule.log_snr(t - step)) / (2 * step)
    torch.testing.assert_close(rate, numbers, rtol=1e-4, atol=1e-6)
    time = t.clone().requires_grad_()
    (slope,) = torch.autograd.grad(log_snr_by_hand(schedule, time).sum(), time)
    torch.testing.assert_close(rate, slope, rtol=1e-9, atol=1e-9)


def test_gradients_reach_every_parameter_through_the_curve_and_its_rate():
    """gradcheck: finite differences in each of the parameters; the rate's own are second derivatives of the curve."""
    schedule, t = shuffled(3, units=3), f64([0.2, 0.6, 0.95])
    names = [name for name, _ in schedule.named_parameters()]

    def of(method):
        def function(*values):
            named_values = {f"schedule.{name}": value for name, value in zip(names, values, strict=True)}
            return torch.func.functional_call(_Method(schedule, method), named_values, t)

        return function

    values = tuple(p.detach().clone().requires_grad_() for p in schedule.parameters())
    for method in ("log_snr", "log_snr_rate"):
        assert torch.autograd.gradcheck(of(method), values)
        gradients = torch.autograd.grad(of(method)(*values).square().sum(), values)
        assert all(bool((gradient != 0).all()) for gradient in gradients)


class _Method(nn.Module):
    def __init__(self, schedule, method):
        super().__init__()
        self.schedule, self.method = schedule, method

    def forward(self, t):
        return getattr(self.schedule, self.method)(t)


class Small(nn.Module):
    """A network of four numbers in float64, with something to say at every time."""

    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(f64([0.7, -0.3, 0.2, 0.9]))

    def forward(self, x, t, condition=None):
        a, b, c, d = self.values
        t = t.reshape(-1, *(1,) * (x.ndim - 1))
        return d * torch.tanh(a * x + b * t + c)


@pytest.mark.parametrize(
    "cast",
    [nn.Module.half, nn.Module.bfloat16, lambda m: m.to(torch.float32), nn.Module.float],
    ids=["half", "bfloat16", "to float32", "float"],
)
def test_a_model_in_fewer_bits_keeps_its_schedule_in_64(cast):
    """Of a double: the curve before and after is the same but for what its parameters were rounded to on the way."""
    denoiser = Denoiser(Small(), Process(shuffled(4)))
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    before = denoiser.process.log_snr(t)
    cast(denoiser)
    assert denoiser.network.values.dtype != torch.float64
    assert all(p.dtype == torch.float64 for p in denoiser.process.schedule.parameters())
    after = denoiser.process.log_snr(t)
    assert after.dtype == torch.float64
    torch.testing.assert_close(after, before, rtol=0, atol=0.5)


def test_two_learned_schedules_are_never_the_same_and_one_is_always_itself():
    """What is equal today has been trained apart tomorrow; kept coefficients and grids are looked up by this."""
    one, two = LearnedSchedule(), LearnedSchedule()
    assert one == one
    assert one != two
    assert len({one, two, one}) == 2
    assert Process(one) == Process(one) != Process(two)


def test_a_process_does_not_remember_the_numbers_of_a_schedule_that_has_moved_on():
    """By the formula: alpha^2 = SNR / (1 + SNR), before and after the ends were moved."""
    schedule = LearnedSchedule(9.0, -4.0)
    process = Process(schedule)
    for ends in ((9.0, -4.0), (11.0, -7.0)):
        with torch.no_grad():
            schedule.ends.copy_(f64(ends))
        with torch.no_grad():
            alpha, sigma = process.at(Process.scales, 1.0)
        assert float(alpha) == pytest.approx(math.sqrt(1 / (1 + math.exp(-ends[1]))), rel=1e-12)
        assert float(sigma) == pytest.approx(math.sqrt(1 / (1 + math.exp(ends[1]))), rel=1e-12)


# -- in a denoiser ----------------------------------------------------------------------------------------------------


def test_a_denoiser_trains_keeps_and_averages_its_schedule_with_its_network():
    """Under their own names, once each; another denoiser that loads them has the same curve."""
    denoiser = Denoiser(Small(), Process(shuffled(5)))
    mine = {"schedule.ends", "schedule.slope", "schedule.place", "schedule.weight"}
    assert {name for name, _ in denoiser.named_parameters()} == mine | {"network.values"}
    assert set(denoiser.state_dict()) == mine | {"network.values"}

    other = Denoiser(Small(), Process(LearnedSchedule(units=8)))
    t = torch.linspace(0.01, 1, 20, dtype=torch.float64)
    assert not torch.allclose(other.process.log_snr(t), denoiser.process.log_snr(t))
    other.load_state_dict(denoiser.state_dict())
    assert torch.equal(other.process.log_snr(t), denoiser.process.log_snr(t))

    average = EMA(denoiser, decay=0.9)
    with torch.no_grad():
        denoiser.schedule.ends.add_(1.0)
    average.update(denoiser, 10**6)
    with average.swapped_in(denoiser):
        assert denoiser.process.log_snr(1.0).item() == pytest.approx(-5 + 0.1, abs=1e-6)
    assert denoiser.process.log_snr(1.0).item() == pytest.approx(-4, abs=1e-6)


# -- the continuous-time loss, written out again ----------------------------------------------------------------------


def parts_by_hand(schedule, network, predicts, x_0, t, noise, decoded):
    """(integral, ends) of each example, nats per dimension: VP, alpha^2 = sigmoid(log-SNR); x_0 of shape (B, d)."""
    d = x_0.shape[1]

    def said(log_snr, t):
        alpha, sigma = torch.sigmoid(log_snr).sqrt()[:, None], torch.sigmoid(-log_snr).sqrt()[:, None]
        x_t = alpha * x_0 + sigma * noise
        output = network(x_t, t)
        return {"x0": output, "eps": (x_t - sigma * output) / alpha, "v": alpha * x_t - sigma * output}[predicts]

    time = t.clone().requires_grad_()
    log_snr = log_snr_by_hand(schedule, time)
    (rate,) = torch.autograd.grad(log_snr.sum(), time, create_graph=True)
    integral = 0.5 * -rate * log_snr.exp() * ((x_0 - said(log_snr, t)) ** 2).sum(1) / d

    last = log_snr_by_hand(schedule, f64(1.0))
    alpha2, sigma2 = torch.sigmoid(last), torch.sigmoid(-last)
    prior = 0.5 * (alpha2 * x_0**2 + sigma2 - 1 - sigma2.log()).sum(1) / d
    first = log_snr_by_hand(schedule, torch.full_like(t, 1e-9))
    variance = torch.exp(-first)[:, None]
    density = 0.5 * (torch.log(2 * math.pi * variance) + (x_0 - said(first, torch.full_like(t, 1e-9))) ** 2 / variance)
    decoding = torch.where(t < decoded, density.sum(1) / d / decoded, 0.0)
    return integral, prior + decoding


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
@pytest.mark.parametrize("decoded", [0.125, 0.5, 1.0])
def test_the_loss_has_the_value_and_the_three_gradients_of_its_formula(predicts, decoded):
    """The formula of the paper in the test's own alpha, sigma and rate. The network and the ends descend on the mean
    of the whole loss, what lies between on the mean of the square of its integral."""
    schedule, network = shuffled(6, (5.0, -3.0), units=4), Small()
    denoiser = Denoiser(network, Process(schedule), predicts)
    x_0 = torch.randn(40, 3, generator=dice(1), dtype=torch.float64)
    noise = torch.randn(40, 3, generator=dice(2), dtype=torch.float64)
    t = torch.rand(40, generator=dice(3), dtype=torch.float64)
    interior = (schedule.slope, schedule.place, schedule.weight)
    everything = (network.values, schedule.ends, *interior)

    loss = Continuous(decoded)(denoiser, x_0, t=t, noise=noise)
    got = torch.autograd.grad(loss.mean(), everything)

    integral, ends = parts_by_hand(schedule, network, predicts, x_0, t, noise, decoded)
    torch.testing.assert_close(loss, integral + ends, rtol=1e-7, atol=1e-9)
    whole = torch.autograd.grad((integral + ends).mean(), everything[:2], retain_graph=True)
    square = torch.autograd.grad((integral**2).mean(), interior)
    for one, other in zip(got, (*whole, *square), strict=True):
        assert float(other.abs().max()) > 1e-6  # or this would say little
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_the_gradients_of_a_preconditioned_denoiser_are_those_of_the_formula_too():
    """EDM's four coefficients and its label depend on the schedule: all of that is a path for the square."""
    schedule, network = shuffled(7, (5.0, -3.0), units=4), Small()
    denoiser = Denoiser(network, Process(schedule), "x0", EDM(0.8))

    class Scaled(nn.Module):  # Karras et al. 2022, table 1, at the log-SNR of that time
        def forward(self, x, t):
            log_snr = log_snr_by_hand(schedule, t)[:, None]
            alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
            total = sigma**2 + 0.64 * alpha**2
            said = network(x / total.sqrt(), (-log_snr / 8)[:, 0])
            return 0.64 * alpha / total * x + 0.8 * sigma / total.sqrt() * said

    x_0 = torch.randn(40, 3, generator=dice(1), dtype=torch.float64)
    noise = torch.randn(40, 3, generator=dice(2), dtype=torch.float64)
    t = torch.rand(40, generator=dice(3), dtype=torch.float64)
    interior = (schedule.slope, schedule.place, schedule.weight)
    loss = Continuous()(denoiser, x_0, t=t, noise=noise)
    got = torch.autograd.grad(loss.mean(), (schedule.ends, *interior))
    integral, ends = parts_by_hand(schedule, Scaled(), "x0", x_0, t, noise, 0.125)
    torch.testing.assert_close(loss, integral + ends, rtol=1e-7, atol=1e-9)
    whole = torch.autograd.grad((integral + ends).mean(), schedule.ends, retain_graph=True)
    square = torch.autograd.grad((integral**2).mean(), interior)
    for one, other in zip(got, (*whole, *square), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)


def test_after_the_loss_the_schedule_has_its_plain_gradients_again():
    """Truth: the curve written out. A factor left behind would multiply the gradients of all that comes later."""
    schedule = shuffled(8, units=4)
    denoiser = Denoiser(Small(), Process(schedule), "x0")
    t = f64([0.3, 0.7])
    Continuous()(denoiser, torch.ones(2, 1).double(), t=t, noise=torch.ones(2, 1).double()).sum().backward()
    (got,) = torch.autograd.grad(schedule.log_snr(t).sum(), schedule.weight)
    (truth,) = torch.autograd.grad(log_snr_by_hand(schedule, t).sum(), schedule.weight)
    torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-9)


def mean_and_error(values):
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def loss_of(denoiser, x_0, seed=0, **how):
    with torch.no_grad():
        return Continuous(**how)(denoiser, x_0, generator=dice(seed))


@pytest.mark.parametrize("decoded", [0.125, 1.0])
@pytest.mark.parametrize("schedule", named("linear_beta", "cosine", "sqrt", "ve", "sub_vp", "log_snr_line"))
def test_the_loss_is_minus_the_continuous_bound_on_average(schedule, decoded, oracle):
    """The bound of the same points on a grid of the two ends, estimated in log-SNR instead of in time: 5 s.e."""
    process, mixture = Process(schedule), oracle.mixture()
    denoiser, x_0 = mixture.denoiser(process), mixture.sample(20_000, dice(1))
    loss = loss_of(denoiser, x_0, decoded=decoded)
    chain = DiffusionChain(denoiser, grid=Grid((1.0, schedule.t_min)), variance="beta")
    gap, error = mean_and_error(loss + chain.elbo(x_0, estimator="continuous", seed=3).total)
    assert gap == pytest.approx(0, abs=5 * error)


@pytest.mark.parametrize("ends", [(12.0, -5.0), (9.0, -7.0)])
def test_of_the_exact_denoiser_the_loss_is_the_entropy_of_the_data(ends, oracle):
    """Quadrature of the mixture; between these ends, a bound in continuous time with the exact denoiser is tight."""
    mixture = oracle.mixture()
    x_0 = mixture.sample(100_000, dice(2))
    for schedule in (LearnedSchedule(*ends), shuffled(9, ends)):
        # the entropy of just these points has less noise than that of all points
        loss = loss_of(mixture.denoiser(Process(schedule)), x_0, decoded=1.0)
        gap, error = mean_and_error(loss + mixture.log_prob(x_0))
        assert float(-mixture.log_prob(x_0).mean()) == pytest.approx(ENTROPY, abs=0.02)
        assert -5 * error < gap < 5 * error + 0.01
        assert error < 0.05


@pytest.mark.parametrize("times", [LossAware(), LogitNormal()], ids=["loss_aware", "logit_normal"])
def test_the_continuous_bound_is_of_uniform_times(times):
    """Others are either another loss, or weighted outside of what a learned schedule's gradient is made of."""
    with pytest.raises(ValueError, match="uniform times"):
        Continuous(times=times)


def test_the_continuous_bound_is_not_of_a_table_of_steps():
    """Between its steps a table is no model's schedule: the loss was a nat under the entropy."""
    denoiser = ks.Mixture([1.0], [[0.0]], [1.0]).denoiser(Process(ALL_SCHEDULES["ddpm_table"]))
    with pytest.raises(ValueError, match="a table of steps"):
        Continuous()(denoiser, torch.zeros(4, 1).double(), generator=dice(0))


#: Of five levels, -1 to 1.
PMF = f64([0.1, 0.35, 0.05, 0.3, 0.2])


class LogPrior(nn.Module):
    """The exact logits of one coordinate: the denoiser adds the likelihood itself."""

    def forward(self, x, t, condition=None):
        return PMF.log().expand(*x.shape, 5)


@pytest.mark.parametrize("schedule", [LearnedSchedule(10.0, -8.0), ALL_SCHEDULES["cosine"]], ids=["learned", "cosine"])
def test_of_exact_levels_the_loss_is_their_entropy_in_nats(schedule):
    """Minus the sum of p log p, and minus the chain's own bound."""
    index = torch.multinomial(PMF, 40_000, replacement=True, generator=dice(4))
    x_0 = index[:, None].double() / 2 - 1
    denoiser = Denoiser(LogPrior(), Process(schedule), "levels", levels=5)
    loss = loss_of(denoiser, x_0)
    gap, error = mean_and_error(loss + PMF[index].log())
    assert -5 * error < gap < 5 * error + 0.01
    chain = DiffusionChain(denoiser, grid=Grid((1.0, schedule.t_min)), variance="beta")
    gap, error = mean_and_error(loss + chain.elbo(x_0, estimator="continuous", seed=5).total.detach())
    assert gap == pytest.approx(0, abs=5 * error)


def test_the_loss_is_of_each_dimension_and_each_example_alone(tilted):
    """Minus the bound over three, the number of coordinates; an example's loss does not depend on its company."""
    process = Process(LearnedSchedule(9.0, -7.0))
    denoiser, x_0 = tilted.denoiser(process), tilted.sample(20_000, dice(6))
    gap, error = mean_and_error(loss_of(denoiser, x_0, decoded=1.0) + tilted.log_prob(x_0) / 3)
    assert -5 * error < gap < 5 * error + 0.01
    assert error < 0.05
    t, noise = torch.linspace(0.02, 0.98, 10, dtype=torch.float64), torch.ones(10, 3).double()
    with torch.no_grad():
        together = Continuous()(denoiser, x_0[:10], t=t, noise=noise)
        alone = [Continuous()(denoiser, x_0[i : i + 1], t=t[i : i + 1], noise=noise[i : i + 1]) for i in range(10)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


# -- what the parameters are for --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [(12.0, -5.0), (6.0, -2.0)])
def test_the_continuous_bound_does_not_depend_on_what_lies_between_the_ends(ends, tilted):
    """Kingma et al. 2021, section 5.1: the integral, taken in log-SNR, has no schedule in it but its limits."""
    x_0 = tilted.sample(300, dice(7))
    totals = []
    for schedule in (LearnedSchedule(*ends), shuffled(10, ends), shuffled(11, ends)):
        chain = DiffusionChain(tilted.denoiser(Process(schedule)), grid=Grid((1.0, 1e-9)), variance="beta")
        totals.append(chain.elbo(x_0, estimator="continuous", seed=8, draws=3).total.detach())
    assert not torch.allclose(LearnedSchedule(*ends).log_snr(0.5), shuffled(10, ends).log_snr(0.5))
    for other in totals[1:]:
        torch.testing.assert_close(other, totals[0], rtol=0, atol=1e-6)
    moved = DiffusionChain(tilted.denoiser(Process(LearnedSchedule(ends[0] + 1, ends[1]))), grid=Grid((1.0, 1e-9)))
    assert float((moved.elbo(x_0, estimator="continuous", seed=8, draws=3).total - totals[0]).abs().max()) > 1e-3


def descend(denoiser, mixture, parameters, steps, rate, batch=256):
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for step in range(steps):
        x_0 = mixture.sample(batch, dice(1000 + step))
        optimizer.zero_grad()
        Continuous()(denoiser, x_0, generator=dice(2000 + step)).mean().backward()
        optimizer.step()


def integrals(denoiser, x_0, seed):
    """The cost of one uniform time for each example, alone."""
    schedule = denoiser.process.schedule
    t = torch.rand(len(x_0), generator=dice(seed), dtype=torch.float64).clamp(1e-9)
    noise = torch.randn(x_0.shape, generator=dice(seed + 1), dtype=torch.float64)
    with torch.no_grad():
        x_t = denoiser.process.marginal(x_0, t).sample(noise)
        error = ((x_0 - denoiser(x_t, t).x0) ** 2).mean(1)
        return 0.5 * -schedule.log_snr_rate(t) * schedule.log_snr(t).exp() * error


def test_learning_what_lies_between_takes_the_noise_out_of_the_loss_and_leaves_its_mean(oracle):
    """Appendix I.2: times are spent where the cost is. The means of 100,000 draws agree to 5 standard errors."""
    mixture, schedule = oracle.mixture(), LearnedSchedule(12.0, -8.0)
    denoiser, x_0 = mixture.denoiser(Process(schedule)), mixture.sample(100_000, dice(12))
    before = integrals(denoiser, x_0, 13)
    schedule.ends.requires_grad_(False)
    descend(denoiser, mixture, (schedule.slope, schedule.place, schedule.weight), steps=200, rate=0.1)
    after = integrals(denoiser, x_0, 13)
    assert float(after.var()) < 0.8 * float(before.var())
    gap, error = mean_and_error(after - before)
    assert gap == pytest.approx(0, abs=5 * error)
    assert schedule.ends.tolist() == [12.0, -8.0]


def test_learning_the_ends_moves_them_outward_and_brings_the_bound_to_the_entropy(oracle):
    """Of the exact denoiser the gap is what the ends leave: a decoder that is too wide, a prior that knows nothing."""
    mixture, schedule = oracle.mixture(), LearnedSchedule(2.5, 0.5)
    denoiser, x_0 = mixture.denoiser(Process(schedule)), mixture.sample(20_000, dice(14))

    def gap():
        chain = DiffusionChain(denoiser, grid=Grid((1.0, 1e-9)), variance="beta")
        return mean_and_error(mixture.log_prob(x_0) - chain.elbo(x_0, estimator="continuous").total)

    before, error = gap()
    assert before > 0.05 + 5 * error
    descend(denoiser, mixture, (schedule.ends,), steps=300, rate=0.05)
    first, last = schedule.ends.tolist()
    assert first > 5.0
    assert last < -0.5
    after, error = gap()
    assert -5 * error < after < before / 4


@pytest.mark.parametrize("kind", sorted(SOLVERS))
def test_a_solver_has_the_table_of_the_same_curve_whether_it_is_learned_or_given(kind):
    """The other curve is a plain function of numbers, which every solver knows how to sample."""
    learned = shuffled(15, (9.0, -5.0))
    frozen = shuffled(15, (9.0, -5.0)).requires_grad_(False)
    given = from_log_snr(lambda t: log_snr_by_hand(frozen, t))
    one, other = (make_solver(kind).table(Process(schedule), steps=6) for schedule in (learned, given))
    network = Small().requires_grad_(False)
    ends = [
        ks.sample(Denoiser(network, Process(schedule)), (3,), seeds=range(4), table=table, dtype=torch.float64)
        for schedule, table in ((learned, one), (given, other))
    ]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LearnedSchedule(-5.0, 12.0), "log-SNR falls from data to noise; got -5.0 first and 12.0 last"),
        (lambda: LearnedSchedule(1.0, 1.0), "log-SNR falls from data to noise"),
        (lambda: LearnedSchedule(math.nan, 1.0), "log-SNR falls from data to noise"),
        (lambda: LearnedSchedule(units=0), "units must be at least 1, got 0"),
        (lambda: Continuous(0.0), "decoded is a share, above 0 and at most 1, got 0.0"),
        (lambda: Continuous(-0.1), "decoded is a share"),
        (lambda: Continuous(1.01), "decoded is a share"),
        (lambda: Continuous(math.nan), "decoded is a share"),
    ],
)
def test_a_schedule_or_a_share_that_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# -- runs --------------------------------------------------------------------------------------------------------------

TINY = """
[data]
name = "digits"
[process]
kind = "learned"
units = 8
[network]
kind = "mlp"
width = 32
depth = 1
dropout = 0.1
[denoiser]
predicts = "eps"
[objective]
kind = "continuous"
[training]
steps = 40
batch_size = 16
warmup = 5
ema = 0.9
checkpoint_every = 10
sample_every = 20
[sampling]
steps = 4
[evaluation]
bound_steps = 20
draws = 1
examples = 30
samples = 20
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    (folder / "tiny.toml").write_text(TINY)
    assert main(["train", str(folder / "tiny.toml"), "training.learning_rate=0.01", "--out", str(folder / "run")]) == 0
    return ks.load(folder / "run")


def said(capsys, *words):
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


@pytest.mark.parametrize("overrides", [[], ["denoiser.predicts=levels"]], ids=["eps", "levels"])
def test_an_interrupted_run_goes_on_with_the_schedule_that_it_had_learned(tiny, tmp_path, overrides):
    """Truth: the uninterrupted run, bit for bit, with the schedule, its averages and its moments."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    recipe = recipes.read(tiny, [*overrides, "training.sample_every=0"])
    train(recipe, whole)
    for until in (3, 17, 29):
        with pytest.raises(RuntimeError, match="stopped here"):
            train_with(recipe, parts, stop_at(until))
    train(recipe, parts)
    end = end_of(whole)
    assert_same(end, end_of(parts))
    assert losses(whole) == losses(parts)
    for group in ("weights", "ema"):
        assert not torch.equal(end[f"{group}/schedule.ends"], f64([12.0, -5.0]))
        assert not torch.equal(end[f"{group}/schedule.weight"], f64([-5.0] * 8))
        assert end[f"{group}/schedule.ends"].dtype == torch.float64
    assert {f"optimizer/schedule.{name}/exp_avg" for name in ("ends", "slope", "place", "weight")} <= set(end)


def test_a_run_has_the_schedule_of_its_averaged_weights(run):
    """Truth: the checkpoint."""
    average = end_of(run.folder)["ema/schedule.ends"]
    assert float(run.denoiser.process.log_snr(1.0)) == pytest.approx(float(average[1]), rel=1e-12)
    assert not torch.equal(average, f64([12.0, -5.0]))


def test_a_run_with_a_learned_schedule_samples_and_measures_like_any_other(run, capsys, tmp_path):
    """Sheets while training; samples of a seed that do not depend on their company; a bound that is a number."""
    assert (run.folder / "samples" / "step-00000040.png").is_file()
    drawn = said(capsys, "sample", run.folder, "-n", 3, "--out", tmp_path / "drawn")
    assert [one["seed"] for one in drawn["samples"]] == [0, 1, 2]
    many = run.sample(6)
    assert float((run.sample(seeds=[4, 1], batch_size=1) != many[[4, 1]]).double().mean()) < 0.01
    result = said(capsys, "evaluate", run.folder)
    assert math.isfinite(result["bits_per_dim"]["total"])
    assert result["bits_per_dim"]["total"] > 0
    ode = said(capsys, "evaluate", run.folder, "--ode", "--importance", 2, "--examples", 4)
    assert all(math.isfinite(one["total"]) for one in ode["likelihoods"].values())
    optimal = said(capsys, "evaluate", run.folder, "--bound", "--variance", "optimal", "--examples", 10)
    assert math.isfinite(optimal["bits_per_dim"]["total"])


def test_tables_of_a_learned_schedule_are_shown_tuned_and_compared(run, capsys, tmp_path):
    shown = said(capsys, "table", run.folder)
    assert shown
    tuned = said(capsys, "tune", run.folder, "--steps", 3, "--pairs", 16, "--iterations", 4, "--fine", 8)
    assert tuned
    drawn = said(capsys, "sample", run.folder, "-n", 2, "--solver", "tuned", "--steps", 3, "--out", tmp_path / "drawn")
    assert len(drawn["samples"]) == 2


def test_training_on_the_continuous_bound_lowers_it(tiny, tmp_path):
    """Truth: the mean of the first losses, of a network that says nothing yet."""
    words = ["training.steps=150", "training.batch_size=64", "training.learning_rate=0.003", "training.sample_every=0"]
    train(recipes.read(tiny, words), tmp_path / "run")
    record = losses(tmp_path / "run")
    assert sum(record[-20:]) / 20 < 0.9 * sum(record[:5]) / 5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("process.units=0", "process: units must be at least 1, got 0"),
        ("process.log_snr_start=-6.0", "process: log-SNR falls from data to noise; got -6.0 first and -5.0 last"),
        ("objective.decoded=2.0", "objective: decoded is a share, above 0 and at most 1, got 2.0"),
        ("process.t_min=0.1", "process: t_min: there is no such key"),
    ],
)
def test_a_recipe_with_such_a_mistake_is_refused_before_training(tiny, tmp_path, override, words):
    with pytest.raises(RecipeError, match=words):
        train(recipes.read(tiny, [override]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_recipe_says_what_share_is_decoded(tiny):
    assert make_objective(recipes.read(tiny, ["objective.decoded=0.5"])) == Continuous(0.5)


@pytest.mark.parametrize("kind", ["simple", "cross_entropy", "bound"])
def test_a_learned_schedule_is_trained_on_the_bound_alone(kind):
    """Under another loss its ends would move to wherever that is easy."""
    recipe = recipes.read("digits-vdm", [f"objective.kind={kind}"])
    with pytest.raises(RecipeError, match="a learned schedule needs continuous"):
        make_objective(recipe)
