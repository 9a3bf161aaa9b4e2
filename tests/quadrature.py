"""Exact averages over the joint law of (x_0, x_t) of a 1-D mixture on DDPM's table: numpy and scipy, no Kuosan."""

import functools
import math

import numpy as np
import torch
from scipy import stats


@functools.cache
def ddpm_abar(step):
    return float(np.prod(1 - np.linspace(1e-4, 0.02, 1000)[:step]))


@functools.cache
def joint_nodes(line, step):
    """Nodes (x_0, x_t) and weights that integrate anything quadratic in x_0 over q(x_0, x_t), in numpy alone.

    x_t on an even grid (exponentially accurate for a smooth density); for each x_t, x_0 is a mixture of two Gaussians,
    for which two Gauss-Hermite nodes each are exact.
    """
    alpha, noise = math.sqrt(ddpm_abar(step)), 1 - ddpm_abar(step)
    means, variances = np.array(line.means), np.array(line.variances)
    total = alpha**2 * variances + noise
    width = 0.05 * math.sqrt(total.min())
    x_t = np.arange(
        alpha * means.min() - 9 * math.sqrt(total.max()), alpha * means.max() + 9 * math.sqrt(total.max()), width
    )
    joint = np.array(line.weights) * stats.norm.pdf(x_t[:, None], alpha * means, np.sqrt(total)) * width  # (n, 2)
    mean = means + alpha * variances / total * (x_t[:, None] - alpha * means)
    std = np.sqrt(variances * noise / total)
    x_0 = np.stack([mean - std, mean + std], -1)
    weight = np.stack([joint / 2, joint / 2], -1)
    x_t = np.broadcast_to(x_t[:, None, None], x_0.shape)
    return tuple(torch.from_numpy(np.ascontiguousarray(c).reshape(-1)) for c in (x_0, x_t, weight))


@functools.cache
def mean_squared_error(line, step):
    """M_t = E (x_0 - E[x_0|x_t])^2, over the same nodes: four of x_0 for each x_t."""
    x_0, _, weight = (c.numpy().reshape(-1, 4) for c in joint_nodes(line, step))
    total = weight.sum(1)
    mean = (weight * x_0).sum(1) / np.where(total > 0, total, 1)
    return float((weight * (x_0 - mean[:, None]) ** 2).sum())
