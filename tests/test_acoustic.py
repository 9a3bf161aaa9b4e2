"""The acoustic model: whole durations, texts and their padding, alignments by enumeration, and its loss by hand."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import kuosan as ks
from kuosan.networks.frames import Frames
from kuosan.objectives import Plain, Stratified, TimeSampler
from kuosan.schedules import RectifiedFlow
from kuosan.speech.acoustic import Acoustic, Encoder, TextToSpeech, lasting, whole
from kuosan.speech.phonemes import SYMBOLS

MELS = 4


class Nothing(nn.Module):
    """A network that says 0, and keeps what it was told."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x, t, condition=None):
        self.seen, self.told, self.t = x, condition, t
        return 0 * x * self.weight


class Means(nn.Module):
    """An encoder that has one mean mel and one log-duration for each symbol, whatever stands beside it."""

    def __init__(self, mels=MELS, seed=0, apart=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.means = nn.Parameter(apart * torch.randn(len(SYMBOLS), mels, generator=generator))
        self.logs = nn.Parameter(torch.randn(len(SYMBOLS), generator=generator) + 1)

    def forward(self, ids):
        there = ids != 0
        return (self.means[ids] * there[..., None]).mT, self.logs[ids]


def acoustic(encoder, network=None):
    return Acoustic(network or Nothing(), ks.Process(RectifiedFlow()), "flow", None, encoder)


def encoder(seed=0, **how):
    torch.manual_seed(seed)
    return Encoder(MELS, width=16, depth=2, **how)


def padded(rows, to=0):
    """Rows of numbers as one tensor, with zeros behind them."""
    most = max(to, *map(len, rows))
    return torch.tensor([[*row, *[0] * (most - len(row))] for row in rows])


# -- whole durations ---------------------------------------------------------------------------------------------------

ROWS = st.lists(st.floats(0, 12).map(lambda x: 0.0 if x < 1e-6 else x), min_size=1, max_size=12)


def one_row(wanted, behind=0, total=None):
    there = torch.tensor([[True] * len(wanted) + [False] * behind])
    found = whole(torch.tensor([[*wanted, *[0.0] * behind]], dtype=torch.float64), there, total)
    assert found.dtype == torch.int64
    assert found[0, len(wanted) :].tolist() == [0] * behind
    return found[0, : len(wanted)].tolist()


@given(ROWS, st.integers(0, 3))
def test_whole_durations_sum_to_what_the_wanted_ones_round_to(wanted, behind):
    """By numpy; or to one frame for each symbol, where that is more."""
    found = one_row(wanted, behind)
    assert min(found) >= 1
    assert sum(found) == max(round(float(np.cumsum(wanted)[-1])), len(wanted))


@given(ROWS, st.integers(0, 3), st.integers(0, 40))
def test_whole_durations_sum_to_what_is_asked_for(wanted, behind, more):
    total = len(wanted) + more
    found = one_row(wanted, behind, total)
    assert min(found) >= 1
    assert sum(found) == total


@given(st.lists(st.floats(1, 12), min_size=1, max_size=12))
def test_where_all_last_a_frame_every_end_is_the_nearest_whole_one(wanted):
    """Ends that are at least a frame apart round to whole ones that are too, so nothing is forced: 0.5 at most."""
    ends = np.cumsum(one_row(wanted))
    assert float(np.abs(ends - np.cumsum(wanted)).max()) <= 0.5 + 1e-9


@given(ROWS)
def test_an_end_moves_no_further_than_the_minimum_of_a_frame_forces(wanted):
    """An end is late by half a frame, and one for each symbol before it that wanted less; early likewise, by those
    behind it."""
    ends, lack = np.cumsum(one_row(wanted)), np.maximum(1 - np.array(wanted), 0)
    asked = np.cumsum(wanted)
    before, behind = np.cumsum(lack), lack[::-1].cumsum()[::-1] - lack
    assert bool((ends - asked <= before + 1).all())
    assert bool((asked - ends <= behind + 1).all())


def test_rounding_errors_do_not_add_up():
    """Of 1,000 symbols of 1.4 frames each, rounded one by one, 400 frames would be lost."""
    assert sum(one_row([1.4] * 1000)) == 1400


@pytest.mark.parametrize(
    ("wanted", "total", "found"),
    [
        ([2.4, 2.4, 2.4], None, [2, 3, 2]),
        ([5.0, 0.1, 0.1, 0.1], None, [2, 1, 1, 1]),
        ([0.1, 0.1, 5.0], None, [1, 1, 3]),
        ([0.0, 0.0], None, [1, 1]),
        ([3.0, 3.0], 2, [1, 1]),
        ([1.0, 1.0], 5, [1, 4]),
    ],
)
def test_whole_durations_by_hand(wanted, total, found):
    assert one_row(wanted, 2, total) == found


def test_rows_of_a_batch_are_alone():
    rows = [[1.5, 2.5, 0.2], [7.3], [0.4, 0.4]]
    there = padded([[1] * len(row) for row in rows]).bool()
    found = whole(torch.tensor([[*row, *[9.0] * (3 - len(row))] for row in rows]), there)  # what is behind counts not
    assert found.tolist() == [[*one_row(row), *[0] * (3 - len(row))] for row in rows]


# -- the encoder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_a_text_is_read_alike_whatever_it_is_padded_to(kernel):
    """In float64, where another order of summing would show in the last of 16 digits."""
    reads = encoder(kernel=kernel).double().eval()
    short, long = [3, 9, 4, 20, 3], list(range(1, 31))
    mean, lasts = reads(torch.tensor([short]))
    for ids in (padded([short], 6), padded([short], 40), padded([short, long])):
        found, logs = reads(ids)
        torch.testing.assert_close(found[:1, :, :5], mean, rtol=0, atol=1e-14)
        torch.testing.assert_close(logs[:1, :5], lasts, rtol=0, atol=1e-14)
        assert not found[0, :, 5:].any()
    beside, _ = reads(torch.tensor([[*short[:4], 5]]))
    assert not torch.allclose(beside[..., 4], mean[..., 4])


def test_durations_do_not_pull_at_the_blocks_that_means_are_made_of():
    reads = encoder()
    reads(torch.tensor([[3, 9, 4]]))[1].square().sum().backward()
    own = {name for name, p in reads.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert own
    assert {name.split(".")[0] for name in own} == {"timing", "lasting"}
    reads.zero_grad()
    reads(torch.tensor([[3, 9, 4]]))[0].square().sum().backward()
    own = {name.split(".")[0] for name, p in reads.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert own == {"symbols", "blocks", "mean"}


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.tensor([1, 2]), "whole numbers"),
        (torch.zeros(1, 3), "whole numbers"),
        (torch.zeros(1, 0, dtype=torch.long), "whole numbers"),
        (torch.tensor([[1, len(SYMBOLS)]]), "symbols are 0 to"),
        (torch.tensor([[-1, 2]]), "symbols are 0 to"),
    ],
)
def test_what_is_no_text_is_refused(ids, words):
    with pytest.raises(ValueError, match=words):
        encoder()(ids)


def test_an_even_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel must be odd, got 4"):
        encoder(kernel=4)


# -- alignment and durations -------------------------------------------------------------------------------------------


def spoken(means, ids, lasts, noise, generator):
    """Mels (M, T) of texts, each symbol's mean as long as it lasts, by numpy."""
    columns = means.detach().numpy()[np.repeat(ids, lasts)].T
    return torch.from_numpy(columns).float() + noise * torch.randn(columns.shape, generator=generator)


def test_a_planted_alignment_is_recovered():
    generator = torch.Generator().manual_seed(0)
    dice = np.random.default_rng(0)
    model = acoustic(Means(20))
    ids = [dice.integers(1, len(SYMBOLS), n).tolist() for n in (1, 7, 30)]
    for texts in ids:  # a symbol twice in turn has no alignment of its own
        texts[:] = [s for i, s in enumerate(texts) if i == 0 or s != texts[i - 1]]
    lasts = [dice.integers(1, 9, len(row)).tolist() for row in ids]
    mels = [spoken(model.encoder.means, *both, 0.1, generator) for both in zip(ids, lasts, strict=True)]
    x_0 = nn.utils.rnn.pad_sequence([mel.T for mel in mels], batch_first=True).mT
    with torch.no_grad():
        mean, _ = model.encoder(padded(ids))
    found = model.align(mean, x_0, padded(ids))
    assert found.tolist() == padded(lasts).tolist()
    assert lasting(x_0).tolist() == [sum(row) for row in lasts]


def test_the_end_of_a_mel_is_its_last_column_that_is_not_padding():
    """A column in the middle may happen to be 0 throughout."""
    x_0 = torch.ones(2, 3, 6)
    x_0[0, :, 2] = x_0[0, :, 5] = 0
    x_0[1, 1:, 3] = 0
    x_0[1, :, 4:] = 0
    assert lasting(x_0).tolist() == [5, 4]


def test_a_text_at_twice_the_speed_lasts_half_as_long():
    """Each symbol wants e^1.5 = 4.48 frames, 9 want 40.3; at a speed of 2, 20.2."""
    model = acoustic(Means())
    nn.init.constant_(model.encoder.logs, 1.5)
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10, 11]])
    for speed, frames in ((1.0, 40), (2.0, 20), (0.5, 81)):
        mu, lasts = model.told(ids, speed)
        assert int(lasts.sum()) == mu.shape[2] == frames
        assert torch.equal(mu[0].T, model.encoder.means[ids[0].repeat_interleave(lasts[0])])
    for frames in (9, 10, 77):
        mu, lasts = model.told(ids, frames=frames)
        assert int(lasts.sum()) == mu.shape[2] == frames
        assert int(lasts.min()) >= 1
        assert int(lasts.max() - lasts.min()) <= 1


def test_texts_are_told_together_as_alone():
    model = acoustic(encoder()).eval()
    rows = [[3, 9, 4], [7, 8, 9, 10, 11, 3]]
    mu, lasts = model.told(padded(rows))
    for i, row in enumerate(rows):
        alone, own = model.told(torch.tensor([row]))
        assert lasts[i].tolist() == [*own[0].tolist(), *[0] * (6 - len(row))]
        torch.testing.assert_close(mu[i, :, : alone.shape[2]], alone[0])
        assert not mu[i, :, alone.shape[2] :].any()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"speed": 0.0}, "speed must be positive, got 0"),
        ({"speed": -1.0}, "speed must be positive"),
        ({"speed": math.nan}, "speed must be positive"),
        ({"frames": 2}, "2 frames are too few for 3 symbols"),
    ],
)
def test_an_impossible_length_is_refused(how, words):
    with pytest.raises(ValueError, match=words):
        acoustic(Means()).told(torch.tensor([[3, 4, 5]]), **how)


def test_frames_are_of_one_text():
    with pytest.raises(ValueError, match="of one text, got 2"):
        acoustic(Means()).told(torch.tensor([[3, 4], [5, 6]]), frames=9)


# -- the loss ----------------------------------------------------------------------------------------------------------

IDS = [[5, 9], [7, 3, 12]]
LENGTHS = (5, 7)
WINDOW = 4


def batch(behind=0, seed=1):
    """Two mels (4, 5) and (4, 7) that are like nothing, padded."""
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.zeros(2, MELS, max(LENGTHS) + behind)
    for i, n in enumerate(LENGTHS):
        x_0[i, :, :n] = torch.randn(MELS, n, generator=generator)
    return x_0


def noise_of(frames, begin, seed=2):
    """Noise (2, 4, frames + 1), its last column so that windows begin at these shares of the recordings."""
    noise = torch.randn(2, MELS, frames + 1, generator=torch.Generator().manual_seed(seed))
    noise[:, 0, -1] = torch.tensor([math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * u - 1))) for u in begin])
    return noise


def best_alignment(mean, mel):
    """Of all ways to share out the frames, that of the least squared distance."""
    symbols, frames = mean.shape[1], mel.shape[1]
    ways = [[b - a for a, b in pairwise((0, *cuts, frames))] for cuts in combinations(range(1, frames), symbols - 1)]
    return min(ways, key=lambda lasts: float(((mel - mean.repeat(lasts, axis=1)) ** 2).sum()))


def by_hand(encoder, x_0, noise, begin, frames):
    """The three terms of each text, by numpy: means, durations, and the flow's error, which is eps - x_0 of a 0."""
    found = []
    for i, (row, n) in enumerate(zip(IDS, LENGTHS, strict=True)):
        mel = x_0[i, :, :n].double().numpy()
        mean = encoder.means.detach().double().numpy()[row].T
        logs = encoder.logs.detach().double().numpy()[row]
        lasts = best_alignment(mean, mel)
        of_means = ((mel - mean.repeat(lasts, axis=1)) ** 2).sum() / (2 * MELS * n)
        of_durations = ((np.log(lasts) - logs) ** 2).mean()
        at = [(math.floor(begin[i] * n) + k) % n for k in range(frames)]
        flow = ((noise[i, :, :frames].double().numpy() - mel[:, at]) ** 2).mean()
        found.append((of_means, of_durations, flow))
    return np.array(found)


@pytest.mark.parametrize("frames", [1, WINDOW, 5, 18])
def test_the_loss_is_of_means_durations_and_the_flow(frames):
    """Each term by numpy, alignments by enumeration; windows of 18 frames go round recordings of 5 and 7."""
    means, begin = Means(), (0.5, 0.9)
    model, x_0, noise = acoustic(means), batch(), noise_of(frames, begin)
    loss = TextToSpeech(frames=frames)(model, x_0, padded(IDS), t=torch.tensor([0.3, 0.8]), noise=noise)
    truth = by_hand(means, x_0, noise, begin, frames)
    assert loss.shape == (2,)
    np.testing.assert_allclose(loss.detach().numpy(), truth.sum(1), rtol=1e-5)
    assert (truth > 0.01).all()


def test_another_weighting_is_of_the_flow_s_error_alone():
    """In eps, x0-hat of a flow of 0 is x_t, so the error is alpha / sigma of that in x0, which is t (eps - x_0)."""
    means, begin, t = Means(), (0.5, 0.9), np.array([0.3, 0.8])
    model, x_0, noise = acoustic(means), batch(), noise_of(WINDOW, begin)
    objective = TextToSpeech(Plain("eps"), frames=WINDOW)
    loss = objective(model, x_0, padded(IDS), t=torch.from_numpy(t), noise=noise)
    truth = by_hand(means, x_0, noise, begin, WINDOW)
    truth[:, 2] *= ((1 - t) / t * t) ** 2
    np.testing.assert_allclose(loss.detach().numpy(), truth.sum(1), rtol=1e-5)


def test_the_network_sees_a_window_that_goes_round_and_is_told_its_means():
    """x_t = (1 - t) x_0 + t eps, at the frames that are counted out by hand."""
    means, frames, begin = Means(), 8, (0.7, 0.999)
    model, x_0, noise = acoustic(means), batch(), noise_of(frames, begin)
    TextToSpeech(frames=frames)(model, x_0, padded(IDS), t=torch.tensor([0.25, 0.25]), noise=noise)
    at = [[3, 4, 0, 1, 2, 3, 4, 0], [6, 0, 1, 2, 3, 4, 5, 6]]
    for i, row in enumerate(IDS):
        torch.testing.assert_close(model.network.seen[i], 0.75 * x_0[i][:, at[i]] + 0.25 * noise[i, :, :-1])
        mean = means.means.detach()[row].T
        lasts = best_alignment(mean.numpy(), x_0[i, :, : LENGTHS[i]].numpy())
        torch.testing.assert_close(model.network.told[i], mean.repeat_interleave(torch.tensor(lasts), 1)[:, at[i]])


def test_windows_begin_anywhere_alike_often():
    """Of 4,000 texts of 5 frames, 5 standard deviations of a fifth."""
    model = acoustic(Means())
    x_0 = torch.arange(1.0, 6.0).expand(4000, MELS, 5)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4000, MELS, 2, generator=generator)
    TextToSpeech(frames=1)(model, x_0, torch.full((4000, 1), 3), t=torch.full((4000,), 1e-6), noise=noise)
    found = model.network.seen[:, 0, 0].round().long().bincount(minlength=6)[1:] / 4000
    assert float((found - 0.2).abs().max()) < 5 * math.sqrt(0.16 / 4000)


def test_padding_never_enters_the_loss():
    """Neither that of recordings nor that of texts, nor what stands beside one in a batch."""
    torch.manual_seed(0)
    model = acoustic(encoder(), Frames((MELS, WINDOW), width=8, depth=1, kernel=3, given=MELS)).eval()
    nn.init.normal_(model.network.last.weight)
    objective, t, noise = TextToSpeech(frames=WINDOW), torch.tensor([0.3, 0.8]), noise_of(WINDOW, (0.5, 0.9))

    def loss(x_0, ids, rows=slice(None)):
        return objective(model, x_0[rows], ids[rows], t=t[rows], noise=noise[rows]).detach()

    truth = loss(batch(), padded(IDS))
    torch.testing.assert_close(loss(batch(6), padded(IDS)), truth)
    torch.testing.assert_close(loss(batch(), padded(IDS, 9)), truth)
    torch.testing.assert_close(loss(batch()[:1, :, :5], padded(IDS[:1]), slice(1)), truth[:1])


def test_losses_teach_what_they_are_of():
    """The encoder's means by their own term and by the flow's, durations by theirs; windows leave nothing out."""
    model = acoustic(encoder(), Frames((MELS, WINDOW), width=8, depth=1, kernel=3, given=MELS))
    TextToSpeech(frames=WINDOW)(model, batch(), padded(IDS)).sum().backward()
    taught = {name.split(".")[1] for name, p in model.encoder.named_parameters(prefix="e") if p.grad is not None}
    assert taught == {"symbols", "blocks", "mean", "timing", "lasting"}


class Often(TimeSampler):
    """The same time always, which counts three times."""

    def sample(self, process, n, generator):
        return torch.full((n,), 0.5, dtype=torch.float64), torch.full((n,), 3.0, dtype=torch.float64)


def test_the_weight_of_a_drawn_time_is_of_the_flow_s_error():
    """Where neither noise nor times are given; the windows of one frame's recordings are all the same."""
    model, x_0, ids = acoustic(Means()), torch.ones(1, MELS, 1), torch.tensor([[5]])

    def loss(times):
        how = {"generator": torch.Generator().manual_seed(3)}
        return float(TextToSpeech(times=times, frames=5000)(model, x_0, ids, **how).detach())

    own = float(TextToSpeech(frames=1)(model, x_0, ids, t=torch.tensor([0.5]), noise=torch.ones(1, MELS, 2)).detach())
    flow = loss(Stratified()) - own  # E (eps - 1)^2 = 2
    assert flow == pytest.approx(2, abs=0.15)
    assert loss(Often()) - own == pytest.approx(3 * flow, abs=0.5)


def test_what_the_loss_lacks_is_said():
    with pytest.raises(ValueError, match="needs the texts"):
        TextToSpeech()(acoustic(Means()), batch())
    with pytest.raises(ValueError, match="at least 1 frame, got 0"):
        TextToSpeech(frames=0)
    with pytest.raises(ValueError, match="text 0 has 6 symbols but 5 frames"):
        TextToSpeech()(acoustic(Means()), batch(), padded([[5, 6, 5, 6, 5, 6], [3]]))


# -- learning ----------------------------------------------------------------------------------------------------------


def test_means_and_alignments_are_learnt_together():
    """Three phonemes, each with a mel of its own and a length of its own, in texts of random order."""
    dice, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    patterns = torch.tensor([[1.5, -1.5, 0.5, 0.0], [-1.0, 1.0, 1.5, -1.5], [0.0, 0.5, -1.5, 1.5]])
    table = torch.zeros(len(SYMBOLS), MELS)
    table[4:7] = patterns
    usual = {4: 2, 5: 4, 6: 7}

    def sentence():
        ids = dice.integers(4, 7, 6).tolist()
        ids = [s for i, s in enumerate(ids) if i == 0 or s != ids[i - 1]]
        return ids, [max(1, usual[s] + int(dice.integers(-1, 2))) for s in ids]

    def made(n):
        texts = [sentence() for _ in range(n)]
        mels = [spoken(table, *one, 0.1, generator).T for one in texts]
        return nn.utils.rnn.pad_sequence(mels, batch_first=True).mT, *(
            padded(rows) for rows in zip(*texts, strict=True)
        )

    model = acoustic(encoder(dropout=0.0), Frames((MELS, 8), width=16, depth=1, kernel=3, given=MELS))
    adam, objective = torch.optim.Adam(model.parameters(), 6e-3), TextToSpeech(frames=8)
    first = last = 0.0
    for step in range(150):
        x_0, ids, _ = made(8)
        loss = objective(model, x_0, ids, generator=generator).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        first, last = (float(loss.detach()) if step == 0 else first), float(loss.detach())
    assert last < 0.5 * first
    x_0, ids, lasts = made(64)
    with torch.no_grad():
        mean, logs = model.eval().encoder(ids)
        found = model.align(mean, x_0, ids)
    assert float((found == lasts)[ids != 0].float().mean()) > 0.97
    for symbol, pattern in zip((4, 5, 6), patterns, strict=True):
        torch.testing.assert_close(mean.mT[ids == symbol].mean(0), pattern, rtol=0, atol=0.15)
        # of lengths n - 1, n, n + 1 alike often, the mean of the logarithm
        truth = np.mean([math.log(max(1, usual[symbol] + k)) for k in (-1, 0, 1)])
        assert float(logs[ids == symbol].mean()) == pytest.approx(truth, abs=0.15)
