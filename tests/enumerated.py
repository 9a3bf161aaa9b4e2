"""A joint law of three tokens of three states, and the denoiser that knows it: every answer can be enumerated."""

import itertools
import math

import numpy as np
import scipy.linalg
import torch
from torch import nn

from kuosan.discrete import CategoricalDenoiser, CategoricalProcess

V, LENGTH = 3, 3
#: Every text.
ALL = torch.tensor(list(itertools.product(range(V), repeat=LENGTH)))
#: Its probability; the tokens depend on each other.
JOINT = np.random.default_rng(0).dirichlet(np.full(len(ALL), 0.3))
RING = torch.tensor([[0.0, 0.7, 0.3], [0.2, 0.0, 0.8], [0.6, 0.3, 0.1]], dtype=torch.float64)
PROCESSES = {
    "masked": CategoricalProcess.masked(V),
    "uniform": CategoricalProcess.uniform(V),
    "law": CategoricalProcess(torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)),
    "matrix": CategoricalProcess(RING),
}


def jumps_of(process):
    """The matrix of jumps, whatever form it was given in."""
    jump = process.jump.numpy()
    return jump if jump.ndim == 2 else np.tile(jump, (process.states, 1))


def transition(process, s, t):
    """q(x_t | x_s) as a matrix by scipy's exponential; at time 1 after more jumps than anyone could tell."""
    jumps = 700.0 if t == 1 else math.log((1 - s) / (1 - t))
    return scipy.linalg.expm(jumps * (jumps_of(process) - np.eye(process.states)))


class Exact(nn.Module):
    """Logits of the joint law: for each token, the sum over all texts that agree, weighed by what the others say."""

    def __init__(self, process):
        super().__init__()
        self.process = process

    def forward(self, x_t, t, condition=None):
        if len(x_t) < 1000 or bool((t != t[0]).any()):
            return self.answer(x_t, t)
        states = self.process.states  # there are few texts: each is answered once
        every = torch.tensor(list(itertools.product(range(states), repeat=LENGTH)))
        return self.answer(every, t[:1].expand(len(every)))[(x_t * torch.tensor([states**2, states, 1])).sum(1)]

    def answer(self, x_t, t):
        # under masks any time gives the same logits; 0 would make what the masks say 0 / 0
        t = t.double().clamp_min(0.5) if self.process.mask is not None else t.double()
        said = self.process.likelihood(x_t, 0.0, t)[..., :V]  # (B, L, V): q(x_t | x_0 = k)
        of_text = torch.stack([said[:, i, ALL[:, i]] for i in range(LENGTH)], 1)  # (B, L, texts)
        logits = torch.zeros(*x_t.shape, V, dtype=torch.float64)
        for i in range(LENGTH):
            others = torch.tensor(JOINT) * torch.stack([of_text[:, j] for j in range(LENGTH) if j != i]).prod(0)
            for k in range(V):
                logits[:, i, k] = others[:, ALL[:, i] == k].sum(-1).log()
        return logits


def exact(process):
    return CategoricalDenoiser(Exact(process), process)
