"""A training step of the MNIST recipe's network with our written-out attention, against torch's fused attention.

    python benchmarks/attention.py

Both in bf16 on the same weights and batch of 128, alternating, 5 times each; the medians and their ratio are printed.
"""

import statistics
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

from kuosan.networks import Transformer
from kuosan.networks.parts import Block


def fused(self: Block, h: torch.Tensor) -> torch.Tensor:
    q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
    return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def main() -> None:
    torch.manual_seed(0)
    network = Transformer((1, 28, 28), classes=10).to(memory_format=torch.channels_last)
    x, t, y = torch.randn(128, 1, 28, 28), torch.rand(128), torch.randint(0, 10, (128,))
    times: dict[str, list[float]] = {"written out": [], "fused": []}
    for turn in range(6):
        for name, attention in (("written out", OWN), ("fused", fused)):
            Block.attention = attention  # type: ignore[method-assign]
            begun = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                loss = (network(x, t, y) - x).float().square().mean()
            loss.backward()
            if turn:  # the first warms up
                times[name].append(time.perf_counter() - begun)
    own, other = (statistics.median(values) for values in times.values())
    print(f"attention written out {own:.3f} s, fused {other:.3f} s a step: fused takes {other / own:.2f} times as long")


OWN = Block.attention

if __name__ == "__main__":
    main()
