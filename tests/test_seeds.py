"""Random streams by name: repeatable, and independent of each other and of what users seed themselves."""

import itertools

import numpy as np
import torch

from kuosan.seeds import stream

N = 20_000


def test_a_stream_is_a_function_of_its_name_and_key_alone():
    """Truth: the same stream made again, also from NumPy's whole numbers."""
    once, again = (torch.randn(5, generator=stream("noise", *key)) for key in ((3, 7), (np.int64(3), np.int32(7))))
    assert torch.equal(once, again)


def test_equal_seeds_do_not_mean_equal_noise():
    """Two independent streams of n normals correlate by about 1 / sqrt(n); five times that would be no chance.

    Data drawn with a user's own generator of seed 0 and noised with seed 0 must not come from the same numbers.
    """
    made = [torch.Generator().manual_seed(0), stream("bound", 0), stream("sample", 0), stream("noise", 0, 0)]
    draws = [torch.randn(N, generator=generator, dtype=torch.float64) for generator in made]
    for one, other in itertools.combinations(draws, 2):
        assert abs(float((one * other).mean())) < 5 / N**0.5
