"""One training on several processes (torchrun): who am I, who writes, and sums over all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class Processes:
    """This process among its equals.

    Args:
        rank: from 0; rank 0 alone writes files.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def part(self, n: int) -> slice:
        """This process's share of a batch of n.

        Raises:
            ValueError: n does not divide evenly.
        """
        if n % self.size:
            raise ValueError(f"a batch of {n} cannot be shared evenly by {self.size} processes; choose a multiple")
        each = n // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def gather(self, x: Tensor) -> Tensor:
        """Everyone's part, in the order of ranks."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def any(self, flag: bool) -> bool:
        """Whether it is true anywhere."""
        if self.size == 1:
            return flag
        x = torch.tensor(float(flag), device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
        return bool(x)


@contextmanager
def joined() -> Iterator[Processes]:
    """Join the processes that torchrun started; alone when it did not."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Processes(dist.get_rank(), size)
        dist.barrier()  # one that left while another was still talking to it has been seen to abort
    finally:
        dist.destroy_process_group()
