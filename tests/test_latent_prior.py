"""A diffusion prior over latents (theory row 19): exact on Gaussians and mixtures of them, and whole runs on digits."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn

import kuosan as ks
from conftest import ALL_SCHEDULES, named
from kuosan import Chain, Denoiser, DiffusionChain, Gaussian, Mixture, Process, schedules
from kuosan import recipe as recipes
from kuosan.autoencoders import Autoencoder
from kuosan.autoencoders.objective import Elbo
from kuosan.build import make_model
from kuosan.cli import main
from kuosan.denoiser import EDM
from kuosan.gaussian import per_example
from kuosan.kernels import Generative, Guide
from kuosan.learned import LearnedSchedule
from kuosan.networks import NETWORKS
from kuosan.recipe import RecipeError
from kuosan.train import train
from test_training import assert_same, end_of, losses, stop_at, train_with

LATENT = Process(schedules.Cosine(log_snr_end=-10.0, t_min=0.01))  # that of the recipe digits-latent
FORMS = pytest.mark.parametrize("form", ["continuous", "matching"])


def f64(value):
    return torch.as_tensor(value, dtype=torch.float64)


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def mean_and_error(values):
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def of_batches(values):
    """The same of the means of batches of 1,000: times are spread evenly over each, which the examples do not show."""
    return mean_and_error(values.reshape(-1, 1000).mean(1))


def prior_of(mixture, form="continuous", steps=100, process=LATENT):
    return DiffusionChain(mixture.denoiser(process), steps=steps, variance="beta", form=form)


# -- a linear-Gaussian VAE whose prior is a diffusion model ------------------------------------------------------------

SLOPE, SHIFT, NOISE = 1.2, -0.1, 0.5  # x = 1.2 z - 0.1 + N(0, 0.5)
ONE = Mixture([1.0], [[0.3]], [0.8])
TWO = Mixture([0.4, 0.6], [[-1.0], [0.9]], [0.2, 0.3])


class Encoder(Guide):
    """q(z|x) = N(gain x + shift, variance)."""

    length = 1

    def __init__(self, gain, shift, variance):
        super().__init__()
        self.numbers = gain, shift, variance

    def up(self, i, below, given):
        gain, shift, variance = self.numbers
        return Gaussian(gain * below[0] + shift, f64(variance))


class Straight(Generative):
    length, shapes = 1, ((1,), (1,))

    def __init__(self, prior):
        super().__init__()
        self.chain = prior

    def prior(self, condition=None):
        return self.chain

    def down(self, i, above, condition=None):
        return Gaussian(SLOPE * above[0] + SHIFT, f64(NOISE))


#: The posterior of ONE, by completing the square.
PRECISION = 1 / 0.8 + SLOPE**2 / NOISE
EXACT = (SLOPE / NOISE / PRECISION, (0.3 / 0.8 - SLOPE * SHIFT / NOISE) / PRECISION, 1 / PRECISION)
ROUGH = (0.6, 0.1, 0.3)


def numbers(mixture):
    """(weight, mean, variance) of each component."""
    columns = (mixture.weights, mixture.means[:, 0], mixture.covariances.flatten())
    return list(zip(*(column.tolist() for column in columns), strict=True))


def log_p(mixture, x):
    """log p(x): a mixture pushed through a line is a mixture; scipy."""
    pushed = ((w, SLOPE * m + SHIFT, SLOPE**2 * v + NOISE) for w, m, v in numbers(mixture))
    density = sum(w * stats.norm.pdf(x, m, math.sqrt(v)) for w, m, v in pushed)
    return math.log(density)


def bound_by_quadrature(mixture, encoder, x):
    """E_q[log p(x|z) + log p(z) - log q(z|x)], with the density of the prior itself; scipy."""
    gain, shift, variance = encoder
    mean, std = gain * x + shift, math.sqrt(variance)

    def cost(z):
        prior = math.log(sum(w * stats.norm.pdf(z, m, math.sqrt(v)) for w, m, v in numbers(mixture)))
        likelihood = stats.norm.logpdf(x, SLOPE * z + SHIFT, math.sqrt(NOISE))
        return stats.norm.pdf(z, mean, std) * (likelihood + prior - stats.norm.logpdf(z, mean, std))

    return integrate.quad(cost, mean - 9 * std, mean + 9 * std, points=[mean], epsabs=1e-9, limit=200)[0]


@FORMS
@pytest.mark.parametrize(
    ("mixture", "encoder"), [(ONE, EXACT), (ONE, ROUGH), (TWO, ROUGH)], ids=["exact", "rough", "mixture"]
)
def test_the_bound_with_a_diffusion_prior_is_the_bound_with_its_density(form, mixture, encoder):
    """scipy's quadrature with the prior's closed form: never above it by more than chance, below by what the ends of
    the schedule and, of 100 steps, their length take; and so below log p(x), which the exact posterior reaches."""
    chain = Chain(Encoder(*encoder), Straight(prior_of(mixture, form)))
    for x in (-1.0, 0.4, 2.0):
        truth = bound_by_quadrature(mixture, encoder, x)
        exact = log_p(mixture, x)
        assert truth <= exact + 1e-9
        if encoder is EXACT:
            assert truth == pytest.approx(exact, abs=1e-8)
        bound = chain.elbo(torch.full((40_000, 1), x).double(), estimator="path", analytic=True, batch_size=1000)
        value, error = of_batches(bound.total)
        assert error < 0.06
        assert value < truth + 5 * error
        assert value == pytest.approx(truth, abs=5 * error + (0.01 if form == "continuous" else 0.1))
        assert not bound.discrete


def test_importance_weights_count_the_latents_of_the_prior_too():
    """log p(x) in closed form: of one path a bound, of many nearly the truth, never above it but by chance."""
    chain = Chain(Encoder(*ROUGH), Straight(prior_of(TWO, steps=30)))
    x = 0.4
    exact = log_p(TWO, x)
    copies = torch.full((4000, 1), x).double()
    bound, bound_error = mean_and_error(chain.elbo(copies, estimator="path").total)
    weights = chain.log_weight(copies, generator=dice(1))
    assert weights.shape == (4000,)
    single, single_error = mean_and_error(weights)
    assert single < exact + 5 * single_error
    # the mean of the weights themselves is p(x)
    ratio, ratio_error = mean_and_error((weights - exact).exp())
    assert ratio == pytest.approx(1, abs=5 * ratio_error)
    assert ratio_error < 0.1
    found = chain.importance_weighted(copies[:300], samples=64, seed=2)
    many, error = mean_and_error(found.log_prob)
    assert bool(found.log_prob.isfinite().all())
    assert many > max(bound - 5 * bound_error, single) - 5 * error
    assert exact - 0.1 < many < exact + 5 * error


# -- one estimate of the prior's bound ---------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("steps", [1, 2, 20])
@pytest.mark.parametrize("schedule", named("linear_beta", "cosine", "ve", "ddpm_table"))
def test_an_estimate_is_the_bound_on_average(form, steps, schedule, tilted):
    """The bound of every rung of the chain, each with draws of its own: 5 standard errors."""
    chain = prior_of(tilted, form, steps, Process(schedule))
    x = tilted.sample(20_000, dice(3))
    estimator = "continuous" if form == "continuous" else "matching"
    with torch.no_grad():
        gap, error = mean_and_error(chain.estimate(x, generator=dice(4)) - chain.elbo(x, estimator=estimator).total)
    assert gap == pytest.approx(0, abs=5 * error)


@FORMS
def test_an_estimate_is_a_function_of_its_noise_and_its_place(form, tilted):
    """The same for the same ones; each of the two makes another; an example does not depend on its company."""
    chain = prior_of(tilted, form, 20)
    x, noise = tilted.sample(6, dice(5)), torch.randn(6, 3, generator=dice(6), dtype=torch.float64)
    u = f64([0.05, 0.2, 0.4, 0.6, 0.8, 0.999])
    value = chain.estimate(x, noise=noise, u=u)
    assert value.shape == (6,)
    torch.manual_seed(1)
    assert torch.equal(chain.estimate(x, noise=noise, u=u), value)
    assert bool((chain.estimate(x, noise=-noise, u=u) != value).all())
    assert bool((chain.estimate(x, noise=noise, u=u.flip(0)) != value).all())
    alone = [chain.estimate(x[i : i + 1], noise=noise[i : i + 1], u=u[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(torch.cat(alone), value, rtol=1e-12, atol=1e-12)
    one, other = (chain.estimate(x, generator=dice(seed)) for seed in (7, 7))
    assert torch.equal(one, other)


def test_the_steps_of_an_estimate_lie_as_its_places_do():
    """Truth: the terms of the chain. With 4 rungs there are three steps between, each a third of the places."""
    chain = prior_of(TWO, "matching", 4)
    x, noise = f64([[0.7]]), f64([[-0.4]])
    guide = chain.guide

    def cost(i):
        above = (guide.marginal(i + 1, x).sample(noise),)
        return float(chain.divergence(i, guide.posterior(i, above, x), above))

    ends = -float(chain.divergence(4, guide.marginal(4, x), ()))
    ends -= float(chain.decoding(x, (guide.marginal(1, x).sample(noise),)))
    for i, places in ((1, (0.0, 0.2, 0.333)), (2, (0.334, 0.5, 0.666)), (3, (0.667, 0.9, 1 - 2**-53))):
        for u in places:
            value = float(chain.estimate(x, noise=noise, u=f64([u])))
            assert value == pytest.approx(ends - 3 * cost(i), rel=1e-12)


def test_the_continuous_cost_is_its_formula():
    """Kingma et al. 2021, eq. 15, times spread evenly in log-SNR; numpy, with the posterior mean of one Gaussian.

    Of the standard normal's own denoiser, alpha x_t, the cost is integrated by scipy; the draw adds the difference.
    """
    chain = prior_of(ONE, "continuous", 10)
    x, noise, u = 0.7, -0.4, 0.3
    times = chain.times
    start, end = (float(LATENT.log_snr(times[i])) for i in (0, -1))

    def at(log_snr):
        alpha2, sigma2 = 1 / (1 + np.exp(-log_snr)), 1 / (1 + np.exp(log_snr))
        x_t = np.sqrt(alpha2) * x + np.sqrt(sigma2) * noise
        mean = 0.3 + np.sqrt(alpha2) * 0.8 / (alpha2 * 0.8 + sigma2) * (x_t - np.sqrt(alpha2) * 0.3)
        return alpha2, sigma2, mean, np.sqrt(alpha2) * x_t

    alpha2, sigma2, *_ = at(end)
    total = -0.5 * (alpha2 * x**2 + sigma2 - 1 - np.log(sigma2))
    total += stats.norm.logpdf(x, at(start)[2], np.exp(-start / 2))
    middle = start + u * (end - start)
    *_, mean, of_standard_normal = at(middle)
    total -= 0.5 * (start - end) * np.exp(middle) * ((x - mean) ** 2 - (x - of_standard_normal) ** 2)
    total -= integrate.quad(lambda snr: 0.5 * (x**2 + snr) / (1 + snr) ** 2, np.exp(end), np.exp(start), limit=500)[0]
    value = chain.estimate(f64([[x]]), noise=f64([[noise]]), u=f64([u]))
    assert float(value) == pytest.approx(total, rel=1e-7)


@pytest.mark.parametrize("variance", [1.0, 0.25])
@pytest.mark.parametrize("schedule", named("linear_beta", "ve", "cosine"))
def test_the_continuous_cost_of_gaussian_data_is_known_without_a_draw(schedule, variance):
    """A silent network under EDM's preconditioning is the denoiser of N(0, sigma_data^2): the same at every draw.

    What remains is the noise of decoding at the earliest time, for which the chain's ends are the truth.
    """
    denoiser = Denoiser(Silent(), Process(schedule), "x0", EDM(variance**0.5))
    chain = DiffusionChain(denoiser, grid=Process(schedule).grid(20), variance="beta", form="continuous")
    x = torch.randn(1, 3, generator=dice(1), dtype=torch.float64).expand(500, 3)
    noise = torch.randn(500, 3, generator=dice(2), dtype=torch.float64)
    decoded = chain.decoding(x, (chain.guide.marginal(1, x).sample(noise),))
    rest = chain.estimate(x, noise=noise, generator=dice(3)) + decoded
    assert float(decoded.std()) > 0.1
    assert float(rest.std()) < 1e-9 * float(rest.abs().max())


def test_a_range_of_log_snr_without_end_is_refused():
    chain = prior_of(ONE, "continuous", 10, Process(schedules.RectifiedFlow()))
    with pytest.raises(ValueError, match="evenly in log-SNR, which is infinite at time 1"):
        chain.estimate(f64([[0.7]]))
    with pytest.raises(ValueError, match="evenly in log-SNR, which is infinite at time 1"):
        chain.elbo(f64([[0.7]]), estimator="continuous")


def test_the_continuous_cost_is_the_same_on_average_with_and_without_its_known_part():
    """The integral of the plain formula, of a mixture: Gauss-Hermite over the noise and scipy over log-SNR."""
    chain = prior_of(TWO, "continuous", 10)
    start, end = (float(LATENT.log_snr(chain.times[i])) for i in (0, -1))
    node, weight = np.polynomial.hermite_e.hermegauss(60)
    x, denoiser = f64([[0.7]]), TWO.denoiser(LATENT)

    def cost(log_snr):
        t = LATENT.schedule.time_of(log_snr)
        x_t = LATENT.marginal(x, t).mean + LATENT.sigma(t) * f64(node)[:, None]
        error = ((x - denoiser(x_t, t.expand(60)).x0) ** 2)[:, 0].numpy()
        return 0.5 * np.exp(log_snr) * (weight / weight.sum()) @ error

    truth = integrate.quad(cost, end, start, limit=200, epsrel=1e-6)[0]
    draws = x.expand(40_000, 1)
    u = (torch.arange(40_000) + 0.5) / 40_000
    found, error = mean_and_error(
        chain.integral(chain.guide.times[1], chain.guide.times[-1], u.double(), draws, None, None, dice(9))
    )
    assert found == pytest.approx(truth, abs=5 * error)
    assert error < 0.01


@FORMS
def test_the_gradient_of_an_estimate_reaches_the_latents(form, tilted):
    """gradcheck: finite differences, the noise and the place held."""
    chain = prior_of(tilted, form, 20)
    noise = torch.randn(4, 3, generator=dice(8), dtype=torch.float64)
    x = tilted.sample(4, dice(9)).requires_grad_()
    u = f64([0.1, 0.4, 0.7, 0.95])
    assert torch.autograd.gradcheck(lambda x: chain.estimate(x, noise=noise, u=u), (x,), eps=1e-6, atol=1e-4)


def test_of_a_learned_schedule_the_continuous_estimate_moves_its_ends_alone(tilted):
    """Central differences of the same estimate, its noise and places held: it does not depend on what lies between."""
    schedule = LearnedSchedule(6.0, -4.0, units=4)
    chain = prior_of(tilted, "continuous", 10, Process(schedule))
    x, noise = tilted.sample(50, dice(22)), torch.randn(50, 3, generator=dice(23), dtype=torch.float64)
    u = torch.rand(50, generator=dice(24), dtype=torch.float64)

    def value():
        return chain.estimate(x, noise=noise, u=u).mean()

    parameters = (schedule.ends, schedule.weight, schedule.place)
    gradients = torch.autograd.grad(value(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        for k in range(2):
            with torch.no_grad():
                values = []
                for step in (1e-4, -2e-4):
                    parameter[k] += step
                    values.append(value().item())
                parameter[k] += 1e-4
            slope = (values[0] - values[1]) / 2e-4
            assert abs(slope) > 1e-2 if parameter is schedule.ends else abs(slope) < 1e-4
            assert gradient[k].item() == pytest.approx(slope, rel=1e-4, abs=1e-4)


def test_a_form_that_is_not_one_is_refused():
    with pytest.raises(ValueError, match="form must be matching or continuous, got 'path'"):
        prior_of(ONE, "path")


# -- it begins as the standard normal ----------------------------------------------------------------------------------


class Silent(nn.Module):
    def forward(self, x, t, condition=None):
        return torch.zeros_like(x)


@pytest.mark.parametrize("schedule", named())
def test_preconditioned_for_unit_variance_a_silent_network_knows_the_standard_normal(schedule):
    """E[z | z_t] = alpha z_t / (alpha^2 + sigma^2), by completing the square; Vahdat et al. 2021, section 3.2."""
    process = Process(schedule)
    denoiser = Denoiser(Silent(), process, "x0", EDM(1.0))
    x_t = torch.randn(50, 3, generator=dice(10), dtype=torch.float64)
    for t in (schedule.t_min, 0.3, 0.9):
        log_snr = float(process.log_snr(t))
        alpha, sigma = (float(c) for c in process.scales(t))
        assert 2 * math.log(alpha / sigma) == pytest.approx(log_snr, rel=1e-9, abs=1e-9)
        torch.testing.assert_close(denoiser(x_t, t).x0, alpha / (alpha**2 + sigma**2) * x_t, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "process", [LATENT, Process(ALL_SCHEDULES["linear_beta"]), Process(ALL_SCHEDULES["ve"])], ids=["recipe", "vp", "ve"]
)
def test_the_bound_of_a_silent_network_is_the_density_of_the_standard_normal(process):
    """scipy, at each of five points alone: the exact denoiser's continuous bound is tight everywhere."""
    chain = DiffusionChain(Denoiser(Silent(), process, "x0", EDM(1.0)), steps=100, variance="beta", form="continuous")
    for z in ((0.0, 0.0), (1.0, -1.0), (0.3, 2.0), (-1.7, -0.2), (2.5, 2.5)):
        points = f64([z]).expand(1000, 2)
        value, error = of_batches(torch.cat([chain.estimate(points, generator=dice(11 + k)) for k in range(30)]))
        assert error < 0.15
        assert value == pytest.approx(stats.multivariate_normal(np.zeros(2)).logpdf(z), abs=5 * error + 0.01)


# -- the objective -----------------------------------------------------------------------------------------------------


def small(layers=1, form="continuous", seed=12, **settings):
    """A tiny autoencoder of 2x2 pictures in 5 levels with a tiny diffusion prior, all weights random."""

    def prior(shape):
        network = NETWORKS["mlp"](shape=shape, width=8, depth=1)
        return DiffusionChain(Denoiser(network, LATENT, "x0", EDM(1.0)), steps=20, variance="beta", form=form)

    torch.manual_seed(seed)
    model = Autoencoder((1, 2, 2), 5, latent=4, layers=layers, width=8, depth=1, prior=prior, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.double().eval()


def pictures(n, seed=13):
    return torch.randint(5, (n, 1, 2, 2), generator=dice(seed)).double() / 2 - 1


@FORMS
@pytest.mark.parametrize("layers", [1, 2])
def test_the_loss_is_minus_the_bound_of_the_whole_ladder_per_dimension(form, layers):
    """The chain's own bound, with other draws, of the same four pictures 5,000 times; 5 standard errors."""
    model = small(layers, form)
    x = pictures(4).repeat(5000, 1, 1, 1)
    with torch.no_grad():
        loss = Elbo()(model, x, generator=dice(14))
    total = model.elbo(x, estimator="path", analytic=True, seed=15).total
    gap, error = mean_and_error(4 * loss + total)
    assert gap == pytest.approx(0, abs=5 * error)
    assert error < 0.3


@pytest.mark.parametrize("posterior", ["gaussian", "flow"])
def test_of_a_prior_that_is_the_standard_normal_the_loss_is_that_of_no_prior(posterior):
    """The closed-form KL of the same autoencoder without one; a silent network is the standard normal."""
    if posterior == "flow":
        pytest.importorskip("zuko")
    model = small(posterior=posterior)
    silent = Denoiser(Silent(), LATENT, "x0", EDM(1.0))
    model.model.prior_chain = DiffusionChain(silent, steps=20, variance="beta", form="continuous")
    x = pictures(4).repeat(5000, 1, 1, 1)
    with torch.no_grad():
        loss = Elbo()(model, x, generator=dice(16))
        model.model.prior_chain = None
        gap, error = mean_and_error(4 * (loss - Elbo()(model, x, generator=dice(17))))
    assert gap == pytest.approx(0, abs=5 * error + 0.02)
    assert error < 0.25


@pytest.mark.parametrize(("layers", "count"), [(1, 4 + 4), (2, 4 + 2 + 2)])
def test_an_example_takes_the_noise_of_its_latents_and_of_the_prior_over_the_last(layers, count):
    """Counting: z of 4, or of 4 and 2, and as many again as the last has; with all of it the loss is a function."""
    model = small(layers)
    assert Elbo().noise_shape(model, (1, 2, 2)) == (count,)
    x, t = pictures(3), f64([0.1, 0.5, 0.9])
    noise = torch.randn(3, count, generator=dice(18), dtype=torch.float64)
    with torch.no_grad():
        loss = Elbo()(model, x, t=t, noise=noise)
        assert torch.equal(Elbo()(model, x, t=t, noise=noise), loss)
        alone = [Elbo()(model, x[i : i + 1], t=t[i : i + 1], noise=noise[i : i + 1]) for i in range(3)]
        torch.testing.assert_close(torch.cat(alone), loss, rtol=1e-12, atol=1e-12)
        for k in range(count):  # no number is without use
            moved = noise.clone()
            moved[:, k] += 1
            assert bool((Elbo()(model, x, t=t, noise=moved) != loss).any())
        assert bool((Elbo()(model, x, t=t / 2, noise=noise) != loss).all())
    model.model.prior_chain = None
    assert Elbo().noise_shape(model, (1, 2, 2)) == (count - (4 if layers == 1 else 2),)


@FORMS
def test_the_loss_trains_encoder_decoder_and_prior_together(form):
    """A gradient other than zero for every parameter; and the encoder's is that of finite differences."""
    model = small(form=form)
    x, t = pictures(8), torch.linspace(0.05, 0.95, 8, dtype=torch.float64)
    noise = torch.randn(8, 8, generator=dice(19), dtype=torch.float64)

    def loss():
        return Elbo()(model, x, t=t, noise=noise).mean()

    loss().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not bool((p.grad != 0).any())]
    assert not dead
    for part in (model.guide, model.model.decoder, model.model.prior_chain):
        parameter = next(p for p in part.parameters() if p.ndim == 2)
        where = divmod(int(parameter.grad.abs().argmax()), parameter.shape[1])
        with torch.no_grad():
            values = []
            for step in (3e-3, -6e-3):  # the decoder's law is in float32
                parameter[where] += step
                values.append(float(loss()))
            parameter[where] += 3e-3
        slope = (values[0] - values[1]) / 6e-3
        assert float(parameter.grad[where]) == pytest.approx(slope, rel=2e-3)


def test_warming_up_the_prior_counts_as_the_divergence_that_it_is_part_of():
    """At step 4 of 10 half: what it costs is linear in beta, between the decoder alone and the whole."""
    model = small()
    x, t, noise = pictures(5), torch.linspace(0, 0.9, 5, dtype=torch.float64), torch.ones(5, 8).double()
    with torch.no_grad():
        at = {step: Elbo(warmup=10)(model, x, t=t, noise=noise, step=step) for step in (0, 4, 9, 100)}
        assert torch.equal(at[9], at[100])
        torch.testing.assert_close(at[4], at[0] + (at[9] - at[0]) * 4 / 9, rtol=1e-10, atol=1e-12)
        assert torch.equal(at[9], Elbo()(model, x, t=t, noise=noise))
        assert float((at[9] - at[0]).abs().min()) > 1e-3


# -- runs --------------------------------------------------------------------------------------------------------------

TINY = [
    "autoencoder.width=32",
    "autoencoder.depth=1",
    "autoencoder.latent=8",
    "network.width=32",
    "network.depth=1",
    "objective.warmup=10",
    "training.steps=40",
    "training.batch_size=16",
    "training.warmup=5",
    "training.checkpoint_every=10",
    "training.sample_every=0",
    "training.ema=0.9",
    "sampling.steps=6",
    "evaluation.draws=2",
    "evaluation.examples=40",
    "evaluation.samples=30",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent") / "run"
    more = ["training.steps=300", "training.learning_rate=0.005", "training.sample_every=150"]
    return train(recipes.read("digits-latent", [*TINY, *more]), folder)


def said(capsys, *words):
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


@pytest.mark.parametrize(
    "overrides",
    [[], ["autoencoder.layers=2", "denoiser.predicts=energy", "objective.free_bits=0.1"]],
    ids=["", "energy"],
)
def test_an_interrupted_run_with_a_prior_goes_on_as_if_nothing_had_been(tmp_path, overrides):
    """Truth: the uninterrupted run, bit for bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    recipe = recipes.read("digits-latent", [*TINY, *overrides])
    train(recipe, whole)
    for until in (3, 17, 29):
        with pytest.raises(RuntimeError, match="stopped here"):
            train_with(recipe, parts, stop_at(until))
    train(recipe, parts)
    assert_same(end_of(whole), end_of(parts))
    assert losses(whole) == losses(parts)
    assert any("prior_chain" in name for name in end_of(whole))


def test_accumulating_in_parts_gives_the_losses_of_the_whole_batch(tmp_path):
    """Truth: the batch at once; only the order of summation differs."""
    overrides = [*TINY, "autoencoder.dropout=0.0", "network.dropout=0.0"]
    train(recipes.read("digits-latent", overrides), tmp_path / "one")
    train(recipes.read("digits-latent", [*overrides, "training.accumulate=4"]), tmp_path / "four")
    assert losses(tmp_path / "four") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_training_moves_the_prior_and_lowers_what_the_digits_cost(run):
    """Of levels equally likely it would be log2(17) bits; the prior's last layer began as zeros."""
    bound = run.bound()
    assert 0.5 < bound.bits_per_dim().total < math.log2(17) - 0.5
    network = run.autoencoder.model.prior_chain.model.denoiser.network
    assert float(network.leave.weight.abs().max()) > 0
    for step in (150, 300):
        assert (run.folder / "samples" / f"step-{step:08d}.png").is_file()


@pytest.mark.parametrize("how", [{}, {"solver": "ancestral", "steps": 5}], ids=["recipe", "ancestral"])
def test_a_sample_depends_on_its_seed_alone(run, how):
    """The same seeds in another order, another batch and other company; matrix products may round a level away."""
    many = run.sample(seeds=range(20), **how)
    assert many.shape == (20, 1, 8, 8)
    assert int(many.max()) <= 16
    order = [7, 3, 19, 0]
    for size in (256, 1):
        other = run.sample(seeds=order, batch_size=size, **how)
        assert float((other != many[order]).double().mean()) < 0.01
    assert torch.equal(run.sample(20, **how), many)
    assert len({tuple(one.flatten().tolist()) for one in many}) == 20


def test_the_solver_of_the_prior_and_its_steps_are_what_one_asks_for(run, capsys, tmp_path):
    """Other steps and another solver make other samples of the same seeds, and their evaluations are counted."""
    out = tmp_path / "drawn"
    plain = run.sample(10)
    for words, evaluations, name in (
        (["--steps", 3], 3, "auto"),
        (["--solver", "ancestral", "--steps", 7], 7, "ancestral"),
        (["--solver", "heun"], None, "heun"),
        ([], 6, "auto"),
    ):
        result = said(capsys, "sample", run.folder, "-n", 2, *words, "--out", out)
        assert name in result["solver"].lower()
        assert "layer by layer" in result["solver"]
        if evaluations is not None:
            assert result["evaluations"] == evaluations
    assert bool((run.sample(10, steps=1) != plain).any())
    assert float((run.sample(10, solver="ancestral") != plain).double().mean()) > 0.02


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["sample", "--guidance", "1"], "it has no guidance"),
        (["sample", "--class", "3"], "was trained without classes: none can be asked for"),
        (["sample", "--solver", "nonsense"], "sampling.solver.kind: must be one of"),
        (["sample", "--steps", "0"], "steps must be at least 1, got 0"),
        (["sample", "--grid", "karras"], "it has no grid"),
        (["evaluate", "--guidance", "1"], "it has no guidance"),
        (["evaluate", "--ode"], "has no probability-flow ODE"),
        (["evaluate", "--variance", "beta"], "its chain has no variance to choose"),
        (["tune", "--steps", "3"], "is the run of an autoencoder, which has no such thing"),
    ],
)
def test_what_such_a_run_does_not_have_is_refused(run, capsys, words, expected):
    command, *rest = words
    assert main([command, str(run.folder), *rest]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kuosan: ")
    assert expected in error


def test_the_report_of_such_a_run_is_that_of_an_autoencoder(run, capsys):
    """Its sections, in the numbers and on the page."""
    assert said(capsys, "report", run.folder)
    numbers = json.loads((run.folder / "report.json").read_text())
    assert numbers["facts"]["kind"] == "An autoencoder"
    page = (run.folder / "report.html").read_text()
    for section in ("reconstructions", "units", "traversals", "samples"):
        assert f'id="{section}"' in page


def test_such_a_run_is_evaluated(run, capsys):
    """The bound of two seeds agrees to their errors; of several paths the bound is no lower."""
    result = said(capsys, "evaluate", run.folder, "--bound", "--importance", 8)
    bound, tighter = (result["likelihoods"][name] for name in ("bound", "importance"))
    for one in (bound, tighter):
        assert math.isfinite(one["total"])
        assert 0 < one["total"] < math.log2(17)
    noise = 5 * math.hypot(bound["monte_carlo_error"], tighter["monte_carlo_error"])
    chain = run.autoencoder
    x, _ = run.examples()
    own = chain.importance_weighted(x, samples=1, seed=3)
    assert tighter["total"] < own.bits_per_dim + noise + 5 * own.standard_error
    other = run.bound(seed=5).bits_per_dim()
    error = 5 * math.hypot(bound["monte_carlo_error"], other.monte_carlo_error)
    assert other.total == pytest.approx(bound["total"], abs=error)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["process.kind=cosine"], "process alone is given; a diffusion prior over the latents needs both of them"),
        (["network.kind=mlp"], "network alone is given; a diffusion prior over the latents needs both of them"),
        (
            ["process.kind=cosine", "network.kind=mlp", "denoiser.predicts=levels"],
            "latents have no levels: the prior's denoiser.predicts must be another",
        ),
        (["process.kind=cosine", "network.kind=mlp", "data.conditional=true"], "an autoencoder is not told classes"),
    ],
)
def test_half_a_prior_or_one_of_levels_is_refused_when_the_recipe_is_read(overrides, words):
    with pytest.raises(RecipeError, match=words):
        recipes.read("digits-vae", overrides)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("network.width=0", "network"),
        ("process.log_snr_end=11.0", "process: log_snr_end is that of noise"),
        ("denoiser.predicts=v", "denoiser: EDM preconditioning"),
        ("objective={kind='simple'}", "objective.kind: of this kind of model must be elbo, latent, got 'simple'"),
        ("sampling.solver.kind=best", "sampling.solver.kind: must be one of"),
    ],
)
def test_a_prior_that_cannot_be_made_is_refused_before_training(tmp_path, override, words):
    with pytest.raises(RecipeError, match=words):
        train(recipes.read("digits-latent", [*TINY, override]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_recipe_that_ships_begins_with_a_standard_normal_prior():
    """Its network's last layer is zeros: the bound on the density of a latent is scipy's, at the first step."""
    prior = make_model(recipes.read("digits-latent"), (1, 8, 8), 17, 10).eval().model.prior()
    assert isinstance(prior, DiffusionChain)
    z = torch.randn(1, 32, generator=dice(20))
    with torch.no_grad():
        value, error = mean_and_error(prior.estimate(z.expand(20_000, 32), generator=dice(21)))
    truth = float(per_example(ks.Gaussian(torch.zeros(1, 32), torch.ones(1, 32)).log_prob(z)))
    assert truth == pytest.approx(stats.multivariate_normal(np.zeros(32)).logpdf(z[0].numpy()), abs=1e-3)
    assert value == pytest.approx(truth, abs=5 * error + 0.1)
    assert error < 1.0
