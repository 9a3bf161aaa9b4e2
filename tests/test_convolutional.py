"""The autoencoder of convolutions: codes of the size asked for, a bound that is one, and a run like any other."""

import itertools
import json
import math

import pytest
import torch

from kuosan import build
from kuosan import recipe as recipes
from kuosan.autoencoders import DECODERS, ConvolutionalAutoencoder
from kuosan.autoencoders.convolution import Pyramid
from kuosan.bound import Bound
from kuosan.cli import main
from kuosan.recipe import RecipeError
from kuosan.runs import load
from kuosan.train import train
from test_autoencoders import dice, seeded, shaken


def model(shape=(1, 2, 2), levels=2, size=0.3, **settings):
    given = {"channels": 1, "factor": 2, "decoder": "levels", "width": 8} | settings
    return shaken(seeded(ConvolutionalAutoencoder, shape, levels, **given).double(), size).eval()


@pytest.mark.parametrize("decoder", ["levels", "mixture", "discretised"])
def test_the_chances_of_all_images_add_up_to_one(decoder):
    """Truth: every image of four pixels with two levels; P of each by 4,000 weighted paths. The bound is below P."""
    autoencoder = model(decoder=decoder, size=0.1)
    x = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=torch.float64).view(16, 1, 2, 2)
    found = autoencoder.importance_weighted(x, samples=4000, batch_size=16_000)
    chances, errors = found.log_prob.exp(), found.log_prob.exp() * found.example_error
    assert chances.sum() == pytest.approx(1, abs=5 * float(errors.square().sum().sqrt()) + 1e-3)
    bound = autoencoder.elbo(x, estimator="path", draws=200)
    assert isinstance(bound, Bound)
    assert float((chances * bound.total).sum()) < float((chances * found.log_prob).sum())


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(("channels", "factor"), [(4, 2), (1, 8), (3, 4)])
def test_a_code_is_smaller_than_its_image_by_the_factor(decoder, channels, factor):
    autoencoder = model((3, 16, 8), 5, channels=channels, factor=factor, decoder=decoder)
    x = torch.randint(5, (2, 3, 16, 8), generator=dice(), dtype=torch.float64) / 2 - 1
    path = autoencoder.path(x, generator=dice())
    assert tuple(path.z[1].shape[1:]) == autoencoder.code == (channels, 16 // factor, 8 // factor)
    law = autoencoder.model.down(0, (path.z[1],))
    assert law.mean.shape == x.shape
    assert law.log_prob(x).shape == x.shape


@pytest.mark.parametrize("up", [False, True])
def test_pixels_stay_where_they_are(up):
    """A change in one corner is not felt in the one opposite: truth, the reach of a few 3x3 convolutions."""
    network = shaken(seeded(Pyramid, 1, 1, 4, up, 8, 1, 0, 0.0).double(), 0.2).eval()
    size = 16 if up else 64
    x = torch.zeros(1, 1, size, size, dtype=torch.float64)
    other = x.clone()
    other[..., :4, -4:] = 1
    for part in network.modules():  # which looks at the whole image at once
        if isinstance(part, torch.nn.GroupNorm):
            part.forward = lambda h: h
    with torch.no_grad():
        moved = (network(other) - network(x)).abs()[0, 0]
    assert moved.shape == ((64, 64) if up else (16, 16))
    n = len(moved) // 4
    assert moved[:n, -n:].min() > 0
    assert moved[-n:, :n].max() == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"factor": 3}, "factor must be a power of two that divides 8 x 8 pixels, got 3"),
        ({"factor": 16}, "factor must be a power of two"),
        ({"channels": 0}, "at least one channel"),
        ({"width": 12}, "width must be a multiple of 8"),
        ({"decoder": "poisson"}, "decoder must be one of"),
        ({"shape": (64,)}, r"convolutions are of images \(C, H, W\)"),
    ],
)
def test_sizes_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        ConvolutionalAutoencoder(**{"shape": (1, 8, 8), "levels": 17} | settings)


def recipe():
    """That of the VAE of digits, with convolutions."""
    table = recipes.shipped()["digits-vae"].read_text("utf-8")
    head, _, tail = table.partition("[autoencoder]")
    body = tail[tail.index("[") :] if "[" in tail else ""
    return head + '[autoencoder]\nkind = "convolutional"\nchannels = 2\nfactor = 4\nwidth = 16\n\n' + body


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("convolutional")
    (folder / "small.toml").write_text(recipe(), "utf-8")
    small = ("training.steps=60", "training.batch_size=32", "training.sample_every=0", "evaluation.samples=16")
    return train(recipes.read(folder / "small.toml", small), folder / "run")


@pytest.mark.slow
def test_a_run_of_convolutions_is_sampled_measured_and_reported(run):
    loaded = load(run.folder)
    assert isinstance(loaded.autoencoder, ConvolutionalAutoencoder)
    assert loaded.sample(3).shape == (3, 1, 8, 8)
    assert main(["evaluate", str(run.folder), "--examples", "20"]) == 0
    found = json.loads((run.folder / "evaluation.json").read_text("utf-8"))
    assert math.isfinite(found["bits_per_dim"]["total"])
    assert main(["report", str(run.folder)]) == 0
    numbers = json.loads((run.folder / "report.json").read_text("utf-8"))
    assert numbers["units"]["layers"][0]["size"] == 2 * 2 * 2


def test_a_recipe_of_convolutions_with_settings_of_the_other_kind_is_refused(tmp_path):
    (tmp_path / "wrong.toml").write_text(recipe().replace("factor = 4", "latent = 4"), "utf-8")
    with pytest.raises(RecipeError, match="autoencoder: latent: there is no such key"):
        build.make_model(recipes.read(tmp_path / "wrong.toml"), (1, 8, 8), 17, 10)
