"""Runs and commands: a folder that needs nothing else, and clear words when something is missing."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import kuosan as ks
from kuosan import recipe as recipes
from kuosan.cli import main
from kuosan.runs import RunError
from kuosan.train import train

RECIPE = """
[data]
name = "digits"
conditional = {conditional}
[process]
kind = "{process}"
[network]
kind = "mlp"
width = 64
depth = 1
[denoiser]
predicts = "{predicts}"
[objective]
kind = "simple"
[training]
steps = 60
batch_size = 64
warmup = 5
sample_every = 30
checkpoint_every = 30
[sampling]
steps = 5
[evaluation]
bound_steps = 10
examples = 50
samples = 30
"""


def make(folder, conditional="true", process="cosine", predicts="levels"):
    path = folder / "small.toml"
    path.write_text(RECIPE.format(conditional=conditional, process=process, predicts=predicts))
    return train(recipes.read(path), folder / "run")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make(tmp_path_factory.mktemp("conditional"))


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """Unconditional, in discrete time, predicting eps."""
    return make(tmp_path_factory.mktemp("plain"), "false", "ddpm", "eps")


def said(capsys, *words) -> dict:
    assert main([*map(str, words), "--json"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    return json.loads(out)


def refused(capsys, *words) -> str:
    assert main([*map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kuosan: ")
    return error


def test_a_moved_run_needs_no_flag_and_gives_the_same_samples(run, tmp_path):
    """Truth: the run in its first place."""
    shutil.copytree(run.folder, tmp_path / "moved")
    one, two = ks.load(run.folder).sample(4), ks.load(tmp_path / "moved").sample(4)
    assert torch.equal(one, two)
    assert one.dtype == torch.uint8
    assert int(one.max()) <= 16


def test_training_writes_its_samples_metrics_and_provenance(run):
    for step in (30, 60):
        with Image.open(run.folder / "samples" / f"step-{step:08d}.png") as picture:
            assert picture.size[0] > 64
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 60
    info = json.loads((run.folder / "run.json").read_text())
    assert (
        info["versions"]["torch"] == torch.__version__.split("+")[0] or info["versions"]["torch"] == torch.__version__
    )


def test_the_samples_of_a_seed_carry_it_and_do_not_depend_on_their_company(run, capsys, tmp_path):
    """Truth: PNG text fields, and the same seeds drawn in another order."""
    many = said(capsys, "sample", run.folder, "--seeds", "3-6", "--class", "7", "--out", tmp_path / "a")
    with Image.open(many["samples"][1]["file"]) as picture:
        assert picture.text["seed"] == "4"  # type: ignore[attr-defined]
        assert picture.text["class"] == "7"  # type: ignore[attr-defined]
        one = np.asarray(picture)
    other = said(capsys, "sample", run.folder, "--seeds", "9,4,5,8", "--class", "7", "--out", tmp_path / "b")
    with Image.open(other["samples"][1]["file"]) as picture:
        assert np.abs(np.asarray(picture).astype(int) - one).max() <= 16  # at most one level of 17, by rounding


def test_evaluate_says_at_least_what_a_program_needs(run, capsys):
    result = said(capsys, "evaluate", run.folder)
    bits = result["bits_per_dim"]
    assert bits["total"] == pytest.approx(bits["reconstruction"] + bits["prior"] + bits["matching"])
    assert bits["standard_error"] > 0
    assert 0 <= result["quality"]["confident"] <= 1
    assert sum(result["quality"]["classes"].values()) == pytest.approx(1)
    assert result["quality"]["frechet"] > 0
    assert json.loads((run.folder / "evaluation.json").read_text()) == result


def test_the_weight_of_guidance_changes_the_samples_and_not_the_bound(run, capsys):
    """The bound is the model's own; the judged samples are those of the weight that was asked for."""
    plain, guided = (said(capsys, "evaluate", run.folder, "--guidance", w) for w in (0, 3))
    assert plain["bits_per_dim"] == guided["bits_per_dim"]
    assert guided["quality"]["guidance"] == 3
    assert plain["quality"]["frechet"] != guided["quality"]["frechet"]


def test_a_discrete_time_run_samples_and_measures(plain_run, capsys):
    assert plain_run.sample(2, steps=1000).shape == (2, 1, 8, 8)
    assert said(capsys, "evaluate", plain_run.folder)["bits_per_dim"]["total"] > 0
    assert said(capsys, "sample", plain_run.folder, "-n", 2, "--solver", "ancestral variance=beta")["evaluations"] == 5


def test_the_words_of_every_command_end_with_what_to_open(run, capsys):
    assert main(["sample", str(run.folder), "-n", "2"]) == 0
    assert capsys.readouterr().out.strip().endswith("sheet.png")
    assert main(["evaluate", str(run.folder)]) == 0
    assert capsys.readouterr().out.strip().endswith("evaluation.json")
    assert main(["recipes"]) == 0
    assert "digits" in capsys.readouterr().out
    assert main(["data"]) == 0
    assert "mnist" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-n", "0"], "count must be at least 1, got 0"),
        (["--steps", "0"], "sampling: steps: input should be greater than or equal to 1, got 0"),
        (["--seeds", "1,2,1"], "every sample needs its own seed; repeated: 1"),
        (["-n", "3", "--seeds", "0-1"], "count is 3, but there are 2 seeds"),
        (["--class", "eleven"], "there is no class 'eleven'; there are 0, 1, 2"),
        (["--guidance", "-2"], "sampling: guidance: input should be greater than or equal to -1, got -2"),
        (["--guidance", "nan"], "sampling: guidance: input should be"),
        (["--solver", "eule"], "sampling.solver.kind: must be one of auto, ddim, .* got 'eule'"),
        (["--solver", "ddim eta=2.0"], "eta must lie in \\[0, 1\\]"),
    ],
)
def test_sampling_refuses_what_makes_no_sense(run, capsys, words, expected):
    assert re.search(expected, refused(capsys, "sample", run.folder, *words))


def test_more_steps_than_a_discrete_model_has_are_refused(plain_run, capsys):
    assert "made with 1000 steps: steps must lie in 1 to 1000, got 1001" in refused(
        capsys, "sample", plain_run.folder, "--steps", 1001
    )


def test_an_unconditional_run_has_no_classes_and_no_guidance(plain_run, capsys):
    assert "trained without classes" in refused(capsys, "sample", plain_run.folder, "--class", 3)
    assert "nothing to guide towards" in refused(capsys, "sample", plain_run.folder, "--guidance", 1)


@pytest.mark.parametrize("command", ["sample", "evaluate", "report"])
def test_a_folder_that_is_not_a_run_is_refused(tmp_path, capsys, command):
    assert "is not a run: it has no recipe.toml" in refused(capsys, command, tmp_path)
    assert "there is no such folder" in refused(capsys, command, tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_damaged_run_is_named(run, tmp_path, capsys, text):
    shutil.copytree(run.folder, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(text)
    assert "run.json is damaged" in refused(capsys, "sample", tmp_path / "run")


def test_settings_may_stand_after_an_option(tmp_path, capsys):
    words = [
        "train",
        "digits",
        "--out",
        str(tmp_path / "run"),
        "training.steps=2",
        "network.width=16",
        "network.depth=1",
    ]
    assert main([*words, "training.sample_every=0"]) == 0
    with pytest.raises(SystemExit):
        main([*words, "--nonsense"])


@pytest.mark.parametrize("seeds", ["5-3", "0-99999999999", "one"])
def test_seeds_that_are_no_range_are_refused(run, capsys, seeds):
    with pytest.raises(SystemExit) as refusal:
        main(["sample", str(run.folder), "--seeds", seeds])
    assert refusal.value.code == 2


def test_a_run_without_a_checkpoint_says_so(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "run", ignore=shutil.ignore_patterns("step-*"))
    with pytest.raises(RunError, match="no checkpoint yet"):
        ks.load(tmp_path / "run").sample(1)


def test_a_folder_of_ones_own_images_trains_with_its_sub_folders_as_classes(tmp_path, capsys):
    """Truth: what was drawn: dark squares and bright ones."""
    dice = np.random.default_rng(0)
    for name, shade in (("dark", 20), ("bright", 230)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(20):
            pixels = np.clip(dice.normal(shade, 8, (12, 10, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{i}.png")
    (tmp_path / "pictures" / "dark" / "broken.png").write_bytes(b"not a picture")
    words = ["train", "images", f"data.folder={tmp_path / 'pictures'}", "data.size=8", "data.conditional=true"]
    words += [
        "network.width=32",
        "network.depth=1",
        "network.channels=8",
        "training.steps=400",
        "training.learning_rate=1e-2",
        "training.batch_size=16",
    ]
    words += [
        "training.precision=float32",
        "training.warmup=10",
        "process.t_min=0.01",
        "training.sample_every=0",
        "training.ema=0.9",
    ]
    words += ["--out", str(tmp_path / "run")]
    assert main(words) == 0
    run = ks.load(tmp_path / "run")
    assert run.classes == ("bright", "dark")
    assert any("broken.png" in note for note in run.info["data"]["notes"])
    samples = run.sample(8, labels=torch.tensor([0, 1] * 4), steps=20).float()
    assert samples[0::2].mean() > 150 > 100 > samples[1::2].mean()
