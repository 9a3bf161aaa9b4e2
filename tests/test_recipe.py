"""Recipes: what they accept, and what they say when they do not."""

import subprocess
import sys

import pytest
import torch

from kuosan import recipe as recipes
from kuosan.build import make_denoiser, make_model, make_objective, make_solver
from kuosan.networks import MLP
from kuosan.objectives import Uniform
from kuosan.recipe import RecipeError
from kuosan.solvers import Ancestral

GOOD = """
[data]
name = "digits"
[process]
kind = "cosine"
[network]
kind = "mlp"
width = 16
depth = 1
[objective]
kind = "weighted"
weighting = { kind = "min_snr", gamma = 3.0 }
times = { kind = "logit_normal", std = 2.0 }
[training]
steps = 10
"""


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.toml"
    path.write_text(GOOD)
    return path


@pytest.mark.parametrize("name", recipes.shipped())
def test_every_recipe_that_ships_builds_its_model(name):
    """Truth: the shapes of the data sets that they name."""
    recipe = recipes.read(name)
    known = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "glosses": (20,), "tang-poems": (64,)}
    shape = (known | {"characters": (1, 32, 32), "emoji": (3, 32, 32)}).get(recipe.data.name or "")
    speech = recipe.data.speech
    if speech is not None:
        shapes = {"magnitude": (513, 8), "spectrum": (1026, 8), "wave": (1, 8 * 256), "mel": (80, 8)}
        x, mel = torch.randn(2, *shapes[speech.state]), torch.randn(2, speech.mels, 8)
        assert make_model(recipe, shapes[speech.state], levels=0, classes=0)(x, 0.5, mel).x0.shape == x.shape
        make_objective(recipe)
        return
    own = (recipe.data.channels, recipe.data.size, recipe.data.size)
    shape = shape or ((recipe.data.length,) if recipe.data.texts else own)
    model = make_model(recipe, shape, levels=17, classes=10)
    make_objective(recipe)
    told = torch.tensor([1, -1]) if recipe.data.conditional else None
    if len(shape) == 1:
        words = torch.randint(2, 17, (2, *shape))
        if recipe.of_tokens:
            loss = model.loss(words, told, u=torch.tensor([0.3, 0.7]), noise=torch.randn(2, *shape))
            assert loss.shape == (2,)
        else:
            vectors = model.embedding(words)
            assert model(vectors, 0.5, told).x0.shape == vectors.shape
        return
    make_solver(recipe.sampling.solver)
    x = torch.randn(2, *shape)
    if recipe.autoencoder is not None:
        path = model.path(x)
        assert model.model.down(0, path.at(0).above).mean.shape == x.shape
        return
    assert model(x, 0.5, told).x0.shape == x.shape


def test_a_recipe_with_two_sources_of_data_is_refused(tmp_path):
    path = tmp_path / "two.toml"
    text = recipes.shipped()["digits"].read_text("utf-8")
    path.write_text(text.replace('name = "digits"', 'name = "digits"\nfolder = "photos"'), "utf-8")
    with pytest.raises(RecipeError, match=r"data: give name .*, folder .* or texts"):
        recipes.read(path)


def test_another_source_of_data_takes_the_place_of_the_recipe_s():
    recipe = recipes.read("vocoder", ["data.folder=recordings"])
    assert (recipe.data.name, recipe.data.folder) == (None, "recordings")
    assert recipes.read("texts", ["data.texts=own.txt"]).data.texts == "own.txt"


def test_a_recipe_survives_being_written_and_read(good, tmp_path):
    recipe = recipes.read(good, ["training.learning_rate=1e-4", "process.s=0.01"])
    (tmp_path / "copy.toml").write_text(recipe.to_toml())
    assert recipes.read(tmp_path / "copy.toml") == recipe


def test_another_kind_forgets_the_settings_of_the_one_before(good):
    """Whatever the order of the words; a kind alone may be written as a word."""
    recipe = recipes.read(good, ["objective.times=uniform", "objective.kind=simple"])
    assert type(make_objective(recipe)).__name__ == "Simple"
    assert make_objective(recipe).times == Uniform()


def test_the_fingerprint_follows_what_training_depends_on_and_nothing_else(good):
    own = recipes.read(good).fingerprint()
    assert recipes.read(good, ["sampling.steps=3", "training.checkpoint_every=7"]).fingerprint() == own
    for change in ("seed=1", "training.steps=11", "network.width=17", "process.t_min=0.01"):
        assert recipes.read(good, [change]).fingerprint() != own


def test_kinds_and_their_settings_become_objects(good):
    recipe = recipes.read(good)
    objective = make_objective(recipe)
    assert objective.weighting.gamma == 3.0  # type: ignore[attr-defined]
    assert objective.times.std == 2.0  # type: ignore[attr-defined]
    assert isinstance(make_denoiser(recipe, (1, 8, 8), 17, 0).network, MLP)
    assert make_solver(recipes.as_table(["ancestral", "temperature=0.5"])) == Ancestral(temperature=0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("training.stpes=5", r"good.toml: training.stpes: there is no such key"),
        ("training.steps=-5", r"good.toml: training.steps: .*greater than or equal to 1, got -5"),
        ("training.steps=many", r"training.steps: .*integer, got 'many'"),
        ("training.learning_rate=100", r"training.learning_rate: .*less than or equal to 1, got 100"),
        ("training.batch_size=1000000000000", r"training.batch_size: .*less than or equal to"),
        ("training.accumulate=3", r"accumulate = 3 must divide batch_size = 128"),
        ("training.ema=1.5", r"training.ema: .*less than 1, got 1.5"),
        ("denoiser.predicts=noise", r"denoiser.predicts: .*'eps'.*got 'noise'"),
        ("data.folder=photos", r"data: a folder needs size"),
        ("data.size=32", r"data: a named data set has its own size"),
        ("evaluation.variance=posterior", r'needs denoiser.predicts = "levels"'),
        ("evaluation.variance=learned", r"needs denoiser.learned_variance = true"),
        ("sampling.guidance=1.0", r"sampling.guidance needs data.conditional"),
        ("seed=-1", r"seed: .*greater than or equal to 0"),
        ("nonsense", r"an override looks like training.steps=500, got 'nonsense'"),
        ("training.steps.x=5", r"steps is a value, not a section"),
    ],
)
def test_a_mistake_is_named_with_file_key_and_what_was_expected(good, change, words):
    with pytest.raises(RecipeError, match=words):
        recipes.read(good, [change])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("network.kind=resnet", r"network.kind: must be one of mlp, transformer, diffusers, got 'resnet'"),
        ("network.widht=5", r"network: widht: there is no such key"),
        ("network.width=wide", r"network: width: .*integer, got 'wide'"),
        ("network.width=-4", r"network: width must lie in 1 to 65536"),
        ("process.t_min=2.0", r"process: t_min must lie between"),
        ("process.kind=linar", r"process.kind: must be one of linear, cosine"),
        ("denoiser.preconditioning=edm", r"denoiser: EDM preconditioning makes the output an x0"),
    ],
)
def test_a_mistake_in_an_open_section_is_named_too(good, change, words):
    with pytest.raises(RecipeError, match=words):
        make_denoiser(recipes.read(good, [change]), (1, 8, 8), 17, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("objective.weighting.gamma=-1.0", r"objective.weighting: gamma must be positive"),
        ("objective.weighting.kind=best", r"objective.weighting.kind: must be one of plain, snr"),
        ("objective.times.mode=1", r"objective.times: mode: there is no such key"),
    ],
)
def test_a_mistake_in_a_nested_table_is_named_with_its_place(good, change, words):
    with pytest.raises(RecipeError, match=words):
        make_objective(recipes.read(good, [change]))


def test_an_image_that_the_patch_does_not_divide_is_refused(good):
    recipe = recipes.read(good)
    network = {"kind": "transformer", "patch": 4, "width": 32, "depth": 1, "channels": 8}
    with pytest.raises(RecipeError, match=r"network: patch must be even or 1 and divide the image's 30 x 30 .*, got 4"):
        make_denoiser(recipe.model_copy(update={"network": network}), (1, 30, 30), 17, 0)


@pytest.mark.parametrize(
    ("source", "words"),
    [("digit", "there is no recipe 'digit'; there are characters-codes"), ("nowhere.toml", "there is no such file")],
)
def test_a_recipe_that_does_not_exist_is_refused(source, words):
    with pytest.raises(RecipeError, match=words):
        recipes.read(source)


@pytest.mark.parametrize("text", ["data = [", "\xff\xfe"])
def test_a_file_that_is_not_toml_is_refused(tmp_path, text):
    path = tmp_path / "bad.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RecipeError, match="not a TOML file"):
        recipes.read(path)


def test_help_and_recipes_do_not_import_torch():
    """Truth: Python's own list of imported modules."""
    code = "import sys; from kuosan.cli import main; main(['recipes']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
    code = "import sys; from kuosan.cli import main\ntry: main(['--help'])\n"
    code += "except SystemExit: sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_reader_that_has_seen_enough_is_no_error():
    """As of `kuosan train --help | head -1`."""
    command = [sys.executable, "-c", "from kuosan.cli import main; main(['train', '--help'])"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith("usage")
        process.stdout.close()
        assert process.stderr.read() == ""


def test_importing_kuosan_imports_nothing_heavy():
    """Everything is loaded when it is first used."""
    code = "import sys, kuosan; sys.exit(any(m in sys.modules for m in ('torch', 'sklearn', 'matplotlib', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
