"""Runs of texts, from a user's own file to samples, a measured model and clear words where something is wrong."""

import csv
import json
import math
import random
import re
import shutil

import pytest
import torch

import kuosan as ks
from kuosan import recipe as recipes
from kuosan.cli import main
from kuosan.discrete.risk import candidate_batches
from kuosan.recipe import RecipeError
from kuosan.runs import AutoregressiveRun, DiffusionRun, DiscreteRun, RunError
from kuosan.text.ngram import NGram
from kuosan.tokenizer import PAD, Tokenizer
from kuosan.train import train

ANIMALS, PLANTS = ("cat", "dog", "cow", "hen"), ("oak", "fern", "moss", "rose")
LENGTH = 8
RECIPE = """
[data]
texts = "{file}"
length = 8
label = "class"
held_out = 0.2
conditional = {conditional}
[process]
kind = "{process}"
[network]
kind = "tokens"
width = 32
depth = 1
heads = 2
[objective]
kind = "token_bound"
[training]
steps = {steps}
batch_size = 32
accumulate = 2
learning_rate = 3e-3
warmup = 5
ema = 0.9
sample_every = {steps}
checkpoint_every = 75
[sampling]
steps = 8
[evaluation]
draws = 4
samples = 60
"""


def sentences(n=200):
    """Animals eat, plants grow: the class shows in every word, and lengths differ."""
    dice = random.Random(0)
    for i in range(n):
        if i % 2:
            yield "animal", f"the {dice.choice(ANIMALS)} eats" + " the" * dice.randint(0, 1) + f" {dice.choice(PLANTS)}"
        else:
            yield "plant", f"a {dice.choice(PLANTS)} grows" + " and grows" * dice.randint(0, 2)


def table(folder):
    with (folder / "own.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["class", "text"])
        rows.writerows(sentences())
    return folder / "own.csv"


def make(folder, process="masked", conditional="true", steps=150):
    path = folder / f"{process}-{conditional}.toml"
    path.write_text(RECIPE.format(file=table(folder), process=process, conditional=conditional, steps=steps))
    return train(recipes.read(path), folder / f"{process}-{conditional}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("texts")


@pytest.fixture(scope="module")
def run(folder):
    return make(folder)


@pytest.fixture(scope="module")
def uniform(folder):
    return make(folder, "uniform", "false")


@pytest.fixture(scope="module")
def autoregressive(folder):
    return make(folder, "autoregressive")


def say(capsys, *arguments):
    """(exit code, stdout, stderr) of a command."""
    code = main([str(one) for one in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def texts_of(run, *options, capsys):
    code, out, _ = say(capsys, "sample", run.folder, "--json", *options)
    assert code == 0
    return [(one.get("class"), open(one["file"]).read().rstrip("\n")) for one in json.loads(out)["samples"]]


# -- what a run is -----------------------------------------------------------------------------------------------------


def test_a_run_of_texts_explains_itself_without_its_data(run, folder, tmp_path):
    assert isinstance(ks.load(run.folder), DiscreteRun)
    info = json.loads((run.folder / "run.json").read_text())
    assert (info["shape"], info["classes"], info["data"]["held_out"]) == ([LENGTH], ["animal", "plant"], 40)
    words = {word for _, text in sentences() for word in text.split()}
    assert info["levels"] == 2 + len(words) == Tokenizer.load(run.folder / "tokenizer.json").size
    log = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert len((run.folder / "samples" / "step-00000150.txt").read_text().splitlines()) == 16
    moved = tmp_path / "moved"
    run.folder.rename(moved)
    (folder / "own.csv").rename(folder / "away.csv")
    try:  # nothing of the data is needed to draw
        assert len(ks.load(moved).sample(2)) == 2
    finally:
        moved.rename(run.folder)
        (folder / "away.csv").rename(folder / "own.csv")


def test_a_run_that_stopped_half_way_goes_on_as_if_it_had_not(run, folder, tmp_path):
    """The folder of 150 steps without its last checkpoint, trained again."""
    shutil.copytree(run.folder, tmp_path / "half")
    half = ks.load(tmp_path / "half")
    shutil.rmtree(next((tmp_path / "half" / "checkpoints").glob("*150")))
    again = train(half.recipe, tmp_path / "half")
    assert again.step == 150
    torch.testing.assert_close(again.sample(4), run.sample(4))


# -- samples -----------------------------------------------------------------------------------------------------------


def test_samples_are_of_known_words_and_depend_on_their_seed_alone(run):
    first, again = run.sample(6), run.sample(seeds=[5, 2], labels=torch.tensor([1, 0]))
    torch.testing.assert_close(again, first[[5, 2]])
    assert first.shape == (6, LENGTH)
    assert int(first.max()) < run.levels


@pytest.mark.parametrize("solver", ["ancestral", "euler", "remasking share=0.3", "confident noise=1"])
@pytest.mark.parametrize("n", [1, 3, LENGTH])
def test_an_asked_length_is_met_exactly(run, solver, n, capsys):
    found = texts_of(run, "--length", n, "--solver", solver, "-n", 8, capsys=capsys)
    assert [len(text.split()) for _, text in found] == [n] * 8


def test_a_prompt_and_given_words_stay_where_they_are(run, uniform, capsys):
    for one in (run, uniform):
        for _, text in texts_of(one, "--prompt", "the cat", "-n", 12, capsys=capsys):
            assert text.split()[:2] == ["the", "cat"]
        for _, text in texts_of(one, "--infill", "a _ _ and _", "-n", 12, capsys=capsys):
            words = text.split()
            assert (words[0], words[3], len(words)) == ("a", "and", 5)
        for _, text in texts_of(one, "--infill", "_ _ rose", "--length", 5, "-n", 4, capsys=capsys):
            assert (text.split()[2], len(text.split())) == ("rose", 5)


def test_of_candidates_one_is_taken_for_each_text(run, autoregressive):
    """Each is one of the texts of its own seeds, whatever the batch; of one candidate it is the text itself."""
    for one in (run, autoregressive):
        found = one.sample(seeds=[3, 5], labels=torch.tensor([0, 1]), candidates=6)
        for i, seed in enumerate([3, 5]):
            (seeds, labels), *_ = candidate_batches([seed], torch.tensor([i]), 6, 256)
            own = one.sample(seeds=seeds, labels=labels)
            assert (own == found[i]).all(1).any()
        assert torch.equal(one.sample(seeds=[3, 5], labels=torch.tensor([0, 1]), candidates=6, batch_size=4), found)
        assert torch.equal(one.sample(3, candidates=1), one.sample(3))
        assert one.sampler(candidates=6).how["candidates"] == 6


def test_from_left_to_right_a_prompt_stays_too(autoregressive, capsys):
    assert isinstance(autoregressive, AutoregressiveRun)
    for _, text in texts_of(autoregressive, "--prompt", "the cat", "-n", 12, capsys=capsys):
        assert text.split()[:2] == ["the", "cat"]


def test_the_class_that_is_asked_for_shows(run, capsys):
    """After 150 steps a model of two kinds of sentences knows which words are of which, more so if guided."""

    def right(*options):
        found = texts_of(run, "--class", "animal", "-n", 40, *options, capsys=capsys)
        assert {name for name, _ in found} == {"animal"}
        return sum(bool(set(text.split()) & {"eats", *ANIMALS}) for _, text in found) / 40

    assert right("--guidance", 3) >= max(0.9, right())


def test_a_low_temperature_repeats_itself(run, capsys):
    def different(*options):
        return len(set(texts_of(run, "-n", 24, "--length", 4, *options, capsys=capsys)))

    assert different("--temperature", 0.05) < different()
    assert different("--nucleus", 0.05) < different()


def test_the_terminal_shows_the_texts(run, capsys):
    code, out, _ = say(capsys, "sample", run.folder, "--seeds", "3,4")
    shown = (run.folder / "samples" / "sheet.txt").read_text().splitlines()
    assert code == 0
    assert [line.split("  ", 1)[1].strip() for line in out.splitlines()[:2]] == shown
    assert "2 samples" in out
    assert "evaluations each" in out


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_evaluation_gives_nats_beside_ngrams(run, capsys):
    code, out, _ = say(capsys, "evaluate", run.folder)
    assert code == 0
    assert "nats per text" in out
    found = json.loads((run.folder / "evaluation.json").read_text())
    bound = found["nats_per_text"]
    assert bound["total"] == pytest.approx(bound["reconstruction"] + bound["prior"] + bound["matching"])
    held_out = run.data.held_out
    ends = held_out.lengths + (held_out.lengths < LENGTH)
    assert bound["nats_per_token"] == pytest.approx(bound["total"] / float(ends.double().mean()))
    assert bound["perplexity"] == pytest.approx(math.exp(bound["nats_per_token"]))
    bigrams = NGram(2).fit(run.data.train.tokens, run.data.train.lengths, run.levels)
    truth = -float(bigrams.log_prob(held_out.tokens, held_out.lengths).mean())
    assert found["baselines"]["bigrams of the training texts"] == pytest.approx(truth)
    rows = (run.folder / "evaluation.csv").read_text().splitlines()
    assert rows[0] == "example,bound_nats,bound_error,bound_nats_per_text"
    nats = [float(row.split(",")[1]) for row in rows[1:]]
    assert -sum(nats) / len(nats) == pytest.approx(bound["total"], rel=1e-6)
    quality = found["quality"]
    assert 0 <= quality["agreement"] <= 1 == quality["held_out"]["agreement"]
    assert quality["held_out"]["perplexity"] < quality["perplexity"]


def test_a_bound_without_the_class_costs_more(run):
    """These texts tell their class for certain: to a perfect model it would be worth log 2."""
    told = run.evaluate(quality=False)["nats_per_text"]["total"]
    untold = run.evaluate(quality=False, unconditional=True)
    assert untold["condition"] == "told no class"
    assert untold["nats_per_text"]["total"] > told + 0.3
    assert (run.folder / "evaluation-unconditional.json").is_file()


def test_steps_make_the_bound_that_of_a_discrete_chain(run):
    """In one step every token is told by its class and its length alone: nothing is drawn. Many are the continuous."""
    one = run.evaluate(quality=False, steps=1, draws=2)["nats_per_text"]
    part, denoiser = run.data.held_out, run.denoiser
    blank = torch.full_like(part.tokens, run.levels).masked_fill(part.tokens == PAD, PAD)
    logits = denoiser.network(blank, torch.zeros(len(blank)), part.labels).double()
    logits[..., PAD] = -math.inf
    words = logits.log_softmax(-1).gather(-1, part.tokens[..., None])[..., 0].masked_fill(part.tokens == PAD, 0.0)
    lengths = (10 * denoiser.lengths.logits.double()).log_softmax(-1)[part.labels, part.lengths - 1]
    assert one["total"] == pytest.approx(-float((words.sum(1) + lengths).mean()), rel=1e-5)
    assert one["monte_carlo_error"] == pytest.approx(0, abs=1e-6)
    many, continuous = (run.evaluate(quality=False, draws=16, **how)["nats_per_text"] for how in ({"steps": 32}, {}))
    noise = 4 * math.hypot(many["monte_carlo_error"], continuous["monte_carlo_error"])
    assert many["total"] == pytest.approx(continuous["total"], abs=noise + 0.1)


def test_the_law_from_left_to_right_is_exact(autoregressive):
    bound = autoregressive.evaluate(quality=False)["nats_per_text"]
    part, law = autoregressive.data.held_out, autoregressive.model.model.autoregressive
    truth = -float(law.log_prob(part.tokens, part.labels).double().mean())
    assert bound["total"] == pytest.approx(truth, rel=1e-5)
    assert bound["prior"] == bound["matching"] == 0


def test_own_texts_are_scored_line_by_line(uniform, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("the cat eats moss\n\nmoss moss moss moss the a\n")
    code, out, _ = say(capsys, "evaluate", uniform.folder, "--data", tmp_path / "mine.txt")
    assert code == 0
    names = [row.split(",")[0] for row in (uniform.folder / "evaluation-files.csv").read_text().splitlines()[1:]]
    assert names == [f"{tmp_path / 'mine.txt'}:1", f"{tmp_path / 'mine.txt'}:3"]
    least = out.split("least likely first")[1]
    assert least.index("mine.txt:3") < least.index("mine.txt:1")


# -- what is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", "the cat eats the rose and grows and grows"], "the prompt has 9 tokens.*room for 8"),
        (["--prompt", "the cat eats", "--length", 2], "the prompt has 3 tokens.*room for 2"),
        (["--infill", "_ _ _ _ _ _ _ _ rose"], "the text to fill in has 9 tokens.*room for 8"),
        (["--infill", "_ rose", "--prompt", "a"], "either a prompt or a text to fill in"),
        (["--prompt", "a unicorn"], "not in the model's vocabulary: 'unicorn'"),
        (["--prompt", ""], "the prompt is empty"),
        (["--length", 0], "length must lie in 1 to 8"),
        (["--length", 9], "length must lie in 1 to 8"),
        (["--class", "mineral"], "no class 'mineral'; there are animal, plant"),
        (["--temperature", 0], "temperature"),
        (["--nucleus", 1.5], "nucleus"),
        (["--solver", "ddim"], "must be one of auto, ancestral, euler, remasking, confident"),
        (["--threshold", 0.9], "it has no threshold to choose"),
        (["--known", "picture.png"], "it has no known to choose"),
    ],
)
def test_what_cannot_be_drawn_is_refused(run, options, words, capsys):
    code, _, err = say(capsys, "sample", run.folder, *options)
    assert code == 2
    assert re.search(words, err), err


def test_a_model_that_lacks_what_is_asked_for_says_so(run, uniform, autoregressive, capsys):
    for one, options, words in (
        (uniform, ["--guidance", 1], "trained without classes"),
        (uniform, ["--class", "plant"], "trained without classes"),
        (uniform, ["--solver", "confident"], "needs masks"),
        (autoregressive, ["--length", 3], "no length"),
        (autoregressive, ["--infill", "a _"], "nothing to fill in"),
        (autoregressive, ["--solver", "euler"], "it has no solver to choose"),
        (autoregressive, ["--steps", 5], "it has no steps to choose"),
        (run, ["--candidates", 0], "candidates are at least 1"),
        (run, ["--batch-size", -3], "batch_size must be at least 1"),
    ):
        code, _, err = say(capsys, "sample", one.folder, *options)
        assert (code, words in err) == (2, True), err
    code, _, err = say(capsys, "tune", run.folder, "--steps", 4)
    assert (code, "diffusion model of tokens, which has no such thing" in err) == (2, True)
    code, _, err = say(capsys, "evaluate", run.folder, "--ode")
    assert (code, "no probability-flow ODE" in err) == (2, True)
    with pytest.raises(RunError, match="never trained both"):
        uniform.evaluate(unconditional=True)
    with pytest.raises(RunError, match="diffusion model of tokens"):
        DiffusionRun.open(run.folder)


def test_texts_that_changed_since_training_are_not_measured(tmp_path, capsys):
    """One word is another: the vocabulary is as large as before, but its tokens may be other words."""
    run = make(tmp_path, conditional="false", steps=2)
    own = tmp_path / "own.csv"
    own.write_text(own.read_text().replace("hen", "owl"))
    code, _, err = say(capsys, "evaluate", run.folder)
    assert (code, "own.csv has changed since" in err) == (2, True), err
    assert len(run.sample(2)) == 2


def test_paths_need_steps_and_a_table_is_not_scored_line_by_line(run, tmp_path, capsys):
    code, _, err = say(capsys, "evaluate", run.folder, "--importance", 4)
    assert (code, "--bound-steps" in err) == (2, True)
    code, out, _ = say(
        capsys, "evaluate", run.folder, "--importance", 8, "--bound", "--bound-steps", 16, "--examples", 8
    )
    assert (code, "importance-weighted" in out) == (0, True)
    code, _, err = say(capsys, "evaluate", run.folder, "--unconditional", "--data", tmp_path / "own.csv")
    assert (code, "stand in a .txt file" in err) == (2, True)


def test_the_recipe_may_sharpen(run, folder, tmp_path):
    path = tmp_path / "sharp.toml"
    path.write_text(RECIPE.format(file=table(folder), process="masked", conditional="true", steps=2))
    recipe = recipes.read(path, ["sampling.nucleus=0.9"])
    assert train(recipe, tmp_path / "run").sampler().how["nucleus"] == 0.9
    with pytest.raises(RecipeError, match="of tokens"):
        recipes.read("digits", ["sampling.nucleus=0.9"])


@pytest.mark.parametrize(
    ("content", "override", "words"),
    [
        (b"", (), "two texts are needed"),
        (b"one line\n", (), "two texts are needed"),
        (b"good line\nbad \xff line\n", (), "byte 14 .0xff., in line 2, is not UTF-8"),
    ],
)
def test_texts_that_cannot_be_learned_are_refused(tmp_path, content, override, words, capsys):
    (tmp_path / "own.txt").write_bytes(content)
    path = tmp_path / "own.toml"
    text = RECIPE.format(file=tmp_path / "own.txt", process="masked", conditional="false", steps=2)
    path.write_text(text.replace('label = "class"\n', ""))
    code, _, err = say(capsys, "train", path, *override, "--out", tmp_path / "run")
    assert code == 2
    assert re.search(words, err), err
    assert not (tmp_path / "run").exists()


def test_a_line_of_a_hundred_thousand_characters_is_cut(tmp_path):
    (tmp_path / "own.txt").write_text("short text " * 9_100 + "\n" + "short text\n" * 20)
    path = tmp_path / "own.toml"
    text = RECIPE.format(file=tmp_path / "own.txt", process="masked", conditional="false", steps=2)
    path.write_text(text.replace('label = "class"\n', ""))
    run = train(recipes.read(path), tmp_path / "run")
    cut = [note for note in run.info["data"]["notes"] if re.match("1 (training|held-out) texts were cut", note)]
    assert len(cut) == 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.label=kind"], "no column 'kind'"),
        (["data.label=text2"], "no column"),
        (["network.kind=mlp"], "network.kind: must be one of tokens"),
        (["objective.kind=simple"], "must be token_bound"),
        (["process.kind=best"], "process.kind: of texts is masked, uniform or autoregressive"),
        (["denoiser.predicts=x0"], "denoiser.predicts is not of tokens"),
        (["sampling.clip=false"], "sampling.clip is not of tokens"),
        (["evaluation.bound_steps=5"], "evaluation.bound_steps is not of tokens"),
        (["data.size=8"], "data.size: is of images"),
        (["data.channels=1"], "data.channels: is of images"),
        (["process.kind=cosine", "network.kind=mlp", "objective.kind=simple"], "with a section .embedding."),
    ],
)
def test_recipes_that_do_not_fit_texts_are_refused(folder, tmp_path, overrides, words):
    path = tmp_path / "own.toml"
    path.write_text(RECIPE.format(file=table(folder), process="masked", conditional="true", steps=2))
    with pytest.raises((RecipeError, ValueError), match=words):
        train(recipes.read(path, overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_masks_are_not_of_images(folder, tmp_path):
    path = tmp_path / "own.toml"
    text = RECIPE.format(file=table(folder), process="masked", conditional="true", steps=2)
    path.write_text(re.sub(r"texts = .*\nlength = .*\nlabel = .*\n.*\n", 'name = "digits"\n', text))
    with pytest.raises(RecipeError, match="masked, uniform and autoregressive are of texts"):
        train(recipes.read(path), tmp_path / "run")


def test_the_padding_of_data_and_of_models_is_one():
    from kuosan.discrete import lengths

    assert PAD == lengths.PAD == 0
