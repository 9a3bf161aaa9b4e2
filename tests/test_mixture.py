"""The Gaussian mixture that other tests take for the truth, against scipy, autograd, quadrature and Monte Carlo."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from conftest import named
from kuosan import Mixture, Process, schedules

CONVENTIONS = named("linear_beta", "sub_vp", "ve", "rectified_flow")
POINTS = torch.tensor([[0.1, -0.3, 0.2], [-1.0, 0.8, 0.0], [2.5, -2.0, 1.0]], dtype=torch.float64)


def scipy_log_prob(mixture, x, alpha=1.0, sigma=0.0):
    """log of the weighted sum of scipy's normal densities."""
    d = mixture.dimension
    log_joint = [
        math.log(w) + stats.multivariate_normal.logpdf(x, alpha * m, alpha**2 * c + sigma**2 * np.eye(d))
        for w, m, c in zip(mixture.weights.tolist(), mixture.means.numpy(), mixture.covariances.numpy(), strict=True)
    ]
    return np.logaddexp.reduce(log_joint, axis=0)


def test_the_density_is_that_of_scipy(tilted, ring):
    for mixture, x in ((tilted, POINTS), (ring, POINTS[:, :2])):
        assert np.allclose(mixture.log_prob(x).numpy(), scipy_log_prob(mixture, x.numpy()), rtol=1e-11)


@pytest.mark.parametrize("schedule", CONVENTIONS)
@pytest.mark.parametrize("t", [0.01, 0.3141, 0.9, 1.0])
def test_the_density_under_a_process_is_that_of_the_moved_and_widened_components(schedule, t, tilted):
    """N(alpha mu, alpha^2 Sigma + sigma^2 I) for each component, in scipy."""
    alpha, sigma = (float(c) for c in schedule.scales(t))
    truth = scipy_log_prob(tilted, POINTS.numpy(), alpha, sigma)
    assert np.allclose(tilted.log_prob(POINTS, Process(schedule), t).numpy(), truth, rtol=1e-9)


@pytest.mark.parametrize("schedule", CONVENTIONS)
@pytest.mark.parametrize("t", [0.0, 0.01, 0.3141, 0.9])
def test_the_score_is_the_gradient_of_the_density(schedule, t, tilted):
    """Autograd."""
    x = POINTS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(tilted.log_prob(x, Process(schedule), t).sum(), x)
    assert torch.allclose(tilted.score(POINTS, Process(schedule), t), gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", CONVENTIONS)
@pytest.mark.parametrize("t", [0.01, 0.3141, 0.9])
@pytest.mark.parametrize("x_t", [-0.5, 0.0, 0.9])
def test_on_the_line_the_posterior_is_bayes_by_quadrature(schedule, t, x_t, oracle):
    """Moments of p(x_0) N(x_t; alpha x_0, sigma^2), trapezoid rule on 200,001 points."""
    alpha, sigma = (float(c) for c in schedule.scales(t))
    x = np.linspace(-4, 4, 200_001)
    p = sum(
        w * stats.norm.pdf(x, m, math.sqrt(v))
        for w, m, v in zip(oracle.weights, oracle.means, oracle.variances, strict=True)
    )
    log_p = np.log(p + 1e-300) - 0.5 * ((x_t - alpha * x) / sigma) ** 2
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean = (p * x).sum()
    at = torch.tensor([[x_t]], dtype=torch.float64)
    mixture, process = oracle.mixture(), Process(schedule)
    assert float(mixture.posterior_mean(at, process, t)) == pytest.approx(mean, abs=1e-8)
    assert float(mixture.posterior_covariance(at, process, t)) == pytest.approx((p * (x - mean) ** 2).sum(), rel=1e-6)


@pytest.mark.parametrize("schedule", CONVENTIONS)
@pytest.mark.parametrize("t", [0.3141, 0.9])
def test_in_the_plane_the_posterior_is_bayes_on_a_lattice(schedule, t):
    """Full covariances in two dimensions: moments over 801 x 801 points."""
    covariances = np.array([[[0.30, 0.12], [0.12, 0.20]], [[0.10, -0.06], [-0.06, 0.40]]])
    means = np.array([[-0.5, 0.3], [0.6, -0.2]])
    mixture = Mixture([0.4, 0.6], means.tolist(), torch.from_numpy(covariances))
    alpha, sigma = (float(c) for c in schedule.scales(t))
    axis = np.linspace(-5, 5, 801)
    x = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    x_t = np.array([0.4, 0.5])
    p = scipy_log_prob(mixture, x) - 0.5 * (((x_t - alpha * x) / sigma) ** 2).sum(-1)
    p = np.exp(p - p.max())
    p /= p.sum()
    mean = p @ x
    covariance = (x - mean).T @ ((x - mean) * p[:, None])
    at = torch.from_numpy(x_t)
    assert np.allclose(mixture.posterior_mean(at, Process(schedule), t).numpy(), mean, atol=1e-7)
    assert np.allclose(mixture.posterior_covariance(at, Process(schedule), t).numpy(), covariance, atol=1e-7)


def test_in_space_the_posterior_is_bayes_by_monte_carlo(tilted, dice):
    """Draws from the mixture, weighted by the likelihood of x_t: 5 standard errors of a self-normalised mean."""
    alpha, sigma, x_t = 0.6, 0.8, torch.tensor([0.3, -0.2, 0.4], dtype=torch.float64)
    process = Process(schedules.from_log_snr(lambda t: 2 * math.log(0.6 / 0.8) + 4 * (0.5 - t)))
    assert [float(c) for c in process.scales(0.5)] == pytest.approx([alpha, sigma])
    x = tilted.sample(200_000, dice)
    w = torch.softmax(-0.5 * ((x_t - alpha * x) ** 2).sum(-1) / sigma**2, 0)
    mean = w @ x
    se = (w[:, None] ** 2 * (x - mean) ** 2).sum(0).sqrt()
    assert bool(((tilted.posterior_mean(x_t, process, 0.5) - mean).abs() < 5 * se).all())
    outer = (x - mean).unsqueeze(-1) * (x - mean).unsqueeze(-2)
    covariance = (w[:, None, None] * outer).sum(0)
    se = (w[:, None, None] ** 2 * (outer - covariance) ** 2).sum(0).sqrt()
    assert bool(((tilted.posterior_covariance(x_t, process, 0.5) - covariance).abs() < 5 * se).all())


def test_samples_have_the_moments_of_the_mixture(tilted, dice):
    """E x and E x x^T by hand from the components; 200,000 draws, 5 standard errors."""
    n = 200_000
    x = tilted.sample(n, dice)
    mean = sum(w * m for w, m in zip(tilted.weights, tilted.means, strict=True))
    second = sum(
        w * (c + torch.outer(m, m)) for w, m, c in zip(tilted.weights, tilted.means, tilted.covariances, strict=True)
    )
    outer = x.unsqueeze(-1) * x.unsqueeze(-2)
    assert bool(((x.mean(0) - mean).abs() < 5 * x.std(0) / math.sqrt(n)).all())
    assert bool(((outer.mean(0) - second).abs() < 5 * outer.std(0) / math.sqrt(n)).all())
    assert torch.allclose(tilted.mean(), mean)
    assert torch.allclose(tilted.covariance(), second - torch.outer(mean, mean))


def test_samples_have_the_density_of_the_mixture(oracle, dice):
    """Kolmogorov-Smirnov against the sum of scipy's normal distribution functions."""
    x = oracle.mixture().sample(20_000, dice)[:, 0].numpy()

    def cdf(y):
        parts = zip(oracle.weights, oracle.means, oracle.variances, strict=True)
        return sum(w * stats.norm.cdf(y, m, math.sqrt(v)) for w, m, v in parts)

    assert stats.kstest(x, cdf).pvalue > 1e-4


def test_covariances_may_be_numbers_or_diagonals():
    means, x = [[0.0, 1.0], [1.0, -1.0], [0.5, 0.5]], POINTS[:, :2]
    spheres = Mixture([1, 2, 3], means, [0.1, 0.2, 0.3])
    diagonals = Mixture([1, 2, 3], means, [[0.1, 0.1], [0.2, 0.2], [0.3, 0.3]])
    full = Mixture([1, 2, 3], means, [[[v, 0.0], [0.0, v]] for v in (0.1, 0.2, 0.3)])
    assert spheres.weights.tolist() == pytest.approx([1 / 6, 1 / 3, 1 / 2])
    assert torch.allclose(spheres.log_prob(x), full.log_prob(x))
    assert torch.allclose(diagonals.log_prob(x), full.log_prob(x))


def test_the_perfect_denoiser_says_the_posterior_mean(process, tilted):
    x = POINTS.float()
    said = tilted.denoiser(process)(x, 0.5)
    assert said.x0.dtype == torch.float32
    assert torch.allclose(said.x0.double(), tilted.posterior_mean(x, process, 0.5), rtol=1e-5, atol=1e-6)


def test_a_time_for_each_point_is_that_time_alone(process, tilted):
    t = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    for answer in (tilted.log_prob, tilted.score, tilted.posterior_mean, tilted.posterior_covariance):
        together = answer(POINTS, process, t)
        for k in range(3):
            assert torch.allclose(together[k], answer(POINTS[k], process, float(t[k])), rtol=1e-12)


def test_a_time_for_each_row_of_points_is_not_taken_for_a_time_of_each_column(tilted):
    """x (B, n, d) with t (B,): the k-th row of points has the time t_k."""
    process = Process(schedules.LinearBeta())
    x, t = POINTS.expand(3, 3, 3), torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    together = tilted.posterior_mean(x, process, t)
    for k in range(3):
        assert torch.allclose(together[k], tilted.posterior_mean(POINTS, process, float(t[k])), rtol=1e-12)


@pytest.mark.parametrize(
    ("weights", "means", "covariances", "words"),
    [
        ([[1.0]], [[0.0]], [1.0], r"weights \(K,\) and means \(K, d\) expected, got \(1, 1\)"),
        ([1.0, 1.0], [[0.0]], [1.0], r"got \(2,\) and \(1, 1\)"),
        ([1.0], [0.0], [1.0], r"got \(1,\) and \(1,\)"),
        ([1.0, 0.0], [[0.0], [1.0]], [1.0, 1.0], "every weight of a mixture must be positive"),
        ([1.0, float("nan")], [[0.0], [1.0]], [1.0, 1.0], "every weight of a mixture must be positive"),
        ([1.0], [[0.0, 0.0]], [[[1.0, 0.5], [0.0, 1.0]]], "symmetric"),
        ([1.0], [[0.0, 0.0]], [[1.0, 1.0, 1.0]], r"got \(1, 3\)"),
        ([1.0], [[0.0, 0.0]], [[[1.0, 2.0], [2.0, 1.0]]], "positive definite"),
        ([1.0], [[0.0]], [0.0], "positive definite"),
        ([1.0], [[0.0]], [-1.0], "positive definite"),
    ],
)
def test_a_mixture_that_cannot_be_says_why(weights, means, covariances, words):
    with pytest.raises(ValueError, match=words):
        Mixture(weights, means, covariances)
