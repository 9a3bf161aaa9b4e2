"""Guidance, transforms of x0-hat and inpainting (theory row 18) against densities by torch.distributions."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal

import kuosan as ks
from conftest import ALL_SCHEDULES, named
from kuosan import ClassifierFree, Denoiser, Mixture, Prediction, Process
from kuosan.solvers import DDIM, SOLVERS, Ancestral, run
from kuosan.solvers.guidance import Autoguidance, ClassifierGuidance
from kuosan.solvers.inpainting import Inpainting
from kuosan.solvers.transforms import Clip, DynamicThreshold

DDPM = Process(ALL_SCHEDULES["ddpm_table"])
LINEAR = Process(ALL_SCHEDULES["linear_beta"])
COSINE = Process(ALL_SCHEDULES["cosine"])


def no_noise():
    raise AssertionError("noise was drawn")


def normals(n, d, dice):
    return lambda: torch.randn(n, d, dtype=torch.float64, generator=dice)


def log_components(mixture, process, t, x):
    """log of weight times density of each component of x_t, (B, K): the truth, by torch.distributions."""
    alpha, sigma = (float(c) for c in process.scales(t))
    eye = torch.eye(mixture.dimension, dtype=torch.float64)
    parts = [
        w.log() + MultivariateNormal(alpha * m, alpha**2 * c + sigma**2 * eye).log_prob(x)
        for w, m, c in zip(mixture.weights, mixture.means, mixture.covariances, strict=True)
    ]
    return torch.stack(parts, 1)


def gradient(function, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


class Counts:
    """A model that counts how many examples it is asked about at each call."""

    def __init__(self, model):
        self.model, self.process, self.asked = model, model.process, []

    def __call__(self, x_t, t, condition=None):
        self.asked.append(len(x_t))
        return self.model(x_t, t, condition)


class Says:
    """Always the same x0."""

    def __init__(self, process, x_0):
        self.process, self.x_0 = process, x_0

    def __call__(self, x_t, t, condition=None):
        return Prediction(self.process, t, x_t, "x0", self.x_0)


# -- guidance ---------------------------------------------------------------------------------------------------------


class Labelled(nn.Module):
    """The exact conditional denoiser of a mixture whose component is its class; -1 is any."""

    def __init__(self, mixture, process):
        super().__init__()
        self.mixture, self.process = mixture, process
        self.parts = [Mixture([1.0], m[None], c[None]) for m, c in zip(mixture.means, mixture.covariances, strict=True)]

    def forward(self, x, t, condition=None):
        out = self.mixture.posterior_mean(x, self.process, t)
        for k, part in enumerate(self.parts):
            mine = condition == k
            out = torch.where(mine[:, None], part.posterior_mean(x, self.process, t), out)
        return out


X_T = torch.tensor([[0.3, -0.2, 0.4], [1.0, 0.5, -0.7], [0.0, 0.1, 0.2]], dtype=torch.float64)


def test_without_guidance_samples_are_of_the_exact_conditional(tilted, dice):
    """w = 0: component 1 of the mixture, its mean and covariance; 5 standard errors of 2,000 samples, 250 steps."""
    n = 2000
    model = ClassifierFree(Denoiser(Labelled(tilted, DDPM), DDPM, "x0"), weight=0.0)
    x = run(
        Ancestral("beta").table(DDPM, steps=250),
        model,
        torch.randn(n, 3, dtype=torch.float64, generator=dice),
        lambda: torch.randn(n, 3, dtype=torch.float64, generator=dice),
        torch.ones(n, dtype=torch.long),
    )
    mean, covariance = tilted.means[1], tilted.covariances[1]
    assert bool(((x.mean(0) - mean).abs() < 5 * x.std(0) / math.sqrt(n)).all())
    outer = (x - mean).unsqueeze(-1) * (x - mean).unsqueeze(-2)
    # 250 steps with the larger variance leave up to 2 % too much of it
    assert bool(
        ((outer.mean(0) - covariance).abs() < 5 * outer.std(0) / math.sqrt(n) + 0.02 * covariance.diag().max()).all()
    )


@pytest.mark.parametrize("weight", [-1.0, -0.5, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("schedule", named("linear_beta", "ve", "rectified_flow"))
def test_guidance_is_the_printed_formula(weight, schedule, tilted):
    """(1 + w) times the conditional minus w times the unconditional: in x0, and so in eps and in the score."""
    process = Process(schedule)
    network = Labelled(tilted, process)
    condition = torch.tensor([0, 1, 1])
    said = ClassifierFree(Denoiser(network, process, "x0"), weight)(X_T, 0.3, condition)
    parts = [network.parts[c] for c in condition.tolist()]
    conditional = torch.stack([p.score(x, process, 0.3) for p, x in zip(parts, X_T, strict=True)])
    score = (1 + weight) * conditional - weight * tilted.score(X_T, process, 0.3)
    assert torch.allclose(said.score, score, rtol=1e-8, atol=1e-8)
    mean = torch.stack([p.posterior_mean(x, process, 0.3) for p, x in zip(parts, X_T, strict=True)])
    x_0 = (1 + weight) * mean - weight * tilted.posterior_mean(X_T, process, 0.3)
    assert torch.allclose(said.x0, x_0, rtol=1e-10)


def test_guidance_takes_a_time_for_each_sample(tilted):
    model = ClassifierFree(Denoiser(Labelled(tilted, LINEAR), LINEAR, "x0"), 2.0)
    condition, t = torch.tensor([0, 1, 1]), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    together = model(X_T, t, condition).x0
    for k in range(3):
        assert torch.allclose(together[k], model(X_T[k : k + 1], float(t[k]), condition[k : k + 1]).x0[0])


def test_any_solver_accepts_a_guided_model(tilted):
    model = ClassifierFree(Denoiser(Labelled(tilted, DDPM), DDPM, "x0"), 2.0)
    assert model.process is DDPM
    for solver in (DDIM(), Ancestral()):
        x = ks.sample(model, (3,), seeds=range(4), solver=solver, steps=5, condition=torch.tensor([0, 1, 0, 1]))
        assert x.shape == (4, 3)
        assert bool(x.isfinite().all())


@pytest.mark.parametrize("weight", [-1.5, float("inf"), float("nan")])
def test_a_guidance_weight_is_a_number_from_minus_one(weight, ring):
    with pytest.raises(ValueError, match="at least -1"):
        ClassifierFree(ring.denoiser(DDPM), weight)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_guidance_needs_a_condition(weight, ring):
    with pytest.raises(ValueError, match="needs a condition"):
        ks.sample(ClassifierFree(ring.denoiser(DDPM), weight), (2,), seeds=[0], steps=2)


@pytest.mark.parametrize("weight", [-0.5, 0.0, 1.5])
@pytest.mark.parametrize("schedule", named("linear_beta", "ve", "rectified_flow"))
def test_the_guided_score_is_that_of_the_density_times_the_class_to_the_power(weight, schedule, tilted):
    """log q(x) + (1 + w) log q(c | x), differentiated by autograd of torch.distributions (Ho and Salimans, sec. 3)."""
    process, condition, rows = Process(schedule), torch.tensor([0, 1, 1]), torch.arange(3)

    def log_density(x):
        joint = log_components(tilted, process, 0.3, x)
        log_all = torch.logsumexp(joint, 1)
        return log_all + (1 + weight) * (joint[rows, condition] - log_all)

    said = ClassifierFree(Denoiser(Labelled(tilted, process), process, "x0"), weight)(X_T, 0.3, condition)
    assert torch.allclose(said.score, gradient(log_density, X_T), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("form", ["x0", "eps", "v", "score"])
def test_guidance_is_the_same_in_every_form(form, tilted):
    """The coefficients sum to one; the prediction stays in the network's own form."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Labelled(tilted, LINEAR)

        def forward(self, x, t, condition=None):
            return Prediction(LINEAR, t, x, "x0", self.inner(x, t, condition)).read(form)

    condition = torch.tensor([0, 1, 1])
    said = ClassifierFree(Denoiser(Reads(), LINEAR, form), 2.0)(X_T, 0.4, condition)
    assert said.form == form
    truth = ClassifierFree(Denoiser(Labelled(tilted, LINEAR), LINEAR, "x0"), 2.0)(X_T, 0.4, condition)
    assert torch.allclose(said.x0, truth.x0, rtol=1e-9)


# -- the interval, in sigma / alpha -----------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", named("linear_beta", "ve", "rectified_flow"))
def test_outside_its_interval_guidance_is_the_model_alone_and_costs_no_more(schedule, tilted):
    """Doubled batches exactly where .3 < sigma / alpha <= 2; elsewhere single ones, and the conditional answer."""
    process = Process(schedule)
    plain = Denoiser(Labelled(tilted, process), process, "x0")
    counting = Counts(plain)
    limited, always = ClassifierFree(counting, 3.0, interval=(0.3, 2.0)), ClassifierFree(plain, 3.0)
    condition = torch.tensor([0, 1, 1])
    times, inside = [0.02, 0.1, 0.2, 0.3, 0.45, 0.6, 0.9], []
    for t in times:
        alpha, sigma = (float(c) for c in process.scales(t))
        inside.append(0.3 < sigma / alpha <= 2.0)
        truth = (always if inside[-1] else plain)(X_T, t, condition)
        assert torch.equal(limited(X_T, t, condition).x0, truth.x0)
    assert counting.asked == [6 if there else 3 for there in inside]
    assert any(inside)
    assert not all(inside)


def test_an_interval_holds_for_each_sample_s_own_time(tilted):
    model = ClassifierFree(Denoiser(Labelled(tilted, LINEAR), LINEAR, "x0"), 3.0, interval=(0.3, 2.0))
    condition, t = torch.tensor([0, 1, 1]), torch.tensor([0.02, 0.3, 0.95], dtype=torch.float64)
    together = model(X_T, t, condition).x0
    for k in range(3):
        assert torch.allclose(together[k], model(X_T[k : k + 1], float(t[k]), condition[k : k + 1]).x0[0])
    assert not torch.allclose(together[1], model.denoiser(X_T[1:2], 0.3, condition[1:2]).x0[0])


# -- rescaling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("phi", "factors"), [(0.0, (1.0, 1.0)), (1.0, (0.5, 0.25)), (0.6, (0.7, 0.55))])
def test_rescaling_brings_the_spread_of_each_sample_back(phi, factors):
    """By hand: 2 a - b is 2 a in the first sample, whose b is 0, and 4 a in the second, whose b is -2 a."""
    a = torch.tensor([[[1.0, -1.0], [3.0, 0.0]], [[0.5, 0.0], [0.0, 2.0]]], dtype=torch.float64)
    b = a * torch.tensor([0.0, -2.0], dtype=torch.float64)[:, None, None]
    x_t, condition = torch.zeros_like(a), torch.tensor([1, 1])

    model = ClassifierFree(Says(LINEAR, torch.cat([a, b])), 1.0, rescale=phi)
    guided = torch.stack([2 * a[0], 4 * a[1]])
    truth = guided * torch.tensor(factors, dtype=torch.float64)[:, None, None]
    assert torch.allclose(model(x_t, 0.5, condition).x0, truth)


def test_rescaling_leaves_a_constant_as_it_is():
    same = torch.ones(1, 4, dtype=torch.float64)
    model = Autoguidance(Says(LINEAR, same), Says(LINEAR, 0 * same), 1.0, rescale=1.0)
    assert torch.equal(model(same, 0.5).x0, 2 * same)


# -- autoguidance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.7, 2.0])
def test_autoguidance_is_the_strong_density_over_the_weak_one_to_the_power(weight, tilted):
    """(1 + w) log p - w log p_weak by autograd; the weak model is a broader mixture."""
    weak = Mixture([0.5, 0.5], tilted.means * 0.8, tilted.covariances * 2.0)

    def log_density(x):
        good, bad = (torch.logsumexp(log_components(m, LINEAR, 0.3, x), 1) for m in (tilted, weak))
        return (1 + weight) * good - weight * bad

    model = Autoguidance(tilted.denoiser(LINEAR), weak.denoiser(LINEAR), weight)
    assert torch.allclose(model(X_T, 0.3).score, gradient(log_density, X_T), rtol=1e-8, atol=1e-8)


def test_autoguidance_outside_its_interval_does_not_ask_the_weak_model(ring):
    strong, weak = Counts(ring.denoiser(LINEAR)), Counts(ring.denoiser(LINEAR))
    model = Autoguidance(strong, weak, 1.0, interval=(0.2, 1.0))
    ks.sample(model, (2,), seeds=range(3), solver=DDIM(), steps=20)
    inside = [0.2 < math.exp(-0.5 * float(LINEAR.log_snr(t))) <= 1.0 for t in LINEAR.sampling_grid(20).times]
    assert len(strong.asked) == 20
    assert len(weak.asked) == sum(inside) > 0


# -- classifier guidance ----------------------------------------------------------------------------------------------


def exact_classifier(mixture, process):
    def log_prob(x, t, condition):
        joint = log_components(mixture, process, t, x)
        return torch.log_softmax(joint, 1)[torch.arange(len(x)), condition]

    return log_prob


@pytest.mark.parametrize("weight", [-1.0, 0.0, 1.0, 3.0])
@pytest.mark.parametrize("schedule", named("linear_beta", "ve", "rectified_flow"))
def test_an_exact_classifier_guides_like_the_exact_conditional(weight, schedule, tilted):
    """Bayes: weight w over the unconditional model is classifier-free weight w - 1, by another road."""
    process, condition = Process(schedule), torch.tensor([0, 1, 1])
    by_classifier = ClassifierGuidance(tilted.denoiser(process), exact_classifier(tilted, process), weight)
    free = ClassifierFree(Denoiser(Labelled(tilted, process), process, "x0"), max(weight - 1, -1))
    with torch.no_grad():
        said = by_classifier(X_T, 0.3, condition)
    if weight >= 0:
        assert torch.allclose(said.score, free(X_T, 0.3, condition).score, rtol=1e-7, atol=1e-7)
    else:
        away = tilted.score(X_T, process, 0.3) - gradient(lambda x: by_classifier.log_prob(x, 0.3, condition), X_T)
        assert torch.allclose(said.score, away, rtol=1e-7, atol=1e-7)


def test_samples_guided_by_a_classifier_are_of_the_conditional(tilted, dice):
    """w = 1 over the unconditional model: component 1's mean, 5 standard errors, sampling under no_grad."""
    n = 1000
    model = ClassifierGuidance(tilted.denoiser(DDPM), exact_classifier(tilted, DDPM))
    draw = normals(n, 3, dice)
    x = run(Ancestral("beta").table(DDPM, steps=100), model, draw(), draw, torch.ones(n, dtype=torch.long))
    assert bool(((x.mean(0) - tilted.means[1]).abs() < 5 * x.std(0) / math.sqrt(n)).all())


def test_a_classifier_may_guide_a_conditional_denoiser_in_an_interval(tilted):
    """Told the class twice: the conditional times the classifier; outside the interval, the denoiser alone."""
    denoiser, condition = Denoiser(Labelled(tilted, LINEAR), LINEAR, "x0"), torch.tensor([0, 1, 1])
    log_prob = exact_classifier(tilted, LINEAR)
    model = ClassifierGuidance(denoiser, log_prob, 0.5, interval=(0.2, 2.0), conditional=True)
    truth = denoiser(X_T, 0.3, condition).score + 0.5 * gradient(lambda x: log_prob(x, 0.3, condition), X_T)
    assert torch.allclose(model(X_T, 0.3, condition).score, truth, rtol=1e-8)
    assert torch.equal(model(X_T, 0.9, condition).x0, denoiser(X_T, 0.9, condition).x0)


# -- energies of guided models ----------------------------------------------------------------------------------------


class LabelledEnergy(Labelled):
    def forward(self, x, t, condition=None):
        energy = -self.mixture.log_prob(x, self.process, t)
        for k, part in enumerate(self.parts):
            energy = torch.where(condition == k, -part.log_prob(x, self.process, t), energy)
        return energy


def test_the_score_of_a_guided_model_is_the_slope_of_its_energy(tilted):
    """For each kind of guidance, inside and outside its interval."""
    condition = torch.tensor([0, 1, 1])
    labelled = Denoiser(LabelledEnergy(tilted, LINEAR), LINEAR, "energy")
    plain, log_prob = tilted.energy_denoiser(LINEAR), exact_classifier(tilted, LINEAR)
    weak = Mixture([0.5, 0.5], tilted.means * 0.8, tilted.covariances * 2.0).energy_denoiser(LINEAR)
    for model in (
        ClassifierFree(labelled, 1.5, interval=(0.2, 2.0)),
        Autoguidance(plain, weak, 1.5, interval=(0.2, 2.0)),
        ClassifierGuidance(plain, log_prob, 1.5, interval=(0.2, 2.0)),
    ):
        for t in (0.02, 0.3):
            slope = gradient(lambda x, model=model, t=t: model.energy(x, t, condition), X_T)
            assert torch.allclose(model(X_T, t, condition).score, -slope, rtol=1e-8, atol=1e-8)


def test_rescaled_guidance_has_no_energy(ring):
    model = Autoguidance(ring.energy_denoiser(LINEAR), ring.energy_denoiser(LINEAR), 1.0, rescale=0.5)
    with pytest.raises(ValueError, match="rescaled guidance has no energy"):
        model.energy(X_T[:, :2], 0.3)


# -- transforms -------------------------------------------------------------------------------------------------------


def test_clipping_is_to_the_range_of_the_data():
    assert Clip()(torch.tensor([-3.0, -1.0, 0.2, 1.5])).tolist() == pytest.approx([-1.0, -1.0, 0.2, 1.0])
    assert Clip(0, 2)(torch.tensor([-3.0, 0.2, 5.0])).tolist() == pytest.approx([0.0, 0.2, 2.0])


def test_dynamic_thresholding_by_hand():
    """|x| = 0, 1, 2, 3, 10: the 0.75 quantile is 3, the 0.5 one 2, 0.875 half way from 3 to 10; each sample's own."""
    x = torch.tensor([[[0.0, -1.0, 2.0, -3.0, 10.0]], [[0.0, 0.1, -0.2, 0.3, 0.4]]], dtype=torch.float64)
    for quantile, s in ((0.75, 3.0), (0.5, 2.0), (0.875, 6.5), (1.0, 10.0)):
        out = DynamicThreshold(quantile)(x)
        assert out[0, 0].tolist() == pytest.approx([max(-s, min(s, v)) / s for v in (0, -1, 2, -3, 10)])
        assert torch.equal(out[1], x[1])  # nothing above the bound: nothing done
    assert DynamicThreshold(0.75, bound=2.0)(x)[0, 0].tolist() == pytest.approx([0, -2 / 3, 4 / 3, -2, 2])


def test_the_threshold_of_a_sample_is_torch_s_quantile(dice):
    x = 3 * torch.randn(4, 3, 7, 5, dtype=torch.float64, generator=dice)
    s = torch.quantile(x.abs().flatten(1), 0.9, dim=1)[:, None, None, None]
    assert torch.allclose(DynamicThreshold(0.9)(x), x.clamp(-s, s) / s)


def test_transforms_are_applied_while_sampling(ring):
    """The last step of DDIM is x0-hat itself; a rule of higher order may end a little outside."""
    settings = {"seeds": range(8), "steps": 5, "transform": DynamicThreshold(0.5, bound=0.2)}
    x = ks.sample(ring.denoiser(LINEAR), (2,), solver=DDIM(), **settings)
    assert float(x.abs().max()) <= 0.2 + 1e-7
    assert float(ks.sample(ring.denoiser(LINEAR), (2,), **settings).abs().max()) < 0.25


# -- inpainting -------------------------------------------------------------------------------------------------------

KNOWN, MASK = torch.tensor([0.5, 9.0, -0.3], dtype=torch.float64), torch.tensor([True, False, True])


@pytest.mark.parametrize("kind", list(SOLVERS))
@pytest.mark.parametrize("corrections", [0, 2])
def test_the_known_values_come_out_exactly(kind, corrections, tilted):
    """By every solver there is: to the bit where the last row is x0-hat alone, else to rounding, in float32."""
    solver = SOLVERS[kind]()
    exact = kind in ("ddim", "ancestral", "euler", "dpm_solver++", "unipc")
    for steps in (solver.order, 6):
        model = Inpainting(tilted.denoiser(LINEAR), KNOWN.float(), MASK, corrections)
        x = ks.sample(model, (3,), seeds=range(6), solver=solver, steps=steps)
        assert float((x - KNOWN.float())[:, MASK].abs().max()) <= (0 if exact else 1e-6)
        assert bool(x[:, 1].isfinite().all())
    assert len(set(x[:, 1].tolist())) == 6


def test_by_replacement_the_unknown_are_what_the_model_says(tilted):
    """x0-hat = (known, the model's own), whatever the form in which it came."""
    for denoiser in (tilted.denoiser(LINEAR), tilted.energy_denoiser(LINEAR)):
        x_0 = Inpainting(denoiser, KNOWN, MASK)(X_T, 0.3).x0
        assert torch.equal(x_0[:, MASK], KNOWN[MASK].expand(3, 2))
        assert torch.equal(x_0[:, ~MASK], denoiser(X_T, 0.3).x0[:, ~MASK])


def test_known_coordinates_are_carried_along_with_their_own_noise(process, tilted, dice):
    """alpha_t x0 + sigma_t eps with one eps for each sample, under an ODE solver, at every time."""
    x_0, eps = KNOWN, torch.randn(4, 3, dtype=torch.float64, generator=dice)
    table, seen = DDIM().table(process, steps=8), []
    alpha, sigma = process.scales(table.times[0])
    model = Inpainting(tilted.denoiser(process), x_0, MASK)
    run(table, model, alpha * x_0 + sigma * eps, no_noise, watch=lambda i, x, p: seen.append(x.clone()))
    for t, x in zip(table.times, seen, strict=True):
        alpha, sigma = process.scales(t)
        assert torch.allclose(x[:, MASK], (alpha * x_0 + sigma * eps)[:, MASK], rtol=1e-9, atol=1e-11)


def test_under_ancestral_sampling_they_follow_the_forward_process(dice):
    """Mean alpha_t x0, variance sigma_t^2 at every level, 5 standard errors."""
    n, seen = 4000, []
    model = Inpainting(Says(COSINE, torch.zeros(n, 1).double()), torch.tensor([0.7]).double(), torch.tensor([True]))
    draw, table = normals(n, 1, dice), Ancestral().table(COSINE, steps=10)
    run(table, model, draw(), draw, watch=lambda i, x, p: seen.append(x.clone()))
    for t, x in zip(table.times, seen, strict=True):
        alpha, sigma = (float(c) for c in COSINE.scales(t))
        assert abs(float(x.mean()) - 0.7 * alpha) < 5 * sigma / math.sqrt(n)
        assert abs(float(x.var()) / sigma**2 - 1) < 5 * math.sqrt(2 / n)


def conditional_of_a_gaussian(mean, covariance, known, mask):
    """Mean and covariance of the unknown coordinates given the known ones: the textbook formula."""
    u, k = ~mask, mask
    gain = covariance[u][:, k] @ torch.linalg.inv(covariance[k][:, k])
    return mean[u] + gain @ (known[k] - mean[k]), covariance[u][:, u] - gain @ covariance[k][:, u]


@pytest.mark.parametrize("mask", [(True, False, True), (False, True, False), (False, False, True)])
def test_corrected_inpainting_of_a_gaussian_is_its_conditional_denoiser(mask, tilted, dice):
    """E[x0 | x_t, known] = E[x0_u | x_t,u] under the conditional Gaussian: closed form, whatever x_t,k is."""
    mask = torch.tensor(mask)
    mean, covariance = tilted.means[0], tilted.covariances[0]
    gaussian = Mixture([1.0], mean[None], covariance[None])
    m, v = conditional_of_a_gaussian(mean, covariance, KNOWN, mask)
    x_t = torch.randn(5, 3, dtype=torch.float64, generator=dice)
    model = Inpainting(gaussian.denoiser(LINEAR), KNOWN, mask, corrections=int(mask.sum()))
    for t in (0.05, 0.3, 0.8):
        alpha, sigma = (float(c) for c in LINEAR.scales(t))
        gain = alpha * v @ torch.linalg.inv(alpha**2 * v + sigma**2 * torch.eye(len(m)).double())
        truth = m + (x_t[:, ~mask] - alpha * m) @ gain.mT
        said = model(x_t, t)
        assert torch.allclose(said.x0[:, ~mask], truth, rtol=1e-8, atol=1e-9)
        assert torch.equal(said.x0[:, mask], KNOWN[mask].expand(5, -1))
        assert not said.x0.requires_grad


def test_inpainting_of_a_correlated_gaussian_replacement_is_biased_and_correction_is_not(dice):
    """x_1 = 1.5 known, correlation 0.9: the other has mean .88, sd .436. The bias is the docstring's."""
    gaussian = Mixture([1.0], [[0.3, -0.2]], [[[1.0, 0.9], [0.9, 1.0]]])
    known, mask, n = torch.tensor([1.5, 0.0]).double(), torch.tensor([True, False]), 2000
    mean, sd = -0.2 + 0.9 * 1.2, math.sqrt(1 - 0.9**2)
    draw, table = normals(n, 2, dice), Ancestral("beta").table(COSINE, steps=250)
    x, biased = (
        run(table, Inpainting(gaussian.denoiser(COSINE), known, mask, corrections), draw(), draw)[:, 1]
        for corrections in (1, 0)
    )
    assert abs(float(x.mean()) - mean) < 5 * sd / math.sqrt(n)
    assert abs(float(x.std()) - sd) < 5 * sd / math.sqrt(2 * n) + 0.01 * sd  # and what 250 steps leave
    assert float(biased.mean()) == pytest.approx(0.55, abs=0.05)


def test_inpainting_of_a_ring_comes_as_near_as_the_docstring_says(ring):
    """x known as 1: the conditional is two modes at +-1 and outliers; W1 against exact draws, in its own deviations."""
    n, known, mask = 3000, torch.tensor([1.0, 0.0]).double(), torch.tensor([True, False])
    log_weight = torch.stack([-0.5 * ((1.0 - m[0]) / 0.15) ** 2 for m in ring.means])
    dice = torch.Generator().manual_seed(5)
    which = torch.multinomial(torch.softmax(log_weight, 0), n, replacement=True, generator=dice)
    exact = ring.means[which, 1] + 0.15 * torch.randn(n, dtype=torch.float64, generator=dice)
    start = torch.randn(n, 2, dtype=torch.float64, generator=dice)
    table, off = DDIM().table(COSINE, steps=100), []
    for corrections in (0, 1):
        x = run(table, Inpainting(ring.denoiser(COSINE), known, mask, corrections), start, no_noise)[:, 1]
        off.append(float((x.sort().values - exact.sort().values).abs().mean() / exact.std()))
    assert off == pytest.approx([0.18, 0.07], abs=0.04)


def test_an_inpainted_sample_depends_on_its_own_seed_alone(tilted):
    def draw(seeds, **options):
        model = Inpainting(tilted.denoiser(LINEAR), KNOWN, MASK, corrections=2)
        return ks.sample(model, (3,), seeds=seeds, solver=Ancestral(), steps=6, dtype=torch.float64, **options)

    together = draw([3, 1, 4, 15])
    assert torch.allclose(together, draw([3, 1, 4, 15], batch_size=2), rtol=1e-9)
    assert torch.allclose(together[2:3], draw([4]), rtol=1e-9)


def test_each_sample_may_have_its_own_known_values(tilted):
    known = torch.stack([KNOWN, -KNOWN])
    mask = torch.stack([MASK, ~MASK])
    x = ks.sample(Inpainting(tilted.denoiser(LINEAR), known, mask), (3,), seeds=[0, 1], steps=5, dtype=torch.float64)
    assert torch.allclose(x[mask], known[mask], rtol=1e-12)


def test_a_guided_model_can_be_inpainted(tilted):
    guided = ClassifierFree(Denoiser(Labelled(tilted, LINEAR), LINEAR, "x0"), 2.0)
    model = Inpainting(guided, KNOWN, MASK, corrections=1)
    x = ks.sample(model, (3,), seeds=range(4), steps=5, condition=torch.tensor([0, 1, 0, 1]), dtype=torch.float64)
    assert torch.allclose(x[:, MASK], KNOWN[MASK].expand(4, 2), rtol=1e-12)


def test_an_energy_can_be_inpainted_with_corrections(tilted):
    """Second derivatives of the energy: the same as with the denoiser of the same mixture."""
    x_t = X_T + 0.1
    one, other = (
        Inpainting(d, KNOWN, MASK, 2)(x_t, 0.3).x0 for d in (tilted.denoiser(LINEAR), tilted.energy_denoiser(LINEAR))
    )
    assert torch.allclose(one, other, rtol=1e-7)


def test_what_is_not_known_may_be_anything(tilted):
    hollow = torch.where(MASK, KNOWN, torch.nan)
    x = ks.sample(Inpainting(tilted.denoiser(LINEAR), hollow, MASK, 1), (3,), seeds=[0], steps=4, dtype=torch.float64)
    assert bool(x.isfinite().all())


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: ClassifierFree(d, interval=(2.0, 0.3)), r"0 <= lower < upper.*got \(2.0, 0.3\)"),
        (lambda d: ClassifierFree(d, interval=(-1.0, 0.3)), "0 <= lower < upper"),
        (lambda d: ClassifierFree(d, interval=(0.5, 0.5)), "0 <= lower < upper"),
        (lambda d: ClassifierFree(d, interval=(float("nan"), 1.0)), "0 <= lower < upper"),
        (lambda d: ClassifierFree(d, rescale=1.5), "rescale is a share from 0"),
        (lambda d: ClassifierFree(d, rescale=float("nan")), "rescale is a share from 0"),
        (lambda d: Autoguidance(d, d, weight=-2.0), "at least -1"),
        (lambda d: Autoguidance(d, Says(COSINE, None)), "both models must be of one process"),
        (lambda d: ClassifierGuidance(d, len, weight=float("inf")), "a finite number"),
        (lambda d: ClassifierGuidance(d, len, weight=float("nan")), "a finite number"),
        (lambda d: ClassifierGuidance(d, len, interval=(3.0, 1.0)), "0 <= lower < upper"),
        (
            lambda d: ClassifierGuidance(d, lambda x, t, c: x)(X_T, 0.3),
            r"one number for each of 3 .* got shape \(3, 3\)",
        ),
        (lambda d: ClassifierGuidance(d, lambda x, t, c: torch.zeros(3))(X_T, 0.3), "do not depend on x"),
        (lambda d: Autoguidance(d, d).energy(X_T, 0.3), 'only a denoiser with predicts="energy"'),
        (lambda d: Autoguidance(Says(LINEAR, 1), Says(LINEAR, 1)).energy(X_T, 0.3), "Says has no energy"),
        (lambda d: ClassifierFree(d, rescale=0.5)(X_T[:, :1], 0.3, torch.zeros(3)), "one number has no standard"),
        (lambda d: Clip(1.0, -1.0), "low < high, got 1.0 and -1.0"),
        (lambda d: DynamicThreshold(1.5), r"quantile must lie in \[0, 1\], got 1.5"),
        (lambda d: DynamicThreshold(bound=0.0), "bound must be positive"),
        (lambda d: Inpainting(d, KNOWN, MASK[:2]), r"one shape, got \(2,\) and \(3,\)"),
        (lambda d: Inpainting(d, KNOWN, MASK.double()), "a mask is bool.*float64"),
        (lambda d: Inpainting(d, KNOWN * torch.nan, MASK), "a known value is not finite"),
        (lambda d: Inpainting(d, KNOWN, MASK, corrections=-1), "corrections must be at least 0"),
        (lambda d: Inpainting(d, KNOWN[:2], MASK[:2])(X_T, 0.3), r"known has shape \(2,\), samples have \(3,\)"),
        (lambda d: Inpainting(d, X_T[:2], X_T[:2] > 0)(X_T, 0.3), r"there are 3 in this batch"),
        (lambda d: Inpainting(Says(LINEAR, X_T), KNOWN, MASK, 1)(X_T, 0.3), "a model that can be differentiated"),
    ],
)
def test_what_cannot_be_guided_or_inpainted_says_why(make, words, tilted):
    with pytest.raises(ValueError, match=words):
        make(Says(LINEAR, X_T[:, :1]) if "standard" in words else tilted.denoiser(LINEAR))


def test_an_unconditional_network_cannot_be_guided():
    """It is told a class, and has none."""
    network = ks.networks.MLP((2,), width=8, depth=1)
    with pytest.raises(ValueError, match="this network is unconditional"):
        ks.sample(ClassifierFree(Denoiser(network, LINEAR)), (2,), seeds=[0], steps=2, condition=torch.zeros(1).long())
