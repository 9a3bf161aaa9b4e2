"""Samplers of tokens against a law that can be enumerated, and what they promise: kept words, seeds, evaluations."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from enumerated import ALL, JOINT, LENGTH, PROCESSES, V, exact
from kuosan.categorical import Categorical
from kuosan.discrete import (
    Ancestral,
    CategoricalDenoiser,
    CategoricalProcess,
    Confident,
    Euler,
    Remasking,
    Sharpened,
    TokenGuidance,
    expected_evaluations,
    sample_tokens,
    sampling,
)
from kuosan.process import Grid

MASKED = PROCESSES["masked"]


@pytest.fixture
def fast_noise(monkeypatch):
    """One generator for all samples: what each depends on is another test's business."""

    class Fast:
        def __init__(self, seeds, shape, dtype, purpose):
            self.generator, self.shape, self.dtype = torch.Generator().manual_seed(0), (len(seeds), *shape), dtype

        def draw(self):
            return torch.randn(self.shape, generator=self.generator, dtype=self.dtype)

    monkeypatch.setattr(sampling, "Noise", Fast)


def frequencies(tokens):
    index = (tokens * torch.tensor([V**2, V, 1])).sum(1)
    return np.bincount(index.numpy(), minlength=len(ALL)) / len(tokens)


def total_variation(tokens, law=JOINT):
    return 0.5 * np.abs(frequencies(tokens) - law).sum()


def draw(process, n=40_000, **settings):
    return sample_tokens(exact(process), LENGTH, seeds=range(n), batch_size=n, **settings).tokens


@pytest.mark.usefixtures("fast_noise")
@pytest.mark.slow
@pytest.mark.parametrize("rule", [Ancestral(), Euler()], ids=["ancestral", "euler"])
@pytest.mark.parametrize("name", list(PROCESSES))
def test_in_many_steps_the_samples_have_the_law_of_the_data(name, rule):
    """Total variation under .02, of which the noise of 40,000 samples is about .007."""
    assert total_variation(draw(PROCESSES[name], steps=150, rule=rule)) < 0.02


@pytest.mark.usefixtures("fast_noise")
@pytest.mark.parametrize("name", list(PROCESSES))
def test_in_one_step_the_tokens_know_nothing_of_each_other(name):
    """Truth: the product of the marginals."""
    marginals = [np.array([JOINT[(ALL[:, i] == k).numpy()].sum() for k in range(V)]) for i in range(LENGTH)]
    product = np.array([math.prod(marginals[i][k] for i, k in enumerate(text)) for text in ALL.tolist()])
    tokens = draw(PROCESSES[name], steps=1)
    assert total_variation(tokens, product) < 0.02
    assert total_variation(tokens) > 0.1


@pytest.mark.usefixtures("fast_noise")
def test_few_steps_are_better_the_more_they_are():
    errors = [total_variation(draw(MASKED, steps=steps)) for steps in (1, 2, 8, 64)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.usefixtures("fast_noise")
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_masking_again_keeps_the_law(share):
    """With the exact denoiser nothing needs to be corrected, and little is spoilt."""
    assert total_variation(draw(MASKED, steps=200, rule=Remasking(share))) < 0.02


@pytest.mark.usefixtures("fast_noise")
def test_masking_again_corrects_what_few_long_steps_spoil():
    """Half of the grid jumps to where few tokens are masked; what is left of it goes over them again."""
    times = (1.0, 0.3, *np.linspace(0.28, 0.02, 30))
    plain, again = (
        total_variation(draw(MASKED, grid=Grid(times), rule=rule)) for rule in (Ancestral(), Remasking(1.0))
    )
    assert again < 0.8 * plain


@pytest.mark.usefixtures("fast_noise")
def test_known_tokens_stay_and_the_others_have_their_conditional_law():
    """Truth: the joint law given the second token, by enumeration. Other processes see the known token only as noisy as
    all else: nearer to that law than one that does not see it, if not at it."""
    given = (ALL[:, 1] == 2).numpy()
    truth = JOINT * given / (JOINT * given).sum()
    blind = np.where(given, sum(JOINT.reshape(V, V, V)[:, k] for k in range(V))[:, None].repeat(V, 1).ravel(), 0)
    for process, tolerance in ((MASKED, 0.02), (PROCESSES["uniform"], 0.6 * 0.5 * np.abs(blind - truth).sum())):
        tokens = draw(process, steps=60, known=torch.tensor([-1, 2, -1]))
        assert bool((tokens[:, 1] == 2).all())
        assert total_variation(tokens, truth) < tolerance


def test_the_network_sees_a_known_token_at_every_step_and_no_law_of_it_is_asked_for():
    seen, asked = [], []
    model = exact(MASKED)

    class Spy(nn.Module):
        def forward(self, x, t, condition=None):
            seen.append(x)
            return model.network(x, t, condition)

    def look(law):
        asked.append(len(law.log_probs))
        assert not bool(law.log_probs.isnan().any())
        return law

    spied = CategoricalDenoiser(Spy(), MASKED)
    sample_tokens(spied, LENGTH, seeds=range(4), steps=3, known=torch.tensor([-1, 2, -1]), transform=look)
    assert all(bool((x[:, 1] == 2).all()) for x in seen)
    assert sum(asked) == 4 * 2  # every other token is drawn once


def test_a_matrix_that_ends_in_one_state_is_no_mask():
    """There a token may have jumped between the data's states before: that it is shown does not make it clean."""
    jump = torch.tensor([[0.0, 0.5, 0.5], [0.2, 0.0, 0.8], [0.0, 0.0, 1.0]]).double()
    assert CategoricalProcess(jump, vocabulary=2).mask is None
    assert CategoricalProcess(torch.tensor([0.0, 1.0])).mask is None
    assert MASKED.mask == V


def test_without_a_mask_nothing_is_kept_from_step_to_step():
    """What x_t itself says depends on the time, even if the network does not know it."""
    denoiser = CategoricalDenoiser(Counting(), CategoricalProcess.uniform(5), timed=False)
    kept, plain = (sample_tokens(denoiser, 3, seeds=range(50), steps=8, cache=cache) for cache in (True, False))
    assert torch.equal(kept.tokens, plain.tokens)


def test_guided_or_not_dropout_is_off_while_sampling():
    modes = set()

    class Drops(nn.Module):
        def forward(self, x, t, condition=None):
            modes.add(self.training)
            return torch.zeros(*x.shape, 5)

    denoiser = CategoricalDenoiser(Drops(), CategoricalProcess.masked(5)).train()
    sample_tokens(TokenGuidance(denoiser, 1.0), 3, seeds=[0], steps=2, condition=torch.tensor([0]))
    sample_tokens(denoiser, 3, seeds=[0], steps=2)
    assert modes == {False}
    assert denoiser.training


@pytest.mark.usefixtures("fast_noise")
def test_confidence_prefers_the_likeliest_texts():
    tokens = draw(MASKED, n=20_000, steps=LENGTH, rule=Confident())
    noisy = draw(MASKED, n=20_000, steps=LENGTH, rule=Confident(noise=100.0))
    likely = np.sort(JOINT)[-3] <= JOINT
    assert frequencies(tokens)[likely].sum() > frequencies(noisy)[likely].sum() + 0.02


# -- laws made sharper -------------------------------------------------------------------------------------------------


def test_a_temperature_is_a_power():
    law = Categorical(torch.tensor([0.5, 0.3, 0.2, 0.0]).double().log())
    power = np.array([0.25, 0.09, 0.04, 0]) / 0.38
    np.testing.assert_allclose(Sharpened(0.5)(law).log_probs.exp(), power, atol=1e-12)


@pytest.mark.parametrize(
    ("nucleus", "kept"), [(1.0, [0.2, 0.5, 0.3]), (0.81, [0.2, 0.5, 0.3]), (0.79, [0, 0.625, 0.375]), (0.4, [0, 1, 0])]
)
def test_a_nucleus_is_the_fewest_states_that_are_enough(nucleus, kept):
    law = Categorical(torch.tensor([0.2, 0.5, 0.3]).double().log())
    np.testing.assert_allclose(Sharpened(nucleus=nucleus)(law).log_probs.exp(), kept, atol=1e-12)


def test_guidance_raises_the_ratio_to_the_unconditional_to_a_power():
    """By numpy: p(c)^(1+w) / p()^w, normalised; w = 0 is the conditional; a token that is shown stays."""
    given, free = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])

    class Two(nn.Module):
        def forward(self, x, t, condition=None):
            return torch.tensor(free if condition is None else given).log().expand(*x.shape, 3)

    denoiser = CategoricalDenoiser(Two(), MASKED)
    x, label = torch.tensor([[3, 1]]), torch.tensor([0])
    for w in (0.0, 1.0, 2.5):
        law = TokenGuidance(denoiser, w)(x, 0.5, label).log_probs.exp()[0].numpy()
        truth = given ** (1 + w) / free**w
        np.testing.assert_allclose(law[0, :3], truth / truth.sum(), rtol=1e-9)
        np.testing.assert_allclose(law[1], [0, 1, 0, 0], atol=1e-12)
    with pytest.raises(ValueError, match="guides towards a condition"):
        TokenGuidance(denoiser, 1.0)(x, 0.5)


# -- what a sample depends on, and what it costs -----------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Ancestral(), Euler(), Remasking(), Confident(noise=0.5)])
def test_a_sample_depends_on_its_seed_alone(rule):
    model = exact(MASKED)
    together = sample_tokens(model, LENGTH, seeds=range(12), steps=5, rule=rule).tokens
    alone = torch.cat([sample_tokens(model, LENGTH, seeds=[i], steps=5, rule=rule).tokens for i in range(12)])
    parts = sample_tokens(model, LENGTH, seeds=range(12), steps=5, rule=rule, batch_size=5).tokens
    assert torch.equal(together, alone)
    assert torch.equal(together, parts)
    assert len(together.unique(dim=0)) > 3


class Counting(nn.Module):
    """A network that counts the texts that it is asked of."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def forward(self, x, t, condition=None):
        self.asked += len(x)
        return torch.zeros(*x.shape, 5)


@pytest.mark.parametrize(("length", "steps"), [(4, 40), (20, 10), (3, 1)])
def test_the_cache_asks_only_of_texts_that_changed(length, steps):
    """Truth: the network's own count; the mean that the formula expects, to 5 standard errors; the same samples."""
    process = CategoricalProcess.masked(5)
    network = Counting()
    denoiser = CategoricalDenoiser(network, process)
    kept = sample_tokens(denoiser, length, seeds=range(300), steps=steps)
    assert int(kept.evaluations.sum()) == network.asked
    error = float(kept.evaluations.double().std()) / math.sqrt(300)
    assert float(kept.evaluations.double().mean()) == pytest.approx(
        expected_evaluations(length, steps), abs=5 * error + 1e-9
    )
    network.asked = 0
    plain = sample_tokens(denoiser, length, seeds=range(300), steps=steps, cache=False)
    assert network.asked == 300 * steps == int(plain.evaluations.sum())
    assert torch.equal(plain.tokens, kept.tokens)


def test_a_model_is_asked_only_when_a_token_is_drawn_or_always_of_a_process_without_masks():
    for timed in (True, False):
        model = CategoricalDenoiser(Counting(), CategoricalProcess.masked(5), timed=timed)
        drawn = sample_tokens(model, 2, seeds=range(4), steps=1000)
        assert drawn.evaluations.tolist() == [2] * 4
    drawn = sample_tokens(CategoricalDenoiser(Counting(), CategoricalProcess.uniform(5)), 2, seeds=range(4), steps=30)
    assert drawn.evaluations.tolist() == [30] * 4


def test_no_mask_is_left_and_no_token_is_outside_the_vocabulary():
    denoiser = CategoricalDenoiser(Counting(), CategoricalProcess.masked(5))
    for rule in (Ancestral(), Euler(), Remasking(1.0), Confident()):
        tokens = sample_tokens(denoiser, 8, seeds=range(50), steps=3, rule=rule).tokens
        assert int(tokens.min()) >= 0
        assert int(tokens.max()) <= 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seeds": []}, "at least one seed"),
        ({"seeds": [1, 1]}, "every sample needs its own seed"),
        ({"steps": 5, "grid": Grid((1.0,))}, "either steps= or grid="),
        ({"steps": 0}, "steps must lie in"),
        ({"known": torch.tensor([0, 1])}, r"shape \(3,\) or \(2, 3\)"),
        ({"known": torch.tensor([0, 1, 3])}, "known tokens are 0 to 2"),
        ({"condition": torch.tensor([0])}, "one condition for each seed"),
        ({"length": 0}, "length and batch_size must be at least 1"),
    ],
)
def test_what_cannot_be_sampled_is_refused(settings, words):
    settings = {"seeds": [0, 1], "steps": 3, "length": LENGTH} | settings
    with pytest.raises(ValueError, match=words):
        sample_tokens(exact(MASKED), settings.pop("length"), **settings)


@pytest.mark.parametrize("rule", [Remasking(), Confident()])
def test_a_rule_of_masks_is_refused_where_there_are_none(rule):
    with pytest.raises(ValueError, match="is of masked processes"):
        sample_tokens(exact(PROCESSES["uniform"]), LENGTH, seeds=[0], steps=3, rule=rule)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Remasking(1.5), "share must lie in 0 to 1"),
        (lambda: Confident(-1.0), "noise must be at least 0"),
        (lambda: Sharpened(0.0), "temperature must be positive"),
        (lambda: Sharpened(nucleus=0.0), "nucleus must lie in"),
    ],
)
def test_settings_without_a_meaning_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
