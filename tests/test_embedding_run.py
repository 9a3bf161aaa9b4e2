"""Runs of texts as points: samples, what is given of them, control, the bound, and clear words where one is wrong."""

import json
import math
import random
import re

import pytest
import torch

import kuosan as ks
from kuosan import recipe as recipes
from kuosan.cli import main
from kuosan.discrete.control import GradientControl
from kuosan.discrete.embedding import Clamp
from kuosan.recipe import RecipeError
from kuosan.report import write_report
from kuosan.runs import EmbeddingRun, RunError
from kuosan.solvers import ClassifierFree, Inpainting
from kuosan.text.ngram import NGram
from kuosan.tokenizer import PAD
from kuosan.train import train

ANIMALS, PLANTS = ("cat", "dog", "cow", "hen", "ewe", "pig"), ("oak", "fern", "moss", "rose", "ivy", "elm")
LENGTH = 6
RECIPE = """
[data]
texts = "{file}"
length = 6
label = "class"
held_out = 0.1
conditional = {conditional}
[embedding]
size = 8
[process]
kind = "sqrt"
[network]
kind = "sequence"
width = 32
depth = 1
heads = 2
[denoiser]
predicts = "{predicts}"
[objective]
kind = "{objective}"
[training]
steps = {steps}
batch_size = 64
learning_rate = 5e-3
warmup = 5
ema = 0.9
label_drop = 0.3
sample_every = {steps}
checkpoint_every = 1000
[sampling]
steps = 12
clip = false
[evaluation]
variance = "beta_tilde"
terms = "stratified"
bound_steps = 20
draws = 4
samples = 60
"""


def sentences(n=300):
    """Animals eat, plants grow: the class shows in the words, and lengths differ."""
    dice = random.Random(0)
    for i in range(n):
        if i % 2:
            yield f"animal,the {dice.choice(ANIMALS)} eats" + " the" * dice.randint(0, 1) + f" {dice.choice(PLANTS)}"
        else:
            yield f"plant,a {dice.choice(PLANTS)} grows" + f" and {dice.choice(PLANTS)}" * dice.randint(0, 1)


def recipe(folder, predicts="words", objective="word_cross_entropy", conditional="true", steps=150, overrides=()):
    (folder / "own.csv").write_text("class,text\n" + "\n".join(sentences()) + "\n")
    path = folder / f"{predicts}-{objective}-{conditional}.toml"
    settings = {"predicts": predicts, "objective": objective, "conditional": conditional, "steps": steps}
    path.write_text(RECIPE.format(file=folder / "own.csv", **settings))
    return recipes.read(path, overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("points")


@pytest.fixture(scope="module")
def run(folder):
    return train(recipe(folder), folder / "run")


@pytest.fixture(scope="module")
def by_x0(folder):
    """Diffusion-LM's own loss, and a model that is told no classes."""
    return train(recipe(folder, "x0", "diffusion_lm", "false", 200), folder / "by_x0")


def words(run, tokens):
    return [run.medium.words(row).split() for row in tokens]


def right(run, tokens, labels):
    """The share of texts with a word of the class that was asked for, and none of the other's."""
    own = [{"eats", *ANIMALS}, {"grows"}]
    found = words(run, tokens)
    fits = [bool(set(text) & own[c]) and not set(text) & own[1 - c] for text, c in zip(found, labels, strict=True)]
    return sum(fits) / len(fits)


# -- what a run is -----------------------------------------------------------------------------------------------------


def test_a_run_of_points_is_one_of_texts(run, by_x0):
    for one in (run, by_x0):
        loaded = ks.load(one.folder)
        assert isinstance(loaded, EmbeddingRun)
        log = [json.loads(line) for line in (one.folder / "metrics.jsonl").read_text().splitlines()]
        assert log[-1]["loss"] < 0.6 * log[0]["loss"]
        torch.testing.assert_close(loaded.sample(4), one.sample(4))
        (sheet,) = (one.folder / "samples").glob("step-*.txt")
        assert len(sheet.read_text().splitlines()) >= 16
        assert one.denoiser.embedding.smallest_distance() > 0.5
    own = run.data.train.lengths
    assert (run.shape, run.state_shape) == ((LENGTH,), (int(own.mode().values), 8))
    states, labels = run.states(run.data.train)
    truth = run.data.train.tokens[own == own.mode().values][:, : run.state_shape[0]]
    torch.testing.assert_close(states, run.denoiser.embedding.points.detach()[truth])
    assert torch.equal(labels, run.data.train.labels[own == own.mode().values])


# -- samples -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["auto", "ddim", "dpm_solver++ order=2", "ancestral"])
def test_every_kind_of_solver_draws_texts(run, solver):
    table = recipes.as_table(solver.split())
    tokens = run.sample(40, solver=table)
    assert tokens.shape == (40, LENGTH)
    ended = (tokens == PAD).cumsum(1) > 0
    assert bool((tokens[ended] == PAD).all())
    assert right(run, tokens, run.labels_for(40).tolist()) > 0.7
    torch.testing.assert_close(run.sample(seeds=[7, 2], labels=torch.tensor([1, 0]), solver=table), tokens[[7, 2]])


@pytest.mark.parametrize("n", [1, 3, LENGTH])
def test_an_asked_length_is_met_exactly(run, by_x0, n):
    for one in (run, by_x0):
        for solver in ("auto", "ancestral"):
            tokens = one.sample(10, length=n, solver={"kind": solver}, steps=6)
            assert ((tokens != PAD).sum(1) == n).all()
            assert (tokens[:, :n] != PAD).all()


def test_lengths_are_those_of_the_seeds_and_nothing_stands_after_the_end(run, by_x0):
    """Drawn from the learned histogram, 4,000 of each class, 5 standard deviations; that is the training texts' own."""
    for one, classes in ((run, 2), (by_x0, 0)):
        labels = one.labels_for(60)
        for settings in ({}, {"solver": {"kind": "ancestral"}, "steps": 6}, {"clip": True}):
            tokens, sampler = one.sample(60, **settings), one.sampler(**settings)
            n = (tokens != PAD).sum(1)
            assert torch.equal(n, sampler.lengths(range(60), labels))
            assert torch.equal(tokens != PAD, torch.arange(LENGTH) < n[:, None])
        assert len(n.unique()) > 1
        own = one.data.train.lengths
        for c in range(classes) or [None]:
            told = None if c is None else torch.full((4000,), c)
            found = sampler.lengths(range(4000), told).bincount(minlength=LENGTH + 1)[1:] / 4000
            law = one.denoiser.lengths.law(1, None if c is None else told[:1])[0].exp()
            assert float((found - law).abs().max()) < 5 * math.sqrt(0.25 / 4000)
            there = own if c is None else own[one.data.train.labels == c]
            assert float((law - there.bincount(minlength=LENGTH + 1)[1:] / len(there)).abs().max()) < 0.1


def test_a_text_is_of_its_seed_and_class_whatever_is_drawn_beside_it(run, by_x0):
    for one, how in ((run, {}), (run, {"guidance": 1.0}), (by_x0, {"prompt": "the"})):
        labels = one.labels_for(40)
        for solver in ("auto", "ancestral"):
            settings = how | {"solver": {"kind": solver}, "steps": 5}
            whole = one.sample(40, labels=labels, **settings)
            for size in (1, 7):
                assert torch.equal(one.sample(40, labels=labels, batch_size=size, **settings), whole)
            some = [31, 2, 17]
            picked = one.sample(seeds=some, labels=None if labels is None else labels[some], **settings)
            assert torch.equal(picked, whole[some])


def test_what_is_given_has_room(run, by_x0):
    """Of the lengths with room for a prompt, the model's law: 4,000 draws, 5 standard deviations."""
    for one in (run, by_x0):
        for prompt, least in (("the", 1), ("the cat eats", 3), ("a rose grows and moss the", 6)):
            for text in words(one, one.sample(20, prompt=prompt, steps=5)):
                assert text[:least] == prompt.split()
                assert LENGTH >= len(text) >= least
        law = one.denoiser.lengths.law(1)[0].exp() * (torch.arange(LENGTH) >= 3)
        drawn = one.sampler(prompt="the cat eats the").lengths(range(4000), torch.full((4000,), -1))
        found = drawn.bincount(minlength=LENGTH + 1)[1:] / 4000
        assert float((found - law / law.sum()).abs().max()) < 5 * math.sqrt(0.25 / 4000)


def test_a_prompt_and_given_words_stay_where_they_are(run, by_x0):
    for one in (run, by_x0):
        for solver in ({"kind": "auto"}, {"kind": "ancestral"}):
            how = {"solver": solver, "steps": 6}
            assert all(text[:2] == ["the", "cat"] for text in words(one, one.sample(8, prompt="the cat", **how)))
            for text in words(one, one.sample(8, infill="a _ _ and _", **how)):
                assert (text[0], text[3], len(text)) == ("a", "and", 5)
            for text in words(one, one.sample(8, infill="_ _ rose", length=5, corrections=1, **how)):
                assert (text[2], len(text)) == ("rose", 5)


def test_the_class_that_is_asked_for_shows_more_so_if_guided(run):
    labels = run.labels_for(60)
    plain, guided = (right(run, run.sample(60, guidance=w), labels.tolist()) for w in (0.0, 3.0))
    assert guided >= max(0.9, plain)


def test_to_clip_is_to_clamp_wherever_a_sampler_is_made(run, folder):
    """Of samplers, of tables in tuning and of the sheet while training: never to [-1, 1]."""
    assert isinstance(run.sampler(clip=True).transform, Clamp)
    assert run.sampler().transform is None
    assert run.sampler(clip=True).how["clip"]
    assert run.sample(4, clip=True).shape == (4, LENGTH)
    with pytest.raises(RunError, match="no threshold"):
        run.sampler(threshold=0.9)
    clipped = train(recipe(folder, steps=3, overrides=["sampling.clip=true"]), folder / "clipped")
    chosen = clipped._settings({})
    assert isinstance(chosen.transform, Clamp)
    x = torch.full((2, *clipped.state_shape), 0.9)
    points = clipped.denoiser.embedding.points
    assert bool(((chosen.transform(x)[:, :, None] - points).norm(dim=-1).min(-1).values < 1e-5).all())


def test_the_command_line_draws_and_shows_texts(run, capsys):
    code = main(["sample", str(run.folder), "-n", "4", "--class", "animal", "--solver", "dpm_solver++ order=2"])
    out, _ = capsys.readouterr()
    assert code == 0
    shown = (run.folder / "samples" / "sheet.txt").read_text().splitlines()
    assert [line.split("  ", 1)[1].strip() for line in out.splitlines()[:4]] == shown


# -- control -----------------------------------------------------------------------------------------------------------


def test_a_classifier_is_trained_once_and_kept(run, capsys):
    first = run.noisy_classifier(60, 64)
    assert "training the classifier" in capsys.readouterr().err
    assert run.noisy_classifier() is first
    other = ks.load(run.folder)
    torch.testing.assert_close(other.noisy_classifier().state_dict(), first.state_dict())
    assert "training the classifier" not in capsys.readouterr().err
    held_out = run.data.held_out
    assert first.accuracy(held_out.tokens, held_out.labels, 0.05) > 0.95
    classes = [held_out.labels[held_out.lengths == n].bincount().max() for n in held_out.lengths.unique()]
    by_length = float(sum(classes)) / len(held_out)  # what the length alone says, which noise does not hide
    assert first.accuracy(held_out.tokens, held_out.labels, 1.0) <= by_length + 1e-9
    kept = run.folder / "classifier" / "classifier.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"weights": "others", "steps": 5}))
    again = ks.load(run.folder).noisy_classifier(5, 8)
    assert "of other weights" in capsys.readouterr().err
    assert json.loads(kept.read_text())["steps"] == 5
    assert not torch.equal(again.network.last.weight, first.network.last.weight)
    run.noisy_classifier(60, 64)


@pytest.mark.parametrize("solver", ["auto", "ancestral"])
def test_control_brings_the_class_to_a_model_that_is_told_none(by_x0, solver):
    """Without control half of the texts are of the class that is asked for; all of a length that both classes have."""
    by_x0.noisy_classifier(400, 64)
    labels, how = (torch.arange(60) % 2).tolist(), {"solver": {"kind": solver}, "steps": 20, "length": 5}
    free, one, strong, several = (
        right(by_x0, by_x0.sample(60, control=w, control_steps=k, **how), labels)
        for w, k in ((0, 1), (1, 1), (4, 1), (4, 3))
    )
    assert free < 0.62
    assert min(one, several) > 1.25 * max(free, 0.45)
    assert strong > 1.4 * max(free, 0.45)


def test_control_is_of_the_model_without_classes_and_goes_with_what_is_given(run):
    run.noisy_classifier(60, 64)
    sampler = run.sampler(control=2.0, control_steps=2, prompt="the", corrections=0, interval=(0.1, 5.0))
    assert isinstance(sampler.of_length(3), Inpainting)
    assert isinstance(sampler.model, GradientControl)
    inner = sampler.model
    assert sampler.of_length(3).model is inner
    assert (inner.weight, inner.steps, inner.interval, inner.conditional) == (2.0, 2, (0.1, 5.0), False)
    assert (sampler.how["control"], sampler.how["control_steps"], sampler.how["guidance"]) == (2.0, 2, 0.0)
    assert "control" not in run.sampler().how
    assert all(text[0] == "the" for text in words(run, run.sample(6, control=2.0, prompt="the")))
    for text in words(run, run.sample(4, control=2.0, control_steps=2, infill="_ _ rose", length=5, corrections=1)):
        assert (text[2], len(text)) == ("rose", 5)
    tokens = run.sample(30, control=0.0, steps=6)  # of weight 0: the model without classes
    assert 0.2 < right(run, tokens, run.labels_for(30).tolist()) < 0.8


def test_control_is_of_the_length_too(run):
    """p(n) p(c | n)^w of what the model learned, by hand; weight 0 is the law of all texts, 1 that of the class."""
    law = torch.softmax(10 * run.denoiser.lengths.logits.detach().double(), -1)
    any_class, labels = law[-1], torch.tensor([0, 1]).repeat(3000)
    for w in (0.0, 1.0, 3.0):
        lengths = run.sampler(control=w).lengths(range(6000), labels)
        for c in (0, 1):
            truth = any_class ** (1 - w) * law[c] ** w
            found = lengths[labels == c].bincount(minlength=LENGTH + 1)[1:] / 3000
            assert float((found - truth / truth.sum()).abs().max()) < 5 * math.sqrt(0.25 / 3000)


def test_a_wrong_number_of_classes_is_refused(run):
    for n in (2, 6):
        with pytest.raises(ValueError, match=f"4 seeds, {n} conditions"):
            run.sample(4, labels=torch.zeros(n, dtype=torch.long))


def test_control_takes_the_place_of_the_recipe_s_guidance(folder):
    guided = train(recipe(folder, steps=2, overrides=["sampling.guidance=2.0"]), folder / "guided")
    guided.noisy_classifier(2, 8)
    assert isinstance(guided.sampler().model, ClassifierFree)
    controlled = guided.sampler(control=1.0)
    assert controlled.model.denoiser is guided.denoiser
    assert controlled.how["guidance"] == 0


def test_control_that_cannot_be_is_refused(run, folder):
    with pytest.raises(RunError, match="without classes: drop guidance"):
        run.sampler(control=1.0, guidance=2.0)
    with pytest.raises(RunError, match="give its weight"):
        run.sampler(control_steps=2)
    with pytest.raises(RunError, match="tuned without control"):
        run.sampler(control=1.0, solver={"kind": "tuned"})
    with pytest.raises(RunError, match="tuned without control"):
        run.tune(2, settings={"control": 1.0})
    with pytest.raises(ValueError, match="finite"):
        run.sampler(control=math.inf)
    with pytest.raises(ValueError, match="at least 1"):
        run.sampler(control=1.0, control_steps=0)
    always = train(recipe(folder, steps=2, overrides=["training.label_drop=0.0"]), folder / "always")
    with pytest.raises(RunError, match="never trained without a class"):
        always.sampler(control=1.0)
    text = (folder / "words-word_cross_entropy-true.toml").read_text().replace('label = "class"\n', "")
    (folder / "none.toml").write_text(text.replace("conditional = true", "conditional = false"))
    none = train(recipes.read(folder / "none.toml", ["training.steps=2"]), folder / "none")
    with pytest.raises(RunError, match="have no classes"):
        none.sampler(control=1.0)


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_evaluation_gives_nats_beside_ngrams(run, capsys):
    assert main(["evaluate", str(run.folder)]) == 0
    assert "nats per text" in capsys.readouterr().out
    found = json.loads((run.folder / "evaluation.json").read_text())
    bound = found["nats_per_text"]
    assert bound["total"] == pytest.approx(bound["reconstruction"] + bound["prior"] + bound["matching"])
    assert bound["form"] == "continuous time"
    held_out = run.data.held_out
    bigrams = NGram(2).fit(run.data.train.tokens, run.data.train.lengths, run.levels)
    truth = -float(bigrams.log_prob(held_out.tokens, held_out.lengths).mean())
    assert found["baselines"]["bigrams of the training texts"] == pytest.approx(truth)
    assert bound["total"] < found["baselines"]["unigrams of the training texts"]
    assert 0 <= found["quality"]["agreement"] <= 1


def test_many_steps_cost_what_continuous_time_does(run, by_x0):
    for one in (run, by_x0):
        many, few, continuous = (
            one.evaluate(quality=False, draws=8, **how)["nats_per_text"] for how in ({"steps": 200}, {"steps": 5}, {})
        )
        noise = 4 * math.hypot(many["monte_carlo_error"], continuous["monte_carlo_error"])
        assert many["total"] == pytest.approx(continuous["total"], abs=noise + 0.1 * continuous["total"])
        assert few["total"] > many["total"]
        assert many["form"] == "200 steps"


def test_the_optimal_variance_is_measured_of_points(run):
    """A lower bound on nothing, but never worse than beta by more than its noise: it is the best of its kind."""
    best, beta = (
        run.evaluate(quality=False, steps=10, draws=16, variance=v)["nats_per_text"] for v in ("optimal", "beta")
    )
    assert (run.folder / "variance.safetensors").is_file()
    noise = 4 * math.hypot(best["monte_carlo_error"], beta["monte_carlo_error"])
    assert best["total"] < beta["total"] + noise
    with pytest.raises(RunError, match="no dimensions in common"):
        run.evaluate(quality=False, steps=10, variance="optimal_per_dimension")


@pytest.mark.parametrize("clip", [False, True])
def test_a_table_is_tuned_to_points(run, clip):
    found, path = run.tune(4, settings={"clip": clip}, pairs=8, iterations=3, batch_size=4, fine=10)
    assert path.is_file()
    assert found.errors.rmse <= found.start_errors.rmse * 1.001
    sampler = run.sampler(steps=4, clip=clip)
    assert sampler.how["solver"].startswith("tuned")
    assert run.sample(3, steps=4, clip=clip).shape == (3, LENGTH)


def test_own_texts_are_scored_line_by_line(run, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("the cat eats moss\n\nmoss moss moss moss the a\n")
    assert main(["evaluate", str(run.folder), "--data", str(tmp_path / "mine.txt")]) == 0
    least = capsys.readouterr().out.split("least likely first")[1]
    assert least.index("mine.txt:3") < least.index("mine.txt:1")


# -- what is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--threshold", 0.9], "it has no threshold to choose"),
        (["--known", "a.png", "--mask", "b.png"], "in the place of a picture"),
        (["--temperature", 0.5], "it has no temperature to choose"),
        (["--prompt", "a unicorn"], "not in the model's vocabulary: 'unicorn'"),
        (["--length", 9], "length must lie in 1 to 6"),
        (["--class", "mineral"], "no class 'mineral'; there are animal, plant"),
        (["--solver", "remasking"], "must be one of"),
        (["--corrector", "langevin", "--prompt", "the"], "drop it"),
        (["--corrections", 1], "corrections are by given words"),
        (["--batch-size", 0], "batch_size must be at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_refused(run, options, said, capsys):
    code = main(["sample", str(run.folder), *map(str, options)])
    err = capsys.readouterr().err
    assert (code, bool(re.search(said, err))) == (2, True), err


def test_a_model_without_classes_or_density_says_so(run, by_x0, capsys):
    for one, command, said in (
        (by_x0, ["sample", "--guidance", "1"], "trained with classes"),
        (by_x0, ["sample", "--class", "plant"], "trained without classes"),
        (run, ["evaluate", "--ode"], "no probability"),
        (run, ["evaluate", "--trajectory"], "no on_trajectory to choose"),
    ):
        code = main([command[0], str(one.folder), *command[1:]])
        err = capsys.readouterr().err
        assert (code, said in err) == (2, True), err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["process.kind=masked"], "words as points take a process such as sqrt"),
        (["denoiser.predicts=eps"], 'is "x0" or "words"'),
        (["denoiser.learned_variance=true"], "without a learned variance"),
        (["network.kind=mlp"], "network.kind: must be one of sequence"),
        (["objective.kind=simple"], "must be diffusion_lm, word_cross_entropy"),
        (["sampling.threshold=0.9"], "sampling.threshold is of images"),
        (["embedding.size=0"], "embedding.size"),
        (["denoiser.preconditioning=edm"], "sigma_data=1"),
    ],
)
def test_recipes_that_do_not_fit_points_are_refused(folder, tmp_path, overrides, said):
    with pytest.raises((RecipeError, ValueError), match=said):
        train(recipe(folder, steps=2, overrides=overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_report_says_whether_words_are_told_apart(run):
    """The smallest distance by brute force; the way ends in the sample that `kuosan sample` draws first."""
    write_report(run, budget=1.0)
    found = json.loads((run.folder / "report.json").read_text())
    points = run.denoiser.embedding.points
    apart = torch.cdist(points, points) + 1e9 * torch.eye(len(points))
    assert found["points"]["smallest"] == pytest.approx(float(apart.min()), rel=1e-4)
    assert 0 <= found["points"]["rounded"] <= 1
    assert found["way"]["text"] == run.medium.words(run.sample(1)[0])
    assert "Are the words told apart?" in (run.folder / "report.html").read_text()
