"""BLEU by hand on texts of a few words, and the choice that it makes."""

import math

import pytest
import torch

from kuosan.discrete.risk import bleu, candidate_batches, minimum_risk, of_least_risk


def test_bleu_is_its_definition_by_hand():
    """Candidate "a b c d", reference "a b d": m = 3, 1, 0 of n = 4, 3, 2 n-grams, and no brevity penalty."""
    truth = (3 / 4 * (1 + 1) / (3 + 1) * (0 + 1) / (2 + 1)) ** (1 / 3)
    assert bleu("abcd", "abd", order=3) == pytest.approx(truth, rel=1e-12)


def test_a_short_candidate_is_penalised():
    """Both of its words are right: exp(1 - 4/2)."""
    assert bleu("ab", "abcd", order=2) == pytest.approx(math.exp(-1), rel=1e-12)


def test_a_word_counts_no_more_often_than_the_reference_has_it():
    assert bleu("aaa", "abc", order=1) == pytest.approx(1 / 3, rel=1e-12)


def test_bleu_of_a_text_with_itself_is_one_and_with_a_stranger_none():
    assert bleu([5, 2, 7, 1, 1], [5, 2, 7, 1, 1]) == pytest.approx(1)
    assert bleu("ab", "cd") == 0
    assert bleu("", "cd") == bleu("cd", "") == 0
    assert bleu("", "") == 1


def test_the_choice_is_what_most_of_the_others_are_like():
    samples = ["the cat sat on a mat", "dogs bark", "the cat sat on the mat", "the cat sat on the mat today", "x y z"]
    assert minimum_risk([one.split() for one in samples]) == 2


def test_the_choice_is_the_least_sum_of_one_minus_bleu():
    samples = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 9, 9, 9], [7, 2, 3, 4], [1, 2, 3]]
    risk = [sum(1 - bleu(a, b) for b in samples if b is not a) for a in samples]
    assert minimum_risk(samples) == min(range(5), key=risk.__getitem__)


def test_of_equal_samples_the_first_is_chosen():
    assert minimum_risk(["ab", "ab", "ab"]) == 0
    assert minimum_risk(["ab"]) == 0


def test_no_samples_and_no_order_are_refused():
    with pytest.raises(ValueError, match="none were given"):
        minimum_risk([])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        bleu("ab", "ab", order=0)


# -- the choice among texts that a run draws ---------------------------------------------------------------------------


def test_candidates_are_drawn_for_each_text_and_the_chosen_one_is_theirs():
    """Three texts of three candidates each: the sure one of each row by hand, and seeds that no text shares."""
    tokens = torch.tensor(
        [[1, 2, 0], [3, 4, 0], [1, 2, 0], [5, 0, 0], [5, 0, 0], [6, 7, 8], [9, 9, 9], [2, 0, 0], [2, 0, 0]]
    )
    assert of_least_risk(tokens, 3).tolist() == [[1, 2, 0], [5, 0, 0], [2, 0, 0]]
    assert of_least_risk(tokens, 1) is tokens
    batches = list(candidate_batches([4, 7, 9], torch.tensor([0, 1, 2]), 3, 6))
    assert [len(seeds) for seeds, _ in batches] == [6, 3]
    seeds = [seed for part, _ in batches for seed in part]
    assert seeds[::3] == [4, 7, 9]
    assert len(set(seeds)) == 9
    assert [label for _, part in batches for label in part.tolist()] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    alone = next(candidate_batches([7], None, 3, 256))
    assert alone == (seeds[3:6], None)  # whatever is drawn beside it
    assert list(candidate_batches([4, 7], None, 1, 256)) == [([4, 7], None)]
