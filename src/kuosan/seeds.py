"""Random streams by name: one generator for each purpose and seed, so that equal seeds never mean equal noise.

Data drawn with seed 0 and noised with seed 0 from the same stream is correlated, and every average over it wrong.
"""

from __future__ import annotations

import hashlib

import torch


def stream(purpose: str, *key: int) -> torch.Generator:
    """A fresh CPU generator that is a function of (purpose, key) alone and independent of every other one."""
    digest = hashlib.blake2b(repr((purpose, *map(int, key))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
