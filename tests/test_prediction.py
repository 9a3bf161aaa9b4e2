"""One output in every form (theory row 12), and the denoiser: against autograd, finite differences, typed formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conftest import ALL_SCHEDULES, named
from kuosan import EDM, Denoiser, Prediction, Process
from kuosan.prediction import FORMS, log_gain, target

SCHEDULES = st.sampled_from(list(ALL_SCHEDULES))
TIMES = st.floats(1e-3, 0.999)
X_0 = torch.tensor([[0.7, -0.2], [0.1, 1.3]], dtype=torch.float64)
EPS = torch.tensor([[-0.4, 1.1], [0.6, -2.0]], dtype=torch.float64)


class Says(nn.Module):
    """A network that returns what it is told to and remembers what it was asked."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, t, condition=None):
        self.seen = (x, t, condition)
        return self.answer(x) if callable(self.answer) else self.answer


def noisy(process, t):
    alpha, sigma = process.schedule.scales(t)
    return alpha * X_0 + sigma * EPS


# -- the five forms ---------------------------------------------------------------------------------------------------


@given(SCHEDULES, TIMES, st.sampled_from(list(FORMS)), st.sampled_from(list(FORMS)))
def test_each_form_can_be_read_from_each(name, t, came_as, read_as):
    """x_t, x0 and eps are chosen; any form made of them must give back any other."""
    process = Process(ALL_SCHEDULES[name])
    said = Prediction(process, t, noisy(process, t), came_as, target(came_as, process, t, X_0, EPS))
    alpha, sigma = (float(c) for c in process.schedule.scales(t))
    worst = 1e-13 * max(sigma / alpha, alpha / sigma, 1) ** 2  # what reading x0 from noise, or noise from x0, costs
    truth = target(read_as, process, t, X_0, EPS)
    assert torch.allclose(
        said.read(read_as), truth, rtol=worst + 1e-12, atol=(worst + 1e-12) * float(truth.abs().max())
    )
    assert torch.allclose(getattr(said, read_as), said.read(read_as))


def test_the_forms_are_what_their_papers_say(schedule):
    """eps; -eps / sigma (Tweedie); alpha eps - sigma x0 (Salimans and Ho); x0."""
    process, t = Process(schedule), 0.3141
    alpha, sigma = (float(c) for c in schedule.scales(t))
    said = Prediction(process, t, noisy(process, t), "x0", X_0)
    assert torch.allclose(said.eps, EPS, rtol=1e-9)
    assert torch.allclose(said.score, -EPS / sigma, rtol=1e-9)
    assert torch.allclose(said.v, alpha * EPS - sigma * X_0, rtol=1e-9)
    assert said.x0 is X_0


def test_velocity_is_the_speed_of_x_t(schedule):
    """Central difference of alpha_t x0 + sigma_t eps at fixed x0 and eps."""
    process, t, h = Process(schedule), 0.3141, 1e-6
    said = Prediction(process, t, noisy(process, t), "eps", EPS)
    speed = (noisy(process, t + h) - noisy(process, t - h)) / (2 * h)
    assert torch.allclose(said.velocity, speed, rtol=1e-6, atol=1e-8)


def test_velocity_of_the_straight_line_is_noise_minus_data():
    process = Process(ALL_SCHEDULES["rectified_flow"])
    for t in (0.0, 0.5, 1.0):
        assert torch.equal(target("velocity", process, t, X_0, EPS), EPS - X_0)


def test_velocity_gives_x0_even_from_pure_noise():
    """Rectified flow at t = 1: alpha = 0, and x0 = eps - velocity."""
    process = Process(ALL_SCHEDULES["rectified_flow"])
    assert torch.allclose(Prediction(process, 1.0, EPS, "velocity", EPS - X_0).x0, X_0)


@pytest.mark.parametrize("t", [1e-3, 0.05, 0.3141, 0.8, 0.999])
def test_the_losses_have_the_stated_ratio(schedule, t):
    """An error in x0 and the errors that it makes in the other forms; and each ratio's own formula."""
    process = Process(schedule)
    alpha, sigma = (float(c) for c in schedule.scales(t))
    d_alpha, d_sigma = (float(c) for c in schedule.rates(t))
    guess = X_0 + 0.1 * EPS.flip(0)
    said = Prediction(process, t, noisy(process, t), "x0", guess)
    snr = (alpha / sigma) ** 2
    formula = {
        "x0": 1.0,
        "eps": snr,
        "score": snr / sigma**2,
        "v": (sigma + alpha**2 / sigma) ** 2,
        "velocity": (d_alpha - d_sigma * alpha / sigma) ** 2,
        "flow": (1 + alpha / sigma) ** 2,
    }
    if schedule.convention == "vp":
        assert formula["v"] == pytest.approx(snr + 1, rel=1e-9)
    for form in FORMS:
        ratio = math.exp(float(log_gain(form, process, t)))
        assert ratio == pytest.approx(formula[form], rel=1e-9)
        error = ((said.read(form) - target(form, process, t, X_0, EPS)) ** 2).sum()
        assert float(error) == pytest.approx(ratio * float(((guess - X_0) ** 2).sum()), rel=1e-6)


@pytest.mark.parametrize("t", [0.02, 0.3141, 0.9])
def test_the_exact_denoiser_has_the_exact_score(schedule, tilted, dice, t):
    """Tweedie: the score read from E[x0|x_t], against autograd and central differences of log q_t."""
    process = Process(schedule)
    alpha, sigma = (float(c) for c in schedule.scales(t))
    x_t = alpha * tilted.sample(6, dice) + sigma * torch.randn(6, 3, dtype=torch.float64, generator=dice)
    score = tilted.denoiser(process)(x_t, t).score
    x = x_t.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(tilted.log_prob(x, process, t).sum(), x)
    assert torch.allclose(score, gradient, rtol=1e-8, atol=1e-10 / sigma**2)
    h = 1e-5 * math.sqrt(alpha**2 * 0.1 + sigma**2)
    for i in range(3):
        step = h * torch.eye(3, dtype=torch.float64)[i]
        slope = (tilted.log_prob(x_t + step, process, t) - tilted.log_prob(x_t - step, process, t)) / (2 * h)
        assert torch.allclose(score[:, i], slope, rtol=1e-5, atol=1e-5 / sigma)


def test_an_x0_can_be_replaced():
    process = Process(ALL_SCHEDULES["linear_beta"])
    said = Prediction(process, 0.5, noisy(process, 0.5), "eps", EPS).with_x0(X_0.clamp(-1, 1))
    alpha, sigma = (float(c) for c in process.schedule.scales(0.5))
    assert said.x0.max() == 1.0
    assert torch.allclose(alpha * said.x0 + sigma * said.eps, noisy(process, 0.5))


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="one of x0, eps, score, v, flow, velocity, got 'noise'"):
        Prediction(Process(ALL_SCHEDULES["cosine"]), 0.5, X_0, "noise", X_0)


def test_only_levels_have_a_variance():
    with pytest.raises(ValueError, match='predicts "levels"'):
        _ = Prediction(Process(ALL_SCHEDULES["cosine"]), 0.5, X_0, "x0", X_0).x0_variance


# -- levels -----------------------------------------------------------------------------------------------------------


def exact_levels(x_t, alpha, sigma, log_prior):
    """p(level | x_t) by Bayes' rule in numpy, for five levels."""
    values = np.linspace(-1, 1, 5)
    log_joint = log_prior - 0.5 * ((x_t[..., None] - alpha * values) / sigma) ** 2
    p = np.exp(log_joint - log_joint.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True), values


@pytest.mark.parametrize("t", [0.01, 0.3141, 0.9])
@pytest.mark.parametrize("log_prior", [np.zeros(5), np.log([0.1, 0.4, 0.2, 0.25, 0.05])])
def test_levels_are_the_exact_posterior_of_their_prior(schedule, t, log_prior):
    """Logits that do not look at x_t are the log prior: the posterior, its mean and variance by Bayes' rule."""
    process = Process(schedule)
    x_t = noisy(process, t)
    network = Says(torch.from_numpy(log_prior).expand(2, 2, 5))
    said = Denoiser(network, process, "levels", levels=5)(x_t, t)
    alpha, sigma = (float(c) for c in schedule.scales(t))
    p, values = exact_levels(x_t.numpy(), alpha, sigma, log_prior)
    mean = (p * values).sum(-1)
    assert np.allclose(said.log_levels.exp().numpy(), p, rtol=1e-9, atol=1e-14)
    assert np.allclose(said.log_levels.exp().sum(-1).numpy(), 1, atol=1e-13)
    assert np.allclose(said.x0.numpy(), mean, atol=1e-12)
    assert np.allclose(said.x0_variance.numpy(), (p * values**2).sum(-1) - mean**2, atol=1e-12)


def test_levels_stay_finite_next_to_the_data_in_single_precision():
    """At sigma = 2e-6 the wrong levels are 1e11 nats away."""
    process = Process(ALL_SCHEDULES["ve"].__class__(sigma_min=1e-6))
    x = torch.tensor([[-1.0, 0.5]])
    said = Denoiser(Says(torch.zeros(1, 2, 5)), process, "levels", levels=5)(x, 0.01)
    assert bool(said.log_levels.exp().isfinite().all())
    assert torch.allclose(said.x0, x)


# -- the denoiser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", list(FORMS))
def test_a_denoiser_reads_its_network_as_it_was_told(form):
    process = Process(ALL_SCHEDULES["cosine"])
    network = Says(EPS)
    said = Denoiser(network, process, form)(X_0, 0.3, "a condition")
    assert said.form == form
    assert torch.equal(said.value, EPS)
    x, t, condition = network.seen
    assert torch.equal(x, X_0)
    assert t.tolist() == [0.3, 0.3]
    assert condition == "a condition"


def test_a_time_for_each_sample_is_that_time_alone(process, tilted):
    x, t = tilted.sample(3, torch.Generator().manual_seed(1)), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    together = tilted.denoiser(process)(x, t)
    for k in range(3):
        alone = tilted.denoiser(process)(x[k : k + 1], float(t[k]))
        for form in FORMS:
            assert torch.allclose(together.read(form)[k : k + 1], alone.read(form), rtol=1e-12)


def test_a_learned_variance_lies_between_the_two_on_a_log_scale():
    """-1 is beta-tilde (fraction 0), 1 is beta (fraction 1)."""
    network = Says(torch.cat([EPS, torch.tensor([[-1.0, 1.0], [0.0, 0.5]])], 1))
    said = Denoiser(network, Process(ALL_SCHEDULES["cosine"]), "eps", learned_variance=True)(X_0, 0.3)
    assert torch.equal(said.value, EPS)
    assert said.variance_fraction.tolist() == [[0.0, 1.0], [0.5, 0.75]]


@pytest.mark.parametrize("sigma", [0.002, 0.5, 3.0, 80.0])
def test_edm_under_ve_is_table_1_of_karras(sigma):
    """c_skip, c_out, c_in and c_noise as printed (arXiv 2206.00364, table 1), sigma_data = 0.5."""
    process = Process(ALL_SCHEDULES["ve"])
    t = math.log(sigma / 0.002) / math.log(80 / 0.002)
    if t == 0:
        t = 1e-300  # time 0 itself is the data
    skip, out, scale, label = (float(c) for c in EDM(0.5).coefficients(process, t))
    assert skip == pytest.approx(0.25 / (sigma**2 + 0.25), rel=1e-10)
    assert out == pytest.approx(sigma * 0.5 / math.sqrt(sigma**2 + 0.25), rel=1e-10)
    assert scale == pytest.approx(1 / math.sqrt(sigma**2 + 0.25), rel=1e-10)
    assert label == pytest.approx(0.25 * math.log(sigma), rel=1e-10)


@pytest.mark.parametrize("t", [1e-3, 0.3, 0.7, 1.0])
def test_edm_shows_and_asks_of_the_network_unit_variance(schedule, t):
    """Variances by hand: x0 of variance s^2, eps of 1, and F's target (x0 - skip x_t) / out."""
    alpha, sigma = (float(c) for c in schedule.scales(t))
    s = 0.7
    skip, out, scale, _ = (float(c) for c in EDM(s).coefficients(Process(schedule), t))
    assert scale**2 * (alpha**2 * s**2 + sigma**2) == pytest.approx(1)
    assert ((1 - skip * alpha) ** 2 * s**2 + skip**2 * sigma**2) / out**2 == pytest.approx(1)


def test_edm_scales_what_goes_in_and_what_comes_out():
    process, t = Process(ALL_SCHEDULES["ve"]), 0.6
    skip, out, scale, label = (float(c) for c in EDM(0.5).coefficients(process, t))
    network = Says(EPS)
    said = Denoiser(network, process, "x0", EDM(0.5))(X_0, t)
    assert torch.allclose(network.seen[0], scale * X_0)
    assert network.seen[1].tolist() == pytest.approx([label, label])
    assert torch.allclose(said.x0, skip * X_0 + out * EPS)


@pytest.mark.parametrize("schedule", named("rectified_flow", "linear_beta"))
def test_edm_of_the_best_linear_denoiser_of_white_data_is_a_network_of_zeros(schedule):
    """For x0 ~ N(0, s^2): E[x0|x_t] = alpha s^2 / (alpha^2 s^2 + sigma^2) x_t, and F is 0."""
    alpha, sigma = (float(c) for c in schedule.scales(0.4))
    said = Denoiser(Says(torch.zeros_like), Process(schedule), "x0", EDM(0.7))(X_0, 0.4)
    assert torch.allclose(said.x0, alpha * 0.49 / (alpha**2 * 0.49 + sigma**2) * X_0)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"predicts": "noise"},
            "predicts must be one of x0, eps, score, v, flow, velocity, levels or energy, got 'noise'",
        ),
        ({"predicts": "eps", "preconditioning": EDM()}, 'use predicts="x0"'),
        ({"predicts": "levels"}, "pass levels="),
        ({"predicts": "levels", "levels": 1}, "at least 2 levels, got 1"),
        ({"predicts": "levels", "levels": 4, "learned_variance": True}, "drop learned_variance"),
    ],
)
def test_an_impossible_denoiser_says_why(options, words):
    with pytest.raises(ValueError, match=words):
        Denoiser(nn.Identity(), Process(ALL_SCHEDULES["cosine"]), **options)


@pytest.mark.parametrize("sigma_data", [0.0, -1.0, float("nan")])
def test_edm_needs_data_that_varies(sigma_data):
    with pytest.raises(ValueError, match=r"sigma_data .* must be positive"):
        EDM(sigma_data)


@pytest.mark.parametrize(
    ("options", "answer", "wanted"),
    [
        ({}, torch.zeros(2, 3), r"\(2, 2\), it returned \(2, 3\)"),
        ({"learned_variance": True}, torch.zeros(2, 2), r"\(2, 4\), it returned \(2, 2\)"),
        ({"predicts": "levels", "levels": 5}, torch.zeros(2, 2), r"\(2, 2, 5\), it returned \(2, 2\)"),
        ({"predicts": "levels", "levels": 5}, torch.zeros(2, 10), r"\(2, 2, 5\), it returned \(2, 10\)"),
    ],
)
def test_a_network_of_another_shape_is_caught(options, answer, wanted):
    with pytest.raises(ValueError, match=r"should have returned shape " + wanted):
        Denoiser(Says(answer), Process(ALL_SCHEDULES["cosine"]), **options)(X_0, 0.5)


@pytest.mark.parametrize("shape", [(3,), (2, 1), (2, 2)])
def test_a_time_of_another_shape_is_caught(shape):
    with pytest.raises(ValueError, match=r"a time must have shape \(\) or \(2,\)"):
        Denoiser(nn.Identity(), Process(ALL_SCHEDULES["cosine"]))(X_0, torch.full(shape, 0.5))


def test_continuous_data_has_no_levels():
    with pytest.raises(ValueError, match="pass levels= for discrete data"):
        _ = Denoiser(nn.Identity(), Process(ALL_SCHEDULES["cosine"])).level_values
