"""Models of diffusers as networks, on tiny ones with random weights."""

import json

import pytest
import torch

import kuosan as ks
from conftest import elbo
from kuosan.bridge.networks import DiffusersNetwork
from kuosan.build import NETWORKS, make
from kuosan.recipe import RecipeError

diffusers = pytest.importorskip("diffusers")


def unet(classes: int = 0):
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        num_class_embeds=classes + 1 if classes else None,
    ).eval()


def test_time_i_of_n_is_timestep_i_minus_1_of_the_unet():
    """Truth: the UNet called by hand, and DDPM's formula for x0 from its noise."""
    model, process = unet(), ks.Process(ks.schedules.linear_beta_table(1000))
    denoiser = ks.Denoiser(DiffusersNetwork(model, steps=1000), process, predicts="eps")
    x_t = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        prediction, by_hand = denoiser(x_t, 0.4), model(x_t, torch.tensor([399, 399])).sample
    assert torch.allclose(prediction.eps, by_hand, atol=1e-5)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[399]
    x_0 = (x_t - (1 - alpha_bar).sqrt() * by_hand) / alpha_bar.sqrt()
    assert torch.allclose(prediction.x0, x_0.float(), atol=1e-4)


def test_a_conditional_unet_hears_the_class_and_any():
    """Truth: the UNet called by hand; its last class embedding stands for any class."""
    model = unet(classes=3)
    network = DiffusersNetwork(model, steps=10, classes=3)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 0.5])
    with torch.no_grad():
        by_hand = model(x, torch.tensor([4.0, 4.0]), class_labels=torch.tensor([1, 3])).sample
        assert torch.allclose(network(x, t, torch.tensor([1, -1])), by_hand, atol=1e-5)


def test_samples_and_bounds_work_on_it():
    denoiser = ks.Denoiser(DiffusersNetwork(unet()), ks.Process(ks.schedules.linear_beta_table()), "eps", levels=256)
    levels = (ks.sample(denoiser, (1, 8, 8), seeds=range(2), steps=3, transform=lambda x: x.clamp(-1, 1)) + 1) * 127.5
    bound = elbo(denoiser, levels.round() / 127.5 - 1, steps=5, variance="beta")
    assert torch.isfinite(bound.total).all()


def test_without_an_embedding_for_any_class_one_has_to_be_said():
    """Truth: the UNet called by hand; all four of its embeddings are classes, and so -1 is none of them."""
    model = unet(classes=3)
    network = DiffusersNetwork(model, steps=10, classes=4)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 0.5])
    with torch.no_grad():
        by_hand = model(x, torch.tensor([4.0, 4.0]), class_labels=torch.tensor([1, 3])).sample
        assert torch.equal(network(x, t, torch.tensor([1, 3])), by_hand)
    with pytest.raises(ValueError, match="4 class embeddings, none of them for any class"):
        network(x, t, torch.tensor([1, -1]))


def test_classes_that_do_not_fit_the_unet_are_refused():
    with pytest.raises(ValueError, match="5 classes need num_class_embeds = 6"):
        DiffusersNetwork(unet(classes=3), classes=5)
    with pytest.raises(ValueError, match="0 classes need num_class_embeds = 1"):
        DiffusersNetwork(unet(classes=3))


def test_float32_does_not_move_a_whole_timestep():
    """Truth: i - 1, exactly; of 1000 steps float32 has 998.99994 for some."""
    network = DiffusersNetwork(unet(), steps=1000)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert torch.equal(network.timestep(t.float()), torch.arange(1000.0))
    assert network.timestep(torch.tensor(0.12345)).item() == pytest.approx(122.45, abs=1e-4)


CONFIG = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
}
DIT = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 1,
    "sample_size": 4,
    "num_embeds_ada_norm": 3,
}


def test_a_recipe_makes_a_new_network_of_a_config():
    recipe = {"kind": "diffusers", "config": json.dumps(CONFIG | {"num_class_embeds": 4})}
    network = make(NETWORKS, recipe, "network", shape=(1, 8, 8), classes=3, outputs=1)
    assert network(torch.randn(2, 1, 8, 8), torch.rand(2)).shape == (2, 1, 8, 8)
    network = make(
        NETWORKS, {"kind": "diffusers", "config": json.dumps(DIT)}, "network", shape=(4, 4, 4), classes=3, outputs=1
    )
    assert network(torch.randn(2, 4, 4, 4), torch.rand(2)).shape == (2, 4, 4, 4)


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        ("{", {}, "config is not JSON"),
        ("[]", {}, "config is a JSON object, got list"),
        ({"_class_name": "UNet3D"}, {}, "_class_name is 'UNet3D'; what is read here is UNet2DModel"),
        ({"groups": 3}, {}, "UNet2DModel has no groups in this version of diffusers"),
        ({"down_block_types": ["X"]}, {}, "UNet2DModel of diffusers refuses its config"),
        ({}, {"shape": (3, 8, 8)}, "in_channels is 1, and what is diffused has 3 channels"),
        ({}, {"shape": (1, 7, 8)}, "halve 7 x 8 to no whole number"),
        ({}, {"shape": (64,)}, "of images"),
        ({}, {"outputs": 2}, "out_channels must be 2, of 2 x 1, got 1"),
        ({}, {"classes": 3}, "3 classes need num_class_embeds = 4"),
        (DIT | {"_class_name": "DiTTransformer2DModel"}, {"shape": (4, 6, 6), "classes": 3}, "sample_size is 4"),
        (DIT | {"attention_type": "other", "_class_name": "Transformer2DModel", "norm_type": "ada_norm_zero"},
         {"shape": (4, 4, 4), "classes": 3}, "has no attention_type"),
    ],
)  # fmt: skip
def test_configs_that_do_not_fit_are_refused(config, given, message):
    text = config if isinstance(config, str) else json.dumps(config if "num_layers" in config else CONFIG | config)
    with pytest.raises(RecipeError, match=message):
        make(
            NETWORKS,
            {"kind": "diffusers", "config": text},
            "network",
            **{"shape": (1, 8, 8), "classes": 0, "outputs": 1} | given,
        )
