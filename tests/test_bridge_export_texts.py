"""Runs that are told captions as pipelines of diffusers: the same tokens, the same weights, the same images."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import kuosan as ks
from kuosan.cli import main
from kuosan.runs import RunError
from kuosan.train import train
from test_captioned import AUTOENCODER, RECIPE, encoder, read, squares

os.environ["HF_HUB_OFFLINE"] = "1"
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from kuosan.bridge.export import export  # noqa: E402
from test_bridge_export import images, in_a_clean_process, opened  # noqa: E402

__all__ = ["encoder", "squares"]  # fixtures

PROMPTS = ["a red square on the left", "GREEN, on the right.", "blue", "a white zebra"]  # of which one word is unknown


@pytest.fixture(scope="module")
def pixels(squares, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("pixels")
    return train(read(tmp, RECIPE.format(folder=squares), "training.steps=20"), tmp / "run")


@pytest.fixture(scope="module")
def codes(squares, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("codes")
    text = RECIPE.format(folder=squares)
    first = text[: text.index("[data.captions]")] + AUTOENCODER + '[objective]\nkind = "elbo"\n'
    first += text[text.index("[training]") : text.index("[sampling]")]
    train(read(tmp, first, "training.steps=20"), tmp / "codes")
    second = text.replace("[process]", AUTOENCODER + "\n[process]").replace("steps = 8", "steps = 8\nclip = false")
    second = second.replace('kind = "simple"', 'kind = "latent"\nweighting = { kind = "plain", form = "v" }')
    others = (f"training.start={tmp / 'codes'}", "training.steps=60", "network.patch=1")
    return train(read(tmp, second, *others), tmp / "run")


def drawn(run, **settings):
    """What the run's own sampler draws of the prompts, before it is rounded to levels, in [0, 1]."""
    sampler = run.sampler(**settings)
    x = ks.sample(
        sampler.model,
        run.state_shape,
        seeds=range(len(PROMPTS)),
        table=sampler.table,
        condition=run.medium.conditions(PROMPTS),
        transform=sampler.transform,
    )
    if run.recipe.family == "latent":
        x = run.decoded(run.autoencoder, x)
    return (x / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("which", ["pixels", "codes"])
def test_prompts_give_the_same_images_guided_or_not(which, request, tmp_path):
    """Truth: the run's own samples of the same seeds; and guidance and the negative prompt do move them."""
    run = request.getfixturevalue(which)
    pipe = opened(export(run, tmp_path / "out"))
    assert type(pipe) is diffusers.StableDiffusionPipeline
    found = {}
    for weight, negative in ((0.0, None), (2.0, None), (2.0, "a blue square")):
        told = {"negative_prompt": [negative] * len(PROMPTS)} if negative else {}
        got = images(pipe, prompt=PROMPTS, guidance_scale=1 + weight, num_inference_steps=8, **told)
        assert torch.allclose(got, drawn(run, guidance=weight, negative=negative), atol=1e-6)
        found[weight, negative] = got
    plain, guided, away = found.values()
    assert (plain - guided).abs().max() > 1e-4
    assert (away - guided).abs().max() > 1e-4
    kept = dict(run.denoiser.named_parameters())
    assert all(torch.equal(p, kept[name]) for name, p in pipe.unet.denoiser.named_parameters())
    if which == "codes":
        of_images = dict(run.model.named_parameters())
        assert all(torch.equal(p, of_images[name]) for name, p in pipe.vae.autoencoder.named_parameters())


def test_the_tokens_are_the_runs_own(pixels, tmp_path):
    """Truth: the run's conditions; the empty prompt is all padding."""
    pipe = opened(export(pixels, tmp_path / "out"))
    for prompt in [*PROMPTS, "", "a, a; a-a... A'a", "a <pad> red <unk> left"]:
        given = pipe.tokenizer(prompt, padding="max_length", max_length=10, truncation=True, return_tensors="pt")
        (said,) = pipe.text_encoder(given.input_ids)
        assert said[..., 0].long().tolist() == pixels.medium.conditions([prompt]).tolist()
    assert pipe.tokenizer.model_max_length == 10
    with pytest.raises(ValueError, match="no timestep_cond"):
        pipe.unet(torch.zeros(1, 3, 8, 8), 500, said, timestep_cond=torch.zeros(1))


@pytest.mark.slow
def test_the_example_of_the_card_runs_in_a_clean_process(codes, tmp_path):
    """Truth: the run's own sample of the prompt that the card has, as bytes."""
    export(codes, tmp_path / "out", 8, 1.0)
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "pipeline_tag: text-to-image" in card
    assert codes.medium.prompts[0] in card
    assert "a prompt of more than 10 tokens is cut" in card
    done = in_a_clean_process(card.split("```python\n")[1].split("```")[0], tmp_path / "out")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out" / "sample.png") as picture:
        found = torch.from_numpy(np.asarray(picture).astype(int))
    wanted = codes.sample(seeds=[0], prompt=codes.medium.prompts[0], guidance=1.0)[0].movedim(0, -1).int()
    assert (found - wanted).abs().max() <= 1


def test_what_cannot_be_exported_is_refused(squares, encoder, tmp_path, capsys):
    text = RECIPE.format(folder=squares)
    pretrained = text[: text.index("[reader]")] + text[text.index("[process]") :]
    pretrained = read(tmp_path, pretrained.replace("vocabulary = 40", f'pretrained = "{encoder}"'), "training.steps=1")
    with pytest.raises(RunError, match=r"which lies elsewhere.*train with a reader of its own"):
        export(train(pretrained, tmp_path / "pretrained"), tmp_path / "out")
    odd = read(tmp_path, text.replace("size = 8", "size = 6"), "training.steps=1")
    with pytest.raises(RunError, match="makes images of 6 pixels a side, and StableDiffusionPipeline multiples of 8"):
        export(train(odd, tmp_path / "odd"), tmp_path / "out")
    assert main(["export", str(tmp_path / "odd"), str(tmp_path / "out")]) == 2
    assert "multiples of 8" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_card_says_which_attributes_samples_have(pixels, tmp_path):
    """Truth: written by hand as `kuosan evaluate` writes it."""
    attributes = {
        "weight": {"seen": {"right": 0.75}, "unseen": {"right": 0.5}},
        "radical": {"seen": {"right": 1.0}, "unseen": None},
    }
    quality = {"attributes": attributes, "samples": 2000, "guidance": 2.0}
    path = pixels.folder / "evaluation.json"
    path.write_text(json.dumps({"step": pixels.step, "quality": quality}), "utf-8")
    try:
        card = (export(pixels, tmp_path / "out") / "README.md").read_text("utf-8")
    finally:
        path.unlink()
    said = "weight 75.0%, radical 100.0% (combinations seen in training); weight 50.0% (combinations held out)"
    assert f"| quality | as the captions ask: {said} of 2,000 samples" in card
