"""Pipelines of diffusers as runs: images and bounds against diffusers' own pipelines, and what is refused.

Every pipeline is tiny, of random weights, made and saved by diffusers itself.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import kuosan as ks
from conftest import elbo
from kuosan import recipe as recipes
from kuosan.autoencoders.convolution import Decoding
from kuosan.bridge.importing import import_pipeline
from kuosan.bridge.pipeline import PipelineError
from kuosan.build import AUTOENCODERS, make
from kuosan.chain import Chain
from kuosan.cli import main
from kuosan.decoders import DiscretisedGaussian
from kuosan.gaussian import Gaussian
from kuosan.kernels import Guide
from kuosan.recipe import RecipeError
from kuosan.runs import LatentRun
from kuosan.solvers import Noise, sample
from kuosan.train import train
from test_bridge_schedulers import doubled

os.environ["HF_HUB_OFFLINE"] = "1"
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:__array__ implementation")

SEEDS = [3, 1, 4]
BLOCKS = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
#: Stable Diffusion's betas.
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LATENT = BETAS | {"clip_sample": False}
DDIM = diffusers.DDIMScheduler


def unet(channels=3, **given):
    return diffusers.UNet2DModel(
        **{"sample_size": 8, "in_channels": channels, "out_channels": channels, "attention_head_dim": 4}
        | {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
        | BLOCKS
        | given
    )


def vae(**given):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(**BLOCKS | blocks | {"latent_channels": 4, "sample_size": 16} | given)


def vq():
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.VQModel(**BLOCKS | blocks, latent_channels=3, num_vq_embeddings=16, scaling_factor=0.5)


def dit():
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8
    )


def tokenizer(folder):
    """CLIP's, of single letters."""
    folder.mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{one}</w>" for one in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    made = transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=12)
    made.model_max_length = 12
    return made


def stable(folder):
    text = transformers.CLIPTextConfig(
        **{"vocab_size": 54, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "bos_token_id": 52}
        | {"num_attention_heads": 2, "max_position_embeddings": 12, "eos_token_id": 53, "pad_token_id": 53}
    )
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    blocks |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 8}
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=tokenizer(folder),
        unet=diffusers.UNet2DConditionModel(sample_size=8, attention_head_dim=2, **BLOCKS | blocks),
        scheduler=diffusers.PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def pipeline(name, folder):
    """A pipeline, the same ones every time, and what its ``__call__`` is told."""
    torch.manual_seed(0)
    if name == "ddpm":
        return diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler(num_train_timesteps=30)), {}
    if name == "ddpm, learned variance":
        scheduler = diffusers.DDPMScheduler(num_train_timesteps=30, variance_type="learned_range")
        return diffusers.DDPMPipeline(unet(out_channels=6), scheduler), {}
    if name == "ddim":
        return diffusers.DDIMPipeline(unet(1), DDIM(beta_schedule="squaredcos_cap_v2")), {
            "use_clipped_model_output": True  # without it x0 and the noise of a clipped x0 do not add up
        }
    if name == "ldm, vq":
        return diffusers.LDMPipeline(vq(), unet(3), DDIM(**LATENT)), {}
    if name == "ldm, kl":
        return diffusers.LDMPipeline(vae(), unet(4), DDIM(**LATENT)), {}
    if name == "ldm, clipped":
        scheduler = diffusers.DDPMScheduler(**BETAS, clip_sample_range=0.5, variance_type="fixed_large")
        return diffusers.LDMPipeline(vae(), unet(4), scheduler), {}
    if name == "ldm, euler":
        return diffusers.LDMPipeline(vae(), unet(4), diffusers.EulerDiscreteScheduler(**BETAS)), {}
    if name == "dit":
        classes = {str(i): f"name {i}, alias {i}" for i in range(1000)} | {"7": "name 6"}
        made = diffusers.DiTPipeline(dit(), vae(), diffusers.DPMSolverMultistepScheduler())
        made.register_to_config(id2label=classes)
        return made, {"class_labels": [5, 0, 999]}
    return stable(folder / "words"), {"prompt": ["a cat", "dog", ""], "guidance_scale": 7.5}


PIPELINES = (
    *("ddpm", "ddpm, learned variance", "ddim", "ldm, vq", "ldm, kl", "ldm, clipped", "ldm, euler"),
    *("dit", "stable diffusion"),
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By name: (the pipeline, what its call is told, the folder in which it was saved)."""
    found = {}

    def of(name):
        if name not in found:
            folder = tmp_path_factory.mktemp("pipelines")
            made, told = pipeline(name, folder)
            made.set_progress_bar_config(disable=True)
            for part in made.components.values():
                if isinstance(part, nn.Module):
                    part.eval()  # DiT's labels are dropped now and then in training
            made.save_pretrained(folder / "saved", safe_serialization=True)
            found[name] = made, told, folder / "saved"
        return found[name]

    return of


@pytest.fixture(scope="module")
def imported(saved, tmp_path_factory):
    """By name: the run of a pipeline whose folder is gone."""
    found = {}

    def of(name):
        if name not in found:
            folder = tmp_path_factory.mktemp("runs")
            shutil.copytree(saved(name)[2], folder / "source")
            import_pipeline(folder / "source", folder / "run")
            shutil.rmtree(folder / "source")
            found[name] = ks.load(folder / "run")
        return found[name]

    return of


@pytest.fixture
def copy(saved, tmp_path):
    """Of a saved pipeline, to be spoilt."""

    def of(name):
        return shutil.copytree(saved(name)[2], tmp_path / "pipeline")

    return of


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def theirs(made, told, noise, steps, monkeypatch):
    """Images in [0, 1] of diffusers' own pipeline, whose every draw is ours."""
    for module in {type(made).__module__, type(made.scheduler).__module__}:
        if hasattr(sys.modules[module], "randn_tensor"):
            monkeypatch.setattr(sys.modules[module], "randn_tensor", lambda *args, **given: noise.draw())
    told = dict(told)
    if isinstance(made, diffusers.StableDiffusionPipeline):
        told["latents"] = noise.draw()
    elif not isinstance(made, diffusers.DiTPipeline):
        told["batch_size"] = len(SEEDS)
    return torch.from_numpy(made(**told, num_inference_steps=steps, output_type="np").images).movedim(-1, 1)


def ours(run, steps, labels, dtype):
    """The same of the run's model and table."""
    sampler = run.sampler(steps=steps)
    x = sample(
        sampler.model,
        run.state_shape,
        seeds=SEEDS,
        table=sampler.table,
        transform=sampler.transform,
        temperature=sampler.start,
        condition=labels,
        dtype=dtype,
    )
    x = run.decoded(run.autoencoder, x) if isinstance(run, LatentRun) else x
    return (x / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("name", PIPELINES)
def test_images_are_those_of_diffusers(name, saved, imported, monkeypatch):
    """To 1e-5, from the same noise, with the pipeline's own scheduler.

    In float64, the scheduler too; as they are both are float32, where betas are rounded: to 1e-4.
    """
    made, told, _ = saved(name)
    run, steps = imported(name), 30 if "ddpm" in name else 8
    labels = None
    if name == "dit":
        labels = torch.tensor(told["class_labels"])
    elif name == "stable diffusion":
        labels = run.medium.conditions(told["prompt"])
    mine = ours(run, steps, labels, torch.float32)
    wanted = theirs(made, told, Noise(SEEDS, run.state_shape), steps, monkeypatch)
    assert wanted.std() > 0.01  # a blank image would be easy to make
    assert torch.allclose(mine, wanted, rtol=0, atol=1e-4)

    single = made.scheduler
    try:
        with doubled():
            made.to(torch.float64).register_modules(scheduler=type(single).from_config(single.config))
            wanted = theirs(made, told, Noise(SEEDS, run.state_shape, torch.float64), steps, monkeypatch)
        run.model.double()
        mine = ours(run, steps, labels, torch.float64)
    finally:
        made.to(torch.float32).register_modules(scheduler=single)
        run.model.float()
    assert mine.dtype == torch.float64
    assert torch.allclose(mine, wanted.double(), rtol=0, atol=1e-5)  # of text the pipeline's images are float32


@pytest.mark.parametrize("name", ["ddim", "dit", "stable diffusion"])
def test_weights_are_those_of_the_files(name, saved, imported):
    """Bit for bit, by the names that the files have for them."""
    *_, folder = saved(name)
    run = imported(name)
    parts = {"unet": "network.model", "transformer": "network.model", "vae": "model.decoder.autoencoder"}
    parts["text_encoder"] = "network.encoder"
    kept, seen = run.store.load().tensors, 0
    assert kept["weights"].keys() >= kept["ema"].keys()
    for part, prefix in parts.items():
        for file in sorted((folder / part).glob("*.safetensors")):
            for key, tensor in load_file(file).items():
                ours = [own for own in kept["weights"] if own.endswith(f"{prefix}.{key}")]
                assert len(ours) == 1, key
                assert torch.equal(kept["weights"][ours[0]], tensor)
                assert torch.equal(kept["ema"].get(ours[0], tensor), tensor)
                seen += 1
    assert seen == len(kept["weights"])


class Told(nn.Module):
    """A UNet of diffusers by hand: time i of so many steps is its timestep i - 1."""

    def __init__(self, unet, steps):
        super().__init__()
        self.unet, self.steps = unet, steps

    def forward(self, x, t, condition=None):
        return self.unet(x, t.double() * self.steps - 1).sample


def test_the_bound_is_that_of_the_same_weights_by_hand(saved, imported, pictures):
    """Truth: a denoiser and a chain made by hand of diffusers' own UNet; to 1e-6 bits per dimension."""
    made, _, _ = saved("ddpm")
    run = imported("ddpm")
    _, x = run.medium.read_files([pictures])
    process = ks.Process(ks.schedules.linear_beta_table(30))
    denoiser = ks.Denoiser(Told(made.unet, 30), process, "eps", levels=256)
    wanted = elbo(denoiser, x, steps=30, variance="beta", seed=0).bits_per_dim().total
    found = run.evaluate(["bound"], files=[pictures], quality=False)
    assert found["bits_per_dim"]["total"] == pytest.approx(wanted, abs=1e-6)
    assert found["likelihoods"]["bound"]["steps"] == 30


class Encoder(Guide):
    """q(z | x) by hand: what diffusers' encoder says, times the scaling factor."""

    length = 1

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def up(self, i, below, given):
        law, scale = self.vae.encode(below[0]).latent_dist, self.vae.config.scaling_factor
        return Gaussian(law.mean * scale, (law.std * scale) ** 2)


class Decoder(nn.Module):
    """p(x | z) by hand: noise of 0.125 around what diffusers' decoder says, in the bins of 256 levels."""

    kind, shape = "discretised", (3, 16, 16)

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, z):
        mean = self.vae.decode(z / self.vae.config.scaling_factor).sample
        return DiscretisedGaussian(mean, torch.full_like(mean, 0.125**2), 256)


def test_the_bound_of_codes_is_that_of_the_same_weights_by_hand(saved, imported, pictures):
    """Truth: a ladder made by hand of diffusers' own modules, over a denoiser of its codes; to 1e-6 bits."""
    made, _, _ = saved("ldm, kl")
    run = imported("ldm, kl")
    _, x = run.medium.read_files([pictures])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    process = ks.Process(ks.schedules.from_alpha_bar(torch.cumprod(1 - betas, 0)))
    denoiser = ks.Denoiser(Told(made.unet, 1000), process, "eps")
    prior = ks.DiffusionChain(denoiser, steps=100, variance="beta", form="continuous")
    by_hand = Chain(Encoder(made.vqvae), Decoding(((3, 16, 16), (4, 8, 8)), Decoder(made.vqvae), prior))
    how = run.elbo_settings(by_hand)
    wanted = by_hand.elbo(x, **how).bits_per_dim().total
    measured = run.evaluate(["bound"], files=[pictures], quality=False)["bits_per_dim"]["total"]
    assert measured == pytest.approx(wanted, rel=1e-6)  # of 28 bits in float32
    try:
        wanted = by_hand.double().elbo(x.double(), **how).bits_per_dim()
        found = run.autoencoder.double().elbo(x.double(), **how).bits_per_dim()
    finally:
        by_hand.float()
        run.autoencoder.float()
    assert found.total == pytest.approx(wanted.total, abs=1e-6)
    assert found.reconstruction == pytest.approx(wanted.reconstruction, abs=1e-6)


def test_a_code_book_has_no_bound(imported, pictures):
    run = imported("ldm, vq")
    with pytest.raises(ValueError, match="a VQModel are entries of a code book"):
        run.evaluate(["bound"], files=[pictures], quality=False)


def test_an_imported_run_samples_by_other_solvers_too(imported):
    run = imported("ddim")
    own = run.sampler()
    assert own.how["solver"] == "diffusers' DDIMScheduler"
    assert own.transform is not None
    other = run.sampler(solver={"kind": "dpm_solver++", "order": 2}, steps=5)
    assert (other.table.evaluations, str(other.transform)) == (5, "Clip(low=-1.0, high=1.0)")
    assert run.sample(2, solver={"kind": "ddim"}, steps=3).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="times of its own: drop the grid and the image"):
        run.sampler(grid={"kind": "karras"})
    config = json.dumps({"_class_name": "DDPMScheduler", "num_train_timesteps": 50})
    with pytest.raises(ValueError, match="tables for its own process"):
        run.sampler(solver={"kind": "diffusers", "config": config}, steps=3)


def test_eta_is_ddim_s_own(imported):
    run = imported("ddim")
    table = run.recipe.sampling.solver
    assert run.sampler(steps=5, solver=table | {"eta": 1.0}).table.stochastic
    assert not run.sampler(steps=5).table.stochastic


def test_classes_of_dit_have_their_first_name(imported):
    """And where two are the same, their numbers."""
    run = imported("dit")
    assert run.classes[5] == "name 5"
    assert (run.classes[6], run.classes[7]) == ("name 6 (6)", "name 6 (7)")
    assert run.recipe.sampling.guidance == 3.0
    assert run.sample(2, steps=2).shape == (2, 3, 16, 16)


def test_embeddings_of_a_unet_are_classes_unless_data_says_one_less(tmp_path, pictures):
    torch.manual_seed(0)
    made = diffusers.DDPMPipeline(unet(num_class_embeds=3), diffusers.DDPMScheduler(num_train_timesteps=10))
    made.save_pretrained(tmp_path / "pipeline")
    run = import_pipeline(tmp_path / "pipeline", tmp_path / "run").run
    assert run.classes == ("0", "1", "2")
    assert run.recipe.training.label_drop == 0.0
    with pytest.raises(ValueError, match="never trained without a class"):
        run.evaluate(files=[pictures])
    for i, file in enumerate(sorted(pictures.glob("*.png"))):
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "data" / "ab"[i % 2])
    told = import_pipeline(tmp_path / "pipeline", tmp_path / "told", tmp_path / "data").run
    assert told.classes == ("a", "b")
    assert told.recipe.training.label_drop > 0
    assert told.sampler(guidance=1.0)
    with pytest.raises(PipelineError, match="a sub-folder for each class, 3 or 2; got none"):
        import_pipeline(tmp_path / "pipeline", tmp_path / "other", pictures)


def test_prompts_are_read_once_for_a_whole_loop(imported, monkeypatch):
    run = imported("stable diffusion")
    network = run.denoiser.network
    calls = []
    network.encoder.register_forward_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(network, "_said", None)
    images = run.sample(2, prompt=["a cat", "dog"], steps=4)
    assert images.shape == (2, 3, 16, 16)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="at most 12 tokens"):
        run.sampler(prompt="a very long prompt indeed")
    assert run.sample(1, steps=2, negative="dog", prompt="cat").shape == (1, 3, 16, 16)


def test_texts_of_one_s_own_are_measured_and_trained_on(saved, tmp_path, pictures):
    shutil.copytree(pictures, tmp_path / "data")
    for file in (tmp_path / "data").glob("*.png"):
        file.with_suffix(".txt").write_text(f"a cat {'abcdefgh'[int(file.stem)]}")
    run = import_pipeline(saved("stable diffusion")[2], tmp_path / "run", tmp_path / "data").run
    assert run.recipe.autoencoder["std"] != 0.125
    assert run.labels_for(2).shape == (2, 12)
    assert run.evaluate(["bound"], quality=False)["split"] == "held_out"
    recipe = recipes.read(tmp_path / "run" / "recipe.toml", ["training.batch_size=2", "training.sample_every=0"])
    after = dict(train(recipe, tmp_path / "tuned").model.named_parameters())
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, after[name])}
    assert moved
    assert all(".network.model." in name for name in moved)  # and neither the text encoder nor the autoencoder


def test_images_need_not_be_square(tmp_path, pictures, capsys):
    torch.manual_seed(0)
    made = diffusers.DDPMPipeline(unet(1, sample_size=(8, 16)), diffusers.DDPMScheduler(num_train_timesteps=10))
    made.save_pretrained(tmp_path / "pipeline")
    run = import_pipeline(tmp_path / "pipeline", tmp_path / "run").run
    assert run.sample(2).shape == (2, 1, 8, 16)
    assert main(["sample", str(tmp_path / "run"), "-n", "2", "--steps", "2"]) == 0
    with pytest.raises(PipelineError, match="pictures are read as squares, and this pipeline makes 8 x 16"):
        import_pipeline(tmp_path / "pipeline", tmp_path / "other", pictures)


def test_a_safety_checker_is_left_out_and_said_to_be(copy, tmp_path, capsys):
    folder = copy("stable diffusion")
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    change(folder / "model_index.json", **checker, feature_extractor=["transformers", "CLIPImageProcessor"])
    assert main(["import", str(folder), "--out", str(tmp_path / "run")]) == 0
    assert "left out    feature_extractor, safety_checker" in capsys.readouterr().out


def test_without_data_a_run_says_what_to_do(imported):
    run = imported("ddpm")
    with pytest.raises(RecipeError, match=r"imported without data\. Name pictures with"):
        run.evaluate(["bound"])
    assert "imported without data" in run.why_no_judge or "no classes" in run.why_no_judge


def test_with_data_it_is_measured_and_trained_on(saved, tmp_path, pictures):
    """The best std is the root of the mean squared error; training goes on from the imported weights."""
    run = import_pipeline(saved("ldm, kl")[2], tmp_path / "run", pictures).run
    x, _ = run.medium.batch(run.data.train, torch.arange(len(run.data.train)))
    with torch.no_grad():
        error = (run.autoencoder.decode(run.autoencoder.encode(x).mean).mean - x).square().mean().sqrt()
    assert run.recipe.autoencoder["std"] == pytest.approx(float(error), rel=1e-5)
    assert run.evaluate(["bound"], quality=False)["split"] == "held_out"
    recipe = recipes.read(tmp_path / "run" / "recipe.toml", ["training.batch_size=2"])
    tuned = train(recipe, tmp_path / "tuned")
    before, after = (dict(one.model.named_parameters()) for one in (run, tuned))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("model.prior") for name in moved)
    assert all(torch.allclose(before[name], after[name], atol=0.01) for name in before)


def test_the_command_line_imports_samples_and_measures(saved, tmp_path, pictures, capsys):
    *_, folder = saved("ldm, kl")
    assert main(["import", str(folder), "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    for words in ("pipeline    LDMPipeline of diffusers", "codes 4 x 8 x 8", "50 steps of DDIMScheduler", "next  "):
        assert words in said
    assert main(["sample", str(tmp_path / "run"), "-n", "2", "--steps", "3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["samples"]) == 2
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(pictures)]) == 0
    assert "bits per dimension" in capsys.readouterr().out
    assert main(["import", str(folder), "--out", str(tmp_path / "run")]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["import", str(folder), "--out", str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["codes"] == [4, 8, 8]


def test_names_of_old_files_are_read_too(copy, tmp_path, imported):
    """As Stable Diffusion's files have them: attention by other names, and positions that are counted."""
    folder = copy("stable diffusion")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors, renamed = load_file(file), {}
    for name, tensor in tensors.items():
        for new, before in old.items():
            name = name.replace(f".{new}.", f".{before}.")
        renamed[name] = tensor
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file)
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(12)[None]}, file, {"format": "pt"})
    run, same = import_pipeline(folder, tmp_path / "run").run, imported("stable diffusion")
    for name, tensor in same.model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], tensor)


def test_weights_in_half_precision_become_float32(copy, tmp_path):
    folder = copy("ddim")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(file).items()}
    save_file(half, file)
    run = import_pipeline(folder, tmp_path / "run").run
    assert all(
        torch.equal(p, half[name.removeprefix("network.model.")].float()) for name, p in run.model.named_parameters()
    )


def test_weights_in_shards_are_put_together(copy, tmp_path, imported):
    folder = copy("ddim") / "unet"
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    names = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for one in set(names.values()):
        save_file({k: v for k, v in tensors.items() if names[k] == one}, folder / one, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / f"{file.name}.index.json").write_text(json.dumps(index))
    run = import_pipeline(folder.parent, tmp_path / "run").run
    assert all(
        torch.equal(p, q) for p, q in zip(run.model.parameters(), imported("ddim").model.parameters(), strict=True)
    )


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def drop(path, *fields):
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in fields}))


def as_pickle(folder):
    file = next(folder.glob("*.safetensors"))
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def with_other_weights(folder, **more):
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors | more, file)


def sharded(folder, *names):
    file = next(folder.glob("*.safetensors"))
    weights = dict.fromkeys(load_file(file), names[0])
    weights[next(iter(weights))] = names[-1]
    file.rename(folder / "shard-1.safetensors")
    (folder / f"{file.name}.index.json").write_text(json.dumps({"weight_map": weights}))


SPOILT = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "it has no model_index.json"),
    "index not JSON": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json is not JSON"),
    "no component": (lambda f: shutil.rmtree(f / "unet"), "unet: this component's folder is missing"),
    "not listed": (lambda f: drop(f / "model_index.json", "scheduler"), "scheduler is missing, of which DDIMPipeline"),
    "no config": (lambda f: (f / "unet" / "config.json").unlink(), "unet/config.json is missing"),
    "config not JSON": (lambda f: (f / "unet" / "config.json").write_text("x"), "unet/config.json is not JSON"),
    "config a list": (lambda f: (f / "unet" / "config.json").write_text("[]"), "unet/config.json is not a JSON object"),
    "no weights": (lambda f: next((f / "unet").glob("*.safetensors")).unlink(), "pytorch_model.safetensors is missing"),
    "pickle": (lambda f: as_pickle(f / "unet"), "is a pickle, which could run any code and is not opened"),
    "missing weights": (lambda f: with_other_weights(f / "unet"), "do not fit config.json: missing keys"),
    "other shapes": (lambda f: change(f / "unet/config.json", block_out_channels=[4, 4]), "do not fit config.json"),
    "not safetensors": (
        lambda f: next((f / "unet").glob("*.safetensors")).write_bytes(b"x" * 99),
        "unet: the weights",
    ),
    "a shard missing": (
        lambda f: sharded(f / "unet", "shard-1.safetensors", "shard-2.safetensors"),
        "shard-2.safetensors is missing, of which the weights are made",
    ),
    "a shard elsewhere": (
        lambda f: sharded(f / "unet", "../shard.safetensors"),
        "'../shard.safetensors' is not the name of a file beside it",
    ),
    "code": (lambda f: (f / "unet" / "net.py").write_text("x = 1"), "code that comes with a pipeline is not run"),
    "auto_map": (lambda f: change(f / "unet/config.json", auto_map={"A": "b.C"}), "auto_map asks for code"),
    "another library": (
        lambda f: change(f / "model_index.json", unet=["my_code", "UNet2DModel"]),
        "unet is of my_code, and code that is not diffusers' is not run",
    ),
    "a pipeline of its own": (
        lambda f: change(f / "model_index.json", _class_name=["pipeline", "Mine"]),
        "code that comes with a pipeline is not run",
    ),
    "unknown pipeline": (
        lambda f: change(f / "model_index.json", _class_name="FluxPipeline"),
        "pipelines that are read are DDPMPipeline, .* got FluxPipeline",
    ),
    "unknown component": (
        lambda f: change(f / "model_index.json", controlnet=["diffusers", "ControlNetModel"]),
        "DDIMPipeline has no controlnet",
    ),
    "unknown network": (
        lambda f: (
            change(f / "unet/config.json", _class_name="UNet1DModel"),
            change(f / "model_index.json", unet=["diffusers", "UNet1DModel"]),
        ),
        "unet/config.json: _class_name is 'UNet1DModel'; what is read here is UNet2DModel",
    ),
    "two classes": (
        lambda f: change(f / "model_index.json", unet=["diffusers", "UNet1DModel"]),
        "config.json is of a UNet2DModel, and model_index.json of a UNet1DModel",
    ),
    "unknown scheduler field": (
        lambda f: change(f / "scheduler/scheduler_config.json", new_field=1),
        "scheduler/scheduler_config.json: DDIMScheduler: unknown new_field",
    ),
    "unknown network field": (
        lambda f: change(f / "unet/config.json", new_field=1),
        "UNet2DModel has no new_field in this version of diffusers",
    ),
    "no size": (lambda f: change(f / "unet/config.json", sample_size=None), "sample_size is a side, or two, got None"),
    "channels": (lambda f: change(f / "unet/config.json", in_channels=2), "one channel or three, got 2"),
    "a link": (
        lambda f: (f / "unet" / "more").symlink_to(f.parent.parent),
        "more: a link that leads out of the folder is not followed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_not_read_is_refused(what, copy, tmp_path):
    folder = copy("ddim")
    spoil, message = SPOILT[what]
    spoil(folder)
    with pytest.raises(PipelineError, match=message) as refused:
        import_pipeline(folder, tmp_path / "run")
    assert str(folder) in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_an_index_beside_whole_weights_is_looked_through_too(copy, tmp_path):
    """diffusers takes the index first, and would open what it names."""
    folder = copy("ddim")
    name = "unet/diffusion_pytorch_model.safetensors.index.json"
    (folder / name).write_text(json.dumps({"weight_map": {"conv_in.weight": "shard.bin"}}))
    (folder / "unet/shard.bin").write_bytes(b"")
    with pytest.raises(PipelineError, match=r"'shard\.bin' is not the name of a file beside it"):
        import_pipeline(folder, tmp_path / "run")


def test_an_unknown_scheduler_is_refused_by_name(copy, tmp_path):
    folder = copy("ldm, kl")
    change(folder / "scheduler/scheduler_config.json", _class_name="HeunDiscreteScheduler")
    with pytest.raises(PipelineError, match=r"scheduler_config.json: _class_name is 'HeunDiscreteScheduler'; these"):
        import_pipeline(folder, tmp_path / "run")


def test_a_shift_of_codes_that_no_pipeline_takes_notice_of_is_refused(copy, tmp_path):
    folder = copy("ldm, kl")
    change(folder / "vqvae/config.json", shift_factor=0.1)
    with pytest.raises(PipelineError, match=r"shift_factor is 0\.1, of which this pipeline"):
        import_pipeline(folder, tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "given", "message"),
    [
        ({"_class_name": "AsymmetricAutoencoderKL"}, {}, "_class_name is 'AsymmetricAutoencoderKL'"),
        ({"in_channels": 1}, {}, "in_channels and out_channels must be 3"),
        ({"latents_mean": [0.0] * 4}, {}, "latents_mean is not read"),
        ({}, {"shape": (3, 15, 16)}, "an image of 15 x 16 is not divided by 2"),
        ({}, {"std": 0.0}, "std is the standard deviation .* over 0"),
    ],
)
def test_an_autoencoder_that_does_not_fit_is_refused(fields, given, message):
    config = {k: v for k, v in vae().config.items() if k[0] != "_"} | {"_class_name": "AutoencoderKL"} | fields
    table = {"kind": "diffusers", "config": json.dumps(config)}
    table |= {"std": given["std"]} if "std" in given else {}
    with pytest.raises(RecipeError, match=message):
        make(AUTOENCODERS, table, "autoencoder", shape=given.get("shape", (3, 16, 16)), levels=256)


def test_a_shift_of_codes_is_undone_before_decoding():
    """Truth: the KL autoencoder called by hand."""
    torch.manual_seed(0)
    own = vae(shift_factor=0.3, scaling_factor=0.7).eval()
    config = json.dumps({"_class_name": "AutoencoderKL", **{k: v for k, v in own.config.items() if k[0] != "_"}})
    ladder = make(AUTOENCODERS, {"kind": "diffusers", "config": config}, "autoencoder", shape=(3, 16, 16), levels=256)
    ladder.model.decoder.autoencoder.load_state_dict(own.state_dict())
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        code = own.encode(x).latent_dist.mean
        assert torch.allclose(ladder.encode(x).mean, (code - 0.3) * 0.7, atol=1e-6)
        assert torch.allclose(ladder.decode((code - 0.3) * 0.7).mean, own.decode(code).sample, atol=1e-5)


def test_nothing_of_diffusers_is_imported_before_it_is_needed():
    code = "import kuosan.bridge.importing, kuosan.runs, sys; print({'diffusers', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(PipelineError, match="nowhere: there is no such folder"):
        import_pipeline(tmp_path / "nowhere")
