"""`kuosan evaluate`: bounds and likelihoods of held-out images, of training images, and of anyone's own pictures."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import kuosan as ks
from kuosan import recipe as recipes
from kuosan.cli import main
from kuosan.dequantisation import data_bound
from kuosan.image.data import to_levels
from kuosan.train import train

DIFFUSION = """
[process]
kind = "cosine"
[network]
kind = "mlp"
width = 32
depth = 1
[denoiser]
predicts = "levels"
[objective]
kind = "cross_entropy"
[sampling]
steps = 3
"""
AUTOENCODER = """
[autoencoder]
kind = "vae"
latent = 4
width = 32
depth = 1
[objective]
kind = "elbo"
"""
REST = """
[data]
name = "digits"
conditional = {conditional}
[training]
steps = 60
batch_size = 32
warmup = 5
ema = 0.9
sample_every = 0
[evaluation]
bound_steps = 8
examples = 12
samples = 20
"""
EXAMPLES = 12
DIMENSIONS = 64


def made(folder, model, conditional="false"):
    path = folder / "small.toml"
    path.write_text(model + REST.format(conditional=conditional))
    return train(recipes.read(path), folder / "run").folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of runs that nobody writes to."""
    return {
        "diffusion": made(tmp_path_factory.mktemp("diffusion"), DIFFUSION),
        "classes": made(tmp_path_factory.mktemp("classes"), DIFFUSION, "true"),
        "vae": made(tmp_path_factory.mktemp("vae"), AUTOENCODER),
    }


@pytest.fixture
def diffusion(trained, tmp_path):
    return shutil.copytree(trained["diffusion"], tmp_path / "diffusion")


@pytest.fixture
def classes(trained, tmp_path):
    return shutil.copytree(trained["classes"], tmp_path / "classes")


@pytest.fixture
def vae(trained, tmp_path):
    return shutil.copytree(trained["vae"], tmp_path / "vae")


@pytest.fixture(params=["diffusion", "vae"])
def either(request, trained, tmp_path):
    return shutil.copytree(trained[request.param], tmp_path / request.param)


def said(capsys, folder, *words):
    """What `evaluate --json` prints: one object on one line, all else on stderr."""
    capsys.readouterr()
    assert main(["evaluate", str(folder), *map(str, words), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def printed(capsys, folder, *words):
    capsys.readouterr()
    assert main(["evaluate", str(folder), *map(str, words)]) == 0
    return capsys.readouterr().out


def refused(capsys, folder, *words):
    capsys.readouterr()
    assert main(["evaluate", str(folder), *map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("kuosan: ")
    assert captured.out == ""
    return captured.err


def lines_of(result):
    with open(result["examples"], encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def assert_agree(result, name):
    """The lines' mean in nats, the lines' mean in bits, and the object's total are one number in two units."""
    lines = lines_of(result)
    nats = np.mean([float(line[f"{name}_nats"]) for line in lines])
    bits = np.mean([float(line[f"{name}_bits_per_dim"]) for line in lines])
    assert result["likelihoods"][name]["total"] == pytest.approx(-nats / (math.log(2) * DIMENSIONS), rel=1e-6)
    assert result["likelihoods"][name]["total"] == pytest.approx(bits, rel=1e-6)
    assert result["likelihoods"][name]["examples"] == len(lines)


def pictures(folder, shades=(0, 128, 255), size=8):
    """Flat grey pictures and, first, one of noise: nothing that a digit is like."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (size, size), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    for shade in shades:
        Image.fromarray(np.full((size, size), shade, np.uint8)).save(folder / f"grey, {shade}.png")
    return folder


# -- what it says ------------------------------------------------------------------------------------------------------


def test_every_measure_has_its_number_with_both_errors_and_its_cost(diffusion, capsys):
    result = said(capsys, diffusion, "--bound", "--importance", 4, "--ode", "--draws", 2)
    found = result["likelihoods"]
    assert list(found) == ["bound", "importance", "ode"]
    for name, one in found.items():
        assert 0 < one["total"] < 20
        assert one["standard_error"] > 0
        assert one["monte_carlo_error"] > 0
        assert one["examples"] == EXAMPLES
        assert one["quantity"]
        assert_agree(result, name)
    assert found["bound"]["evaluations_per_example"] == 2 * 8
    assert found["importance"]["evaluations_per_example"] == 4 * 8
    assert found["ode"]["evaluations_per_example"] > 8
    assert found["bound"]["draws"] == 2
    assert (found["bound"]["steps"], found["bound"]["grid"], found["bound"]["variance"]) == (8, "even", "beta")
    assert result["split"] == "held_out"
    assert result["scored"] == EXAMPLES
    assert result["step"] == 60
    assert "quality" not in result  # only where no measure was named
    assert json.loads((diffusion / "evaluation.json").read_text()) == result


def test_the_bound_of_an_autoencoder_is_told_with_its_layers_and_terms(vae, capsys):
    result = said(capsys, vae, "--bound", "--importance", 8)
    bound, importance = result["likelihoods"]["bound"], result["likelihoods"]["importance"]
    bits = result["bits_per_dim"]
    assert bits["total"] == pytest.approx(bits["reconstruction"] + bits["prior"] + bits["matching"])
    assert bits["matching"] == 0  # there is one layer
    assert bits["total"] == bound["total"]
    assert (bound["layers"], bound["terms"], bound["draws"]) == (1, "shared", 1)
    assert bound["evaluations_per_example"] == 1
    assert importance["evaluations_per_example"] == 8
    for name in ("bound", "importance"):
        assert_agree(result, name)


def test_the_number_of_an_evaluation_is_that_of_the_chain(either, capsys):
    """Truth: the chain asked directly, for the examples that the run names; a bound is in nats, to be turned."""
    run = ks.load(either)
    chain, _ = run.chain()
    x, condition = run.examples("held_out", EXAMPLES)
    assert condition is None
    direct = chain.elbo(x, **run.elbo_settings(chain))
    weighted = chain.importance_weighted(x, samples=4)
    result = said(capsys, either, "--bound", "--importance", 4)
    for one, name in ((direct.total, "bound"), (weighted.log_prob, "importance")):
        lines = lines_of(result)
        held_out = run.data.held_out.levels  # a line names its image's place in the split
        named = torch.stack([held_out[int(line["example"])] for line in lines])
        assert torch.equal(to_levels(x, run.levels), named)
        np.testing.assert_allclose([float(line[f"{name}_nats"]) for line in lines], one, rtol=1e-6)
    spread = float(direct.total.std()) / math.sqrt(EXAMPLES) / (math.log(2) * DIMENSIONS)
    assert result["likelihoods"]["bound"]["standard_error"] == pytest.approx(spread, rel=1e-6)


def test_more_paths_bring_the_bound_nearer_and_cost_more(vae, capsys):
    """L_K rises with K (Burda et al. 2016, theorem 1), bits fall; 5 standard errors of the drawing."""
    found = [said(capsys, vae, "--importance", k)["likelihoods"]["importance"] for k in (2, 200)]
    few, many = found
    assert [one["evaluations_per_example"] for one in found] == [2, 200]
    assert [one["quantity"] for one in found] == ["2 paths", "200 paths"]
    assert many["monte_carlo_error"] < few["monte_carlo_error"]
    assert many["total"] < few["total"] + 5 * few["monte_carlo_error"]


def test_more_draws_cost_more_and_are_surer(either, capsys):
    """Evaluations are proportional to draws; the noise of the drawing falls, its mean does not move."""
    few, many = (said(capsys, either, "--bound", "--draws", n)["likelihoods"]["bound"] for n in (4, 64))
    assert (few["draws"], many["draws"]) == (4, 64)
    assert many["evaluations_per_example"] == 16 * few["evaluations_per_example"]
    assert many["monte_carlo_error"] < few["monte_carlo_error"]
    error = math.hypot(many["monte_carlo_error"], few["monte_carlo_error"])
    assert many["total"] == pytest.approx(few["total"], abs=8 * error)  # few is of four replicates


def test_of_a_single_draw_and_a_single_example_no_error_is_known(either, capsys):
    result = said(capsys, either, "--bound", "--draws", 1, "--examples", 1)
    one = result["likelihoods"]["bound"]
    assert one["standard_error"] is None
    assert one["monte_carlo_error"] is None
    assert result["scored"] == len(lines_of(result)) == 1
    words = printed(capsys, either, "--bound", "--draws", 1, "--examples", 1)
    assert " - " in next(line for line in words.splitlines() if line.startswith("bound "))


def test_the_same_question_has_the_same_answer(either, capsys):
    one = said(capsys, either, "--bound", "--importance", 4)
    assert said(capsys, either, "--bound", "--importance", 4) == one


def test_without_a_measure_it_is_the_bound_and_the_quality_of_samples(either, capsys):
    result = said(capsys, either)
    assert list(result["likelihoods"]) == ["bound"]
    assert result["quality"]["samples"] == 20
    words = printed(capsys, either)
    assert "quality, by a classifier of real images" in words
    assert words.strip().endswith("evaluation.json")


def test_the_words_say_each_measure_with_its_numbers(vae, capsys):
    """The words against the object that was written."""
    words = printed(capsys, vae, "--bound", "--importance", 4)
    found = json.loads((vae / "evaluation.json").read_text())["likelihoods"]
    for start, name in (("bound", "bound"), ("importance-weighted, 4 paths", "importance")):
        (line,) = (line for line in words.splitlines() if line.startswith(start + " "))
        total, error, *_ = line.removeprefix(start).split()
        assert float(total) == pytest.approx(found[name]["total"], abs=1e-4)
        assert float(error) == pytest.approx(found[name]["standard_error"], abs=1e-4)
    assert f"{EXAMPLES} held-out images" in words
    assert "(1 layer, 1 draw)" in words


# -- what is kept ------------------------------------------------------------------------------------------------------


def test_the_file_says_what_was_asked_last_and_nothing_else(either, capsys):
    """Two measures of one table are of the same images, and so is the file with a line for each."""
    said(capsys, either, "--bound")
    second = said(capsys, either, "--importance", 4, "--examples", 5)
    assert json.loads((either / "evaluation.json").read_text()) == second
    assert set(second["likelihoods"]) == {"importance"}
    assert second["scored"] == len(lines_of(second)) == 5


@pytest.mark.parametrize("text", ["{", "", "{}"])
def test_a_damaged_evaluation_is_written_anew(vae, capsys, text):
    (vae / "evaluation.json").write_text(text)
    assert set(said(capsys, vae, "--bound")["likelihoods"]) == {"bound"}


def test_every_split_has_its_own_file(either, capsys):
    """Training images are other images; "test" is another word for held out."""
    held = said(capsys, either, "--bound", "--split", "test")
    train_part = said(capsys, either, "--bound", "--split", "train")
    assert said(capsys, either, "--bound", "--split", "held_out") == held
    assert (held["split"], train_part["split"]) == ("held_out", "train")
    assert held["examples"].endswith("evaluation.csv")
    assert train_part["examples"].endswith("evaluation-train.csv")
    assert held["likelihoods"]["bound"]["total"] != train_part["likelihoods"]["bound"]["total"]
    assert json.loads((either / "evaluation.json").read_text()) == held
    assert json.loads((either / "evaluation-train.json").read_text()) == train_part
    run = ks.load(either)
    x, _ = run.examples("train", EXAMPLES)
    total = (chain := run.chain()[0]).elbo(x, **run.elbo_settings(chain)).total
    np.testing.assert_allclose([float(line["bound_nats"]) for line in lines_of(train_part)], total, rtol=1e-6)


def test_as_many_examples_are_scored_as_asked_for(vae, capsys):
    for n in (1, 5, 297, 1000):
        result = said(capsys, vae, "--bound", "--examples", n)
        assert result["scored"] == len(lines_of(result)) == min(n, 297)


# -- anyone's pictures -------------------------------------------------------------------------------------------------


def test_a_folder_of_pictures_is_scored_one_by_one(either, capsys, tmp_path):
    """Truth: the chain for these pixels, quantised by hand: 0, 128 and 255 are levels 0, 8 and 16 of 17."""
    folder = pictures(tmp_path / "pictures")
    result = said(capsys, either, "--data", folder)
    lines = lines_of(result)
    assert [line["example"] for line in lines] == sorted(str(path) for path in folder.iterdir())
    assert (result["split"], result["scored"]) == ("files", 4)
    assert result["examples"].endswith("evaluation-files.csv")
    assert "quality" not in result
    assert_agree(result, "bound")
    assert not (either / "evaluation.json").exists()
    run = ks.load(either)
    by_name = {line["example"]: float(line["bound_nats"]) for line in lines}
    noise = torch.from_numpy(np.asarray(Image.open(folder / "noise.png")).astype(float)).view(1, 1, 8, 8)
    greys = [torch.full((1, 1, 8, 8), level / 8 - 1) for level in (0, 8, 16)]
    names = [*(str(folder / f"grey, {shade}.png") for shade in (0, 128, 255)), str(folder / "noise.png")]
    x = dict(zip(names, [*greys, (noise / 255 * 16).round() / 8 - 1], strict=True))
    ordered = torch.cat([x[line["example"]] for line in lines]).float()
    total = (chain := run.chain()[0]).elbo(ordered, **run.elbo_settings(chain)).total
    np.testing.assert_allclose([by_name[line["example"]] for line in lines], total, rtol=1e-6)


def test_pictures_and_folders_may_stand_side_by_side(vae, capsys, tmp_path):
    folder = pictures(tmp_path / "pictures", (10, 20))
    alone = pictures(tmp_path / "others", ()) / "noise.png"
    result = said(capsys, vae, "--data", alone, folder, "--importance", 4)
    names = [line["example"] for line in lines_of(result)]
    assert names == [str(alone), *(str(folder / name) for name in ("grey, 10.png", "grey, 20.png", "noise.png"))]
    assert list(result["likelihoods"]) == ["importance"]


def test_of_pictures_the_least_likely_is_named_first(either, capsys, tmp_path):
    """The order of the words against the scores in the file; at most ten are shown."""
    folder = pictures(tmp_path / "pictures", range(0, 240, 20))
    words = printed(capsys, either, "--data", folder).splitlines()
    begin = words.index("least likely first, bits per dimension:")
    shown = [line.split(maxsplit=1) for line in words[begin + 1 : begin + 11]]
    with (either / "evaluation-files.csv").open(newline="") as file:
        scores = {line["example"]: float(line["bound_bits_per_dim"]) for line in csv.DictReader(file)}
    assert len(scores) == 13
    assert [name for _, name in shown] == sorted(scores, key=lambda name: -scores[name])[:10]
    assert [float(score) for score, _ in shown] == pytest.approx(sorted(scores.values(), reverse=True)[:10], abs=1e-4)
    assert words[begin + 11].strip() == "..."


def test_pictures_of_other_sizes_are_cropped_and_scaled(vae, capsys, tmp_path):
    """A flat picture is flat at every size: the same score."""
    small, large = pictures(tmp_path / "small", (128,)), pictures(tmp_path / "large", (128,), 50)
    scores = [
        lines_of(said(capsys, vae, "--data", folder / "grey, 128.png"))[0]["bound_nats"] for folder in (small, large)
    ]
    assert scores[0] == scores[1]


# -- what has no part in it --------------------------------------------------------------------------------------------


def test_a_sampler_has_no_part_in_the_bound(classes, capsys):
    """Guidance, solver, steps and clipping are of samples: the bound and the weighted one are the model's."""
    measures = ["--bound", "--importance", 4]
    plain = said(capsys, classes, *measures)
    assert said(capsys, classes, *measures, "--guidance", 3) == plain
    recipe = (classes / "recipe.toml").read_text()
    settings = 'solver = { kind = "ddim", eta = 1.0 }\nguidance = 2.0\nclip = false\n'
    before, after = recipe.split("[sampling]\n")
    after = after.split("[evaluation]")[1]
    (classes / "recipe.toml").write_text(f"{before}[sampling]\nsteps = 7\n{settings}[evaluation]{after}")
    assert ks.load(classes).recipe.sampling.guidance == 2
    assert said(capsys, classes, *measures) == plain


def test_the_bound_of_a_model_with_classes_is_told_them(classes):
    """The labels of the examples: without them it is another number."""
    run = ks.load(classes)
    x, labels = run.examples("held_out", EXAMPLES)
    assert labels is not None
    data = run.data.held_out
    assert data.labels is not None
    where = [int((data.levels == ((one + 1) * 8).round()).flatten(1).all(1).nonzero()[0]) for one in x]
    assert torch.equal(labels, data.labels[where])
    found = run.likelihoods(x, labels, ["bound"])["bound"]
    assert not torch.equal(found.nats, run.likelihoods(x, None, ["bound"])["bound"].nats)


def test_the_steps_and_the_variance_of_the_bound_may_be_chosen(diffusion, capsys):
    result = said(capsys, diffusion, "--bound", "--bound-steps", 5, "--variance", "beta_tilde")
    assert (result["bits_per_dim"]["steps"], result["bits_per_dim"]["variance"]) == (5, "beta_tilde")
    assert result["bits_per_dim"]["evaluations_per_example"] == 5
    run = ks.load(diffusion)
    direct = run.bound(variance="beta_tilde", steps=5).bits_per_dim().total
    assert result["bits_per_dim"]["total"] == pytest.approx(direct, rel=1e-9)


def test_how_the_ode_is_solved_may_be_chosen(diffusion, capsys):
    """Truth: data_bound asked directly; the exact divergence has no probes' noise, and no seed but that of y."""
    run = ks.load(diffusion)
    x, _ = run.examples("held_out", 4)
    words = ("--ode", "--examples", 4, "--draws", 1, "--divergence", "exact")
    for dequantisation in ("noise", "uniform"):
        result = said(capsys, diffusion, *words, "--dequantisation", dequantisation, "--tolerance", "1e-3")
        direct = data_bound(run.denoiser, x, q=dequantisation, rtol=1e-3, atol=1e-3)
        assert result["likelihoods"]["ode"]["total"] == pytest.approx(direct.bits_per_dim, rel=1e-9)
        assert f"q = {dequantisation}" in result["likelihoods"]["ode"]["quantity"]
        assert "the prior at time 1" in result["likelihoods"]["ode"]["quantity"]
    loose = direct.evaluations
    tight = said(capsys, diffusion, *words, "--dequantisation", "uniform")["likelihoods"]["ode"]
    assert tight["evaluations_per_example"] > loose


def test_a_dequantisation_is_fitted_to_training_data(diffusion, capsys):
    result = said(capsys, diffusion, "--ode", "--examples", 4, "--dequantisation", "variational", "--tolerance", "1e-3")
    assert "q = variational" in result["likelihoods"]["ode"]["quantity"]


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--bound", "--tolerance", "1e-3"], "--tolerance is of the ODE: add --ode"),
        (["--ode", "--tolerance", "0"], "rtol and atol must be positive"),
        (["--ode", "--divergence", "approximate"], "divergence must be one of exact, rademacher, gaussian"),
        (["--ode", "--dequantisation", "dither"], "dequantisation must be noise, uniform or variational, got 'dither'"),
    ],
)
def test_an_ode_that_cannot_be_is_refused(diffusion, capsys, words, expected):
    assert expected in refused(capsys, diffusion, *words)


def test_an_autoencoder_has_no_ode(vae, capsys):
    assert "has no probability-flow ODE that is of its data" in refused(capsys, vae, "--ode")
    assert not (vae / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--bound", "--examples", "0"], "examples must be at least 1, got 0"),
        (["--bound", "--draws", "0"], "draws must be at least 1, got 0"),
        (["--importance", "-1"], "importance must be at least 1, got -1"),
        (["--guidance", "1"], "guid"),
    ],
)
def test_evaluating_nothing_is_refused(either, capsys, words, expected):
    assert expected in refused(capsys, either, *words)
    assert not (either / "evaluation.json").exists()


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["--bound", "--examples", "-5"], id="examples"),
        pytest.param(["--importance", "0"], id="importance"),
        pytest.param(["--ode", "--draws", "0"], id="draws"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused(diffusion, capsys, words):
    refused(capsys, diffusion, *words)


def test_a_report_after_the_evaluation_of_one_example_is_written(vae, capsys):
    """The error of a single example is not known; the page can say so."""
    said(capsys, vae, "--bound", "--examples", 1)
    assert main(["report", str(vae)]) == 0


def test_the_bound_of_a_gaussian_decoder_is_called_a_density(tmp_path, capsys):
    folder = made(tmp_path, AUTOENCODER.replace("width", 'decoder = "gaussian"\nwidth'))
    assert "density" in said(capsys, folder, "--bound")["likelihoods"]["bound"]["quantity"]


def test_pictures_that_are_none_are_refused(vae, capsys, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no pictures: expected files that end in .png" in refused(capsys, vae, "--data", empty)
    (empty / "words.png").write_text("not a picture")
    assert "words.png cannot be read as a picture" in refused(capsys, vae, "--data", empty / "words.png")
    assert "words.png cannot be read as a picture" in refused(capsys, vae, "--data", empty)
    assert "nowhere.png" in refused(capsys, vae, "--data", tmp_path / "nowhere.png")
    assert not (vae / "evaluation-files.json").exists()


def test_options_that_do_not_exist_are_refused(vae, capsys):
    for words in (["--split", "validation"], ["--measure", "bound"], ["--importance", "many"], ["--data"]):
        with pytest.raises(SystemExit) as refusal:
            main(["evaluate", str(vae), *words])
        assert refusal.value.code == 2
    capsys.readouterr()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"measures": ["luck"]}, "a measure is one of bound, importance, ode, got 'luck'"),
        ({"split": "validation"}, "split must be one of held_out, train, got 'validation'"),
        ({"examples": 0}, "examples must be at least 1, got 0"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"files": []}, "there is no picture to read"),
    ],
)
def test_python_is_refused_what_makes_no_sense_too(trained, settings, words):
    for name in ("diffusion", "vae"):
        run = ks.load(trained[name])
        with pytest.raises(ValueError, match=words):
            run.evaluate(quality=False, **settings)
        assert not (trained[name] / "evaluation.json").exists()


@pytest.mark.parametrize("value", [0.03, 1.125, -1.125, math.nan, math.inf])
def test_pixels_that_are_on_no_level_have_no_likelihood(trained, value):
    """Between two of the 17, beyond the ends, or no number at all."""
    words = "not finite" if not math.isfinite(value) else "must lie on the 17 even levels"
    for name in ("diffusion", "vae"):
        run = ks.load(trained[name])
        x = torch.zeros(2, 1, 8, 8)
        run.likelihoods(x, None, ["bound"])
        x[1, 0, 3, 3] = value
        for measure in ("bound", "importance"):
            with pytest.raises(ValueError, match=words):
                run.likelihoods(x, None, [measure], importance=2)
