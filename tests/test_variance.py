"""The optimal reverse variance (theory row 11): against closed forms of one Gaussian, quadrature, and enumeration."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import optimize
from torch import nn

import kuosan as ks
from conftest import ALL_SCHEDULES, elbo
from kuosan import Denoiser, Mixture, Process, schedules
from kuosan import recipe as recipes
from kuosan.optimal import analytic_dpm, knots, measure, weights_fingerprint
from kuosan.recipe import RecipeError
from kuosan.runs import diffusion as runs
from kuosan.solvers import DDIM, Ancestral, Row, Table, run
from kuosan.solvers.noise import measured
from kuosan.train import train
from kuosan.variance import OptimalVariance, VarianceError, reverse_variance
from quadrature import ddpm_abar, joint_nodes

DDPM = Process(ALL_SCHEDULES["ddpm_table"])
COSINE = Process(ALL_SCHEDULES["cosine"])
SPREAD = (0.04, 0.3, 1.5)  # variances of the three coordinates of a Gaussian
GAUSSIAN = Mixture([1.0], [[0.2, -0.4, 0.0]], [SPREAD])


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


def exact_error(process, t):
    """M_t of each coordinate of the Gaussian: 1 / (1 / variance + SNR); (n, 3)."""
    return 1 / (1 / f64(SPREAD) + torch.exp(process.log_snr(t))[:, None])


def exact(process, times=None):
    times = torch.linspace(0.001, 1, 400, dtype=torch.float64) if times is None else times
    return OptimalVariance(process, times, exact_error(process, times))


# -- what is measured -------------------------------------------------------------------------------------------------


def test_measured_errors_are_those_of_the_gaussian(process):
    """Every coordinate at every knot, and their mean, in standard errors: standard normal, so none beyond 5."""
    found = measure(GAUSSIAN.denoiser(process), GAUSSIAN.sample(20_000, torch.Generator().manual_seed(1)), draws=1000)
    truth = exact_error(process, found.times)
    assert found.shape == (3,)
    # the spread of squares is itself measured on 1,000, and one draw of the mean is mixed in: a tenth more
    assert float(((found.error - truth) / found.standard_error).abs().max()) < 5.5
    scalar = found.scalar
    assert float(((scalar.error - truth.mean(1)) / scalar.standard_error).abs().max()) < 5.5
    assert float(((scalar.error - truth.mean(1)) / scalar.standard_error).square().mean()) == pytest.approx(1, abs=0.8)


def test_the_error_of_a_wrong_mean_is_measured_as_it_is(process):
    """x0-hat = 0: M_t is E ||x_0||^2 / d at every time."""

    class Zero(nn.Module):
        def forward(self, x, t, condition=None):
            return torch.zeros_like(x)

    found = measure(Denoiser(Zero(), process, "x0"), GAUSSIAN.sample(5000, torch.Generator().manual_seed(1))).scalar
    truth = (sum(SPREAD) + 0.2**2 + 0.4**2) / 3
    assert float(((found.error - truth) / found.standard_error).abs().max()) < 5


def test_knots_are_dense_in_log_snr_and_hold_both_ends(process):
    times = knots(process)
    schedule = process.schedule
    if isinstance(schedule, schedules.Table):
        n = len(schedule)
        assert torch.equal((times * n).round() / n, times)
        assert (float(times[0]), float(times[-1])) == (1 / n, 1.0)
    else:
        assert (len(times), float(times[0]), float(times[-1])) == (64, schedule.t_min, 1.0)
        gaps = process.log_snr(times[:-1]).diff()
        assert torch.allclose(gaps, gaps.mean(), rtol=1e-3)


def test_between_the_knots_the_error_is_positive_and_between_theirs(process):
    found = exact(process, knots(process))
    truth = exact_error(process, candidates := torch.linspace(1e-3, 1, 777, dtype=torch.float64))
    values = found.mean_squared_error(candidates)
    assert bool((values > 0).all() & (values[1:] >= values[:-1] * (1 - 1e-12)).all())  # as the truth, it rises with t
    inside = candidates >= found.times.min()
    assert torch.allclose(values[inside], truth[inside], rtol=0.03)
    assert torch.allclose(found.mean_squared_error(found.times), found.error, rtol=1e-12)


def test_times_of_every_shape_and_order_give_the_same_error():
    found = exact(DDPM)
    backwards = OptimalVariance(DDPM, found.times.flip(0), found.error.flip(0))
    assert torch.equal(found.mean_squared_error(f64([0.3, 0.7])), backwards.mean_squared_error(f64([0.3, 0.7])))
    assert torch.equal(found.mean_squared_error(0.3), found.mean_squared_error(f64([0.3, 0.7]))[0])
    assert found.mean_squared_error(0.3).shape == (3,)
    assert found.scalar.mean_squared_error(0.3).shape == ()
    assert found.scalar.scalar.shape == ()


def test_a_coordinate_that_never_moved_has_a_small_variance_not_none():
    """Two coordinates, one constant: N draws of 0 and one of the mean over both."""
    x_0 = torch.stack([torch.randn(100, dtype=torch.float64), torch.zeros(100, dtype=torch.float64)], 1)

    class Zero(nn.Module):
        def forward(self, x, t, condition=None):
            return torch.zeros_like(x)

    error = measure(Denoiser(Zero(), COSINE, "x0"), x_0, draws=100).error
    mean = float((x_0**2).mean())
    assert torch.allclose(error[:, 1], f64(mean / 101), rtol=1e-9)


def test_measuring_is_repeatable_and_a_seed_matters():
    denoiser, x_0 = GAUSSIAN.denoiser(COSINE), GAUSSIAN.sample(100)
    one, two, other = (measure(denoiser, x_0, times=[0.5], draws=50, seed=seed).error for seed in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_conditions_reach_the_network():
    """A network that is told x_0 makes no error."""

    class Told(nn.Module):
        def forward(self, x, t, condition=None):
            return condition

    x_0 = torch.randn(40, 2)
    assert float(measure(Denoiser(Told(), COSINE, "x0"), x_0, x_0, draws=100).error.max()) == 0


PMF = f64([0.1, 0.4, 0.2, 0.25, 0.05])


@pytest.mark.parametrize("levels", [True, False])
def test_the_cost_of_decoding_discrete_data_is_measured(levels):
    """From noise nothing is known: the entropy of five levels, or of the bins of their Gaussian; from data, nothing."""

    class LogPrior(nn.Module):
        def forward(self, x, t, condition=None):
            return PMF.log().expand(*x.shape, 5)

    class Mean(nn.Module):
        def forward(self, x, t, condition=None):
            return Denoiser(LogPrior(), COSINE, "levels", levels=5)(x, t).x0

    index = torch.multinomial(PMF, 5000, replacement=True, generator=torch.Generator().manual_seed(4))
    denoiser = Denoiser(LogPrior() if levels else Mean(), COSINE, "levels" if levels else "x0", levels=5)
    x_0 = index[:, None].double() / 2 - 1
    found = measure(denoiser, x_0, times=[0.001, 1.0], draws=4000, batch_size=4000)
    values = torch.linspace(-1, 1, 5, dtype=torch.float64)
    mean = float(PMF @ values)
    std = math.sqrt(float(PMF @ (values - mean) ** 2))
    border = [-math.inf, -0.75, -0.25, 0.25, 0.75, math.inf]
    phi = np.diff([0.5 * (1 + math.erf((b - mean) / std / math.sqrt(2))) for b in border])
    truth = -float(PMF @ PMF.log()) if levels else -float(PMF @ f64(np.log(phi)))
    assert float(found.decoding_cost(1.0)) == pytest.approx(truth, abs=5 / math.sqrt(4000))
    assert float(found.decoding_cost(0.001)) == pytest.approx(0, abs=1e-6)
    assert float(found.scalar.decoding_cost(1.0)) == float(found.decoding_cost(1.0))


def test_the_cost_of_decoding_continuous_data_is_the_entropy_of_the_decoder():
    """1/2 log 2 pi e M for each coordinate, by hand."""
    found = exact(COSINE)
    error = exact_error(COSINE, f64([0.3]))[0]
    by_hand = float((0.5 * torch.log(2 * math.pi * math.e * error)).mean())
    assert float(found.decoding_cost(0.3)) == pytest.approx(by_hand, rel=1e-3)


# -- it is optimal ----------------------------------------------------------------------------------------------------


def kl_by_hand(line, t, s, mean, variance):
    """E KL(q(x_s|x_t,x_0) || N(c_x x_t + c_0 mean(x_t), variance)) on DDPM's table, by quadrature; no Kuosan."""
    t_bar, s_bar = ddpm_abar(t), ddpm_abar(s)
    beta = 1 - t_bar / s_bar
    tilde, c_0 = (1 - s_bar) / (1 - t_bar) * beta, math.sqrt(s_bar) * beta / (1 - t_bar)
    x_0, x_t, weight = (c.numpy() for c in joint_nodes(line, t))
    gap = c_0**2 * (x_0 - mean(x_t)) ** 2
    return float(weight @ (0.5 * (np.log(variance / tilde) + (tilde + gap) / variance - 1)))


@pytest.mark.parametrize(("t", "s"), [(500, 250), (1000, 999), (200, 3), (2, 1)])
@pytest.mark.parametrize("perfect", [True, False])
def test_no_other_variance_has_a_smaller_divergence(perfect, t, s, oracle):
    """scipy minimises the KL over v, by quadrature; for the exact mean and for one that is far off."""
    mixture = oracle.mixture() if perfect else Mixture([1.0], [[0.5]], [0.04])

    def mean(x_t):
        return mixture.posterior_mean(torch.from_numpy(x_t)[:, None], DDPM, t / 1000)[:, 0].numpy()

    best = optimize.minimize_scalar(
        lambda log_v: kl_by_hand(oracle, t, s, mean, math.exp(log_v)), bounds=(-14, 3), method="bounded",
        options={"xatol": 1e-9},
    )  # fmt: skip
    x_0, x_t, weight = (c.numpy() for c in joint_nodes(oracle, t))
    found = OptimalVariance(DDPM, f64([t / 1000]), f64([weight @ (x_0 - mean(x_t)) ** 2]))
    assert float(found.reverse(t / 1000, s / 1000)) == pytest.approx(math.exp(best.x), rel=1e-5)


def test_the_kernel_of_a_gaussian_is_exact_with_it(process):
    """Bayes for one Gaussian: q(x_s|x_t) has precision 1 / Var(x_s) + scale^2 / Var(x_t|x_s), in every coordinate."""
    found = exact(process, knots(process, 400))
    prediction = GAUSSIAN.denoiser(process)(torch.zeros(1, 3).double(), float(found.times[10]))
    t, s = prediction.t, float(found.times[25])
    alpha, sigma = process.scales(s)
    scale, variance = process.step_coefficients(t, s)
    truth = 1 / (1 / (alpha**2 * f64(SPREAD) + sigma**2) + scale**2 / variance)
    for got in (found.reverse(t, s), reverse_variance(prediction, s, found)):
        assert torch.allclose(got, truth, rtol=1e-9)


class Biased(nn.Module):
    """The exact denoiser, a tenth too small: some network, trained badly."""

    def __init__(self, mixture, process):
        super().__init__()
        self.mixture, self.process = mixture, process

    def forward(self, x, t, condition=None):
        return 0.9 * self.mixture.posterior_mean(x, self.process, t)


@pytest.mark.parametrize("perfect", [True, False])
def test_the_bound_is_tightest_with_it_at_every_number_of_steps(perfect, process, tilted):
    """Measured on other data. Paired with the same noise: not below beta or beta-tilde by 3 standard errors; and each
    coordinate with its own is not below the scalar."""
    network = Biased(tilted, process) if not perfect else None
    denoiser = tilted.denoiser(process) if network is None else Denoiser(network, process, "x0")
    optimal = measure(denoiser, tilted.sample(4000, torch.Generator().manual_seed(1)), draws=3000)
    x_0 = tilted.sample(1000, torch.Generator().manual_seed(5))
    for steps in (1, 3, 10, 30):
        decoder = float(optimal.scalar.mean_squared_error(process.grid(steps).times[-1]))
        totals = {
            name: elbo(denoiser, x_0, steps=steps, variance=choice, decoder_variance=given).total
            for name, choice, given in (
                ("beta_tilde", "beta_tilde", decoder),
                ("beta", "beta", decoder),
                ("scalar", optimal.scalar, None),
                ("each", optimal, None),
            )
        }
        for better, worse in (("scalar", "beta_tilde"), ("scalar", "beta"), ("each", "scalar")):
            gain = totals[better] - totals[worse]
            assert float(gain.mean()) >= -3 * float(gain.std()) / math.sqrt(1000), (steps, better, worse)


def test_half_a_decade_off_is_worse(tilted):
    """The bound by sampling has its maximum where M says: with M halved or doubled it falls, by 5 standard errors."""
    denoiser = Denoiser(Biased(tilted, COSINE), COSINE, "x0")
    optimal = measure(denoiser, tilted.sample(4000, torch.Generator().manual_seed(1)), draws=4000).scalar
    x_0 = tilted.sample(2000, torch.Generator().manual_seed(5))
    best = elbo(denoiser, x_0, steps=8, variance=optimal).total
    for factor in (0.5, 2.0):
        off = OptimalVariance(COSINE, optimal.times, factor * optimal.error)
        gain = best - elbo(denoiser, x_0, steps=8, variance=off).total
        assert float(gain.mean()) > 5 * float(gain.std()) / math.sqrt(2000)


def test_where_the_network_knows_more_the_posterior_is_tighter():
    """Jensen: E log(1 + g Var[x_0|x_t]) <= log(1 + g E Var). Levels, so that both exist."""

    class LogPrior(nn.Module):
        def forward(self, x, t, condition=None):
            return PMF.log().expand(*x.shape, 5)

    denoiser = Denoiser(LogPrior(), COSINE, "levels", levels=5)
    index = torch.multinomial(PMF, 4000, replacement=True, generator=torch.Generator().manual_seed(4))
    x_0 = index[:, None].double() / 2 - 1
    optimal = measure(denoiser, x_0)
    posterior, best, beta = (elbo(denoiser, x_0, steps=10, variance=v).total for v in ("posterior", optimal, "beta"))
    for better, worse in ((posterior, best), (best, beta)):
        gain = better - worse
        assert float(gain.mean()) > 5 * float(gain.std()) / math.sqrt(4000)


# -- samplers ---------------------------------------------------------------------------------------------------------


def variance_at_the_end(table, process, scalar):
    """Of each coordinate before the last step, for the Gaussian and its exact denoiser, which is linear in x."""
    value = process.alpha(table.times[0]) ** 2 * f64(SPREAD) + process.sigma(table.times[0]) ** 2
    for row in table.rows[:-1]:
        alpha, sigma = process.scales(row.t)
        slope = alpha * f64(SPREAD) / (alpha**2 * f64(SPREAD) + sigma**2)
        each = torch.ones(3).double() if row.z_each is None else row.z_each
        assert scalar == (row.z_each is None)
        value = (sum(row.x) + row.m[0] * slope) ** 2 * value + (row.z[0] * each) ** 2
    return value


@pytest.mark.parametrize("solver", [Ancestral, *(lambda variance, e=e: DDIM(e, variance) for e in (0.0, 0.6, 1.0))])
@pytest.mark.parametrize("steps", [2, 5, 40])
def test_a_few_large_steps_keep_the_variance_of_a_gaussian(steps, solver, process):
    """The law of total variance: with the right noise every x_s has exactly its own variance, however few the steps."""
    optimal = exact(process, knots(process, 2000))
    grid = process.grid(steps)
    table = solver(variance=optimal).table(process, grid)
    s = grid.times[-1]
    truth = process.alpha(s) ** 2 * f64(SPREAD) + process.sigma(s) ** 2
    assert torch.allclose(variance_at_the_end(table, process, False), truth, rtol=1e-4)
    assert table.rows[-1].z == ()
    # one number for all coordinates cannot, but has their mean variance right in one step
    one = solver(variance=optimal.scalar).table(process, process.grid(2))
    truth = process.alpha(process.grid(2).times[-1]) ** 2 * f64(SPREAD) + process.sigma(process.grid(2).times[-1]) ** 2
    assert float(variance_at_the_end(one, process, True).mean()) == pytest.approx(float(truth.mean()), rel=1e-4)


def test_without_it_a_few_large_steps_do_not():
    """The same check fails for beta-tilde and for DDIM's own noise."""
    grid = COSINE.grid(5)
    truth = COSINE.alpha(grid.times[-1]) ** 2 * f64(SPREAD) + COSINE.sigma(grid.times[-1]) ** 2
    for solver in (Ancestral(), Ancestral("beta"), DDIM(0.6)):
        value = variance_at_the_end(solver.table(COSINE, grid), COSINE, True)
        assert not torch.allclose(value, truth, rtol=0.02)


def test_ddim_at_one_is_ancestral_with_it_too(process):
    optimal = exact(process, knots(process))
    one, two = (solver.table(process, steps=7) for solver in (DDIM(1.0, optimal), Ancestral(optimal)))
    for left, right in zip(one.rows, two.rows, strict=True):
        assert left.x == pytest.approx(right.x)
        assert left.m == pytest.approx(right.m)
        assert left.z == pytest.approx(right.z)
        if left.z:
            assert torch.allclose(left.z_each, right.z_each)


def test_temperature_scales_its_noise():
    half, whole = (Ancestral(exact(DDPM), k).table(DDPM, steps=9) for k in (0.5, 1.0))
    assert torch.allclose(half.C, 0.5 * whole.C)
    assert torch.allclose(half.rows[0].z_each, whole.rows[0].z_each)
    assert not Ancestral(exact(DDPM), 0.0).table(DDPM, steps=9).stochastic


class Same:
    """A model whose x0-hat is always 0."""

    process = DDPM

    def __call__(self, x, t, condition=None):
        return ks.Prediction(DDPM, t, x, "x0", torch.zeros_like(x))


def test_each_coordinate_gets_its_own_noise():
    """By hand: two rows, the second uses its own noise and the first's again, each with its own factors."""
    first, second = f64([0.5, 1.0, 1.2]), f64([2.0, 1.0, 0.1])
    table = Table((Row(1.0, x=0.5, z=3.0, z_each=first), Row(0.5, x=1.0, z=(4.0, -2.0), z_each=second)))
    draws = [f64([[1.0, 2.0, 3.0]]), f64([[-1.0, 0.5, 0.25]])]
    given = iter(draws)
    out = run(table, Same(), torch.ones(1, 3).double(), lambda: next(given))
    assert torch.allclose(out, 0.5 + 3 * first * draws[0] + 4 * second * draws[1] - 2 * first * draws[0])
    assert torch.allclose(table.read_as("eps", DDPM).rows[0].z_each, first)


def test_noise_for_samples_of_another_shape_is_refused():
    table = Ancestral(exact(DDPM)).table(DDPM, steps=4)
    with pytest.raises(ValueError, match=r"row 0 has noise for samples of shape \(3,\), not \(2,\)"):
        run(table, Same(), torch.ones(1, 2).double(), lambda: torch.ones(1, 2).double())


def test_noise_factors_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite in z_each"):
        Table((Row(1.0, z=1.0, z_each=f64([1.0, math.nan])),))


def test_samples_have_the_variance_of_the_data_after_few_steps():
    """10,000 samples in 5 steps: before the last, the right variance in each coordinate, to 5 standard errors."""
    optimal = exact(COSINE)
    grid = COSINE.grid(5)
    seen = []
    table = Ancestral(optimal).table(COSINE, grid)
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(10_000, 3, generator=generator, dtype=torch.float64)
    run(
        table, GAUSSIAN.denoiser(COSINE), start,
        lambda: torch.randn(10_000, 3, generator=generator, dtype=torch.float64),
        watch=lambda i, x, p: seen.append(x.clone()),
    )  # fmt: skip
    for t, x in zip(grid.times[1:], seen[1:], strict=True):
        truth = COSINE.alpha(t) ** 2 * f64(SPREAD) + COSINE.sigma(t) ** 2
        assert torch.allclose(x.var(0), truth, rtol=5 * math.sqrt(2 / 10_000))


# -- Analytic-DPM's estimator -----------------------------------------------------------------------------------------


def test_the_other_estimator_is_right_and_its_noise_is_amplified(ring):
    """Both are unbiased (exact M_t of the Gaussian, 5 standard errors); near t = 1 one of them says nothing at all."""
    x_0 = GAUSSIAN.sample(4000, torch.Generator().manual_seed(1))
    denoiser = GAUSSIAN.denoiser(COSINE)
    times = f64([0.01, 0.1, 0.5, 0.9, 0.99, 1.0])
    ours, (theirs, error) = measure(denoiser, x_0, times=times).scalar, analytic_dpm(denoiser, x_0, times=times)
    order = times.argsort(descending=True)
    theirs, error, times = theirs[order], error[order], times[order]
    truth = exact_error(COSINE, times).mean(1)
    assert float(((theirs - truth) / error).abs().max()) < 5
    assert float(((ours.error - truth) / ours.standard_error).abs().max()) < 5
    # at the end, log-SNR -15, sigma^2 / alpha^2 is 3.3e6: its standard error is thousands of times M itself
    assert float(error[0] / truth[0]) > 1e4
    assert float(ours.standard_error[0] / truth[0]) < 0.03
    # where there is little noise it is the other way round: eps-hat alone knows more than x_0 - x0-hat
    assert float(error[-1]) < float(ours.standard_error[-1])


def test_the_amplification_is_that_of_the_papers_schedules():
    """sigma^2 / alpha^2 at the end: 2.5e4 of DDPM's linear table; 4e8 of the cosine one with its betas under 0.999."""
    assert math.exp(-float(DDPM.log_snr(1.0))) == pytest.approx(2.5e4, rel=0.02)
    bar = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    table = np.cumprod([1 - min(1 - b / a, 0.999) for a, b in itertools.pairwise(bar)])
    assert math.exp(-float(Process(schedules.from_alpha_bar(table)).log_snr(1.0))) == pytest.approx(4e8, rel=0.05)


def test_clipped_it_stays_where_the_paper_says():
    denoiser, x_0 = GAUSSIAN.denoiser(COSINE), GAUSSIAN.sample(200)
    free, _ = analytic_dpm(denoiser, x_0, times=knots(COSINE), draws=100)
    held, _ = analytic_dpm(denoiser, x_0, times=knots(COSINE), draws=100, clip=True)
    highest = torch.exp(-COSINE.log_snr(knots(COSINE)))
    assert bool((free < 0).any())
    assert bool(((held >= 0) & (held <= highest)).all())


# -- kept -------------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, t, condition=None):
        return self.layer(x)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    denoiser = Denoiser(Linear(), DDPM, "x0")
    found = measure(denoiser, GAUSSIAN.sample(50).float(), draws=20)
    found.save(tmp_path / "variance.safetensors")
    again = OptimalVariance.load(tmp_path / "variance.safetensors", DDPM)
    for name in ("times", "error", "standard_error", "scalar_standard_error"):
        assert torch.equal(getattr(found, name), getattr(again, name))
    assert again.reconstruction is None
    assert again.fingerprint == found.fingerprint == weights_fingerprint(denoiser)
    assert [path.name for path in tmp_path.iterdir()] == ["variance.safetensors"]
    with pytest.raises(VarianceError, match="measured under another process"):
        OptimalVariance.load(tmp_path / "variance.safetensors", COSINE)
    data = bytearray((tmp_path / "variance.safetensors").read_bytes())
    (tmp_path / "half").write_bytes(data[: len(data) // 2])
    with pytest.raises(VarianceError, match="damaged"):
        OptimalVariance.load(tmp_path / "half", DDPM)


RECIPE = """
[data]
name = "digits"
conditional = true
[process]
kind = "cosine"
[network]
kind = "mlp"
width = 32
depth = 1
[denoiser]
predicts = "{predicts}"
[objective]
kind = "simple"
[training]
steps = {steps}
batch_size = 64
warmup = 2
sample_every = 5
[sampling]
steps = 4
solver = {solver}
[evaluation]
bound_steps = 5
examples = 40
samples = 20
variance = "{variance}"
"""


def make(folder, steps=10, predicts="v", solver='{kind = "ancestral", variance = "optimal"}', variance="optimal"):
    path = folder / "small.toml"
    path.write_text(RECIPE.format(steps=steps, predicts=predicts, solver=solver, variance=variance))
    return train(recipes.read(path), folder / "run")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run whose recipe asks for the optimal variance in its samples and in its bound."""
    return make(tmp_path_factory.mktemp("optimal"))


def never(*_, **__):
    raise AssertionError("measured again")


def test_a_run_measures_once_and_keeps_it(trained, monkeypatch, capfd):
    first = trained.optimal_variance
    assert first.shape == (1, 8, 8)
    assert "optimal variance" in capfd.readouterr().err
    monkeypatch.setattr(runs, "measure", never)
    again = ks.load(trained.folder).optimal_variance
    assert torch.equal(first.error, again.error)
    assert (trained.folder / "variance.safetensors").is_file()


def test_a_run_samples_and_evaluates_with_what_its_recipe_asks_for(trained):
    """Truth: the same asked for by hand."""
    by_hand = trained.sample(3, solver=Ancestral(trained.optimal_variance.scalar))
    assert torch.equal(trained.sample(3), by_hand)
    assert not torch.equal(by_hand, trained.sample(3, solver=Ancestral()))
    named_, each = (trained.bound(variance=v).total for v in ("optimal", "optimal_per_dimension"))
    assert torch.equal(named_, trained.bound().total)
    assert torch.equal(named_, trained.bound(variance=trained.optimal_variance.scalar).total)
    assert float(each.mean()) > float(named_.mean())  # pixels at the border of a digit are always white
    assert trained.evaluate()["bits_per_dim"]["variance"] == "optimal"
    ddim = trained.sampler(solver=DDIM(0.5, "optimal_per_dimension")).table
    assert ddim.rows[0].z_each.shape == (1, 8, 8)


def test_other_weights_are_measured_again(trained, tmp_path, capfd):
    other = make(tmp_path, steps=20)
    trained.optimal_variance.save(other.folder / "variance.safetensors")
    found = ks.load(other.folder).optimal_variance
    assert "was measured of other weights; measuring again" in capfd.readouterr().err
    assert found.fingerprint != trained.optimal_variance.fingerprint
    (other.folder / "variance.safetensors").write_bytes(b"no")
    assert torch.equal(ks.load(other.folder).optimal_variance.error, found.error)
    assert "is damaged" in capfd.readouterr().err


def test_the_trajectory_of_a_run_has_the_better_bound(trained):
    for variance in ("optimal", "optimal_per_dimension", "beta"):
        grid = trained.trajectory(3, variance)
        even, found = (trained.bound(variance=variance, **g).total.mean() for g in ({"steps": 3}, {"grid": grid}))
        assert float(found) > float(even)


def test_a_recipe_that_trains_with_what_is_not_yet_measured_is_refused(tmp_path):
    text = RECIPE.format(steps=5, predicts="v", solver='{kind = "ddim"}', variance="beta")
    (tmp_path / "small.toml").write_text(text.replace('kind = "simple"', 'kind = "bound"\nvariance = "optimal"'))
    with pytest.raises(RecipeError, match="has to be measured first"):
        train(recipes.read(tmp_path / "small.toml"), tmp_path / "run")


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"error": f64([0.1, -0.2])}, "finite and never negative, got -0.2"),
        ({"error": f64([0.1, math.nan])}, "finite and never negative, got nan"),
        ({"error": f64([0.1, math.inf])}, "finite and never negative, got inf"),
        ({"error": f64([0.1])}, r"error does not belong to 2 times: its shape is \(1,\)"),
        ({"times": f64(0.5)}, r"times must have shape \(n,\)"),
        ({"times": f64([])}, r"times must have shape \(n,\)"),
        ({"times": f64([0.5, 0.5])}, "all different"),
        ({"times": f64([0.0, 0.5])}, r"lie in \(0, 1\]"),
        ({"standard_error": f64([0.1, 0.1, 0.1])}, "standard_error does not belong"),
        ({"reconstruction": f64([[0.1], [0.1]])}, "reconstruction does not belong"),
    ],
)
def test_errors_that_cannot_be_are_refused(changes, words):
    given = {"times": f64([0.5, 1.0]), "error": f64([0.1, 0.2])} | changes
    with pytest.raises(ValueError, match=words):
        OptimalVariance(DDPM, **given)


def test_an_error_of_zero_is_allowed():
    """A network that is certain and right."""
    found = OptimalVariance(DDPM, f64([0.1, 1.0]), f64([0.0, 0.3]))
    assert 0 < float(found.mean_squared_error(0.1)) < 1e-29
    assert 0 < float(found.mean_squared_error(0.5)) < 0.3


@pytest.mark.parametrize("use", ["bound", "ancestral", "ddim"])
def test_the_error_of_another_process_is_refused(use):
    other = exact(COSINE)
    uses = {
        "bound": lambda: elbo(GAUSSIAN.denoiser(DDPM), torch.zeros(2, 3).double(), steps=5, variance=other),
        "ancestral": lambda: Ancestral(other).table(DDPM, steps=5),
        "ddim": lambda: DDIM(0.5, other).table(DDPM, steps=5),
    }
    with pytest.raises(ValueError, match="measured under another process"):
        uses[use]()


def test_the_error_of_another_shape_is_refused():
    denoiser = Mixture([1.0], [[0.0, 0.0]], [0.1]).denoiser(DDPM)
    with pytest.raises(ValueError, match=r"of examples of shape \(3,\), these have \(2,\); take .scalar"):
        elbo(denoiser, torch.zeros(2, 2).double(), steps=5, variance=exact(DDPM))
    with pytest.raises(ValueError, match=r"of examples of shape \(3,\)"):
        reverse_variance(denoiser(torch.zeros(2, 2).double(), 0.5), 0.3, exact(DDPM))


@pytest.mark.parametrize("name", ["optimal", "optimal_per_dimension"])
def test_a_name_alone_has_not_been_measured(name):
    denoiser = GAUSSIAN.denoiser(DDPM)
    for use in (
        lambda: Ancestral(name).table(DDPM, steps=5),
        lambda: DDIM(1.0, name).table(DDPM, steps=5),
        lambda: elbo(denoiser, torch.zeros(2, 3).double(), steps=5, variance=name),
        lambda: reverse_variance(denoiser(torch.zeros(2, 3).double(), 0.5), 0.3, name),
    ):
        with pytest.raises(ValueError, match=f'variance="{name}" has to be measured first'):
            use()


def test_names_are_looked_up_only_where_they_are_asked_for():
    assert measured(Ancestral("beta"), never) == Ancestral("beta")
    assert measured(DDIM(0.5), never) == DDIM(0.5)
    assert measured(DDIM(0.5, "optimal"), lambda name: "beta_tilde") == DDIM(0.5)


@pytest.mark.parametrize(
    ("make_solver", "words"),
    [
        (lambda: DDIM(0.5, "gamma"), "variance must be one of beta_tilde, optimal, optimal_per_dimension, got 'gamma'"),
        (lambda: Ancestral("gamma"), "variance must be one of beta_tilde, beta, learned, optimal"),
    ],
)
def test_an_unknown_variance_is_refused(make_solver, words):
    with pytest.raises(ValueError, match=words):
        make_solver()


@pytest.mark.parametrize(
    ("x_0", "options", "words"),
    [
        (torch.zeros(0, 3), {}, "at least one example and two draws, got 0"),
        (torch.zeros(4, 3), {"draws": 1}, "two draws, got 4 and 1"),
        (torch.tensor([[0.0, 0.0, math.nan]]), {}, "not finite"),
        (torch.zeros(4, 3), {"condition": torch.zeros(3)}, "4 examples, 3 conditions"),
        (torch.zeros(4, 3), {"times": [0.0]}, r"lie in \(0, 1\]"),
        (torch.zeros(4, 3), {"times": [math.nan]}, r"lie in \(0, 1\]"),
        (torch.zeros(4, 3), {"times": []}, "times"),
    ],
)
def test_what_cannot_be_measured_says_why(x_0, options, words):
    with pytest.raises(ValueError, match=words):
        measure(GAUSSIAN.denoiser(DDPM), x_0, **options)


def test_a_network_that_returns_nan_is_named():
    class Broken(nn.Module):
        def forward(self, x, t, condition=None):
            return torch.where(t[:, None] > 0.5, torch.nan, x)

    with pytest.raises(ValueError, match=r"the denoiser's error at t = 0\.7 is not finite"):
        measure(Denoiser(Broken(), DDPM, "x0"), torch.zeros(4, 3), times=[0.2, 0.7], draws=4)
