"""Decoders as laws: what they sample has the frequencies that they state; and the cross-entropy of two Gaussians."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kuosan.decoders import DiscretisedGaussian, DiscretisedMixture, Levels, level_of
from kuosan.gaussian import Gaussian

LEVELS = 7
VALUES = torch.linspace(-1, 1, LEVELS, dtype=torch.float64)
DRAWS = 40_000
#: (mean, standard deviation): between levels, on one, near an end, beyond it, and flat.
GAUSSIANS = [(0.1, 0.4), (1 / 3, 0.2), (-0.9, 0.3), (1.2, 0.5), (0.0, 3.0)]


def f64(value):
    return torch.as_tensor(value, dtype=torch.float64)


def fits(index, chances):
    """Pearson's chi-square at 1e-4, levels expected fewer than five times thrown together."""
    count = np.bincount(index, minlength=LEVELS)
    expected = np.asarray(chances) * len(index)
    rare = expected < 5
    if rare.any():
        count = np.append(count[~rare], count[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    statistic = ((count - expected) ** 2 / np.maximum(expected, 1e-9))[expected > 1e-3].sum()
    return statistic < stats.chi2.ppf(1 - 1e-4, max(len(expected) - 1, 1)) and count[expected <= 1e-3].sum() == 0


def bins(mean, std):
    """The probabilities of the levels: scipy's normal between the midpoints, open at both ends."""
    borders = np.concatenate([[-np.inf], (VALUES[1:] + VALUES[:-1]).numpy() / 2, [np.inf]])
    return np.diff(stats.norm.cdf(borders, mean, std))


@pytest.mark.parametrize(("mean", "std"), GAUSSIANS)
def test_a_gaussian_cut_into_bins_samples_each_level_as_often_as_it_says(mean, std):
    """Chi-square against scipy's probabilities of the bins, which log_prob must give too."""
    law = DiscretisedGaussian(f64(mean).expand(DRAWS), f64(std**2), LEVELS)
    index = level_of(law.sample(generator=torch.Generator().manual_seed(1)), LEVELS)
    assert fits(index.numpy(), bins(mean, std))
    stated = DiscretisedGaussian(f64(mean), f64(std**2), LEVELS).log_prob(VALUES).exp()
    assert stated.numpy() == pytest.approx(bins(mean, std), rel=1e-9, abs=1e-15)


def test_the_sampled_levels_are_bit_for_bit_those_of_the_data_or_nearly():
    """torch.linspace: what is sampled can be scored again, at any number of levels."""
    for levels in (2, 3, 17, 256):
        law = DiscretisedGaussian(torch.zeros(5000).double(), f64(0.5), levels)
        x = law.sample(generator=torch.Generator().manual_seed(2))
        nearest = torch.linspace(-1, 1, levels, dtype=torch.float64)[level_of(x, levels)]
        assert torch.allclose(x, nearest, rtol=0, atol=1e-12)
        assert bool(law.log_prob(x).isfinite().all())


def test_the_noise_that_is_given_picks_the_level():
    """By hand: 0.1 + 0.5 * (-2, 0, 1, 9) = (-0.9, 0.1, 0.6, 4.6), to the nearest of three levels."""
    law = DiscretisedGaussian(f64(0.1).expand(4), f64(0.25), 3)
    assert law.sample(f64([-2.0, 0.0, 1.0, 9.0])).tolist() == [-1.0, 0.0, 1.0, 1.0]


#: weights, and the Gaussians that they are of: apart, over each other, and one that is never chosen.
MIXTURES = [
    ([0.25, 0.75], [(-0.9, 0.1), (0.6, 0.2)]),
    ([0.5, 0.3, 0.2], [(0.1, 0.4), (0.0, 3.0), (1.2, 0.5)]),
    ([0.0, 1.0], [(-0.9, 0.1), (1 / 3, 0.2)]),
]


def mixture(weights, gaussians, n):
    mean, std = f64(gaussians).T
    wide = f64(weights).log().expand(n, -1)
    return DiscretisedMixture(wide, DiscretisedGaussian(mean.expand_as(wide), (std**2).expand_as(wide), LEVELS))


@pytest.mark.parametrize(("weights", "gaussians"), MIXTURES)
def test_a_mixture_samples_each_level_as_often_as_it_says(weights, gaussians):
    """Chi-square against the weighed sum of scipy's probabilities of the bins, which log_prob must give too."""
    chances = sum(w * bins(*one) for w, one in zip(weights, gaussians, strict=True))
    index = level_of(mixture(weights, gaussians, DRAWS).sample(generator=torch.Generator().manual_seed(1)), LEVELS)
    assert index.shape == (DRAWS,)
    assert fits(index.numpy(), chances)
    assert mixture(weights, gaussians, LEVELS).log_prob(VALUES).exp().numpy() == pytest.approx(chances, rel=1e-9)


def test_the_noise_that_is_given_picks_the_component_and_then_its_level():
    """By hand: u = Phi(z) = .1, .2 are 40 % and 80 % into the first quarter; .4, .85 are 20 % and 80 % into the rest.

    The quantiles of N(0, .5^2) and N(.5, .5^2) there are -.13, .42, .08, .92: to the nearest of seven levels.
    """
    law = mixture([0.25, 0.75], [(0.0, 0.5), (0.5, 0.5)], 4)
    x = law.sample(f64(stats.norm.ppf([0.1, 0.2, 0.4, 0.85])))
    assert level_of(x, LEVELS).tolist() == [3, 4, 3, 6]


def test_the_mean_of_a_mixture_is_that_of_its_gaussians_within_the_levels():
    """By hand: .25 (-.9) + .75 .6; and a mean beyond the last level counts as it."""
    assert mixture([0.25, 0.75], [(-0.9, 0.1), (0.6, 0.2)], 1).mean.tolist() == pytest.approx([0.225])
    assert mixture([0.5, 0.5], [(0.0, 1.0), (3.0, 0.1)], 1).mean.tolist() == pytest.approx([0.5])


PROBABILITIES = f64([[0.05, 0.1, 0.3, 0.05, 0.2, 0.05, 0.25], [0.0, 0.0, 0.5, 0.0, 0.0, 0.5, 0.0]])


@pytest.mark.parametrize("row", [0, 1])
def test_a_law_over_levels_samples_each_as_often_as_it_says(row):
    """Chi-square against the table; a level of probability zero never comes."""
    log_probs = PROBABILITIES.log()[:, None].expand(2, DRAWS, LEVELS)
    x = Levels(log_probs, VALUES).sample(generator=torch.Generator().manual_seed(3))
    assert x.shape == (2, DRAWS)
    assert fits(level_of(x[row], LEVELS).numpy(), PROBABILITIES[row].numpy())


def test_the_noise_that_is_given_picks_the_level_of_its_own_chance():
    """By hand: Phi(-2, 0, 1, 9) = (0.023, 0.5, 0.84, 1) of the sums 0.05, 0.15, 0.45, 0.5, 0.7, 0.75, 1."""
    law = Levels(PROBABILITIES[:1].log().expand(5, LEVELS), VALUES)
    x = law.sample(f64([-2.0, -0.01, 0.1, 1.0, 9.0]))
    assert level_of(x, LEVELS).tolist() == [0, 3, 4, 6, 6]


def test_a_law_over_levels_scores_each_coordinate_by_its_own_table():
    """Looked up by hand, at every level of both coordinates."""
    law = Levels(PROBABILITIES.log(), VALUES)
    for first in range(LEVELS):
        for second in range(LEVELS):
            found = law.log_prob(VALUES[[first, second]]).exp().tolist()
            assert found == pytest.approx([float(PROBABILITIES[0, first]), float(PROBABILITIES[1, second])], rel=1e-12)


def test_the_mean_of_a_law_over_levels_is_that_of_its_table():
    """numpy."""
    truth = PROBABILITIES.numpy() @ np.linspace(-1, 1, LEVELS)
    assert Levels(PROBABILITIES.log(), VALUES).mean.numpy() == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize("x", [0.1, -1.2, float("nan")])
def test_a_value_between_the_levels_has_no_probability(x):
    for law in (Levels(PROBABILITIES[:1].log(), VALUES), DiscretisedGaussian(f64([0.0]), f64(1.0), LEVELS)):
        with pytest.raises(ValueError, match="7 even levels"):
            law.log_prob(f64([x]))


@given(*(st.floats(-3, 3), st.floats(0.05, 4)) * 2)
def test_the_cross_entropy_of_two_gaussians_is_an_average(mean, std, other_mean, other_std):
    """Gauss-Hermite of -log density by scipy, exact because that is quadratic; less the entropy it is the KL."""
    node, weight = np.polynomial.hermite_e.hermegauss(4)
    truth = -(weight / weight.sum()) @ stats.norm.logpdf(mean + std * node, other_mean, other_std)
    one, other = Gaussian(f64(mean), f64(std**2)), Gaussian(f64(other_mean), f64(other_std**2))
    found = float(one.cross_entropy(other))
    assert found == pytest.approx(truth, rel=1e-10, abs=1e-10)
    assert found - float(one.entropy()) == pytest.approx(float(one.kl(other)), rel=1e-8, abs=1e-8)


def test_the_cross_entropy_with_itself_is_the_entropy():
    """1/2 log 2 pi e sigma^2."""
    law = Gaussian(f64([0.3, -2.0]), f64([0.5, 3.0]))
    truth = [0.5 * math.log(2 * math.pi * math.e * v) for v in (0.5, 3.0)]
    assert law.cross_entropy(law).tolist() == pytest.approx(truth, rel=1e-12)
