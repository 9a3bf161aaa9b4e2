"""Alignments are the best ones, by enumeration."""

from itertools import combinations, pairwise

import pytest
import torch

from kuosan.speech.alignment import durations, expand, path


def every_way(symbols, frames):
    """All lists of so many positive integers with this sum."""
    for cuts in combinations(range(1, frames), symbols - 1):
        ends = (0, *cuts, frames)
        yield [after - before for before, after in pairwise(ends)]


def total(score, lasting):
    """The score of one text that lasts so, added up cell by cell."""
    t, found = 0, 0.0
    for symbol, count in enumerate(lasting):
        for _ in range(count):
            found += float(score[symbol, t])
            t += 1
    return found


def one(score):
    symbols, frames = score.shape
    return durations(score[None], torch.tensor([symbols]), torch.tensor([frames]))[0].tolist()


@pytest.mark.parametrize("symbols", [1, 2, 3, 4])
def test_the_best_of_all_ways_is_found(symbols):
    """Every way to share out up to 7 frames, for scores that differ enough that no two ways tie."""
    generator = torch.Generator().manual_seed(symbols)
    for frames in range(symbols, 8):
        for _ in range(20):
            score = torch.randn(symbols, frames, generator=generator)
            assert one(score) == max(every_way(symbols, frames), key=lambda lasting: total(score, lasting))


def test_a_planted_path_is_recovered():
    """The scores are 0 on the path and worse by noise's square elsewhere, as log-likelihoods of means that differ."""
    generator = torch.Generator().manual_seed(0)
    planted = torch.randint(1, 9, (40,), generator=generator)
    means = torch.randn(20, 40, generator=generator)
    mel = means.repeat_interleave(planted, 1) + 0.1 * torch.randn(20, int(planted.sum()), generator=generator)
    score = -(means[:, :, None] - mel[:, None]).square().sum(0)
    assert one(score) == planted.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_a_batch_is_aligned_as_one_by_one_whatever_stands_beyond_the_lengths(seed):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(5, 9, 30, generator=generator)
    texts, frames = torch.tensor([9, 1, 4, 7, 7]), torch.tensor([30, 12, 4, 30, 8])
    junk = score.clone()
    for k, (symbols, lasting) in enumerate(zip(texts, frames, strict=True)):
        junk[k, symbols:] = float("nan")
        junk[k, :, lasting:] = float("inf")
    found = durations(junk, texts, frames)
    assert found.dtype == torch.int64
    assert found.sum(1).tolist() == frames.tolist()
    for k, (symbols, lasting) in enumerate(zip(texts.tolist(), frames.tolist(), strict=True)):
        assert found[k, :symbols].tolist() == one(score[k, :symbols, :lasting])
        assert found[k, symbols:].tolist() == [0] * (9 - symbols)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_may_have_any_precision_and_gradients(dtype):
    score = torch.tensor([[1.0, 2.0, -3.0], [1.0, -1.0, 1.0]], dtype=dtype, requires_grad=True)
    assert one(score) == [2, 1]


WRONG = {
    "two axes": ((3, 4), [2], [3], "score should be"),
    "no symbols": ((1, 0, 4), [1], [3], "score should be"),
    "too few lengths": ((2, 3, 4), [3], [4, 4], "texts should be integers .2,."),
    "too many frames' lengths": ((1, 3, 4), [3], [4, 4], "frames should be integers .1,."),
    "lengths of 0": ((2, 3, 4), [3, 0], [4, 4], "texts must lie in 1 .. 3"),
    "frames beyond the score": ((1, 3, 4), [3], [5], "frames must lie in 1 .. 4"),
    "symbols beyond the score": ((1, 3, 4), [4], [4], "texts must lie in 1 .. 3"),
    "real lengths": ((1, 3, 4), [3.0], [4], "texts should be integers"),
    "more symbols than frames": ((3, 3, 4), [2, 3, 3], [2, 4, 2], "text 2 has 3 symbols but 2 frames"),
}


@pytest.mark.parametrize(("shape", "texts", "frames", "why"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_said(shape, texts, frames, why):
    with pytest.raises(ValueError, match=why):
        durations(torch.zeros(shape), torch.tensor(texts), torch.tensor(frames))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_named(value):
    score = torch.zeros(2, 2, 3)
    score[1, 0, 0] = value
    with pytest.raises(ValueError, match="text 1 are not finite"):
        durations(score, torch.tensor([2, 2]), torch.tensor([3, 3]))


def test_whole_numbers_are_no_scores():
    with pytest.raises(ValueError, match="real numbers"):
        durations(torch.zeros(1, 2, 3, dtype=torch.int64), torch.tensor([2]), torch.tensor([3]))


LASTING = torch.tensor([[2, 0, 1], [1, 3, 1]])


def test_columns_are_repeated_as_long_as_they_last():
    values = torch.tensor([[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]])
    assert expand(values, LASTING).tolist() == [[[1, 1, 3, 0, 0]], [[4, 5, 5, 5, 6]]]


def test_a_path_is_drawn():
    assert path(LASTING).tolist() == [
        [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 0, 0]],
        [[1, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 1]],
    ]


def test_gradients_of_repeated_columns_are_their_durations():
    values = torch.zeros(2, 4, 3, requires_grad=True)
    expand(values, LASTING).sum().backward()
    assert torch.equal(values.grad, LASTING[:, None].expand(2, 4, 3).float())


def test_no_durations_are_no_frames():
    assert expand(torch.ones(1, 4, 2), torch.zeros(1, 2, dtype=torch.int64)).shape == (1, 4, 0)


@pytest.mark.parametrize("shape", [(2, 3), (1, 4, 3), (2, 4, 2)])
def test_values_that_do_not_fit_are_said(shape):
    with pytest.raises(ValueError, match="do not fit durations"):
        expand(torch.zeros(shape), LASTING)


@pytest.mark.parametrize("make", [path, lambda lasting: expand(torch.zeros(2, 4, 3), lasting)], ids=["path", "expand"])
def test_durations_are_counts(make):
    with pytest.raises(ValueError, match="negative"):
        make(LASTING - 1)
    for wrong in (LASTING.float(), LASTING[0], LASTING > 0):
        with pytest.raises(ValueError, match="should be integers"):
            make(wrong)
