"""A table of numbers in words and as a picture."""

from __future__ import annotations

from pathlib import Path

from kuosan.process import Process
from kuosan.solvers import Table


def words(table: Table, process: Process) -> str:
    """For each evaluation: its time, its noise level, and what it weighs in the end."""
    table = table.read_as("x0", process)
    a, b, c = table.dense()
    lines = [f"{'evaluation':>10}{'time':>10}{'sigma/alpha':>13}{'weight of x0 in the end':>25}{'of its noise':>14}"]
    for i, row in enumerate(table.rows):
        alpha, sigma = process.at(Process.scales, row.t)
        level = f"{sigma / alpha:>13.4g}" if alpha else f"{'no signal':>13}"
        lines.append(f"{i + 1:>10d}{row.t:>10.4f}{level}{float(b[-1, i]):>25.4f}{float(c[-1, i]):>14.4f}")
    lines.append(f"{'':>10}{'':>10}{'start':>13}{float(a[-1]):>25.2g}")
    return "\n".join(lines)


def plot(table: Table, process: Process, path: Path) -> Path:
    """The lower triangle: how much of each evaluation's x0 is in each state, and the noise levels, as a PNG."""
    import numpy as np
    from matplotlib.figure import Figure

    table = table.read_as("x0", process)
    _, b, _ = table.dense()
    scale = [float(process.alpha(t)) for t in (*table.times[1:], 0.0)]
    shares = b.numpy() / np.maximum(scale, 1e-9)[:, None]
    figure = Figure(figsize=(9.4, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    n = table.evaluations
    top = float(np.abs(np.tril(shares)).max())
    picture = np.where(np.tril(np.ones((n, n))) > 0, shares, np.nan)
    image = left.imshow(picture, cmap="RdBu_r", vmin=-top, vmax=top)
    left.set(title="share of each x0 in the state, over alpha", xlabel="x0 of evaluation", ylabel="after evaluation")
    ticks = range(0, n, max(1, n // 10))
    left.set_xticks(ticks, [str(i + 1) for i in ticks])
    left.set_yticks(ticks, [str(i + 1) for i in ticks])
    figure.colorbar(image, ax=left, shrink=0.85)
    levels = [float((-0.5 * process.log_snr(t)).exp().clamp_max(1e4)) for t in table.times]
    right.plot(range(1, n + 1), levels, "o-", color="#1f6f8c")
    right.set(title="noise level of each evaluation", xlabel="evaluation", ylabel="sigma / alpha", yscale="log")
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    return path
