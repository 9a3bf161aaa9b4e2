"""Texts longer than the model's own, against laws that can be enumerated, and through runs."""

import csv
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from enumerated import JOINT, LENGTH, PROCESSES, V, exact
from kuosan import recipe as recipes
from kuosan.cli import main
from kuosan.discrete import (
    CategoricalDenoiser,
    CategoricalProcess,
    Confident,
    Lengths,
    Remasking,
    Sharpened,
    TokenGuidance,
    expected_evaluations,
    sample_tokens,
    sampling,
)
from kuosan.discrete.blocks import blocks_of, sample_blocks
from kuosan.seeds import stream
from kuosan.train import train

MASKED = PROCESSES["masked"]
PAIRS = np.array([[0.8, 0.2], [0.35, 0.65]])  # p(next | this) of two states
FIRST = np.array([0.1, 0.9])  # far from what the chain comes to: only the beginning is like it


@pytest.fixture
def fast_noise(monkeypatch):
    """One generator for each batch: what a text depends on is another test's business."""

    class Fast:
        def __init__(self, seeds, shape, dtype, purpose):
            self.generator, self.shape, self.dtype = stream(purpose, seeds[0]), (len(seeds), *shape), dtype

        def draw(self):
            return torch.randn(self.shape, generator=self.generator, dtype=self.dtype)

    monkeypatch.setattr(sampling, "Noise", Fast)


def chain_of(texts):
    """The probability of each text of the chain."""
    return np.array([FIRST[text[0]] * np.prod([PAIRS[a, b] for a, b in itertools.pairwise(text)]) for text in texts])


class Chain(nn.Module):
    """Logits of masked texts of w tokens of the chain, by enumeration."""

    def __init__(self, window):
        super().__init__()
        texts = np.array(list(itertools.product(range(2), repeat=window)))
        every = np.array(list(itertools.product(range(3), repeat=window)))  # 2: the mask
        law, table = chain_of(texts), np.zeros((len(every), window, 2))
        for row, i in itertools.product(range(len(every)), range(window)):
            others = np.arange(window) != i
            agree = ((every[row] == 2) | (every[row] == texts))[:, others].all(1)
            table[row, i] = [law[agree & (texts[:, i] == k)].sum() for k in range(2)]
        self.table, self.base = torch.tensor(table).log(), 3 ** torch.arange(window - 1, -1, -1)

    def forward(self, x_t, t, condition=None):
        return self.table[(x_t * self.base).sum(1)]


def frequencies(tokens, states):
    base = states ** torch.arange(tokens.shape[1] - 1, -1, -1)
    counts = np.bincount((tokens * base).sum(1).numpy(), minlength=states ** tokens.shape[1])
    return counts / len(tokens)


def in_windows(length, block):
    """The law of a long text whose windows of 3 tokens all have the joint law, given those before."""
    law = JOINT.reshape((V,) * LENGTH)
    texts = list(itertools.product(range(V), repeat=length))
    truth = np.ones(len(texts))
    for row, text in enumerate(texts):
        end = 0
        for width in blocks_of(length, LENGTH, block):
            end += width
            shown = text[max(0, end - LENGTH) : end]
            before = law[shown[: LENGTH - width]].sum()
            truth[row] *= law[shown] / before if before else 0.0
    return truth


# -- the law of long texts ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fast_noise")
@pytest.mark.parametrize(("window", "block"), [(4, 2), (4, 1), (3, None)])
def test_a_markov_chain_written_block_after_block_has_the_law_of_the_chain(window, block):
    """Total variation from the chain's own law of 6 tokens, of which the noise of 20,000 samples is about .015."""
    model = CategoricalDenoiser(Chain(window), CategoricalProcess.masked(2))
    drawn = sample_blocks(model, 6, seeds=range(20_000), window=window, block=block, steps=60, batch_size=20_000)
    truth = chain_of(itertools.product(range(2), repeat=6))
    assert truth.sum() == pytest.approx(1)
    assert 0.5 * np.abs(frequencies(drawn.tokens, 2) - truth).sum() < 0.03


@pytest.mark.usefixtures("fast_noise")
@pytest.mark.parametrize("block", [1, 2])
def test_of_any_law_each_block_is_what_its_window_says_after_what_is_before(block):
    """Truth: p(x_1 .. x_3), then the joint law of three tokens given those that the window still shows."""
    how = {"seeds": range(50_000), "window": LENGTH, "steps": 60, "batch_size": 50_000}
    truth = in_windows(5, block)
    assert truth.sum() == pytest.approx(1)
    assert 0.5 * np.abs(frequencies(sample_blocks(exact(MASKED), 5, block=block, **how).tokens, V) - truth).sum() < 0.03


@pytest.mark.usefixtures("fast_noise")
def test_without_masks_what_comes_before_is_seen_only_as_noisy_as_all_else():
    """Nearer to the law given it than a block that sees nothing of it, if not at it. Both by enumeration."""
    how = {"seeds": range(10_000), "window": LENGTH, "steps": 40, "batch_size": 10_000}
    found = frequencies(sample_blocks(exact(PROCESSES["uniform"]), 4, block=1, **how).tokens, V)
    truth, last = in_windows(4, 1), JOINT.reshape(V, V, V).sum((0, 1))
    blind = np.outer(JOINT, last).ravel()
    assert np.abs(found - truth).sum() < 0.75 * np.abs(blind - truth).sum()


# -- what is kept, what it depends on, what it costs -------------------------------------------------------------------


class Counting(nn.Module):
    """A network that counts the texts that it is asked of, and keeps what it saw."""

    def __init__(self):
        super().__init__()
        self.asked, self.seen = 0, []

    def forward(self, x, t, condition=None):
        self.asked += len(x)
        self.seen.append(x)
        return torch.zeros(*x.shape, 5)


@pytest.mark.parametrize(
    ("length", "window", "block", "widths"),
    [
        (6, 4, 2, [4, 2]),
        (7, 4, None, [4, 2, 1]),
        (10, 4, 4, [4, 4, 2]),
        (3, 4, 2, [3]),
        (4, 4, 1, [4]),
        (2, 1, 1, [1, 1]),
    ],
)
def test_the_first_window_is_written_whole_then_a_block_each(length, window, block, widths):
    assert blocks_of(length, window, block) == widths


def test_what_is_given_stays_wherever_it_stands():
    known = torch.full((9,), -1)
    known[[0, 1, 4, 7]] = torch.tensor([2, 1, 0, 2])
    for process in (MASKED, PROCESSES["uniform"]):
        tokens = sample_blocks(exact(process), 9, seeds=range(20), window=3, block=1, steps=4, known=known).tokens
        assert tokens.shape == (20, 9)
        assert bool((tokens[:, known >= 0] == known[known >= 0]).all())
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < V
    each = torch.stack([known, known.roll(1)])
    tokens = sample_blocks(exact(MASKED), 9, seeds=[0, 1], window=3, steps=4, known=each).tokens
    assert bool((tokens[each >= 0] == each[each >= 0]).all())


def test_a_block_sees_what_is_before_it_and_nothing_else():
    network = Counting()
    model = CategoricalDenoiser(network, CategoricalProcess.masked(5))
    tokens = sample_blocks(model, 8, seeds=[0], window=4, block=2, steps=1).tokens[0]
    truth = [[5, 5, 5, 5], [*tokens[2:4], 5, 5], [*tokens[4:6], 5, 5]]
    assert [x[0].tolist() for x in network.seen] == [[int(i) for i in row] for row in truth]


@pytest.mark.parametrize("rule", [None, Remasking(), Confident(noise=0.5)])
def test_a_long_text_depends_on_its_seed_alone(rule):
    how = {"window": 3, "block": 1, "steps": 4, "rule": rule, "transform": Sharpened(0.9)}
    together = sample_blocks(exact(MASKED), 7, seeds=range(12), **how).tokens
    alone = torch.cat([sample_blocks(exact(MASKED), 7, seeds=[i], **how).tokens for i in range(12)])
    parts = sample_blocks(exact(MASKED), 7, seeds=range(12), batch_size=5, **how).tokens
    assert torch.equal(together, alone)
    assert torch.equal(together, parts)
    assert len(together.unique(dim=0)) > 6


def test_blocks_have_other_noise_each_and_the_first_window_that_of_a_short_text():
    """Where nothing says anything of a token, equal noise would be equal blocks."""
    model = CategoricalDenoiser(Counting(), CategoricalProcess.masked(5))
    tokens = sample_blocks(model, 20, seeds=range(40), window=4, block=4, steps=3).tokens
    torch.testing.assert_close(tokens[:, :4], sample_tokens(model, 4, seeds=range(40), steps=3).tokens)
    blocks = tokens.unflatten(1, (5, 4)).flatten(0, 1)
    same = (blocks[:, None] == blocks).double().mean().item()
    assert same == pytest.approx(1 / 5 + 4 / 5 / 200, abs=0.02)  # each is like itself, and like others by chance


def test_guided_blocks_are_told_their_class():
    class Two(nn.Module):
        def forward(self, x, t, condition=None):
            said = torch.zeros(*x.shape, 5)
            return said if condition is None else said.scatter(-1, condition[:, None, None].expand(*x.shape, 1), 2.0)

    model = TokenGuidance(CategoricalDenoiser(Two(), CategoricalProcess.masked(5)), 3.0)
    labels = torch.arange(20) % 5
    tokens = sample_blocks(model, 12, seeds=range(20), window=4, steps=3, condition=labels).tokens
    assert (tokens == labels[:, None]).double().mean() > 0.95


@pytest.mark.parametrize(("length", "window", "block", "steps"), [(30, 10, 5, 12), (13, 5, 2, 40)])
def test_evaluations_are_those_of_all_blocks(length, window, block, steps):
    """Truth: the network's own count, and the mean by the formula, to 5 standard errors."""
    network = Counting()
    model = CategoricalDenoiser(network, CategoricalProcess.masked(5))
    seen = []
    how = {"window": window, "block": block, "steps": steps, "seeds": range(200)}
    drawn = sample_blocks(model, length, progress=lambda *at: seen.append(at), **how)
    assert int(drawn.evaluations.sum()) == network.asked
    widths = blocks_of(length, window, block)
    expected = sum(expected_evaluations(n, steps) for n in widths)
    error = float(drawn.evaluations.double().std()) / 200**0.5
    assert float(drawn.evaluations.double().mean()) == pytest.approx(expected, abs=5 * error)
    assert drawn.steps == steps * len(widths)
    assert seen == [(200 * (i + 1), 200 * len(widths)) for i in range(len(widths))]
    plain = sample_blocks(model, length, cache=False, **how)
    assert plain.evaluations.tolist() == [steps * len(widths)] * 200
    assert torch.equal(plain.tokens, drawn.tokens)


def test_no_padding_is_drawn_by_a_model_that_knows_lengths():
    for process in (CategoricalProcess.masked(5, still=0), CategoricalProcess.uniform(5, still=0)):
        model = CategoricalDenoiser(Counting(), process, lengths=Lengths(4))
        tokens = sample_blocks(model, 11, seeds=range(30), window=4, steps=3).tokens
        assert 1 <= int(tokens.min()) <= int(tokens.max()) <= 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"length": 0}, "length and window must be at least 1"),
        ({"window": 0}, "length and window must be at least 1"),
        ({"block": 0}, "blocks have 1 to 4 tokens"),
        ({"block": 5}, "blocks have 1 to 4 tokens"),
        ({"window": 5}, "a window of 5 tokens: this model reads at most 4"),
        ({"known": torch.full((10,), 1)}, r"known must be of shape \(9,\) or \(2, 9\), got \(10,\)"),
        ({"known": torch.full((9,), 5)}, "known tokens are 0 to 4"),
        ({"known": torch.full((9,), 0)}, "token 0 is what follows the end"),
        ({"seeds": [1, 1]}, "every sample needs its own seed"),
        ({"steps": None}, "either steps= or grid="),
    ],
)
def test_what_cannot_be_written_is_refused(settings, words):
    model = CategoricalDenoiser(Counting(), CategoricalProcess.masked(5, still=0), lengths=Lengths(4))
    settings = {"seeds": [0, 1], "steps": 3, "length": 9, "window": 4} | settings
    with pytest.raises(ValueError, match=words):
        sample_blocks(model, settings.pop("length"), **settings)


# -- through runs ------------------------------------------------------------------------------------------------------

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
width = 16
depth = 1
heads = 2
[objective]
kind = "token_bound"
[training]
steps = 4
batch_size = 16
sample_every = 0
[sampling]
steps = 6
"""
WORDS = ("the", "cat", "eats", "moss", "and", "grows")


def make(folder, process):
    with (folder / "own.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["class", "text"])
        rows.writerows(("ab"[i % 2], " ".join(WORDS[(i * k) % 6] for k in range(1, 3 + i % 7))) for i in range(60))
    conditional = "false" if process == "uniform" else "true"
    (folder / "own.toml").write_text(RECIPE.format(file=folder / "own.csv", process=process, conditional=conditional))
    return train(recipes.read(folder / "own.toml"), folder / "run")


@pytest.fixture(scope="module", params=["masked", "uniform"])
def run(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp(request.param), request.param)


def say(capsys, run, *options):
    code = main([str(one) for one in ("sample", run.folder, *options)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_run_writes_three_times_its_length(run, capsys):
    code, out, _ = say(capsys, run, "--length", 24, "--blocks", 4, "-n", 5, "--json")
    found = json.loads(out)
    texts = [Path(one["file"]).read_text().split() for one in found["samples"]]
    assert code == 0
    assert [len(text) for text in texts] == [24] * 5
    assert all(set(text) <= {*WORDS, "<unk>"} for text in texts)
    masked = run.denoiser.process.mask is not None
    truth = expected_evaluations(8, 6) + 4 * expected_evaluations(4, 6) if masked else 5 * 6
    assert (found["length"], found["blocks"], found["evaluations"]) == (24, 4, round(truth, 1))
    again = run.sample(seeds=[3], length=24, blocks=4, labels=None if run.labels_for(1) is None else torch.tensor([1]))
    assert run.medium.words(again[0]).split() == texts[3]


def test_a_prompt_begins_the_long_text(run, capsys):
    for given, option in (("the cat eats", "--prompt"), ("the _ eats", "--infill")):
        code, out, _ = say(capsys, run, "--length", 11, "--blocks", 2, "-n", 3, option, given, "--json")
        texts = [Path(one["file"]).read_text().split() for one in json.loads(out)["samples"]]
        assert code == 0
        assert [(text[0], text[2], len(text)) for text in texts] == [("the", "eats", 11)] * 3


def test_evaluations_of_a_run_are_counted(run):
    drawn = run.draw(run.sampler(length=20, blocks=3), range(6), cache=False)
    assert drawn.tokens.shape == (6, 20)
    assert drawn.evaluations.tolist() == [6 * 5] * 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--length", 24], r"length must lie in 1 to 8, .* blocks \(--blocks 4\); got 24"),
        (["--length", 8, "--blocks", 4], "blocks are for a length beyond the 8 tokens .* got 8"),
        (["--blocks", 4], "blocks are for a length beyond the 8 tokens .* none was given"),
        (["--length", 24, "--blocks", 9], "blocks have 1 to 8 tokens"),
        (["--length", 24, "--blocks", 0], "blocks have 1 to 8 tokens"),
        (["--length", 24, "--blocks", 4, "--prompt", "the cat " * 5], "the prompt has 10 tokens.*room for 8"),
    ],
)
def test_what_a_run_cannot_write_is_refused(run, options, words, capsys):
    code, _, err = say(capsys, run, *options)
    assert code == 2
    assert re.search(words, err), err


def test_from_left_to_right_there_are_no_blocks(tmp_path, capsys):
    run = make(tmp_path, "autoregressive")
    code, _, err = say(capsys, run, "--length", 24, "--blocks", 4)
    assert (code, "writes token by token, and has no blocks" in err) == (2, True), err
    with pytest.raises(ValueError, match="length must lie in 1 to 8"):
        run.sampler(length=24)
