"""Energies and products of models (theory row 25) against exact mixtures."""

import math

import pytest
import torch
from torch import nn

import kuosan as ks
from conftest import ALL_SCHEDULES, elbo
from kuosan import EDM, Denoiser, Mixture, Prediction, Process
from kuosan.cli import main
from kuosan.networks import MLP, Energy
from kuosan.solvers import DDIM, Ancestral, run
from kuosan.solvers.correctors import MALA, Langevin, annealed
from kuosan.solvers.energies import Product

COSINE = Process(ALL_SCHEDULES["cosine"])
X_T = torch.tensor([[0.3, -0.2, 0.4], [1.0, 0.5, -0.7], [0.0, 0.1, 0.2]], dtype=torch.float64)


def normals(shape, dice):
    return lambda: torch.randn(shape, dtype=torch.float64, generator=dice)


# -- the denoiser -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.05, 0.4, 0.8, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)], ids=str)
def test_the_exact_energy_is_the_exact_denoiser(process, t, tilted):
    """E = -log q_t; its score, x0, eps and v are those of the closed forms, with gradients off as when sampling."""
    denoiser, known = tilted.energy_denoiser(process), tilted.denoiser(process)
    assert torch.allclose(denoiser.energy(X_T, t), -tilted.log_prob(X_T, process, t), rtol=1e-12)
    with torch.no_grad():
        said = denoiser(X_T, t)
    assert said.form == "score"
    assert not said.value.requires_grad
    for form in ("score", "x0", "eps", "v"):
        truth = known(X_T, t).read(form)
        assert torch.allclose(said.read(form), truth, rtol=1e-7, atol=1e-7 * float(truth.abs().max()))


class Quadratic(nn.Module):
    """G(u, label) = sum of a u^2 / 2 + c u label: its slope is a u + c label."""

    def forward(self, u, label, condition=None):
        return (0.5 * torch.tensor([1.0, -0.5, 2.0]).to(u) * u**2 + 0.3 * u * label[:, None]).sum(1)


class Slope(nn.Module):
    def forward(self, u, label, condition=None):
        return -(torch.tensor([1.0, -0.5, 2.0]).to(u) * u + 0.3 * label[:, None])


@pytest.mark.parametrize("t", [0.1, 0.7, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)], ids=str)
def test_a_preconditioned_energy_is_edm_s_denoiser_with_minus_its_slope(process, t):
    """The same x0 as EDM's formula with F = -grad G, for every schedule."""
    edm = EDM(0.6)
    energy, direct = Denoiser(Quadratic(), process, "energy", edm), Denoiser(Slope(), process, "x0", edm)
    assert torch.allclose(energy(X_T, t).x0, direct(X_T, t).x0, rtol=1e-6, atol=1e-7)


def test_a_preconditioned_network_that_says_0_knows_the_gaussian(process):
    """E = |x|^2 / 2 (sigma^2 + alpha^2 sigma_d^2): data N(0, sigma_d^2), up to the constant."""

    class Nothing(nn.Module):
        def forward(self, u, label, condition=None):
            return 0 * u.sum(1)

    gaussian = Mixture([1.0], torch.zeros(1, 3), [0.36])
    denoiser = Denoiser(Nothing(), process, "energy", EDM(0.6))
    for t in (0.1, 0.6):
        truth = -gaussian.log_prob(X_T, process, t)
        assert torch.allclose(denoiser.energy(X_T, t).diff(), truth.diff(), rtol=1e-9, atol=1e-12)
        assert torch.allclose(denoiser(X_T, t).score, gaussian.score(X_T, process, t), rtol=1e-9)


def test_an_energy_out_of_a_network_is_its_product_with_x():
    """f = W x: E = x^T W x, whose slope is (W + W^T) x."""

    class Matrix(nn.Module):
        def forward(self, x, t, condition=None):
            return (x.flatten(1) @ W.mT).reshape(x.shape)

    W = torch.tensor([[1.0, 2.0, 0.0], [0.5, -1.0, 0.3], [0.0, 0.0, 0.7]], dtype=torch.float64)
    x = X_T[:, None, :]
    denoiser = Denoiser(Energy(Matrix()), COSINE, "energy")
    assert torch.allclose(denoiser.energy(x, 0.3), torch.einsum("bi,ij,bj->b", X_T, W, X_T))
    assert torch.allclose(denoiser(x, 0.3).score[:, 0], -X_T @ (W + W.mT))


def test_a_loss_of_the_score_trains_the_energy():
    """d loss / d parameter through the gradient in x, against a central difference."""
    torch.manual_seed(0)
    network = Energy(MLP((2,), width=8, depth=1)).double()
    for p in network.parameters():
        nn.init.normal_(p, std=0.3)
    denoiser = Denoiser(network, COSINE, "energy", EDM(0.7))
    x_0, noise, t = (
        torch.randn(3, 5, 2, dtype=torch.float64).unbind(0)[0],
        torch.randn(5, 2).double(),
        torch.full((5,), 0.4),
    )
    objective = ks.objectives.Simple()

    def loss():
        return objective(denoiser, x_0, t=t.double(), noise=noise).mean()

    p = network.network.enter.weight
    (slope,) = torch.autograd.grad(loss(), p)
    with torch.no_grad():
        h, values = 1e-5, []
        for sign in (1, -1):
            p[0, 1] += sign * h
            values.append(float(loss()))
            p[0, 1] -= sign * h
    assert float(slope[0, 1]) == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5)


def test_the_simple_loss_of_an_energy_is_of_eps(tilted, dice):
    """Ho et al.'s L_simple, by hand from the exact score."""
    x_0, noise = tilted.sample(6, dice), torch.randn(6, 3, dtype=torch.float64, generator=dice)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    alpha, sigma = (c[:, None] for c in COSINE.scales(t))
    score = tilted.score(alpha * x_0 + sigma * noise, COSINE, t)
    loss = ks.objectives.Simple()(tilted.energy_denoiser(COSINE), x_0, t=t, noise=noise)
    assert torch.allclose(loss, ((-sigma * score - noise) ** 2).mean(1), rtol=1e-8)


def test_a_learned_energy_comes_near_the_exact_one(ring, dice):
    """300 steps on the ring: its x0-hat, and its differences of energy where the data is, against closed forms."""
    torch.manual_seed(1)
    denoiser = Denoiser(Energy(MLP((2,), width=64, depth=2)), COSINE, "energy", EDM(1.0))
    objective = ks.objectives.Weighted(ks.objectives.EDMWeight(1.0))
    optimizer = torch.optim.Adam(denoiser.parameters(), 4e-3)
    data = ring.sample(300 * 256, dice).float().reshape(300, 256, 2)
    for i, x_0 in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - i / 300)
        optimizer.zero_grad()
        objective(denoiser, x_0, generator=dice).mean().backward()
        optimizer.step()
    x_0, t = ring.sample(2000, dice), 0.4
    alpha, sigma = (float(c) for c in COSINE.scales(t))
    x_t = (alpha * x_0 + sigma * torch.randn(2000, 2, dtype=torch.float64, generator=dice)).float()
    exact = ring.posterior_mean(x_t, COSINE, t)
    with torch.no_grad():
        off = (denoiser(x_t, t).x0 - exact).square().mean().sqrt()
        gap = denoiser.energy(x_t, t) + ring.log_prob(x_t, COSINE, t)
    assert float(off) < 0.12 * float(x_0.std())
    assert float(gap.std()) < 0.25 * float(ring.log_prob(x_t, COSINE, t).std())


@pytest.mark.parametrize("network", ["mlp", "transformer"])
def test_a_recipe_trains_an_energy_end_to_end(network, tmp_path, capsys):
    """train, sample and the bound, in a run's folder: three steps."""
    out = str(tmp_path / "run")
    size = ["network.width=16", "network.depth=1"]
    if network == "transformer":
        size = ["network.kind=transformer", *size, "network.heads=2", "network.channels=8", "network.patch=2"]
    settings = ["denoiser.predicts=energy", "training.steps=3", "training.batch_size=8", "training.sample_every=0"]
    assert main(["train", "digits", "--out", out, *settings, *size, "evaluation.variance=beta"]) == 0
    run = ks.load(out)
    assert run.denoiser.predicts == "energy"
    assert run.sample(2, steps=3).shape == (2, 1, 8, 8)
    x_0 = torch.zeros(2, 1, 8, 8)
    assert bool(elbo(run.denoiser, x_0, steps=3, variance="beta").total.isfinite().all())


def test_what_an_energy_cannot_be_combined_with_is_refused(tmp_path):
    with pytest.raises(ks.recipe.RecipeError, match=r"torch\.compile cannot differentiate twice"):
        ks.recipe.read("digits", ["denoiser.predicts=energy", "evaluation.variance=beta", "training.compile=true"])
    with pytest.raises(ValueError, match="with no room for a variance"):
        Denoiser(Quadratic(), COSINE, "energy", learned_variance=True)


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (lambda x, t, c: x, r"should have returned shape \(3,\), it returned \(3, 3\)"),
        (lambda x, t, c: t, "the numbers do not depend on x"),
    ],
)
def test_a_network_that_gives_no_energy_is_named(network, words):
    class Net(nn.Module):
        def forward(self, x, t, condition=None):
            return network(x, t, condition)

    with pytest.raises(ValueError, match=words):
        Denoiser(Net(), COSINE, "energy")(X_T, 0.3)


def test_only_an_energy_has_an_energy(tilted):
    with pytest.raises(ValueError, match='only a denoiser with predicts="energy" knows one; this one predicts x0'):
        tilted.denoiser(COSINE).energy(X_T, 0.3)


# -- products ---------------------------------------------------------------------------------------------------------


def test_a_product_adds_energies_and_scores(tilted, ring):
    """With weights, one of them negative; by the closed forms of two mixtures."""
    other = Mixture([0.3, 0.7], [[0.2, 0.1, 0.0], [-0.4, 0.3, 0.6]], [0.2, 0.3])
    for t in (0.1, 0.6):
        model = Product([tilted.energy_denoiser(COSINE), other.energy_denoiser(COSINE)], [2.0, -0.5])
        score = 2 * tilted.score(X_T, COSINE, t) - 0.5 * other.score(X_T, COSINE, t)
        energy = -2 * tilted.log_prob(X_T, COSINE, t) + 0.5 * other.log_prob(X_T, COSINE, t)
        assert torch.allclose(model(X_T, t).score, score, rtol=1e-8, atol=1e-9)
        assert torch.allclose(model.energy(X_T, t), energy, rtol=1e-10)


def test_the_noised_product_is_not_the_product_of_the_noised():
    """Two unit Gaussians at the origin, where alpha^2 = sigma^2 = 1/2: variances 1/2 and 3/4, by hand."""
    unit = Mixture([1.0], [[0.0]], [1.0])
    model = Product([unit.denoiser(COSINE)] * 2)
    x = torch.tensor([[0.7]], dtype=torch.float64)
    t = float(COSINE.schedule.time_of(torch.tensor(0.0, dtype=torch.float64)))
    # VP keeps each factor N(0, 1): their product has variance 1/2. The product N(0, 1/2), noised, has 1/4 + 1/2.
    assert float(model(x, t).score) == pytest.approx(-0.7 / 0.5, rel=1e-6)
    truth = Mixture([1.0], [[0.0]], [0.5]).score(x, COSINE, t)
    assert float(truth) == pytest.approx(-0.7 / 0.75, rel=1e-6)


def product_of(a, b):
    """The product of two mixtures: a mixture over pairs, by Gaussian algebra."""
    weights, means, covariances = [], [], []
    for w, m, s in zip(a.weights, a.means, a.covariances, strict=True):
        for v, n, r in zip(b.weights, b.means, b.covariances, strict=True):
            gain = s @ torch.linalg.inv(s + r)
            overlap = torch.distributions.MultivariateNormal(n, s + r).log_prob(m)
            weights.append(float(w * v * overlap.exp()))
            means.append((m + gain @ (n - m)).tolist())
            covariances.append((s - gain @ s).tolist())
    return Mixture(weights, means, covariances)


UPRIGHT = Mixture([0.5, 0.5], [[-1.0, 0.0], [1.0, 0.0]], [[0.05, 0.6], [0.2, 0.6]])
LEVEL = Mixture([0.3, 0.7], [[0.0, 0.8], [0.2, -0.8]], [[0.6, 0.1], [0.6, 0.1]])


def statistics(x):
    """Means, second moments, and the share of each quadrant."""
    quadrant = [((x[:, 0] > 0) == a) & ((x[:, 1] > 0) == b) for a in (True, False) for b in (True, False)]
    return torch.stack(
        [x[:, 0], x[:, 1], x[:, 0] ** 2, x[:, 1] ** 2, x[:, 0] * x[:, 1], *map(torch.Tensor.double, quadrant)]
    )


def deviations(x, exact):
    """The largest difference of a statistic from that of exact draws, in standard errors."""
    got, truth = statistics(x), statistics(exact)
    error = (truth.var(1) / x.shape[0] + truth.var(1) / exact.shape[0]).sqrt()
    return float(((got.mean(1) - truth.mean(1)).abs() / error).max())


def test_the_closed_product_is_the_product():
    """Up to one constant, at any point."""
    x = X_T[:, :2]
    gap = UPRIGHT.log_prob(x) + LEVEL.log_prob(x) - product_of(UPRIGHT, LEVEL).log_prob(x)
    assert torch.allclose(gap, gap[:1].expand(3), rtol=1e-9)


def test_annealed_mala_samples_the_product_and_the_reverse_process_does_not(dice):
    """Du et al.'s point: one model, sampled right by MCMC at every level, astray by ancestral sampling and DDIM."""
    n, rates = 2000, {}
    exact = product_of(UPRIGHT, LEVEL).sample(100_000, dice)
    model, draw = Product([UPRIGHT.energy_denoiser(COSINE), LEVEL.energy_denoiser(COSINE)]), normals((n, 2), dice)
    mala = MALA(snr=0.5, steps=15, width=0.25, watch=lambda t, a: rates.setdefault(t, []).append(float(a.mean())))
    x = annealed(model, COSINE.sampling_grid(30), draw(), mala, draw)
    assert deviations(x, exact) < 5
    assert len(rates) == 30
    assert all(0.4 < sum(r) / len(r) < 0.98 for r in rates.values())
    scores = Product([UPRIGHT.denoiser(COSINE), LEVEL.denoiser(COSINE)])
    for solver in (Ancestral("beta"), DDIM()):
        assert deviations(run(solver.table(COSINE, steps=100), scores, draw(), draw), exact) > 8


def test_a_product_of_scores_alone_is_sampled_by_annealed_langevin(dice):
    """No energies: unadjusted, so with small steps; within 5 standard errors and 3 % more of the second moments."""
    n, exact = 2000, product_of(UPRIGHT, LEVEL).sample(100_000, dice)
    model, draw = Product([UPRIGHT.denoiser(COSINE), LEVEL.denoiser(COSINE)]), normals((n, 2), dice)
    x = annealed(model, COSINE.sampling_grid(30), draw(), Langevin(snr=0.2, steps=40, width=0.2), draw)
    got, truth = statistics(x), statistics(exact)
    slack = 5 * (truth.var(1) / n).sqrt() + 0.03 * truth.abs().mean(1)
    assert bool(((got.mean(1) - truth.mean(1)).abs() < slack).all())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: Product([]), "at least one model"),
        (lambda d: Product([d, d], [1.0]), "one finite weight for each of 2 models"),
        (lambda d: Product([d], [math.inf]), "one finite weight"),
        (lambda d: Product([d, UPRIGHT.denoiser(Process(ALL_SCHEDULES["ve"]))]), "all models must be of one process"),
        (lambda d: Product([d]).energy(X_T[:, :2], 0.3), "this one predicts x0"),
    ],
)
def test_a_product_that_cannot_be_says_why(make, words):
    with pytest.raises(ValueError, match=words):
        make(UPRIGHT.denoiser(COSINE))


def test_a_prediction_may_be_tilted_in_every_form(process, tilted):
    """The score moves by the gradient, whatever the form."""
    known, push = tilted.denoiser(process)(X_T, 0.4), torch.tensor([0.3, -0.1, 0.2]).double()
    for form in ("x0", "eps", "score", "v", "velocity", "flow"):
        said = Prediction(process, 0.4, X_T, form, known.read(form)).tilted(push)
        assert said.form == form
        assert torch.allclose(said.score, known.score + push, rtol=1e-6, atol=1e-7)
