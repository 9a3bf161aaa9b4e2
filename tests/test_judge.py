"""The judge knows real images from bad ones, its distance is the Frechet distance, and copies are found."""

import numpy as np
import pytest
import torch

from kuosan.image.data import Examples, ImageData, digits
from kuosan.image.judge import Judge, frechet_distance, nearest


@pytest.fixture(scope="module")
def real():
    pytest.importorskip("sklearn")
    return digits()


@pytest.fixture(scope="module")
def judge(real):
    return Judge.train(real)


def stripes(count: int, seed: int) -> Examples:
    """Noisy images of 20x20 with stripes that lie (class 0), stand (class 1), or none (class 2)."""
    chance = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    wave = 60 * np.sin(np.arange(20) + chance.uniform(0, 6, (count, 1)))
    images = 128 + chance.normal(0, 20, (count, 20, 20))
    images[labels == 0] += wave[labels == 0, :, None]
    images[labels == 1] += wave[labels == 1, None, :]
    return Examples(torch.from_numpy(images.clip(0, 255).astype(np.uint8))[:, None], torch.from_numpy(labels))


@pytest.fixture(scope="module")
def striped():
    return ImageData("stripes", stripes(300, 1), stripes(90, 2), 256, ("lying", "standing", "none"), "", "")


@pytest.fixture(scope="module")
def network_judge(striped):
    return Judge.train(striped, seed=3)


def gaussian(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, size, generator=chance, dtype=torch.float64)
    return torch.randn(size, generator=chance, dtype=torch.float64), factor @ factor.T


def test_the_frechet_distance_of_gaussians_with_diagonal_covariances_has_a_closed_form():
    """It is the sum of the squared differences of the means and of the standard deviations."""
    means = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 2.0, 2.0])
    deviations = torch.tensor([1.0, 3.0, 0.0]), torch.tensor([2.0, 1.0, 0.5])
    covariances = [deviation.square().diag() for deviation in deviations]
    expected = 1 + 4 + 1 + 4 + 0.25
    found = frechet_distance(means[0], covariances[0], means[1], covariances[1])
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [1, 5, 40])
def test_the_frechet_distance_agrees_with_the_matrix_square_root_of_scipy(size):
    """scipy.linalg.sqrtm of the product, which is another algorithm."""
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    (mean, covariance), (other_mean, other_covariance) = gaussian(size, 0), gaussian(size, 1)
    root = np.real(sqrtm((covariance @ other_covariance).numpy()))
    expected = (mean - other_mean).square().sum() + covariance.trace() + other_covariance.trace() - 2 * np.trace(root)
    found = frechet_distance(mean, covariance, other_mean, other_covariance)
    assert found == pytest.approx(float(expected), rel=1e-9)
    assert found == pytest.approx(frechet_distance(other_mean, other_covariance, mean, covariance), rel=1e-9)


def test_a_gaussian_is_at_no_distance_from_itself_even_if_it_is_flat():
    """By definition; the covariance has rank 1."""
    mean, flat = torch.ones(4), torch.ones(4, 4)
    assert frechet_distance(mean, flat, mean, flat) == pytest.approx(0, abs=1e-9)


def test_the_judge_of_digits_is_right_and_confident_about_real_held_out_digits(judge, real):
    """SVC(C=10, gamma="scale"), sigmoid-calibrated in 5 folds by scikit-learn 1.9: .9933 right, .8956 confident."""
    assert judge.accuracy >= 0.98
    assert judge.reference_confident == pytest.approx(0.896, abs=0.02)
    assert judge.reference.samples == 297
    assert judge.reference.confident_error == pytest.approx(0.0177, abs=0.001)
    probabilities = judge.probabilities(real.held_out.levels)
    assert probabilities.shape == (297, 10)
    assert torch.allclose(probabilities.sum(1), torch.ones(297, dtype=torch.float64))


def test_the_judge_tells_real_digits_from_a_gaussian_and_from_noise(judge, real):
    """A Gaussian of the pixels' mean and covariance, and uniform noise, which confidence alone does not expose."""
    pixels = real.train.levels.flatten(1).double().numpy()
    chance = np.random.default_rng(0)

    def quality(values):
        levels = torch.from_numpy(values.round().clip(0, 16).astype(np.uint8)).reshape(-1, 1, 8, 8)
        return judge.quality(levels)

    drawn = quality(chance.multivariate_normal(pixels.mean(0), np.cov(pixels.T), 297))
    noise = quality(chance.uniform(0, 16, (297, 64)))
    assert drawn.confident < judge.reference_confident - 0.15
    assert 0.3 < noise.confident < judge.reference_confident - 0.15  # as the docstring of Quality warns
    assert 2 * judge.reference_frechet < drawn.frechet < noise.frechet / 5
    assert drawn.agreement is None


def test_the_distance_is_reported_beside_that_of_as_many_real_images(judge, real):
    """The held-out images themselves; and with fewer images the distance is larger, real though they are."""
    assert judge.reference.frechet_of_real == pytest.approx(judge.reference_frechet, rel=1e-9)
    few = judge.quality(real.held_out.levels[:60])
    assert few.frechet_of_real == pytest.approx(few.frechet, rel=0.5)
    assert min(few.frechet_of_real, few.frechet) > 1.5 * judge.reference_frechet


def test_a_missing_class_shows_in_the_shares_and_in_the_distance(judge, real):
    """The real training digits, with and without the threes."""
    levels, labels = real.train.levels, real.train.labels
    whole, lacking = judge.quality(levels), judge.quality(levels[labels != 3])
    assert sum(whole.classes.values()) == pytest.approx(1)
    assert whole.classes["3"] == pytest.approx(0.1, abs=0.02)
    assert lacking.classes["3"] < 0.005
    assert whole.frechet == pytest.approx(0, abs=1e-6)
    assert lacking.frechet > 0.3


def test_agreement_is_the_share_that_is_what_was_asked_for(judge, real):
    """Wrong labels for a quarter of the images, by construction."""
    levels, labels = real.train.levels[:400], real.train.labels[:400].clone()
    right = judge.quality(levels, labels).agreement
    labels[:100] = (labels[:100] + 1) % 10
    quality = judge.quality(levels, labels)
    assert right > 0.99
    assert quality.agreement == pytest.approx(0.75, abs=0.01)
    assert quality.agreement_error == pytest.approx((0.75 * 0.25 / 400) ** 0.5, rel=0.02)


def test_larger_images_are_judged_by_a_network(network_judge):
    """The stripes are far above the noise, so that nearly all can be told."""
    assert network_judge.accuracy > 0.97
    assert network_judge.reference_confident > 0.9
    assert network_judge.features(stripes(4, 5).levels).shape == (4, 64)


def test_training_a_network_is_repeatable_and_leaves_the_random_state_alone(striped, network_judge):
    """The same seed twice, even where the caller has gradients off; and the global generator before and after."""
    before = torch.get_rng_state()
    with torch.inference_mode():
        again = Judge.train(striped, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.reference == network_judge.reference


@pytest.mark.parametrize("kind", ["judge", "network_judge"])
def test_a_saved_judge_judges_alike(kind, request, tmp_path):
    """The judge before saving."""
    judge = request.getfixturevalue(kind)
    judge.save(tmp_path / "here")
    loaded = Judge.load(tmp_path / "here")
    images = torch.randint(0, judge.level_count, (20, *judge.shape), dtype=torch.uint8)
    assert loaded.quality(images) == judge.quality(images)
    assert (loaded.reference, loaded.classes, loaded.data) == (judge.reference, judge.classes, judge.data)


def test_a_missing_or_damaged_judge_says_what_to_do(judge, tmp_path):
    """Files removed and cut."""
    with pytest.raises(FileNotFoundError, match=r"judge\.json is missing.*Judge\.train"):
        Judge.load(tmp_path)
    judge.save(tmp_path)
    weights = tmp_path / "judge.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged: delete it and train it again"):
        Judge.load(tmp_path)


def test_data_that_no_judge_can_learn_from_are_refused(striped):
    """Without classes; with a class of too few images; with too few held out."""

    def changed(train, held_out, classes):
        return ImageData("odd", train, held_out, 256, classes, "", "")

    with pytest.raises(ValueError, match="has no classes"):
        Judge.train(changed(Examples(striped.train.levels), Examples(striped.held_out.levels), None))
    with pytest.raises(ValueError, match="5 training images of every class; 'blank' has 0"):
        Judge.train(changed(striped.train, striped.held_out, (*striped.classes, "blank")))
    with pytest.raises(ValueError, match=r"2 held-out images .* has 1"):
        Judge.train(changed(striped.train, stripes(1, 0), striped.classes))


def test_images_of_another_kind_are_refused(judge, real):
    """Floats, another shape, too high a level, a single one, and labels that do not match."""
    levels = real.held_out.levels
    with pytest.raises(ValueError, match=r"expects uint8 levels of shape \(N, 1, 8, 8\), got torch.float32"):
        judge.quality(levels.float())
    with pytest.raises(ValueError, match=r"got torch.uint8 of shape \(297, 1, 8, 7\)"):
        judge.quality(levels[..., 1:])
    with pytest.raises(ValueError, match=r"levels 0 \.\. 16 as in digits, got 17"):
        judge.features(torch.full((2, 1, 8, 8), 17, dtype=torch.uint8))
    with pytest.raises(ValueError, match="at least 2 images"):
        judge.quality(levels[:1])
    with pytest.raises(ValueError, match="one label for each of the 297 images"):
        judge.quality(levels, torch.zeros(3))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_nearest_image_is_found_exactly_whatever_the_chunk(chunk):
    """Brute force in numpy; copies are at distance 0 and the first of several is given."""
    chance = torch.Generator().manual_seed(0)
    reference = torch.randint(0, 256, (40, 3, 5, 5), dtype=torch.uint8, generator=chance)
    reference[30] = reference[12]
    samples = torch.randint(0, 256, (10, 3, 5, 5), dtype=torch.uint8, generator=chance)
    samples[4] = reference[12]
    distances, indices = nearest(samples, reference, 256, chunk)
    pixels = [2 * images.flatten(1).double().numpy() / 255 - 1 for images in (samples, reference)]
    table = np.linalg.norm(pixels[0][:, None] - pixels[1], axis=2)
    assert indices.tolist() == table.argmin(1).tolist()
    assert np.allclose(distances, table.min(1), rtol=1e-12, atol=0)
    assert (distances[4], indices[4]) == (0, 12)


def test_images_of_different_shapes_have_no_distance():
    """The shapes are in the error."""
    with pytest.raises(ValueError, match=r"one shape, got \(2, 1, 4, 4\) and \(2, 1, 5, 5\)"):
        nearest(torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 5, 5), 256)
