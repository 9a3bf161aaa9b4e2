"""The n-gram is a law: its probabilities sum to one, and are those of Witten and Bell by hand."""

import itertools
import math

import pytest
import torch

from kuosan.text.ngram import NGram

A, B = 1, 2


def padded(texts, length):
    tokens = torch.tensor([[*text, *[0] * (length - len(text))] for text in texts], dtype=torch.int64)
    return tokens.reshape(len(texts), length), torch.tensor([len(text) for text in texts])


CORPUS = [[A, B], [A, B, A], [B], [A, A, B, B]]


@pytest.fixture(params=[1, 2, 3, 5])
def model(request):
    return NGram(request.param).fit(*padded(CORPUS, 4), vocabulary=3)


def test_the_bigram_of_a_tiny_corpus_is_witten_and_bell_by_hand():
    """Two texts, "A B" and "A", so V = 3 and the tokens to predict are A B end A end.

    Unigrams: c = (end 2, A 2, B 1) of 5, T = 3, below them 1/3 each: p(A) = (2 + 3/3) / 8 = 3/8, p(B) = 2/8, p(end) =
    3/8. After A came B and end: c(A) = 2, T(A) = 2: p(B | A) = (1 + 2 * 2/8) / 4 = 3/8, p(end | A) = (1 + 2 * 3/8) / 4
    = 7/16, p(A | A) = (0 + 2 * 3/8) / 4 = 3/16. A text begins with A twice, T = 1: p(A | start) = (2 + 3/8) / 3 =
    19/24. After B came the end, once: p(end | B) = (1 + 3/8) / 2 = 11/16.
    """
    model = NGram(2).fit(*padded([[A, B], [A]], 3), vocabulary=3)
    assert [model.probability((), token) for token in (0, A, B)] == pytest.approx([3 / 8, 3 / 8, 2 / 8], rel=1e-14)
    assert [model.probability((A,), token) for token in (0, A, B)] == pytest.approx([7 / 16, 3 / 16, 3 / 8], rel=1e-14)
    log_prob = model.log_prob(*padded([[A, B], [A], [A, A, A]], 3))
    by_hand = [19 / 24 * 3 / 8 * 11 / 16, 19 / 24 * 7 / 16, 19 / 24 * (3 / 16) ** 2]
    assert log_prob.dtype == torch.float64
    assert log_prob.exp().tolist() == pytest.approx(by_hand, rel=1e-12)


def test_the_trigram_of_a_tiny_corpus_is_witten_and_bell_by_hand():
    """As above. "A A" never came, so p(B | A A) = p(B | A) = 3/8; p(B | start A) = (1 + 2 * 3/8) / (2 + 2) = 7/16."""
    model = NGram(3).fit(*padded([[A, B], [A]], 3), vocabulary=3)
    assert model.probability((A, A), B) == pytest.approx(3 / 8, rel=1e-14)
    assert model.probability((0, A), B) == pytest.approx(7 / 16, rel=1e-14)
    assert model.probability((B, A, 0, A), B) == pytest.approx(7 / 16, rel=1e-14)  # only the last two matter


def test_the_probabilities_of_all_continuations_sum_to_one(model):
    """After every context of up to three tokens, seen or not."""
    for context in itertools.chain.from_iterable(itertools.product(range(3), repeat=k) for k in range(4)):
        total = math.fsum(model.probability(context, token) for token in range(3))
        assert total == pytest.approx(1, abs=1e-14)


def test_the_probabilities_of_all_padded_texts_sum_to_one(model):
    """All 1 + 2 + 4 + 8 + 16 texts of up to 4 of the two tokens: the end of a full text costs nothing."""
    texts = [text for k in range(5) for text in itertools.product((A, B), repeat=k)]
    assert len(texts) == 31
    assert float(model.log_prob(*padded(texts, 4)).exp().sum()) == pytest.approx(1, abs=1e-13)


def test_perplexity_counts_the_end_of_a_text_that_is_shorter_than_the_room():
    """A vocabulary of 3 that was seen evenly: each of the 3 + 2 predicted tokens has 1/3."""
    model = NGram(1).fit(*padded([[A, B], [A, B]], 3), vocabulary=3)
    assert model.perplexity(*padded([[A, B], [A]], 3)) == pytest.approx(3, rel=1e-12)
    full = model.log_prob(*padded([[A, B, A]], 3))
    assert full.tolist() == pytest.approx([-3 * math.log(3)], rel=1e-12)


def test_a_higher_order_knows_an_order_of_words():
    """A cycle of three tokens has one continuation: the bigram's perplexity goes to 1, the unigram's stays near 3."""
    tokens, lengths = padded([[1, 2, 3] * 10] * 50, 30)
    perplexities = [NGram(n).fit(tokens, lengths, 4).perplexity(tokens, lengths) for n in (1, 2)]
    assert perplexities[0] == pytest.approx(3, rel=0.01)
    assert perplexities[1] < 1.01


def test_fitting_again_forgets():
    once = NGram(2).fit(*padded([[B]], 4), vocabulary=3)
    twice = NGram(2).fit(*padded(CORPUS, 4), vocabulary=3).fit(*padded([[B]], 4), vocabulary=3)
    assert once.probability((B,), 0) == twice.probability((B,), 0)


def test_bad_input_says_what_is_wrong():
    with pytest.raises(ValueError, match="order must be at least 1"):
        NGram(0)
    with pytest.raises(ValueError, match="call fit first"):
        NGram(1).probability((), 1)
    with pytest.raises(ValueError, match="call fit first"):
        NGram(1).log_prob(*padded(CORPUS, 4))
    with pytest.raises(ValueError, match="no texts"):
        NGram(1).fit(*padded([], 4), vocabulary=3)
    tokens, lengths = padded(CORPUS, 4)
    model = NGram(2).fit(tokens, lengths, 3)
    with pytest.raises(ValueError, match="no texts"):
        model.perplexity(tokens[:0], lengths[:0])
    with pytest.raises(ValueError, match=r"tokens \(N, L\) and lengths \(N,\), got \(4, 4\) and \(3,\)"):
        model.log_prob(tokens, lengths[:3])
    with pytest.raises(ValueError, match="text 2 has length 9"):
        model.log_prob(tokens, torch.tensor([2, 3, 9, 4]))
    for bad in (0, 3, -1):
        with pytest.raises(ValueError, match=r"text 0 has an id outside 1 \.\. 2"):
            model.log_prob(torch.tensor([[A, bad, B]]), torch.tensor([3]))
