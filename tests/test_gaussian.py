"""Gaussian algebra (theory row 1) against quadrature, scipy, 50-digit arithmetic and Monte Carlo."""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from kuosan import Gaussian

MEANS = st.floats(-3, 3)
VARIANCES = st.floats(0.01, 9)


def gaussian(mean, variance):
    return Gaussian(torch.tensor(mean, dtype=torch.float64), torch.tensor(variance, dtype=torch.float64))


def moments(density, low=-60.0, high=60.0):
    """(mean, variance) of an unnormalised density on the line, by the trapezoid rule on 120,001 points."""
    x = np.linspace(low, high, 120_001)
    p = density(x)
    p = p / p.sum()
    mean = (p * x).sum()
    return mean, (p * (x - mean) ** 2).sum()


def kl_by_quadrature(m1, v1, m2, v2):
    """The definition, integral of p (log p - log q), by adaptive quadrature; 12 standard deviations to each side."""
    p, q = stats.norm(m1, math.sqrt(v1)), stats.norm(m2, math.sqrt(v2))
    reach = 12 * math.sqrt(v1)
    return integrate.quad(
        lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), m1 - reach, m1 + reach, epsabs=1e-12, epsrel=1e-12
    )[0]


def exact_kl(m1, v1, m2, v2):
    with mpmath.workdps(50):
        m1, v1, m2, v2 = (mpmath.mpf(c) for c in (m1, v1, m2, v2))
        return float(mpmath.log(v2 / v1) / 2 + (v1 + (m1 - m2) ** 2) / (2 * v2) - mpmath.mpf(1) / 2)


@given(MEANS, VARIANCES, MEANS, VARIANCES)
def test_kl_is_the_integral_of_its_definition(m1, v1, m2, v2):
    """scipy.integrate.quad of p (log p - log q)."""
    truth = kl_by_quadrature(m1, v1, m2, v2)
    assert float(gaussian(m1, v1).kl(gaussian(m2, v2))) == pytest.approx(truth, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize(("m1", "v1", "m2", "v2"), [(0.3, 0.25, -0.2, 1.7), (1.0, 4.0, 0.0, 0.5)])
def test_erratum_2_the_variance_in_the_numerator_of_the_kl_is_the_first_one(m1, v1, m2, v2):
    """With s2^2 in the numerator, as often printed, the formula misses the integral; with s1^2 it does not."""
    truth = kl_by_quadrature(m1, v1, m2, v2)
    printed = 0.5 * math.log(v2 / v1) + (v2 + (m1 - m2) ** 2) / (2 * v2) - 0.5
    assert abs(printed - truth) > 0.1
    assert float(gaussian(m1, v1).kl(gaussian(m2, v2))) == pytest.approx(truth, rel=1e-10)


@pytest.mark.parametrize("excess", [1e-2, 1e-5, 1e-9, -1e-9])
def test_kl_keeps_its_digits_when_the_variances_are_nearly_equal(excess):
    """50-digit arithmetic; the textbook form is zero or noise here, the true value is excess^2 / 4."""
    v1 = 0.37 * (1 + excess)
    truth = exact_kl(0.0, v1, 0.0, 0.37)
    assert float(gaussian(0.0, v1).kl(gaussian(0.0, 0.37))) == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("ratio", [1e3, 1e-3, 1e-6, 1e-10, 1e-20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_keeps_its_digits_when_the_variances_are_far_apart(ratio, dtype):
    """50-digit arithmetic: log(s2/s1) is 23 nats at a ratio of 1e-20, not infinity."""
    first, second = torch.tensor(ratio, dtype=dtype), torch.tensor(1.0, dtype=dtype)
    zero = torch.zeros((), dtype=dtype)
    truth = exact_kl(0.0, float(first), 0.0, 1.0)
    got = float(Gaussian(zero, first).kl(Gaussian(zero, second)))
    assert got == pytest.approx(truth, rel=1e-5 if dtype == torch.float32 else 1e-12)


def test_kl_from_itself_is_exactly_zero():
    g = gaussian([0.1, -3.0], [0.2, 7.0])
    assert g.kl(g).tolist() == [0.0, 0.0]


def test_kl_from_a_point_is_infinite():
    """A point has no density: log(s2 / 0)."""
    assert float(gaussian(0.0, 0.0).kl(gaussian(0.0, 1.0))) == math.inf


@given(MEANS, VARIANCES, MEANS)
def test_log_prob_is_that_of_scipy(mean, variance, x):
    truth = stats.norm(mean, math.sqrt(variance)).logpdf(x)
    got = gaussian(mean, variance).log_prob(torch.tensor(x, dtype=torch.float64))
    assert float(got) == pytest.approx(truth, rel=1e-12, abs=1e-12)


def test_entropy_is_that_of_scipy_and_has_the_shape_of_the_distribution():
    g = Gaussian(torch.zeros(3, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64))
    assert g.entropy().shape == (3,)
    assert g.entropy().tolist() == pytest.approx([stats.norm(0, math.sqrt(0.3)).entropy()] * 3)


def test_the_sum_of_independent_gaussians_is_their_convolution():
    """The density of x + y by quadrature over x."""
    x = np.linspace(-30, 30, 60_001)
    first, second = stats.norm(0.4, 0.5), stats.norm(-1.1, 1.3)
    total = gaussian(0.4, 0.25) + gaussian(-1.1, 1.69)
    for y in (-2.0, 0.0, 1.5):
        density = np.trapezoid(first.pdf(x) * second.pdf(y - x), x)
        assert float(total.log_prob(torch.tensor(y, dtype=torch.float64))) == pytest.approx(math.log(density), abs=1e-9)


def test_an_affine_map_with_noise_is_what_quadrature_says():
    """y = 0.8 x + 0.3 + noise: its density is the integral of p(x) N(y; 0.8 x + 0.3, 0.09)."""
    x = np.linspace(-30, 30, 60_001)
    law = gaussian(0.4, 0.25).affine(0.8, 0.3, 0.09)
    for y in (-1.0, 0.6, 1.5):
        density = np.trapezoid(stats.norm(0.4, 0.5).pdf(x) * stats.norm(0.8 * x + 0.3, 0.3).pdf(y), x)
        assert float(law.log_prob(torch.tensor(y, dtype=torch.float64))) == pytest.approx(math.log(density), abs=1e-9)


@pytest.mark.parametrize(("m1", "v1", "m2", "v2"), [(0.4, 0.25, -1.1, 1.69), (2.0, 4.0, 2.0, 0.01)])
def test_the_product_of_two_densities_is_normalised_by_completing_the_square(m1, v1, m2, v2):
    """Moments of the pointwise product, by quadrature."""
    mean, variance = moments(lambda x: stats.norm.pdf(x, m1, math.sqrt(v1)) * stats.norm.pdf(x, m2, math.sqrt(v2)))
    product = gaussian(m1, v1) * gaussian(m2, v2)
    assert float(product.mean) == pytest.approx(mean, rel=1e-9)
    assert float(product.variance) == pytest.approx(variance, rel=1e-9)


@pytest.mark.parametrize("scale", [0.7, -2.0])
def test_seeing_a_noisy_multiple_updates_by_bayes(scale):
    """Moments of prior times likelihood, by quadrature."""
    mean, variance = moments(lambda x: stats.norm.pdf(x, 0.4, 0.5) * stats.norm.pdf(1.2, scale * x, 0.6))
    after = gaussian(0.4, 0.25).given(torch.tensor(1.2, dtype=torch.float64), scale, 0.36)
    assert float(after.mean) == pytest.approx(mean, rel=1e-9)
    assert float(after.variance) == pytest.approx(variance, rel=1e-9)


def test_seeing_without_noise_leaves_a_point():
    after = gaussian(0.4, 0.25).given(torch.tensor(1.2, dtype=torch.float64), 2.0, 0.0)
    assert (float(after.mean), float(after.variance)) == (pytest.approx(0.6), 0.0)


def test_a_sample_is_the_noise_stretched_and_moved():
    noise = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    assert gaussian(0.5, 0.09).sample(noise).tolist() == pytest.approx([0.2, 0.5, 1.1])


def test_gradients_reach_mean_and_variance_through_the_sample(dice):
    """E x^2 = mu^2 + v has the gradient (2 mu, 1); Monte Carlo over 200,000 draws, 5 standard errors."""
    mean = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    variance = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    n = 200_000
    x = Gaussian(mean.expand(n), variance).sample(generator=dice)
    (x**2).mean().backward()
    # d/dmu of one draw is 2 x, of variance 4 v; d/dv is x z / s, of variance at most (mu^2 + 2 v) / v
    assert float(mean.grad) == pytest.approx(1.4, abs=5 * math.sqrt(4 * 0.4 / n))
    assert float(variance.grad) == pytest.approx(1.0, abs=5 * math.sqrt((0.49 + 0.8) / 0.4 / n))


def test_samples_have_the_mean_and_variance_that_were_asked_for(dice):
    """100,000 draws, 5 standard errors."""
    n = 100_000
    x = gaussian([0.3] * n, 2.0).sample(generator=dice)
    assert float(x.mean()) == pytest.approx(0.3, abs=5 * math.sqrt(2 / n))
    assert float(x.var()) == pytest.approx(2.0, abs=5 * 2 * math.sqrt(2 / n))


def test_a_seed_repeats_a_sample():
    first, again = (gaussian([0.0, 1.0], 1.0).sample(generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)


def test_a_point_samples_itself():
    assert gaussian([1.5, 2.5], 0.0).sample().tolist() == [1.5, 2.5]


def test_mean_and_variance_must_fit_together():
    with pytest.raises(ValueError, match=r"mean \(3,\) and variance \(2,\) do not broadcast"):
        Gaussian(torch.zeros(3), torch.ones(2))
