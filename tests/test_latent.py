"""Latent diffusion: codes scaled without a change of the images, an autoencoder that stays, samples that are images."""

import json
import math

import pytest
import torch

from kuosan import recipe as recipes
from kuosan.cli import main
from kuosan.image.data import to_levels
from kuosan.recipe import RecipeError
from kuosan.report import write_report
from kuosan.runs import LatentRun, RunError, load
from kuosan.train import train
from pages import Page, written
from test_autoencoders import dice
from test_convolutional import model

AUTOENCODER = """
[data]
name = "digits"
conditional = {conditional}

[autoencoder]
kind = "convolutional"
channels = 2
factor = 2
width = 16
decoder = "levels"
"""
FIRST = """
[objective]
kind = "elbo"

[training]
steps = 40
batch_size = 32
learning_rate = 3e-3
sample_every = 0
"""
SECOND = """
[process]
kind = "cosine"

[network]
kind = "transformer"
patch = 2
width = 16
depth = 1
heads = 2
channels = 8

[denoiser]
predicts = "x0"
preconditioning = "edm"
sigma_data = 1.0

[objective]
kind = "latent"
weighting = { kind = "edm", sigma_data = 1.0 }

[training]
steps = 6
batch_size = 16
warmup = 1
sample_every = 6
start = "START"

[sampling]
steps = 3
clip = false

[evaluation]
examples = 8
samples = 16
"""


def second(folder, start, *overrides):
    text = AUTOENCODER.format(conditional="true") + SECOND.replace("START", str(start))
    (folder / "second.toml").write_text(text, "utf-8")
    return recipes.read(folder / "second.toml", overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("latent")


@pytest.fixture(scope="module")
def first(folder):
    (folder / "first.toml").write_text(AUTOENCODER.format(conditional="false") + FIRST, "utf-8")
    return train(recipes.read(folder / "first.toml"), folder / "first")


@pytest.fixture(scope="module")
def run(folder, first):
    train(second(folder, first.folder), folder / "second")
    return load(folder / "second")


@torch.no_grad()
def test_codes_are_scaled_and_images_stay_as_they_are():
    """Truth: the laws before; the mean and standard deviation of codes, by numpy. Twice is as good as once."""
    autoencoder = model((1, 8, 8), 5, channels=3, factor=2, size=0.5)
    x = torch.randint(5, (200, 1, 8, 8), generator=dice(), dtype=torch.float64) / 2 - 1
    law = autoencoder.encode(x)
    image = autoencoder.decode(law.mean).mean
    for _ in range(2):
        autoencoder.rescale(autoencoder.encode(x).sample(generator=dice(1)))
        codes = autoencoder.encode(x)
        assert torch.allclose(autoencoder.decode(codes.mean).mean, image, atol=1e-9)
        drawn = codes.sample(generator=dice(1)).transpose(0, 1).flatten(1).numpy()
        assert abs(drawn.mean(1)).max() < 1e-6
        assert abs(drawn.std(1, ddof=1) - 1).max() < 1e-6
    ratio = (law.variance / codes.variance).transpose(0, 1).flatten(1)
    assert ratio.std(1).max() < 1e-6 * ratio.mean()  # the noise is scaled with them


def test_the_autoencoder_stays_as_it_was_and_its_prior_is_trained(first, run):
    assert isinstance(run, LatentRun)
    before, after = dict(first.autoencoder.named_parameters()), dict(run.autoencoder.named_parameters())
    assert before
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert any(name.startswith("model.prior_chain") for name in after)
    assert len(run.log()) == 6
    codes, labels = run.states(run.data.train)
    assert codes.shape[1:] == run.state_shape == (2, 4, 4)
    assert codes.transpose(0, 1).flatten(1).std(1).numpy() == pytest.approx([1, 1], abs=0.05)
    assert labels is not None


def test_samples_are_images_of_codes_and_depend_on_seed_and_class_alone(run):
    """Truth: the codes that the denoiser's own sampler draws, decoded by the autoencoder."""
    both = run.sample(4, labels=torch.tensor([3, 3, 5, 5]))
    assert both.shape == (4, 1, 8, 8)
    assert torch.equal(run.sample(seeds=[2], labels=torch.tensor([5])), both[2:3])
    import kuosan

    sampler = run.sampler()
    codes = kuosan.sample(run.denoiser, (2, 4, 4), seeds=[2], table=sampler.table, condition=torch.tensor([5]))
    with torch.no_grad():
        assert torch.equal(to_levels(run.autoencoder.decode(codes).mean, 17), both[2:3])
    assert (run.folder / "samples" / "step-00000006.png").is_file()


def test_guidance_tables_and_the_variance_are_of_codes(run, capsys):
    assert not torch.equal(run.sample(8, guidance=50.0), run.sample(8))
    assert main(["tune", str(run.folder), "--steps", "2", "--pairs", "4", "--iterations", "2", "--fine", "6"]) == 0
    assert "tuned" in run.sampler(steps=2).how["solver"]
    assert run.optimal_variance.error.shape[1:] == (2, 4, 4)


def test_the_bound_is_of_images_and_has_all_its_parts(run, capsys):
    """Truth: the layer's own decoding and entropy, and the bound of the denoiser on the same codes, added up."""
    assert main(["evaluate", str(run.folder)]) == 0
    found = json.loads((run.folder / "evaluation.json").read_text("utf-8"))
    assert math.isfinite(found["bits_per_dim"]["total"])
    x, condition = run.examples("held_out", 8)
    autoencoder = run.autoencoder
    bound = autoencoder.elbo(x, condition, estimator="path", draws=200)
    with torch.no_grad():
        total = torch.zeros(len(x), dtype=torch.float64)
        for k in range(200):
            law = autoencoder.encode(x)
            z = law.sample(generator=dice(k))
            decoding = autoencoder.decode(z).log_prob(x).flatten(1).sum(1)
            prior = autoencoder.model.prior().estimate(z, condition, generator=dice(1000 + k))
            total += (decoding + prior - law.log_prob(z).flatten(1).sum(1)).double() / 200
    assert float(bound.total.mean()) == pytest.approx(float(total.mean()), abs=0.05 * abs(float(total.mean())))
    with pytest.raises(RunError, match="its bound has no variance to choose"):
        run.chain(variance="beta")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sampling.clip=true"], "set clip = false"),
        (["denoiser.learned_variance=true", "denoiser.predicts=eps"], "without a learned variance"),
        (["objective.kind=simple", "data.conditional=false", "sampling.clip=true"], "must be elbo, latent"),
        (["autoencoder={kind='vae', latent=8}"], "codes that are images: take convolutional"),
    ],
)
def test_a_recipe_of_latent_diffusion_that_cannot_be_is_refused(overrides, words, folder, first, tmp_path):
    with pytest.raises(RecipeError, match=words):
        train(second(folder, first.folder, *overrides), tmp_path / "run")


def test_latent_diffusion_needs_the_autoencoder_that_it_says(folder, first, tmp_path):
    text = (AUTOENCODER.format(conditional="false") + SECOND).replace('start = "START"\n', "")
    (tmp_path / "alone.toml").write_text(text, "utf-8")
    with pytest.raises(RecipeError, match=r"give training\.start, the run of one"):
        recipes.read(tmp_path / "alone.toml")
    with pytest.raises(RunError, match="is the run of another autoencoder: it lacks guide"):
        train(second(folder, first.folder, "autoencoder.width=8"), tmp_path / "other")
    with pytest.raises(RunError, match="is not a run"):
        train(second(folder, tmp_path / "nothing"), tmp_path / "other")


@pytest.mark.slow
def test_the_report_has_the_sections_of_both(run):
    page = Page(write_report(run, budget=0.5))
    page.check_alone()
    ids = [attributes["id"] for attributes in page.of("section")]
    expected = ["samples", "way", "loss", "bound", "reconstructions", "evaluations", "temperature", "neighbours"]
    assert [name for name in ids if name in expected] == expected
    numbers = written(run)
    assert numbers["bits_per_dim"]["held_out"]["layers"] == 1
    assert numbers["reconstructions"]["rmse"]["all layers"] > 0
    assert "Both are codes, decoded" in page.source
