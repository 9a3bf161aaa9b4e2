"""Likelihood along the probability-flow ODE, against densities and maps that are known in closed form or from scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.optimize import minimize
from torch import nn

import kuosan as ks
from conftest import ALL_SCHEDULES, PAIR_PMF, PMF, LogPrior, PairLogits, named
from kuosan import dequantisation, ode, schedules
from kuosan.denoiser import EDM, Denoiser
from kuosan.prediction import FORMS
from kuosan.process import Process
from kuosan.solvers import ClassifierFree

TIGHT = {"method": "dopri8", "rtol": 1e-8, "atol": 1e-8, "max_evaluations": 2000}
COSINE = Process(ALL_SCHEDULES["cosine"])


def states(mixture, process, n, t):
    """n draws of x_t."""
    x_0 = mixture.sample(n, torch.Generator().manual_seed(1))
    return process.marginal(x_0, t).sample(generator=torch.Generator().manual_seed(2))


def exact_end(mixture, process, t=1.0):
    return lambda x_T: mixture.log_prob(x_T, process, t)


def blob(d):
    """Two components of full, unequal covariances in d dimensions."""
    dice = torch.Generator().manual_seed(d)
    roots = torch.randn(2, d, d, generator=dice, dtype=torch.float64) / math.sqrt(d)
    covariances = 0.15 * roots @ roots.mT + 0.05 * torch.eye(d, dtype=torch.float64)
    return ks.Mixture([0.4, 0.6], torch.randn(2, d, generator=dice, dtype=torch.float64) / 2, covariances)


# -- the density ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", named())
def test_the_density_of_a_mixture_is_exact_under_every_schedule(schedule, tilted):
    """A perfect denoiser's ODE has the law of x_t at every time: the mixture's own log_prob at its start."""
    process = Process(schedule)
    start = float(schedule.at(torch.zeros(())))
    x = states(tilted, process, 6, start)
    found = ode.log_likelihood(tilted.denoiser(process), x, at_end=exact_end(tilted, process), **TIGHT)
    assert (found.log_prob - tilted.log_prob(x, process, start)).abs().max() < 1e-7
    assert torch.equal(found.log_prob, found.end_log_prob + found.log_det)
    assert bool((found.example_error == 0).all())


@pytest.mark.parametrize("schedule", named("linear_beta", "ve", "rectified_flow"))
@pytest.mark.parametrize("d", [1, 2, 16])
def test_the_density_of_a_mixture_is_exact_in_every_dimension(schedule, d):
    """The same truth; between two inner times, where neither end is nearly Gaussian."""
    mixture, process = blob(d), Process(schedule)
    t, end = (float(schedule.time_of(level)) for level in (4.0, -1.5))
    x = states(mixture, process, 4, t)
    found = ode.log_likelihood(
        mixture.denoiser(process), x, start=t, end=end, at_end=exact_end(mixture, process, end), **TIGHT
    )
    assert (found.log_prob - mixture.log_prob(x, process, t)).abs().max() < 1e-7


@pytest.mark.parametrize("predicts", [*FORMS, "energy"])
def test_the_density_does_not_depend_on_what_the_network_predicts(predicts, tilted):
    """The same truth, for networks that return each form of the perfect denoiser."""

    class Returns(nn.Module):
        def forward(self, x, t, condition=None):
            return tilted.denoiser(COSINE)(x, t).read(predicts)

    denoiser = tilted.energy_denoiser(COSINE) if predicts == "energy" else Denoiser(Returns(), COSINE, predicts)
    x = states(tilted, COSINE, 3, 0.3)
    options = {"start": 0.3, "at_end": exact_end(tilted, COSINE), "rtol": 1e-7, "atol": 1e-7}
    found = ode.log_likelihood(denoiser, x, **options)
    assert (found.log_prob - tilted.log_prob(x, COSINE, 0.3)).abs().max() < 1e-5


@pytest.mark.parametrize("method", ode.METHODS)
def test_the_error_follows_the_tolerance(method, tilted):
    """A hundredth of the tolerance leaves less than a tenth of the error, and more evaluations; truth: the mixture."""
    x, truth = states(tilted, COSINE, 4, 0.3), None
    errors, evaluations = [], []
    for tolerance in (1e-3, 1e-5):
        options = {"rtol": tolerance, "atol": tolerance, "method": method, "start": 0.3}
        found = ode.log_likelihood(tilted.denoiser(COSINE), x, at_end=exact_end(tilted, COSINE), **options)
        truth = tilted.log_prob(x, COSINE, 0.3)
        errors.append(float((found.log_prob - truth).abs().max()))
        evaluations.append(found.evaluations)
    assert errors[1] < errors[0] / 10
    assert evaluations[0] < evaluations[1]


def test_every_example_meets_the_tolerance_whatever_else_is_in_the_batch():
    """One hard state among 999 at the calm mean is solved as well as alone; truth: the mixture's density."""
    mixture = ks.Mixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.0]], [[0.01, 0.02], [0.02, 0.01]])
    process, start = Process(ALL_SCHEDULES["rectified_flow"]), 0.05
    x = torch.tensor([[0.95, 0.0]], dtype=torch.float64).repeat(1000, 1)
    x[7] = torch.tensor([0.03, 0.2])
    options = {"start": start, "at_end": exact_end(mixture, process), "rtol": 1e-5, "atol": 1e-5}
    found = ode.log_likelihood(mixture.denoiser(process), x, **options)
    assert abs(found.log_prob[7] - mixture.log_prob(x, process, start)[7]) < 4e-3


@pytest.mark.parametrize(("schedule", "std"), [("ve", 80.0), ("cosine", 1.0), ("rectified_flow", 1.0)])
def test_by_default_the_ode_ends_in_the_law_that_sampling_starts_from(schedule, std, tilted):
    """N(0, I), or N(0, 80^2 I) under VE, written out."""
    x = states(tilted, Process(ALL_SCHEDULES[schedule]), 3, 0.5)
    found = ode.log_likelihood(tilted.denoiser(Process(ALL_SCHEDULES[schedule])), x, start=0.5)
    law = torch.distributions.Normal(0.0, std)
    assert torch.allclose(found.end_log_prob, law.log_prob(found.x_T).sum(1))


# -- the map ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", named("cosine", "ve", "sub_vp", "rectified_flow"))
def test_encoding_follows_the_probability_flow(schedule, tilted):
    """scipy's DOP853 on Song's own form in time, dx/dt = f x - g^2/2 score, with the mixture's exact score."""
    process = Process(schedule)
    start, end = (float(schedule.time_of(level)) for level in (3.0, -5.0))
    x = states(tilted, process, 1, start)

    def velocity(t, y):
        y = torch.from_numpy(y)[None]
        return (process.drift(y, t) - 0.5 * process.diffusion(t) ** 2 * tilted.score(y, process, t))[0].numpy()

    truth = solve_ivp(velocity, (start, end), x[0].numpy(), "DOP853", rtol=1e-9, atol=1e-9).y[:, -1]
    found = ode.encode(tilted.denoiser(process), x, start=start, end=end, **TIGHT)
    assert np.abs(found[0].numpy() - truth).max() < 1e-6 * max(1, np.abs(truth).max())


@pytest.mark.parametrize("schedule", named("linear_beta", "ve", "rectified_flow"))
def test_decoding_undoes_encoding(schedule, tilted):
    process = Process(schedule)
    x = states(tilted, process, 5, float(schedule.at(torch.zeros(()))))
    x_T = ode.encode(tilted.denoiser(process), x, **TIGHT)
    assert (x_T - x).abs().max() > 0.1
    assert (ode.decode(tilted.denoiser(process), x_T, **TIGHT) - x).abs().max() < 1e-7


def test_the_likelihood_ends_where_encoding_does(tilted):
    x = states(tilted, COSINE, 3, 0.2)
    found = ode.log_likelihood(tilted.denoiser(COSINE), x, start=0.2, **TIGHT)
    assert (found.x_T - ode.encode(tilted.denoiser(COSINE), x, start=0.2, **TIGHT)).abs().max() < 1e-8


def test_time_never_leaves_the_interval(tilted):
    """Outside it there may be no time at all; torchdiffeq by itself steps past the end and interpolates."""
    seen = []

    class Spy(nn.Module):
        def forward(self, x, t, condition=None):
            seen.extend(t.tolist())
            return tilted.posterior_mean(x, COSINE, t)

    denoiser = Denoiser(Spy(), COSINE, "x0")
    ode.decode(denoiser, ode.encode(denoiser, torch.zeros(2, 3).double(), start=0.2, end=0.7), start=0.2, end=0.7)
    assert 0.2 <= min(seen) < 0.2 + 1e-9
    assert 0.7 - 1e-9 < max(seen) <= 0.7


# -- Hutchinson -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_the_estimated_divergence_is_unbiased_and_states_its_error(kind, tilted):
    """One state 2000 times, each with its own probes: their mean is the mixture's density, their spread the error."""
    x = states(tilted, COSINE, 1, 0.2).expand(2000, 3)
    options = {"start": 0.2, "at_end": exact_end(tilted, COSINE), "max_evaluations": 300}
    found = ode.log_likelihood(tilted.denoiser(COSINE), x, divergence=kind, probes=3, seed=5, **options)
    truth = tilted.log_prob(x[:1], COSINE, 0.2)
    error = float(found.log_prob.std())
    assert error > 0.05
    assert abs(float(found.log_prob.mean() - truth)) < 4 * error / math.sqrt(2000) + 1e-4
    assert float(found.example_error.square().mean().sqrt()) == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize("schedule", named("cosine", "ve"))
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_a_probe_is_fixed_for_the_whole_solve(kind, schedule):
    r"""Of a single Gaussian the ODE is linear, and with one probe the log-determinant is a quadratic form in it.

    In closed form :math:`v^\top \log(\bar M) v + d\log(g_T/g_t)`, M-bar the map of x / g; Rademacher probes of d = 2
    have two values of it, (1, 1) and (1, -1), and a probe drawn again on the way would give every value between.
    """
    covariance = torch.tensor([[0.5, 0.3], [0.3, 0.4]], dtype=torch.float64)
    gaussian, process = ks.Mixture([1.0], [[0.0, 0.0]], covariance[None]), Process(schedule)
    start, end = (float(schedule.time_of(level)) for level in (3.0, -3.0))
    (alpha, sigma), (alpha_T, sigma_T) = process.scales(start), process.scales(end)
    values, axes = torch.linalg.eigh(covariance)
    grown = (torch.log(alpha_T**2 * values + sigma_T**2) - torch.log(alpha**2 * values + sigma**2)) / 2
    stretch = torch.log((alpha_T + sigma_T) / (alpha + sigma))
    log_map = axes @ torch.diag(grown - stretch) @ axes.T
    x = states(gaussian, process, 12, start)
    found = ode.log_likelihood(gaussian.denoiser(process), x, start=start, end=end, divergence=kind, **TIGHT)
    if kind == "gaussian":
        probes = torch.stack([ode._probes(x[:1], torch.tensor([k]), kind, 1, 0)[0, 0] for k in range(12)])
    else:
        probes = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()
    forms = torch.einsum("ki,ij,kj->k", probes, log_map, probes) + 2 * stretch
    gaps = (found.log_det[:, None] - forms).abs()
    assert (gaps.diagonal() if kind == "gaussian" else gaps.min(1).values).max() < 1e-6
    assert len(found.log_det.round(decimals=6).unique()) == (12 if kind == "gaussian" else 2)
    assert bool(found.example_error.isnan().all())


def test_the_probe_of_an_example_is_a_function_of_the_seed_and_its_index(tilted):
    """Of nothing else: not of the batches, not of how many examples follow, not of global randomness."""
    x = states(tilted, COSINE, 7, 0.3)
    options = {"start": 0.3, "divergence": "gaussian", "rtol": 1e-6, "atol": 1e-6}

    def of(x, seed=0, **more):
        return ode.log_likelihood(tilted.denoiser(COSINE), x, seed=seed, **options, **more).log_prob

    whole, calls = of(x), []
    torch.manual_seed(99)
    assert torch.allclose(whole, of(x, batch_size=3, progress=lambda *c: calls.append(c)), atol=1e-3, rtol=0)
    assert torch.allclose(whole[:2], of(x[:2]), atol=1e-3, rtol=0)
    assert (whole - of(x, seed=1)).abs().max() > 0.1
    assert calls == [(3, 7), (6, 7), (7, 7)]


def test_images_have_the_density_of_their_pixels():
    """The divergence over (C, H, W) is that of the flat vector, exact and estimated; truth: the mixture in d = 8."""
    mixture = blob(8)

    class Image(nn.Module):
        def forward(self, x, t, condition=None):
            return mixture.posterior_mean(x.flatten(1), COSINE, t).reshape(x.shape)

    x = states(mixture, COSINE, 3, 0.3)
    for kind in ode.DIVERGENCES:
        options = {"start": 0.3, "divergence": kind, "at_end": lambda y: mixture.log_prob(y.flatten(1), COSINE, 1.0)}
        image = ode.log_likelihood(Denoiser(Image(), COSINE, "x0"), x.reshape(3, 2, 2, 2), **options)
        flat = ode.log_likelihood(mixture.denoiser(COSINE), x, **options)
        assert image.x_T.shape == (3, 2, 2, 2)
        assert image.dimensions == 8
        assert torch.allclose(image.log_prob, flat.log_prob, atol=1e-9)
        if kind == "exact":
            assert (flat.log_prob - mixture.log_prob(x, COSINE, 0.3)).abs().max() < 0.01


# -- numbers ----------------------------------------------------------------------------------------------------------


class InSingle(nn.Module):
    """A network of float32."""

    def __init__(self, mixture, process):
        super().__init__()
        self.mixture, self.process, self.seen = mixture, process, set()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x, t, condition=None):
        self.seen.add(x.dtype)
        return self.mixture.posterior_mean(x, self.process, t).float()


def test_the_state_keeps_its_dtype_around_a_network_of_another(tilted):
    """Two states 1e-10 apart are one in float32; the round trip of float64 is far under what float32 can hold."""
    process = Process(ALL_SCHEDULES["rectified_flow"])
    network = InSingle(tilted, process)
    denoiser = Denoiser(network, process, "x0")
    x = states(tilted, process, 1, 0.1).repeat(2, 1)
    x[1] += 1e-10
    options = {"start": 0.1, "rtol": 1e-8, "atol": 1e-8}
    x_T = ode.encode(denoiser, x, **options)
    assert network.seen == {torch.float32}
    assert x_T.dtype == torch.float64
    assert (x_T[0] - x_T[1]).abs().max() > 1e-11
    assert (ode.decode(denoiser, x_T, **options) - x).abs().max() < 1e-6
    found = ode.log_likelihood(denoiser, x.float(), start=0.1, at_end=exact_end(tilted, process))
    assert found.x_T.dtype == torch.float32
    assert found.log_prob.dtype == torch.float64
    assert (found.log_prob - tilted.log_prob(x.float(), process, 0.1)).abs().max() < 0.01


def test_solving_leaves_the_model_as_it_was_and_no_graph(tilted):
    """Dropout is off inside and on again afterwards: two solves agree to the last bit."""
    network = nn.Sequential(nn.Linear(3, 16), nn.Dropout(0.5), nn.Linear(16, 3)).double()

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = network

        def forward(self, x, t, condition=None):
            return self.inside(x)

    denoiser = Denoiser(Reads(), COSINE, "x0").train()
    x = states(tilted, COSINE, 2, 0.3)
    first, second = (ode.log_likelihood(denoiser, x, start=0.3) for _ in range(2))
    assert torch.equal(first.log_prob, second.log_prob)
    assert denoiser.training
    assert network[1].training
    assert not first.log_prob.requires_grad
    assert not first.x_T.requires_grad


def test_a_condition_reaches_the_network_with_its_example():
    """Two Gaussians that the condition tells apart: each state has the density of its own; in batches too."""
    pair = [ks.Mixture([1.0], [[m, -m]], [0.1]) for m in (-0.5, 0.7)]

    class Chosen(nn.Module):
        def forward(self, x, t, condition=None):
            means = torch.stack([m.posterior_mean(x, COSINE, t) for m in pair])
            return means[condition, torch.arange(len(x))]

    x = states(pair[0], COSINE, 4, 0.2)
    which = torch.tensor([0, 1, 1, 0])
    options = {"start": 0.2, "end": 0.8, "batch_size": 3, "rtol": 1e-8, "atol": 1e-8}

    def end(x_T):
        return torch.stack([pair[k].log_prob(y, COSINE, 0.8) for k, y in zip(which, x_T, strict=True)])

    found = ode.log_likelihood(Denoiser(Chosen(), COSINE, "x0"), x, which, at_end=end, **options)
    truth = torch.stack([pair[k].log_prob(y, COSINE, 0.2) for k, y in zip(which, x, strict=True)])
    assert torch.allclose(found.log_prob, truth, atol=1e-6)


def test_bits_per_dimension_are_nats_over_log_two_and_the_dimensions(tilted):
    found = ode.log_likelihood(tilted.denoiser(COSINE), states(tilted, COSINE, 5, 0.3), start=0.3)
    bits, error = found.bits_per_dim, found.standard_error
    assert bits == pytest.approx(-float(found.log_prob.mean()) / (3 * math.log(2)))
    assert error == pytest.approx(float(found.log_prob.std()) / math.sqrt(5) / (3 * math.log(2)))
    assert "at time 0.3 (sigma / alpha = 0.5" in found.quantity
    assert found.quantity.endswith(", the prior at time 1")


def test_a_flow_network_that_ignores_x_moves_everything_alike():
    """A constant velocity c under the rectified flow: x_T = x + c (1 - start), and no density changes."""

    class Constant(nn.Module):
        def forward(self, x, t, condition=None):
            return torch.full_like(x, 2.0)

    denoiser = Denoiser(Constant(), Process(schedules.RectifiedFlow()), "flow")
    found = ode.log_likelihood(denoiser, torch.zeros(2, 2).double(), start=0.25)
    assert torch.allclose(found.x_T, torch.full((2, 2), 1.5).double())
    assert torch.allclose(found.log_det, torch.zeros(2).double())


def test_edm_preconditioning_is_part_of_the_model(tilted):
    """The exact denoiser through EDM's scalings and back: the density of the mixture."""
    process, edm = Process(ALL_SCHEDULES["ve"]), EDM(0.5)

    class Inner(nn.Module):
        def forward(self, x, label, condition=None):
            t = process.schedule.time_of(-8 * label)
            skip, out, scale, _ = (c[:, None] for c in edm.coefficients(process, t))
            return (tilted.posterior_mean(x / scale, process, t) - skip * x / scale) / out

    start = float(process.schedule.time_of(4.0))
    x = states(tilted, process, 2, start)
    options = {"start": start, "at_end": exact_end(tilted, process), "rtol": 1e-6, "atol": 1e-6}
    found = ode.log_likelihood(Denoiser(Inner(), process, "x0", edm), x, **options)
    assert (found.log_prob - tilted.log_prob(x, process, start)).abs().max() < 1e-4


# -- the data ---------------------------------------------------------------------------------------------------------

FIVE = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
THREE = torch.cartesian_prod(*[torch.linspace(-1, 1, 3, dtype=torch.float64)] * 2)


def exact_points(values, pmf, process):
    """log q_T of data that is one of a few points, by its definition."""
    alpha, sigma = process.scales(1.0)
    law = torch.distributions.Normal(alpha * values, sigma)
    return lambda x_T: torch.logsumexp(pmf.flatten().log() + law.log_prob(x_T[:, None]).sum(-1), 1)


def rounded(process, t):
    """log of the probability that x_t falls into the bin of each of the five levels, by the error function."""
    alpha, sigma = process.scales(t)
    law = torch.distributions.Normal(alpha * FIVE.T, sigma)
    return ((law.cdf(FIVE + 0.25) - law.cdf(FIVE - 0.25)) @ PMF).log()


def five(schedule, level=0.1):
    """(denoiser, options) of the five levels, from the time at which sigma / alpha is ``level``."""
    process = Process(ALL_SCHEDULES[schedule])
    start = float(process.schedule.time_of(-2 * math.log(level)))
    options = {"start": start, "at_end": exact_points(FIVE, PMF, process), "rtol": 1e-5, "atol": 1e-5}
    return Denoiser(LogPrior(), process, "levels", levels=5), options


def mean_and_error(bound, pmf=PMF):
    """Of the bound's average over the data's own law."""
    return float(pmf @ bound.log_prob), float((pmf * bound.example_error).square().sum().sqrt())


@pytest.mark.parametrize("schedule", ["linear_beta", "ve"])
def test_with_the_exact_decoder_noise_is_the_posterior_and_the_bound_the_probability(schedule):
    """p(y) P(x|y) / q(y|x) is then P(x) for every y: no gap and no spread; the five probabilities are known."""
    denoiser, options = five(schedule)
    bound = dequantisation.data_bound(denoiser, FIVE, draws=3, **options)
    assert (bound.log_prob - PMF.log()).abs().max() < 1e-3
    assert bound.example_error.max() < 1e-3
    assert "log P(x), a probability of 5 levels" in bound.quantity


def test_of_two_dependent_numbers_the_bound_is_nearly_the_probability():
    """By enumeration of the nine pairs; the decoder takes both apart, which at so little noise costs nothing."""
    process = Process(ALL_SCHEDULES["cosine"])
    start = float(process.schedule.time_of(-2 * math.log(0.15)))
    denoiser = Denoiser(PairLogits(process), process, "levels", levels=3)
    options = {"start": start, "at_end": exact_points(THREE, PAIR_PMF, process), "rtol": 1e-6, "atol": 1e-6}
    bound = dequantisation.data_bound(denoiser, THREE, draws=2, **options)
    assert (bound.log_prob - PAIR_PMF.flatten().log()).abs().max() < 5e-3


def test_a_point_decoder_cut_into_bins_bounds_the_probability_on_average():
    """Gibbs: no model has a higher mean log-probability than the law of the data, whose entropy is known."""
    levels, options = five("cosine", level=0.15)

    class Mean(nn.Module):
        def forward(self, x, t, condition=None):
            return levels(x, t).x0

    denoiser = Denoiser(Mean(), levels.process, "x0", levels=5)
    mean, error = mean_and_error(dequantisation.data_bound(denoiser, FIVE, draws=40, **options))
    assert -0.2 < mean - float(PMF @ PMF.log()) < 5 * error


def test_uniform_dequantisation_is_a_bound_that_samples_tighten():
    """Truth: the probability that x_t is rounded to the level, by the error function."""
    denoiser, options = five("cosine")
    truth = float(PMF @ rounded(denoiser.process, options["start"]))
    gaps = []
    for samples in (1, 16):
        bound = dequantisation.data_bound(denoiser, FIVE, q="uniform", samples=samples, draws=480 // samples, **options)
        mean, error = mean_and_error(bound)
        assert mean < truth + 5 * error
        gaps.append(truth - mean)
    assert gaps[0] > 0.2
    assert gaps[1] < 0.3 * gaps[0]


def quadrature_bound(m, log_std, level, process, t):
    """E_q[log p_t(y) - log q(y|x)] of the squashed Gaussian in one level's bin, by Gauss-Hermite."""
    z, weight = np.polynomial.hermite_e.hermegauss(120)
    alpha, sigma = (float(c) for c in process.scales(t))
    a = m + np.exp(log_std) * z
    y = level + (2 / (1 + np.exp(-a)) - 1) / 4
    density = sum(
        p * np.exp(-0.5 * ((y - alpha * v) / sigma) ** 2)
        for p, v in zip(PMF.tolist(), FIVE[:, 0].tolist(), strict=True)
    )
    log_p = np.log(density / sigma / math.sqrt(2 * math.pi))
    log_q = -0.5 * (z**2 + math.log(2 * math.pi)) - np.log(2 / 4 * np.exp(log_std - a) / (1 + np.exp(-a)) ** 2)
    return float(weight @ (log_p - log_q)) / math.sqrt(2 * math.pi)


def test_the_score_alone_finds_the_best_dequantisation_of_its_family():
    """scipy maximises the same bound for each level by quadrature; the fit never computes a density."""
    denoiser, options = five("cosine", level=0.2)
    calls = []
    fit = {"start": options["start"], "progress": lambda *c: calls.append(c)}
    data = FIVE[torch.multinomial(PMF, 4000, replacement=True, generator=torch.Generator().manual_seed(0))]
    q = dequantisation.fit_variational(denoiser, data, steps=500, learning_rate=0.03, **fit)
    assert calls[-1] == (500, 500)
    short, short_at_first = [], []
    for level, chosen in zip(FIVE[:, 0].tolist(), q.network(FIVE).numpy(), strict=True):
        args = (level, denoiser.process, options["start"])
        best = -minimize(lambda p, args=args: -quadrature_bound(*p, *args), chosen + 0.3, method="Nelder-Mead").fun
        short.append(best - quadrature_bound(*chosen, *args))
        short_at_first.append(best - quadrature_bound(0.0, math.log(1.6), *args))
    assert min(short) > -1e-6
    assert float(PMF @ torch.tensor(short)) < 0.25 * float(PMF @ torch.tensor(short_at_first))


def test_a_learned_dequantisation_is_tighter_than_uniform():
    """Truth: the probability that x_t is rounded to the level, by the error function."""
    denoiser, options = five("cosine")
    data = FIVE[torch.multinomial(PMF, 4000, replacement=True, generator=torch.Generator().manual_seed(0))]
    q = dequantisation.fit_variational(denoiser, data, steps=200, start=options["start"])
    truth = float(PMF @ rounded(denoiser.process, options["start"]))
    (uniform, _), (learned, error) = (
        mean_and_error(dequantisation.data_bound(denoiser, FIVE, q=q, draws=200, **options)) for q in ("uniform", q)
    )
    assert learned < truth + 5 * error
    assert truth - learned < 0.2 * (truth - uniform)
    by_quadrature = [
        quadrature_bound(*chosen, level, denoiser.process, options["start"])
        for level, chosen in zip(FIVE[:, 0].tolist(), q.network(FIVE).numpy(), strict=True)
    ]
    assert learned == pytest.approx(float(PMF.numpy() @ np.array(by_quadrature)), abs=5 * error)


@pytest.mark.parametrize("samples", [1, 16])
def test_of_continuous_data_it_bounds_the_density_at_the_data(samples, tilted):
    """log p_0 of the mixture itself. From sigma / alpha = 0.1 the bound is near it, and nearer with more samples."""
    start = float(COSINE.schedule.time_of(-2 * math.log(0.1)))
    x = tilted.sample(20, torch.Generator().manual_seed(3))
    options = {"start": start, "at_end": exact_end(tilted, COSINE), "rtol": 1e-5, "atol": 1e-5}
    bound = dequantisation.data_bound(tilted.denoiser(COSINE), x, samples=samples, draws=320 // samples, **options)
    mean = float((bound.log_prob - tilted.log_prob(x)).mean())
    error = float(bound.example_error.square().mean().sqrt()) / math.sqrt(20)
    assert (-0.03 if samples == 1 else -0.01) < mean < 5 * error
    assert "log p_0(x), a density" in bound.quantity


def test_the_decoder_variance_is_the_callers(tilted):
    """A decoder ten times too narrow is far from the mixture's density, on the safe side."""
    start = float(COSINE.schedule.time_of(-2 * math.log(0.1)))
    x = tilted.sample(20, torch.Generator().manual_seed(3))
    options = {"start": start, "at_end": exact_end(tilted, COSINE)}
    bound = dequantisation.data_bound(tilted.denoiser(COSINE), x, draws=8, decoder_variance=0.001, **options)
    assert float((bound.log_prob - tilted.log_prob(x)).mean()) < -1


def test_draws_are_functions_of_the_seed_and_the_example(tilted):
    """The same bound in other batches, of fewer examples, and under other global randomness."""
    x = tilted.sample(4, torch.Generator().manual_seed(3))
    options = {"start": 0.3, "draws": 2, "divergence": "gaussian", "rtol": 1e-7, "atol": 1e-7}
    whole = dequantisation.data_bound(tilted.denoiser(COSINE), x, **options)
    torch.manual_seed(99)
    part = dequantisation.data_bound(tilted.denoiser(COSINE), x[:3], batch_size=4, **options)
    assert torch.allclose(whole.log_prob[:3], part.log_prob, atol=1e-5)
    assert (
        dequantisation.data_bound(tilted.denoiser(COSINE), x, seed=1, **options).log_prob - whole.log_prob
    ).abs().max() > 0.1


# -- what cannot be ---------------------------------------------------------------------------------------------------


def test_a_solve_that_takes_too_long_says_where_it_stopped_and_what_to_try(tilted):
    with pytest.raises(ode.SolveError, match="max_evaluations = 20") as error:
        ode.encode(tilted.denoiser(COSINE), torch.zeros(1, 3).double(), max_evaluations=20, rtol=1e-9)
    for words in ("stopped at time", "sigma / alpha", "at a step of", "Stiffness", "larger start", "float64"):
        assert words in str(error.value)


def test_a_solve_whose_steps_vanish_says_where():
    """dx/ds = x^2 from 10 at s = 0.2 is infinite at s = 0.3, by hand; under the rectified flow s is the time."""

    class Explodes(nn.Module):
        def forward(self, x, t, condition=None):
            return x**2

    denoiser = Denoiser(Explodes(), Process(schedules.RectifiedFlow()), "flow")
    with pytest.raises(ode.SolveError, match=r"underflow in dt .*stopped at time 0\.(3|2999\d*) "):
        ode.encode(denoiser, torch.full((1, 2), 10.0).double(), start=0.2, rtol=0.01, atol=0.01)


def test_stiffness_is_the_slope_of_the_velocity():
    """Of x0-hat = 0 the velocity is x-bar / s and its Jacobian I / s, at whichever s it stopped: 1 / s times 1 - s."""

    class Zero(nn.Module):
        def forward(self, x, t, condition=None):
            return 0 * x

    denoiser = Denoiser(Zero(), Process(schedules.RectifiedFlow()), "x0")
    with pytest.raises(ode.SolveError, match=r"left: 9 "):
        ode.encode(denoiser, torch.ones(2, 3).double(), start=0.1, max_evaluations=2)


def test_a_network_that_returns_nan_is_named(tilted):
    class Bad(nn.Module):
        def forward(self, x, t, condition=None):
            return x.log()

    with pytest.raises(ode.SolveError, match="network's output or its derivative is not finite"):
        ode.encode(Denoiser(Bad(), COSINE, "x0"), -torch.ones(1, 3).double())


def test_a_guided_model_has_no_likelihood(tilted):
    guided = ClassifierFree(tilted.denoiser(COSINE), 2.0)
    for ask in (ode.encode, ode.decode, ode.log_likelihood, dequantisation.data_bound, dequantisation.fit_variational):
        with pytest.raises(ValueError, match=r"belongs to the model.*pass the Denoiser itself.*ClassifierFree"):
            ask(guided, torch.zeros(1, 3).double())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"divergence": "hutchinson"}, "divergence must be one of exact, rademacher, gaussian, got 'hutchinson'"),
        ({"probes": 0, "divergence": "gaussian"}, "probes must be at least 1"),
        ({"probes": 2}, "the exact divergence takes none but 1"),
        ({"at_end": "posterior"}, "at_end must be"),
        ({"at_end": lambda x: x}, "one number for each of 2 examples"),
        ({"method": "rk4"}, "method must be one of dopri5, dopri8, bosh3, got 'rk4'"),
        ({"rtol": 0.0}, "rtol and atol must be positive"),
        ({"max_evaluations": 0}, "max_evaluations and batch_size"),
        ({"batch_size": 0}, "max_evaluations and batch_size"),
        ({"start": 0.0}, "start must lie between 0"),
        ({"start": 1.0}, "start must lie between 0"),
        ({"start": 0.5, "end": 0.5}, "start < end <= 1"),
        ({"end": 1.5}, "start < end <= 1"),
    ],
)
def test_an_impossible_option_says_what_is_possible(options, words, tilted):
    with pytest.raises(ValueError, match=words):
        ode.log_likelihood(tilted.denoiser(COSINE), torch.zeros(2, 3).double(), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"q": "gaussian"}, 'q must be "noise", "uniform" or what fit_variational returns'),
        ({"samples": 0}, "samples and draws must be at least 1"),
        ({"draws": 0}, "samples and draws must be at least 1"),
        ({"samples": 2, "divergence": "rademacher"}, 'a bound only with divergence="exact"'),
        ({"decoder_variance": 0.0}, "decoder_variance must be positive"),
        ({"decoder_variance": 1.0, "q": "uniform"}, 'decoder of q="noise"'),
    ],
)
def test_an_impossible_bound_says_what_is_possible(options, words):
    with pytest.raises(ValueError, match=words):
        dequantisation.data_bound(five("cosine")[0], FIVE, **options)


def test_data_that_does_not_fit_the_model_is_refused(tilted):
    denoiser, x = tilted.denoiser(COSINE), torch.zeros(2, 3).double()
    for bad in (x.log(), x[:0], x.long()):
        for ask in (ode.encode, dequantisation.data_bound):
            with pytest.raises(ValueError, match="at least one example of finite floating-point numbers"):
                ask(denoiser, bad)
    with pytest.raises(ValueError, match="2 examples, 3 conditions"):
        ode.encode(denoiser, x, torch.zeros(3))
    with pytest.raises(ValueError, match="only discrete data has bins"):
        dequantisation.data_bound(denoiser, x, q="uniform")
    with pytest.raises(ValueError, match="only discrete data has bins"):
        dequantisation.fit_variational(denoiser, x)
    for q in ("noise", "uniform"):
        with pytest.raises(ValueError, match="5 even levels"):
            dequantisation.data_bound(five("cosine")[0], FIVE + 0.1, q=q)


@pytest.mark.parametrize("predicts", ["eps", "score"])
def test_noise_says_nothing_where_there_is_no_signal(predicts):
    """Under the rectified flow x0 = (x - sigma eps) / alpha has no value at t = 1; until 0.999 it has."""
    denoiser = Denoiser(nn.Identity(), Process(schedules.RectifiedFlow()), predicts)
    with pytest.raises(ValueError, match=r"pass an earlier end, such as end=0\.999"):
        ode.encode(denoiser, torch.zeros(1, 2).double())


def test_without_torchdiffeq_it_says_what_to_install(monkeypatch, tilted):
    monkeypatch.setitem(__import__("sys").modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match=r"pip install 'kuosan\[likelihood\]'"):
        ode.encode(tilted.denoiser(COSINE), torch.zeros(1, 3).double())
