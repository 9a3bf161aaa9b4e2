"""Texts from left to right, against all padded texts of three tokens and a network that is asked of each beginning."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from kuosan.autoencoders.objective import Elbo
from kuosan.categorical import Categorical
from kuosan.discrete import Sharpened, autoregressive
from kuosan.discrete.autoregressive import (
    Autoregressive,
    AutoregressiveChain,
    AutoregressiveGuidance,
    sample_left_to_right,
)
from kuosan.networks.tokens import TokenTransformer
from kuosan.text.ngram import NGram

V, LENGTH = 3, 3
#: Every text of up to three of the tokens 1 and 2, filled with 0.
TEXTS = torch.tensor(
    [[*text, *[0] * (LENGTH - n)] for n in range(LENGTH + 1) for text in itertools.product((1, 2), repeat=n)]
)


def small(vocabulary=V, length=LENGTH, classes=0, causal=True, dropout=0.0):
    """A network with no weight at zero, so that everything that it is told can be seen; float64."""
    torch.manual_seed(0)
    network = TokenTransformer(vocabulary + 1, vocabulary, length, 16, 2, 2, classes, dropout, causal)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return network.double().eval()


class Plain(nn.Module):
    """The same network as one that knows nothing of ``only``."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, t, condition=None):
        return self.network(x, t, condition)


class Constant(nn.Module):
    """Every token has these chances, whatever is before it."""

    def __init__(self, chances):
        super().__init__()
        self.logits = torch.tensor(chances, dtype=torch.float64).log()

    def forward(self, x, t, condition=None):
        return self.logits.expand(*x.shape, -1)


class Classes(nn.Module):
    """Of class 0 one law, without a class another."""

    def forward(self, x, t, condition=None):
        chances = [0.3, 0.3, 0.4] if condition is None else [0.7, 0.2, 0.1]
        return torch.tensor(chances, dtype=torch.float64).log().expand(*x.shape, V)


def by_hand(network, text, condition=None):
    """log p of one text: one call of the network for each beginning, the softmax of its last position in numpy."""
    total = 0.0
    for i, token in enumerate(text):
        x = torch.tensor([[network.last.out_features, *text[:i]]])
        logits = network(x, torch.zeros(1), condition)[0, -1].detach().numpy()
        total += logits[token] - np.logaddexp.reduce(logits)
        if token == 0:
            break
    return total


@pytest.fixture(scope="module")
def network():
    return small().requires_grad_(False)


@pytest.fixture(scope="module")
def truth(network):
    return np.array([by_hand(network, text) for text in TEXTS.tolist()])


# -- the network -------------------------------------------------------------------------------------------------------


def test_a_causal_network_does_not_see_what_comes_later():
    network = small(5, 6).requires_grad_(False)
    x = torch.tensor([[1, 4, 2, 0, 3, 5]])
    before = network(x, torch.zeros(1))
    for i in range(6):
        other = x.clone()
        other[0, i] = (x[0, i] + 1) % 6
        apart = (network(other, torch.zeros(1)) - before).abs().amax(-1)[0]
        assert apart[:i].sum() == 0
        assert bool((apart[i:] > 1e-6).all())


def test_a_network_that_is_not_causal_sees_everything():
    network, x = small(5, 6, causal=False).requires_grad_(False), torch.tensor([[1, 4, 2, 0, 3, 5]])
    apart = network(x, torch.zeros(1)) - network(torch.tensor([[1, 4, 2, 0, 3, 4]]), torch.zeros(1))
    assert bool((apart.abs().amax(-1) > 1e-6).all())


@pytest.mark.parametrize("causal", [True, False])
def test_logits_of_some_positions_are_those_of_all_positions_there(causal):
    network = small(5, 6, classes=2, causal=causal)
    dice = torch.Generator().manual_seed(0)
    x, only = torch.randint(6, (4, 6), generator=dice), torch.rand(4, 6, generator=dice) < 0.4
    only[2] = False
    condition, t = torch.tensor([0, 1, -1, 1]), torch.zeros(4)
    some, everywhere = network(x, t, condition, only=only), network(x, t, condition)
    picked = [everywhere[b, i] for b in range(4) for i in range(6) if only[b, i]]
    torch.testing.assert_close(some, torch.stack(picked), rtol=1e-12, atol=1e-12)
    assert network(x, t, condition, only=torch.zeros_like(only)).shape == (0, 5)


@pytest.mark.parametrize("only", [torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 6)])
def test_only_says_yes_or_no_of_each_position(only):
    with pytest.raises(ValueError, match=r"only must be bool of shape \(2, 6\)"):
        small(5, 6)(torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2), only=only)


# -- the law -----------------------------------------------------------------------------------------------------------


def test_the_law_of_a_text_is_the_product_of_what_follows_each_beginning(network, truth):
    for model in (Autoregressive(network, V), Autoregressive(Plain(network), V)):
        np.testing.assert_allclose(model.log_prob(TEXTS), truth, rtol=1e-12)


def test_the_probabilities_of_all_padded_texts_sum_to_one(network):
    """And what goes on after its end never happens: of all 27 rows only the 15 padded texts do."""
    every = torch.tensor(list(itertools.product(range(V), repeat=LENGTH)))
    chances = Autoregressive(network, V).log_prob(every).exp()
    assert int((chances > 0).sum()) == len(TEXTS) == 15
    assert float(chances.sum()) == pytest.approx(1, abs=1e-12)


def test_the_end_is_the_token_that_is_named(network):
    """With token 2 as the end: the same sum of one, and a text ended by it costs as many tokens as it has and one."""
    model = Autoregressive(network, V, end=2)
    every = torch.tensor(list(itertools.product(range(V), repeat=LENGTH)))
    assert float(model.log_prob(every).exp().sum()) == pytest.approx(1, abs=1e-12)
    logits = network(torch.tensor([[V]]), torch.zeros(1))[0, 0].numpy()
    assert float(model.log_prob(torch.tensor([[2, 2, 2]]))) == pytest.approx(logits[2] - np.logaddexp.reduce(logits))
    assert model.next_law(torch.tensor([[0, 2]])).log_probs.tolist() == [[-math.inf, -math.inf, 0]]
    drawn = sample_left_to_right(model, LENGTH, seeds=range(40)).tokens
    assert bool(torch.isfinite(model.log_prob(drawn)).all())
    assert int((drawn == 0).sum()) > 5


def test_each_text_has_its_own_condition_and_depends_on_no_other():
    network = small(classes=2).requires_grad_(False)
    classes = torch.arange(len(TEXTS)) % 3 - 1
    found = Autoregressive(network, V).log_prob(TEXTS, classes)
    alone = [by_hand(network, text, c[None]) for text, c in zip(TEXTS.tolist(), classes, strict=True)]
    np.testing.assert_allclose(found, alone, rtol=1e-12)


def test_the_next_law_is_that_of_the_last_position_and_certain_after_the_end(network):
    model = Autoregressive(network, V)
    law = model.next_law(torch.tensor([[1, 2], [1, 0], [0, 0]])).log_probs.exp().numpy()
    logits = network(torch.tensor([[V, 1, 2]]), torch.zeros(1))[0, -1].numpy()
    np.testing.assert_allclose(law[0], np.exp(logits) / np.exp(logits).sum(), rtol=1e-12)
    np.testing.assert_array_equal(law[1:], [[1, 0, 0], [1, 0, 0]])
    first = model.next_law(torch.zeros(2, 0, dtype=torch.int64)).log_probs.exp().numpy()
    logits = network(torch.tensor([[V]]), torch.zeros(1))[0, -1].numpy()
    np.testing.assert_allclose(first, [np.exp(logits) / np.exp(logits).sum()] * 2, rtol=1e-12)


def test_texts_are_padded_and_ended_as_those_of_the_n_grams():
    """Chances .2 (end), .5, .3: "1" costs its end, "1 2 1" none. The same numbers from a unigram's own chances."""
    model = Autoregressive(Constant([0.2, 0.5, 0.3]), V)
    texts = torch.tensor([[1, 0, 0], [1, 2, 1], [2, 2, 0], [0, 0, 0]])
    found = model.log_prob(texts).exp()
    assert found.tolist() == pytest.approx([0.5 * 0.2, 0.5 * 0.3 * 0.5, 0.3**2 * 0.2, 0.2], rel=1e-12)
    unigrams = NGram(1).fit(torch.tensor([[1, 2, 0], [1, 1, 2]]), torch.tensor([2, 3]), V)
    model = Autoregressive(Constant([unigrams.probability((), token) for token in range(V)]), V)
    torch.testing.assert_close(model.log_prob(TEXTS), unigrams.log_prob(TEXTS, (TEXTS != 0).sum(1)))


def test_the_network_reads_and_answers_no_more_than_is_predicted():
    """Of two texts of 1 and 2 tokens in a room of 6: 3 positions are read, and 2 + 3 answered."""
    network, asked = small(5, 6), []
    network.last.register_forward_hook(lambda layer, given, out: asked.append(tuple(out.shape)))
    network.token.register_forward_hook(lambda layer, given, out: asked.append(tuple(out.shape[:2])))
    Autoregressive(network, 5).log_prob(torch.tensor([[3, 0, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0]]))
    assert asked == [(2, 3), (5, 5)]


def test_low_precision_logits_are_summed_in_full():
    class Half(Constant):
        def forward(self, x, t, condition=None):
            return super().forward(x, t).bfloat16()

    assert Autoregressive(Half([0.2, 0.5, 0.3]), V).log_prob(TEXTS).dtype == torch.float32


# -- the ladder --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["matching", "path"])
def test_without_latents_the_bound_is_the_law_itself(network, truth, estimator):
    """No KL, and no noise of the draws, of which two are made to see it."""
    bound = AutoregressiveChain(Autoregressive(network, V), LENGTH).elbo(TEXTS, draws=2, estimator=estimator)
    np.testing.assert_allclose(bound.total, truth, rtol=1e-12)
    assert bound.prior.tolist() == [0] * len(TEXTS)
    assert bound.matching.shape == (0, len(TEXTS))
    assert bound.monte_carlo_error == 0
    assert bound.standard_error == pytest.approx(truth.std(ddof=1) / math.sqrt(len(truth)))
    assert bound.discrete
    assert bound.dimensions == LENGTH


def test_many_paths_through_no_latents_are_one(network, truth):
    found = AutoregressiveChain(Autoregressive(network, V), LENGTH).importance_weighted(TEXTS, samples=3)
    np.testing.assert_allclose(found.log_prob, truth, rtol=1e-12)
    assert float(found.example_error.abs().max()) == pytest.approx(0, abs=1e-12)


def test_texts_whose_common_padding_was_cut_still_pay_for_their_end(network, truth):
    """Truth: the same texts with their padding. Three tokens wide "1 2" is not full."""
    chain = AutoregressiveChain(Autoregressive(network, V), LENGTH)
    short = (TEXTS[:, 2] == 0).numpy()
    np.testing.assert_allclose(chain.estimate(TEXTS[short, :2]), truth[short], rtol=1e-12)
    with pytest.raises(ValueError, match="at most 3 tokens, got 4"):
        chain.estimate(torch.zeros(1, 4, dtype=torch.int64))


def test_the_objective_of_ladders_trains_it():
    """Truth: the gradient of -log p(x) / L, from the plain product of softmaxes. The noise has shape (B, 0)."""
    network, texts, classes = small(classes=2), TEXTS[[3, 9, 0, 1]], torch.tensor([0, 1, -1, 1])
    chain, objective = AutoregressiveChain(Autoregressive(network, V), LENGTH), Elbo()
    assert objective.noise_shape(chain, (LENGTH,)) == (0,)
    loss = objective(chain, texts, classes, noise=torch.zeros(4, 0))
    loss.sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in network.named_parameters()}
    network.zero_grad()
    total = torch.zeros(())
    for text, c in zip(texts.tolist(), classes, strict=True):
        for i, token in enumerate(text):
            logits = network(torch.tensor([[V, *text[:i]]]), torch.zeros(1), c[None])[0, -1]
            total = total - torch.log_softmax(logits, -1)[token] / LENGTH
            if token == 0:
                break
    total.backward()
    assert loss.shape == (4,)
    assert float(loss.detach().sum()) == pytest.approx(float(total.detach()), rel=1e-12)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12, msg=name)
    drawn = objective(chain, texts, classes, generator=torch.Generator().manual_seed(0), step=3)
    torch.testing.assert_close(drawn, loss)


def test_a_small_transformer_learns_which_token_follows_which():
    """Texts of two equal tokens of four: -log 1/4 nats each, however they end (room for three)."""
    torch.manual_seed(0)
    chain = AutoregressiveChain(Autoregressive(TokenTransformer(6, 5, 3, 32, 1, 2, causal=True), 5), 3)
    optimizer = torch.optim.Adam(chain.parameters(), 1e-2)
    for step in range(150):
        one = torch.randint(1, 5, (128, 1), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        Elbo()(chain, torch.cat([one, one, torch.zeros_like(one)], 1)).mean().backward()
        optimizer.step()
    texts = torch.tensor([[k, k, 0] for k in range(1, 5)])
    assert float(chain.elbo(texts).total.mean()) == pytest.approx(-math.log(4), abs=0.05)


def test_a_ladder_writes_texts_as_its_decoder_does(network):
    chain = AutoregressiveChain(Autoregressive(network, V), LENGTH)
    noise = torch.randn(50, *chain.model.noise_shape, generator=torch.Generator().manual_seed(1))
    path = chain.generate(noise)
    assert noise.shape == (50, LENGTH)
    assert chain.path(TEXTS).z[1].shape == (len(TEXTS), 0)
    for text, z in zip(path.z[0].tolist(), noise, strict=True):
        ended = False
        for i, token in enumerate(text):  # by inverting the cumulative chances of each token with numpy
            logits = network(torch.tensor([[V, *text[:i]]]), torch.zeros(1))[0, -1].numpy()
            sums = np.cumsum(np.exp(logits) / np.exp(logits).sum())
            u = 0.5 * math.erfc(-float(z[i]) / math.sqrt(2))
            assert token == (0 if ended else int(np.searchsorted(sums, u)))
            ended = ended or token == 0
    assert path.z[1].shape == (50, 0)
    greedy = path.laws[0].mean
    assert bool((greedy == greedy[0]).all())
    logits = network(torch.tensor([[V]]), torch.zeros(1))[0, -1]
    assert int(greedy[0, 0]) == int(logits.argmax())
    fresh = path.laws[0].sample(generator=torch.Generator().manual_seed(2))
    assert fresh.shape == (50, LENGTH)
    assert len(fresh.unique(dim=0)) > 5


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fast_noise(monkeypatch):
    """One generator for all samples: what each depends on is another test's business."""

    class Fast:
        def __init__(self, seeds, shape, dtype, purpose):
            assert purpose == "tokens"
            self.shape, self.dtype = (len(seeds), *shape), dtype

        def draw(self):
            return torch.randn(self.shape, generator=torch.Generator().manual_seed(0), dtype=self.dtype)

    monkeypatch.setattr(autoregressive, "Noise", Fast)


def total_variation(tokens, chances):
    places = {tuple(text): k for k, text in enumerate(TEXTS.tolist())}
    count = np.bincount([places[tuple(text)] for text in tokens.tolist()], minlength=len(TEXTS))
    return 0.5 * np.abs(count / len(tokens) - chances).sum()


@pytest.mark.usefixtures("fast_noise")
@pytest.mark.parametrize("transform", [None, Sharpened(0.5), Sharpened(nucleus=0.6)])
def test_the_samples_have_the_law_that_is_enumerated(network, truth, transform):
    """Total variation under .015, of which the noise of 20,000 samples is .007; the transformed laws in numpy."""
    model = Autoregressive(network, V)
    if transform is not None:
        truth = np.zeros(len(TEXTS))
        for k, text in enumerate(TEXTS.tolist()):
            for i, token in enumerate(text):
                logits = network(torch.tensor([[V, *text[:i]]]), torch.zeros(1))[0, -1].numpy()
                p = np.exp(logits / transform.temperature)
                p = p / p.sum()
                order = np.argsort(-p)
                p[order[int(np.searchsorted(np.cumsum(p[order]), transform.nucleus)) + 1 :]] = 0
                with np.errstate(divide="ignore"):
                    truth[k] += np.log(p[token] / p.sum())
                if token == 0:
                    break
        assert np.exp(truth).sum() == pytest.approx(1)
    drawn = sample_left_to_right(model, LENGTH, seeds=range(20_000), batch_size=20_000, transform=transform)
    assert total_variation(drawn.tokens, np.exp(truth)) < 0.015
    lengths = (drawn.tokens != 0).sum(1)
    assert torch.equal(drawn.evaluations, (lengths + 1).clamp_max(LENGTH))
    assert drawn.steps == LENGTH


@pytest.mark.usefixtures("fast_noise")
def test_a_prompt_is_kept_and_what_follows_has_the_law_given_it(network, truth):
    """Truth: the enumerated law of the texts that begin with 2, normalised."""
    begins = (TEXTS[:, 0] == 2).numpy()
    chances = np.exp(truth) * begins / np.exp(truth)[begins].sum()
    drawn = sample_left_to_right(
        Autoregressive(network, V), LENGTH, seeds=range(20_000), batch_size=20_000, prompt=torch.tensor([2])
    )
    assert total_variation(drawn.tokens, chances) < 0.015
    assert drawn.steps == 2


def test_each_text_may_have_its_own_prompt(network):
    model, prompt = Autoregressive(network, V), torch.tensor([[1, 2], [2, 2], [1, 1]])
    drawn = sample_left_to_right(model, LENGTH, seeds=range(3), prompt=prompt)
    assert torch.equal(drawn.tokens[:, :2], prompt)
    assert drawn.evaluations.tolist() == [1, 1, 1]
    full = torch.tensor([1, 2, 2])
    whole = sample_left_to_right(model, LENGTH, seeds=range(2), prompt=full)
    assert torch.equal(whole.tokens, full.expand(2, -1))
    assert whole.evaluations.tolist() == [0, 0]


def test_a_sample_depends_on_its_seed_and_condition_alone():
    model, n = Autoregressive(small(5, 6, classes=2), 5), 12
    classes = torch.arange(n) % 2
    together = sample_left_to_right(model, 6, seeds=range(n), condition=classes)
    parts = sample_left_to_right(model, 6, seeds=range(n), condition=classes, batch_size=5)
    alone = [sample_left_to_right(model, 6, seeds=[i], condition=classes[i : i + 1]).tokens for i in range(n)]
    assert torch.equal(together.tokens, parts.tokens)
    assert torch.equal(together.evaluations, parts.evaluations)
    assert torch.equal(together.tokens, torch.cat(alone))
    assert len(together.tokens.unique(dim=0)) > 6
    other = sample_left_to_right(model, 6, seeds=range(n), condition=1 - classes)
    assert not torch.equal(together.tokens, other.tokens)


def test_a_text_that_has_ended_is_not_asked_of_again():
    """Truth: the network's own count; when all have ended, no call is made."""
    calls = []

    class Counting(Constant):
        def forward(self, x, t, condition=None):
            calls.append(len(x))
            assert bool((t == 0).all())
            return super().forward(x, t)

    drawn = sample_left_to_right(Autoregressive(Counting([0.5, 0.5]), 2), 60, seeds=range(8), batch_size=8)
    assert sum(calls) == int(drawn.evaluations.sum())
    assert len(calls) == int(drawn.evaluations.max()) < 60
    for text, asked in zip(drawn.tokens.tolist(), drawn.evaluations.tolist(), strict=True):
        assert text == [1] * (asked - 1) + [0] * (61 - asked)


def test_progress_is_told_and_dropout_is_off():
    network, told = small(5, 6, dropout=0.5).train(), []
    model = Autoregressive(network, 5)
    draws = [
        sample_left_to_right(model, 6, seeds=range(7), batch_size=3, progress=lambda done, n: told.append((done, n)))
        for _ in range(2)
    ]
    assert torch.equal(draws[0].tokens, draws[1].tokens)
    assert told == [(3, 7), (6, 7), (7, 7)] * 2
    assert network.training


def test_guidance_raises_the_ratio_to_the_unconditional_to_a_power():
    """By numpy: p(c)^(1+w) / p()^w, normalised; w = 0 is the conditional; the end stays certain."""
    given, free = np.array([0.7, 0.2, 0.1]), np.array([0.3, 0.3, 0.4])
    model, x, label = Autoregressive(Classes(), V), torch.tensor([[1], [0]]), torch.tensor([0, 0])
    for w in (0.0, 1.0, 2.5):
        law = AutoregressiveGuidance(model, w).next_law(x, label).log_probs.exp().numpy()
        power = given ** (1 + w) / free**w
        np.testing.assert_allclose(law, [power / power.sum(), [1, 0, 0]], rtol=1e-9)
    with pytest.raises(ValueError, match="guides towards a condition"):
        AutoregressiveGuidance(model, 1.0).next_law(x)
    drawn = sample_left_to_right(
        AutoregressiveGuidance(model, 50.0), LENGTH, seeds=range(5), condition=torch.zeros(5, dtype=torch.int64)
    )
    assert drawn.tokens.tolist() == [[0, 0, 0]] * 5
    assert drawn.evaluations.tolist() == [1] * 5


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Autoregressive(small(causal=False), V), "causal=True"),
        (lambda: Autoregressive(small(), V + 1), "5 states and 4 predicted tokens expected"),
        (lambda: Autoregressive(TokenTransformer(3, 3, 3, 16, 1, 2, causal=True), 3), "4 states and 3 predicted"),
        (lambda: Autoregressive(small(), V, end=V), "end must be one of"),
        (lambda: Autoregressive(Constant([1.0]), 1), "at least 2 tokens"),
        (lambda: AutoregressiveChain(Autoregressive(small(), V), 4), "texts have 1 to 3 tokens, got 4"),
        (lambda: AutoregressiveChain(Autoregressive(Constant([0.5, 0.5]), 2), 0), "tokens, got 0"),
    ],
)
def test_a_model_that_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(2, 3), "whole numbers"),
        (torch.tensor([1, 2, 0]), "whole numbers"),
        (torch.tensor([[1, 3, 0]]), "tokens are 0 to 2, got 0 to 3"),
        (torch.tensor([[1, -1, 0]]), "tokens are 0 to 2, got -1 to 1"),
        (torch.tensor([[1, 2, 0, 0]]), "at most 3 tokens, got 4"),
        (torch.zeros(2, 0, dtype=torch.int64), "at least one token"),
    ],
)
def test_texts_that_are_none_are_refused(network, x, words):
    with pytest.raises(ValueError, match=words):
        Autoregressive(network, V).log_prob(x)


def test_there_is_one_condition_for_each_text_and_room_for_the_next_token(network):
    model = Autoregressive(Classes(), V)
    with pytest.raises(ValueError, match="2 texts, 1 conditions"):
        model.log_prob(TEXTS[:2], torch.tensor([0]))
    with pytest.raises(ValueError, match="at most 3 tokens, got 4"):
        Autoregressive(network, V).next_law(TEXTS[:2])
    with pytest.raises(ValueError, match=r"should have returned shape \(2, 3, 4\), it returned \(2, 3, 2\)"):
        Autoregressive(Constant([0.5, 0.5]), 4).log_prob(TEXTS[-2:])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seeds": []}, "at least one seed"),
        ({"seeds": [1, 1]}, "every sample needs its own seed"),
        ({"length": 0}, "length and batch_size must be at least 1"),
        ({"batch_size": 0}, "length and batch_size must be at least 1"),
        ({"length": 4}, "at most 3 tokens, got 4"),
        ({"condition": torch.tensor([0])}, "one condition for each seed"),
        ({"prompt": torch.tensor([1, 1, 1, 1])}, "the prompt has 4 tokens, and the text has room for 3"),
        ({"prompt": torch.tensor([[1]])}, r"shape \(n,\) or \(2, n\), got \(1, 1\)"),
        ({"prompt": torch.tensor(1)}, r"shape \(n,\) or \(2, n\), got \(\)"),
        ({"prompt": torch.tensor([1.0])}, "whole numbers"),
        ({"prompt": torch.tensor([3])}, "tokens are 0 to 2, got 3 to 3"),
        ({"prompt": torch.tensor([1, 0])}, "has ended"),
    ],
)
def test_what_cannot_be_sampled_is_refused(network, settings, words):
    settings = {"seeds": [0, 1], "length": LENGTH} | settings
    with pytest.raises(ValueError, match=words):
        sample_left_to_right(Autoregressive(network, V), settings.pop("length"), **settings)


def test_a_transform_is_handed_laws_of_the_next_token(network):
    seen = []

    def look(law):
        seen.append((type(law), tuple(law.log_probs.shape)))
        return law

    sample_left_to_right(
        Autoregressive(network, V), LENGTH, seeds=range(4), transform=look, prompt=torch.tensor([1, 1])
    )
    assert seen == [(Categorical, (4, V))]


def test_a_batch_without_the_padding_that_all_have_pays_for_its_ends():
    """What training sees of texts that are all short, against the whole texts."""
    chain = AutoregressiveChain(Autoregressive(small(), V), LENGTH)
    short = torch.tensor([[1, 0, 0], [2, 0, 0]])
    whole, trimmed = (chain.loss(x, u=torch.zeros(2)) for x in (short, short[:, :1]))
    torch.testing.assert_close(whole, -chain.model.autoregressive.log_prob(short))
    torch.testing.assert_close(trimmed, whole)
