"""The adapter for diffusers' UNets, on a tiny one with random weights."""

import pytest
import torch

import kuosan as ks
from conftest import elbo
from kuosan.networks.diffusers import DiffusersUNet

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
    denoiser = ks.Denoiser(DiffusersUNet(model, steps=1000), process, predicts="eps")
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
    network = DiffusersUNet(model, steps=10, classes=3)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 0.5])
    with torch.no_grad():
        by_hand = model(x, torch.tensor([4.0, 4.0]), class_labels=torch.tensor([1, 3])).sample
        assert torch.allclose(network(x, t, torch.tensor([1, -1])), by_hand, atol=1e-5)


def test_samples_and_bounds_work_on_it():
    denoiser = ks.Denoiser(DiffusersUNet(unet()), ks.Process(ks.schedules.linear_beta_table()), "eps", levels=256)
    levels = (ks.sample(denoiser, (1, 8, 8), seeds=range(2), steps=3, transform=lambda x: x.clamp(-1, 1)) + 1) * 127.5
    bound = elbo(denoiser, levels.round() / 127.5 - 1, steps=5, variance="beta")
    assert torch.isfinite(bound.total).all()


def test_classes_that_do_not_fit_the_unet_are_refused():
    with pytest.raises(ValueError, match="4 classes need num_class_embeds = 5"):
        DiffusersUNet(unet(classes=3), classes=4)
