"""The report of a model of texts: a page that needs nothing else and says what report.json says."""

import itertools
import json
import math

import pytest
import torch

from kuosan import recipe as recipes
from kuosan.measurements import measurements_of
from kuosan.measurements.text import GUIDANCE, NUCLEI, Nearest
from kuosan.report import write_report
from kuosan.runs import load
from kuosan.text.ngram import NGram
from kuosan.train import train
from pages import Page, written

TINY = [
    "network.width=16",
    "network.depth=1",
    "training.steps=6",
    "training.batch_size=16",
    "training.accumulate=1",
    "training.precision=float32",
    "training.warmup=2",
    "sampling.steps=5",
    "evaluation.draws=2",
]
SECTIONS = ["samples", "way", "loss", "bound", "quality", "control", "rounds", "lengths", "neighbours", "provenance"]
BUDGET = 0.02
LENGTH = 7


def lines():
    """Texts of two classes and 4 to 7 words."""
    beasts = itertools.product(["small", "big", "old"], ["cat", "dog", "fox"], ["that sleeps", "that eats fish", "of"])
    tools = itertools.product(["saw", "axe", "pen"], ["to cut", "to draw", "for"], ["wood", "a line", "work"])
    found = [(f"a {a} {b} {c}", "animal") for a, b, c in beasts] + [(f"{a} used {b} {c}", "tool") for a, b, c in tools]
    return [found[(5 * i) % len(found)] for i in range(len(found))]


def trained(folder, *overrides, labels=True):
    folder.mkdir(parents=True, exist_ok=True)
    if labels:
        source = folder / "words.csv"
        source.write_text("\n".join(["text,class", *(f"{text},{name}" for text, name in lines())]), "utf-8")
    else:
        source = folder / "words.txt"
        source.write_text("\n".join(text for text, _ in lines()), "utf-8")
    own = 'label="class", conditional=true' if labels else "conditional=false"
    data = f'data={{texts="{source}", length={LENGTH}, held_out=0.2, {own}}}'
    train(recipes.read("glosses-masked", [data, *TINY, *overrides]), folder / "run")
    return load(folder / "run")


def sections(page):
    return [attributes["id"] for attributes in page.of("section")]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A run on texts of two classes, hardly trained."""
    return trained(tmp_path_factory.mktemp("runs") / "words")


@pytest.fixture(scope="module")
def page(words):
    return Page(write_report(words, budget=BUDGET))


@pytest.fixture(scope="module")
def numbers(words, page):
    return written(words)


def test_the_page_has_every_section_in_order(page):
    assert sections(page) == SECTIONS


def test_the_page_loads_nothing_from_anywhere(page):
    page.check_alone()
    assert page.of("img") == []


def test_every_figure_has_a_caption(page):
    assert len(page.of("figure")) == len(page.of("figcaption")) >= 8


def test_the_numbers_on_the_page_are_those_of_the_json(page, numbers):
    """Each marked number carries its name in report.json; what is printed is that value, rounded."""
    assert len(page.numbers) > 120
    for name, value, printed in page.numbers:
        truth = numbers
        for part in name.split("."):
            truth = truth[int(part)] if isinstance(truth, list) else truth[part]
        assert float(value) == truth, name
        shown = float(printed.replace(",", "").replace("−", "-").rstrip("\u202f%"))
        assert shown / (100 if "%" in printed else 1) == pytest.approx(truth, rel=6e-3, abs=6e-3), name


def test_the_samples_shown_are_those_that_the_run_draws_with_their_classes(words, page, numbers):
    """Truth: run.sample with the seeds that the page states, classes in turn."""
    rows = numbers["samples"]["rows"]
    assert [row["seed"] for row in rows] == [c + 2 * k for c in range(2) for k in range(6)]
    assert [row["class"] for row in rows] == ["animal"] * 6 + ["tool"] * 6
    assert [a["data-seed"] for a in page.of("tr") if "data-seed" in a] == [str(row["seed"]) for row in rows]
    drawn = words.sample(12)
    for row in rows:
        assert row["text"] == words.medium.words(drawn[row["seed"]])


def test_the_way_from_noise_to_words_ends_in_the_first_sample(words, page, numbers):
    """Under masks each token appears once, in the row where it is marked, and stays."""
    way = numbers["way"]
    assert way["text"] == words.medium.words(words.sample(1)[0]) == numbers["samples"]["rows"][0]["text"]
    assert " ".join(way["rows"][-1]["tokens"]) == way["text"]
    assert way["left_to_right"] == way["tokens"] + (way["tokens"] < LENGTH)
    blanks = ["_"] * way["tokens"]
    for row in way["rows"]:
        assert row["new"] == [a != b for a, b in zip(row["tokens"], blanks, strict=True)]
        assert all(a in (b, "_") for a, b in zip(blanks, row["tokens"], strict=True))
        blanks = row["tokens"]
    classes = [a["class"].split() for a in page.of("span") if a.get("class", "").startswith("token")]
    assert sum("new" in names for names in classes) == way["tokens"]


def test_the_ngrams_are_those_of_the_training_texts_on_the_same_held_out_texts(words, numbers):
    """Truth: NGram itself; for each token of the texts and each end."""
    data, found = words.data, numbers["nats_per_text"]
    chosen = words.chosen("held_out", found["held_out"]["examples"])
    tokens, lengths = data.held_out.tokens[chosen], data.held_out.lengths[chosen]
    predicted = float((lengths + (lengths < LENGTH)).sum()) / len(chosen)
    assert [row["order"] for row in found["ngrams"]] == [1, 2, 3]
    for row in found["ngrams"]:
        ngram = NGram(row["order"]).fit(data.train.tokens, data.train.lengths, data.tokenizer.size)
        assert row["total"] == pytest.approx(-float(ngram.log_prob(tokens, lengths).mean()))
        assert row["perplexity"] == pytest.approx(ngram.perplexity(tokens, lengths))
    for split in ("held_out", "train"):
        own = found[split]
        assert own["total"] == pytest.approx(own["prior"] + own["matching"] + own["reconstruction"])
    assert found["held_out"]["nats_per_token"] == pytest.approx(found["held_out"]["total"] / predicted)


def test_control_has_every_weight_and_nucleus_and_rounds_every_rule(numbers):
    ways = [(point["guidance"], point["nucleus"]) for point in numbers["control"]["points"]]
    assert ways == [(weight, nucleus) for nucleus in NUCLEI for weight in GUIDANCE]
    assert [rule["rule"] for rule in numbers["rounds"]["rules"]] == ["ancestral", "confident"]
    for rule in numbers["rounds"]["rules"]:
        assert [point["steps"] for point in rule["points"]][:4] == [1, 2, 4, 8]
        for point in rule["points"]:
            assert 1 <= point["evaluations"] <= point["steps"]


def test_an_evaluation_of_this_step_is_used_and_one_of_another_step_is_not(words, numbers):
    kept = words.folder / "evaluation.json"
    quality = numbers["quality"] | {"agreement": 0.125, "guidance": 0.0}
    nats = numbers["nats_per_text"]["held_out"] | {"total": 7.5, "form": "continuous time"}
    try:
        for step, found in ((words.step, True), (words.step - 1, False)):
            kept.write_text(json.dumps({"step": step, "nats_per_text": nats, "quality": quality}))
            measurements = measurements_of(words, BUDGET)
            assert (measurements.nats_per_text()[0]["held_out"]["total"] == 7.5) is found
            assert (measurements.quality()["agreement"] == 0.125) is found
    finally:
        kept.unlink()


def test_uniform_noise_has_its_page(tmp_path):
    """Every token is shown at every step, and there is no rule that knows masks."""
    run = trained(tmp_path, 'process.kind="uniform"')
    page = Page(write_report(run, budget=BUDGET))
    found = written(run)
    assert sections(page) == SECTIONS
    assert [rule["rule"] for rule in found["rounds"]["rules"]] == ["ancestral"]
    assert not any(found["way"]["rows"][0]["new"])
    assert all("_" not in row["tokens"] for row in found["way"]["rows"])
    assert " ".join(found["way"]["rows"][-1]["tokens"]) == run.medium.words(run.sample(1)[0])


def test_a_model_that_writes_from_left_to_right_has_no_way_and_no_rounds(tmp_path):
    run = trained(tmp_path, 'process.kind="autoregressive"')
    page = Page(write_report(run, budget=BUDGET))
    found = written(run)
    assert sections(page) == [name for name in SECTIONS if name not in ("way", "rounds")]
    tokens = run.sample(found["quality"]["samples"])
    lengths = (tokens != 0).sum(1)
    assert found["samples"]["evaluations"] == pytest.approx(float((lengths + (lengths < LENGTH)).double().mean()))
    n = found["nats_per_text"]["held_out"]["examples"]
    x, condition = run.examples("held_out", n)
    exact = -run.model.model.autoregressive.log_prob(torch.nn.functional.pad(x, (0, LENGTH - x.shape[1])), condition)
    assert found["nats_per_text"]["held_out"]["total"] == pytest.approx(float(exact.mean()), rel=1e-5)


def test_texts_without_classes_have_a_report_without_a_judge_or_control(tmp_path):
    run = trained(tmp_path, labels=False)
    page = Page(write_report(run, budget=BUDGET))
    found = written(run)
    assert sections(page) == [name for name in SECTIONS if name != "control"]
    assert "There is no judge of classes" in page.source
    assert found["control"] is None
    assert [row["seed"] for row in found["samples"]["rows"]] == list(range(24))
    assert {row["class"] for row in found["samples"]["rows"]} == {None}
    assert found["rounds"]["rules"][0]["points"][0]["agreement"] is None


def test_the_nearest_training_text_is_the_one_that_shares_most_pairs():
    """By hand: "1 2 3" has the pairs (^, 1), (1, 2), (2, 3), (3, $); with "1 2" it shares two of five."""
    nearest = Nearest(torch.tensor([[1, 2, 0], [4, 5, 6]]), torch.tensor([2, 3]))
    overlap, index = nearest(torch.tensor([[1, 2, 3], [4, 5, 6], [9, 0, 0]]), torch.tensor([3, 3, 1]))
    assert index.tolist()[:2] == [0, 1]
    assert overlap.tolist() == pytest.approx([2 / 5, 1.0, 0.0])
    assert not math.isnan(overlap[2])
