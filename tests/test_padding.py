"""Padding that is no word, in what does not know of embeddings: Gaussians, lengths and networks of vectors."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from kuosan.discrete.embedding_chain import PaddedGaussian
from kuosan.discrete.lengths import QUICK, Lengths, Padded, padded
from kuosan.gaussian import Gaussian
from kuosan.networks.sequence import SequenceTransformer
from kuosan.solvers import Noise

D = 2


def dice(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=dice(seed), dtype=torch.float64)


def lengths_of(*laws):
    """Lengths with these laws: of the classes, if there are several, and last of "any"."""
    lengths = Lengths(len(laws[0]), len(laws) - 1)
    with torch.no_grad():
        lengths.logits.copy_(torch.tensor(np.array(laws)).log() / QUICK)
    return lengths


def ragged():
    """Vectors of three texts of one, three and two words, and where padding stands."""
    hidden = torch.arange(3) >= torch.tensor([1, 3, 2])[:, None]
    return normal(3, 3, D).masked_fill(hidden[..., None], 0.0), hidden


def test_padded_gaussians_are_gaussians_of_the_words_alone():
    """Each answer by hand, of each text without its padding; of padding 0."""
    _, hidden = ragged()
    mean, other, x, noise = (normal(3, 3, D, seed=s) for s in range(1, 5))
    a, b = (torch.tensor(v).double()[:, None, None] for v in ([0.5, 1.0, 2.0], [0.7, 3.0, 0.2]))
    q, p = PaddedGaussian(mean, a, hidden), PaddedGaussian(other, b, ~hidden)
    scale, variance = 0.6, 0.3
    found = {
        "sample": q.sample(noise),
        "log_prob": q.log_prob(x),
        "entropy": q.entropy(),
        "kl": q.kl(p),
        "plain kl": q.kl(Gaussian(other, b)),
        "cross_entropy": q.cross_entropy(p),
        "given": q.given(x, scale, variance).log_prob(noise),
    }
    log = 0.5 * math.log(2 * math.pi)
    gain = scale * a / (scale**2 * a + variance)
    mean_y, variance_y = mean + gain * (x - scale * mean), a * variance / (scale**2 * a + variance)
    kl = 0.5 * (torch.log(b / a) + (a + (mean - other) ** 2) / b - 1)
    truth = {
        "sample": mean + a.sqrt() * noise,
        "log_prob": -log - 0.5 * a.log() - (x - mean) ** 2 / (2 * a),
        "entropy": (log + 0.5 + 0.5 * a.log()).expand(3, 3, D),
        "kl": kl,
        "plain kl": kl,
        "cross_entropy": log + 0.5 * b.log() + (a + (mean - other) ** 2) / (2 * b),
        "given": -log - 0.5 * variance_y.log() - (noise - mean_y) ** 2 / (2 * variance_y),
    }
    for name, value in found.items():
        for row, said, n in zip(truth[name], value, [1, 3, 2], strict=True):
            torch.testing.assert_close(said[:n], row[:n])
            assert not said[n:].any(), name
    assert torch.equal(padded(q.sample(generator=dice())), hidden)
    assert torch.equal(PaddedGaussian.of(Gaussian(mean, a), hidden).sample(noise), found["sample"])


@pytest.mark.parametrize("width", [2, 3])
def test_the_prior_of_vectors_is_that_of_the_length_times_that_of_each_word(width):
    """By hand from the normal density; nothing is a text that is empty or goes on after its end."""
    x, laws = normal(5, 3, D), np.array([[0.2, 0.5, 0.3]] * 3 + [[0.6, 0.3, 0.1]] * 2)
    for row, n in zip(x, [1, 2, width, 0, 2], strict=True):
        row[n:] = 0
    x[4, 0] = 0
    x = x[:, :width]
    prior = Padded(torch.tensor(laws).log(), Gaussian(torch.zeros(()).double(), torch.tensor(1.7).double()))
    words = -0.5 * (math.log(2 * math.pi * 1.7) * D + (x**2).sum(-1) / 1.7)
    truth = [math.log(laws[k][n - 1]) + float(words[k, :n].sum()) for k, n in enumerate([1, 2, width])]
    np.testing.assert_allclose(prior.log_prob(x), [*truth, -math.inf, -math.inf])
    hidden = padded(x)
    truth = [math.log(laws[k][n - 1]) for k, n in enumerate([1, 2, width])]
    np.testing.assert_allclose(prior.log_length(hidden), [*truth, -math.inf, -math.inf])


def test_lengths_of_seeds_are_of_each_seed_alone_and_follow_the_law():
    """20,000 of each class, 5 standard deviations; and what is drawn beside them knows nothing of them."""
    laws, n = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.2, 0.3, 0.5]]), 20_000
    lengths = lengths_of(*laws)
    drawn = lengths.of_seeds(range(n))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4)[1:] / n, laws[2], atol=5 * math.sqrt(0.25 / n))
    some = [17, 3, 19_999, 4]
    assert torch.equal(lengths.of_seeds(some), drawn[some])
    assert all(int(lengths.of_seeds([k])) == int(drawn[k]) for k in range(30))
    told = lengths.of_seeds(range(n), torch.zeros(n, dtype=torch.int64))
    np.testing.assert_allclose(np.bincount(told, minlength=4)[1:] / n, laws[0], atol=5 * math.sqrt(0.25 / n))
    longer = lengths.of_seeds(range(n), least=2)
    np.testing.assert_allclose(np.bincount(longer, minlength=4) / n, [0, 0, 0.375, 0.625], atol=5 * math.sqrt(0.25 / n))
    assert int(lengths.of_seeds(range(200), most=2).max()) == 2
    first = Noise(range(n), (), torch.float64).draw()
    assert abs(np.corrcoef(first, drawn)[0, 1]) < 5 / math.sqrt(n)


def test_a_network_says_the_same_of_words_however_much_padding_follows():
    """And words are told where the end is, see each other and nothing of what stands after it."""
    torch.manual_seed(0)
    network = SequenceTransformer((6, D), 16, 2, 2, outputs=5, padding=True).double()
    for p in network.parameters():
        nn.init.normal_(p, std=0.5)
    x, hidden = ragged()
    t = torch.tensor([0.1, 0.5, 0.9]).double()
    with torch.no_grad():
        said = network(x, t)
        assert said.shape == (3, 3, 5)
        for width in (4, 5, 6):
            more = network(nn.functional.pad(x, (0, 0, 0, width - 3)), t)
            torch.testing.assert_close(more[:, :3][~hidden], said[~hidden])
        for k, n in enumerate([1, 3, 2]):
            torch.testing.assert_close(network(x[k : k + 1, :n], t[k : k + 1])[0], said[k, :n])
        longer = network(torch.cat([x[:, :2], torch.ones(3, 1, D).double()], 1), t)
        assert float((longer[2, :2] - said[2, :2]).abs().amax(-1).min()) > 1e-3
        network.from_end.zero_()
        network.blocks.apply(lambda part: nn.init.zeros_(part.weight) if isinstance(part, nn.Linear) else None)
        blind = network(x, t)  # nobody looks at others, or at the end: what is left is the word and its place
        network.from_end[1] = torch.linspace(-1, 2, 16)
        moved = (network(x, t) - blind).abs().sum(-1) > 1e-6
        assert torch.equal(moved, torch.tensor([[0, 0, 0], [0, 1, 0], [1, 0, 0]]).bool())
        network.from_end[0], network.from_end[1] = torch.linspace(-1, 2, 16), 0.0
        moved = (network(x, t) - blind).abs().sum(-1)[~hidden] > 1e-6
        assert torch.equal(moved, torch.tensor([[1, 0, 0], [0, 0, 1], [0, 1, 0]]).bool()[~hidden])


@pytest.mark.parametrize(
    ("padding", "shape", "words"),
    [
        (True, (2, 4, 4), r"for \(up to 3, 4\) vectors, got \(4, 4\)"),
        (True, (2, 0, 4), r"for \(up to 3, 4\) vectors, got \(0, 4\)"),
        (True, (2, 3, 5), r"for \(up to 3, 4\) vectors, got \(3, 5\)"),
        (True, (2, 4), r"for \(up to 3, 4\) vectors, got \(4,\)"),
        (False, (2, 2, 4), r"for \(3, 4\) vectors, got \(2, 4\)"),
        (False, (2, 4, 4), r"for \(3, 4\) vectors, got \(4, 4\)"),
    ],
)
def test_vectors_that_do_not_fit_a_network_are_refused(padding, shape, words):
    network = SequenceTransformer((3, 4), 8, 1, 2, padding=padding)
    with pytest.raises(ValueError, match=words):
        network(torch.ones(shape), torch.zeros(2))


def test_a_length_that_no_text_has_is_refused():
    with pytest.raises(ValueError, match="the longest text has 2 tokens, and 3 are asked for"):
        lengths_of([0.5, 0.5]).of_seeds([1, 2], least=3)
