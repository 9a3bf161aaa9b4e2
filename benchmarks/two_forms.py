"""The forms of the bound beside each other: what each says on average, and how much it varies; and the reverse kernel.

    python benchmarks/two_forms.py [forms | kernel] [--steps T ...] [--checked T ...] [--json FILE]

forms: 1-D data N(0.5, 0.36), LinearBeta on the even grid t = i/T, the exact denoiser and the exact reverse variance, at
the two points x with (x - 0.5)^2 = 0.6, where log p = -1.2414. Mean and variance of one estimate of the bound by each
form, with the latents drawn anew for every term, with one random t, and along one shared path. Every term is a
polynomial of degree 2 in at most three standard normals, so Gauss-Hermite with 3 nodes each reads off its coefficients
and all means and variances are exact, those along a path too (there the polynomial is one in T normals). For --checked
T the same is estimated by ``DiffusionChain.elbo`` with --draws draws for each point. Draws docs/two_forms.png.

kernel: KL(q(x_s|x_t) || the Gaussian of its mean and variance), averaged over x_t, for a mixture of two Gaussians, by
quadrature, against the step in log-SNR; beside it what is lost if one variance serves all x_t, and the law that small
steps follow, (step SNR_t)^3 E[kappa_3(x_0|x_t)^2] / 12. Draws docs/reverse_kernel.png.
"""

import argparse
import json
import math
import warnings
from pathlib import Path

import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

import kuosan as ks
from kuosan.diffusion import DiffusionChain
from kuosan.figures import FIRST, INK, LINE, SECOND, SOFT
from kuosan.gaussian import Gaussian
from kuosan.kernels import Place
from kuosan.variance import OptimalVariance

DOCS = Path(__file__).parent.parent / "docs"
STEPS = (2, 5, 10, 20, 50, 100, 200, 500, 1000)
FORMS = {
    "matching": "denoising matching",
    "bridge": "consistency",
    "path": "log-ratio of the path",
    "consistency_as_printed": "consistency as printed",
}
WAYS = {"all": "separate draws for every term", "random": "one random t", "shared": "all terms along one path"}
PROCESS = ks.Process(ks.schedules.LinearBeta())
MEAN, VARIANCE = 0.5, 0.36
POINTS = MEAN + torch.tensor([[-1.0], [1.0]], dtype=torch.float64) * math.sqrt(0.6)
LOG_P = float(Gaussian(torch.tensor(MEAN), torch.tensor(VARIANCE)).log_prob(POINTS).mean())


def exact_chain(length: int) -> DiffusionChain:
    """The diffusion model whose every reverse kernel is the true one."""
    grid = ks.Grid(tuple((length - i) / length for i in range(length)))
    times = torch.tensor(grid.times, dtype=torch.float64)
    alpha, sigma = PROCESS.scales(times)
    error = VARIANCE * sigma**2 / (VARIANCE * alpha**2 + sigma**2)
    denoiser = ks.Mixture([1.0], [[MEAN]], [VARIANCE]).denoiser(PROCESS)
    return DiffusionChain(denoiser, grid=grid, variance=OptimalVariance(PROCESS, times, error))


# -- the forms of the bound --------------------------------------------------------------------------------------------


def polynomials(chain: DiffusionChain, form: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every term of the bound of x (1, 1) as c + b n + n A n - tr A: c (T+1,), b (T+1, 3), A (T+1, 3, 3).

    The normals n of rung i are those of z_{i-1} about its marginal, and of the steps to z_i and to z_{i+1}. Rung 0 has
    only the last of them, rung T all but the last.
    """
    node, weight = (torch.as_tensor(v, dtype=torch.float64) for v in hermegauss(3))
    normals = torch.cartesian_prod(node, node, node)  # (27, 3)
    weights = torch.cartesian_prod(*[weight / weight.sum()] * 3).prod(1)
    q, length = chain.guide, chain.length
    columns = tuple(normals[:, [k]] for k in range(3))
    values = [chain.term(form, 0, Place(x, None, x.expand(27, 1), (q.up(1, (x,), x).sample(columns[2]),)))]
    for i in [torch.arange(1, length), length]:
        rungs = i if isinstance(i, Tensor) else torch.tensor([i])
        rung = rungs.repeat_interleave(27)
        first, second, third = (column.repeat(len(rungs), 1) for column in columns)
        given = x.expand(len(rung), 1)
        below = q.marginal(rung - 1, given).sample(first)
        law = q.up(rung, (below,), given)
        z = law.sample(second)
        above = () if i is length else (q.up(rung + 1, (z,), given).sample(third),)
        place = Place(given, None, given, above, (below,), z, law)
        values.append(chain.term(form, length if i is length else rung, place).expand(len(rung)))
    f = torch.cat(values).view(length + 1, 27) * weights
    a = 0.5 * torch.einsum("tn,nk,nl->tkl", f, normals, normals)
    return f.sum(1), f @ normals, a - 0.5 * torch.diag_embed(f.sum(1, keepdim=True).expand(-1, 3))


def spread(b: Tensor, a: Tensor) -> Tensor:
    """Variance of b n + n A n for standard normals n."""
    return b.square().sum(-1) + 2 * a.square().sum((-2, -1))


def along_path(chain: DiffusionChain, b: Tensor, a: Tensor) -> Tensor:
    """Variance of the sum of all terms along one path: one polynomial in the normals of its T steps."""
    length = chain.length
    scale, variance = PROCESS.step_coefficients(chain.guide.times[1:], chain.guide.times[:-1])
    path = torch.zeros(length + 1, length, dtype=torch.float64)  # z_i - E z_i as a sum of the steps' normals
    for i in range(length):
        path[i + 1] = scale[i] * path[i]
        path[i + 1, i] = variance[i].sqrt()
    below, step = torch.zeros(2, length + 1, length, dtype=torch.float64)
    below[1:] = path[:-1]
    below[2:] /= path[1:-1].norm(dim=1, keepdim=True)
    step[1:] = torch.eye(length, dtype=torch.float64)
    above = torch.cat([step[1:], torch.zeros_like(step[:1])])
    uses = (below, step, above)
    total_b = sum(u.mT @ b[:, k] for k, u in enumerate(uses))
    total_a = sum(u.mT @ (a[:, k, j, None] * v) for k, u in enumerate(uses) for j, v in enumerate(uses))
    return spread(total_b, total_a)


def exactly(chain: DiffusionChain, form: str) -> dict[str, float]:
    """Mean of one estimate of the bound, and its variance by each way of drawing; the mean over both points."""
    found = []
    between = chain.length - 1
    for x in POINTS:
        c, b, a = polynomials(chain, form, x[None])
        each = spread(b, a)
        ends = each[0] + each[-1]
        second = (each + c**2)[1:-1].sum() * between  # E of the square of one term times their number
        random = ends + second - c[1:-1].sum() ** 2
        found.append(torch.stack([-c.sum(), each.sum(), random, along_path(chain, b, a)]))
    return dict(zip(("mean", *WAYS), torch.stack(found).mean(0).tolist(), strict=True))


def sampled(chain: DiffusionChain, form: str, way: str, draws: int) -> tuple[float, float, float, float]:
    """Mean and variance of one estimate by ``elbo``, each followed by its standard error."""
    total = chain.elbo(POINTS.repeat(draws, 1), estimator=form, terms=way).total.view(draws, 2)
    squares = (total - total.mean(0)) ** 2
    mean_error, error = ((v.var(0).sum() / draws).sqrt() / 2 for v in (total, squares))
    return float(total.mean()), float(mean_error), float(squares.mean()), float(error)


def deficit(chain: DiffusionChain) -> float:
    """sum_t (1 - beta_{t+1}) beta_t / beta_{t+1}: by how much the printed form is too low if the model is exact."""
    scale, beta = PROCESS.step_coefficients(chain.guide.times[1:], chain.guide.times[:-1])
    return float((scale[1:] ** 2 * beta[:-1] / beta[1:]).sum())


def forms(options: argparse.Namespace) -> dict:
    warnings.filterwarnings("ignore", message="the consistency form as printed")
    print(f"bound on log p(x) = {LOG_P:.5f} nats, exact model; mean and variance of one estimate\n")
    head = f"{'T':>5s}  {'form':24s}{'mean':>11s}{'separate':>13s}{'random t':>13s}{'shared path':>13s}"
    print(head + "\n" + "-" * len(head))
    results: dict = {}
    for length in options.steps:
        chain = exact_chain(length)
        rows = {form: exactly(chain, form) for form in FORMS}
        ratios = {way: rows["bridge"][way] / rows["matching"][way] for way in WAYS}
        results[length] = {**rows, "ratio": ratios, "deficit": deficit(chain)}
        for form, row in rows.items():
            print(f"{length:5d}  {FORMS[form]:24s}{row['mean']:11.5f}" + "".join(f"{row[way]:13.5g}" for way in WAYS))
        print(f"{'':5s}  {'consistency / matching':35s}" + "".join(f"{ratios[way]:13.3g}" for way in WAYS))
        low = LOG_P - rows["consistency_as_printed"]["mean"]
        print(f"{'':5s}  printed form too low by {low:.4f}; by the formula {results[length]['deficit']:.4f}\n")
    for length in options.checked:
        chain = exact_chain(length)
        print(f"T = {length}, sampled: elbo of each point {options.draws} times (and how many errors from the exact)")
        for form in FORMS:
            row = exactly(chain, form)
            for way in WAYS:
                mean, mean_error, variance, error = sampled(chain, form, way, options.draws)
                off = (mean - row["mean"]) / mean_error, (variance - row[way]) / error
                print(
                    f"  {FORMS[form]:24s}{WAYS[way]:32s}mean {mean:9.4f} ± {mean_error:.4f} ({off[0]:+.1f})"
                    f"   variance {variance:10.5g} ± {error:.2g} ({off[1]:+.1f})",
                    flush=True,
                )
    draw_forms(results)
    return results


# -- the reverse kernel ------------------------------------------------------------------------------------------------

MIXTURE = ks.Mixture([0.35, 0.65], [[-0.6], [0.5]], [0.01, 0.04])
LEVELS = (-4.0, -1.0, 2.0, 5.0)  # log-SNR of x_t
SIZES = tuple(10 ** (k / 8) for k in range(-16, 9))
SMALL = 0.1  # steps up to here are fitted
SHOWN = (-1.0, -1.0, (0.5, 6.0))  # log-SNR of x_t, x_t / its standard deviation, two steps


def components(t: Tensor, x_t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q(x_s|x_t) as a mixture: shares (N, K), means (N, K), variances (K,); s = 0 gives q(x_0|x_t)."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = PROCESS.scales(s), PROCESS.scales(t)
    means, variances = MIXTURE.means[:, 0], MIXTURE.covariances[:, 0, 0]
    at_t = Gaussian(alpha_t * means, alpha_t**2 * variances + sigma_t**2)
    share = torch.softmax(at_t.log_prob(x_t) + MIXTURE.weights.log(), 1)
    law = Gaussian(alpha_s * means, alpha_s**2 * variances + sigma_s**2).given(x_t, *PROCESS.step_coefficients(t, s))
    return share, law.mean, law.variance


def moments(share: Tensor, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and third central moment of each mixture, (N,)."""
    middle = (share * mean).sum(1, keepdim=True)
    gap = mean - middle
    return middle[:, 0], (share * (variance + gap**2)).sum(1), (share * (3 * gap * variance + gap**3)).sum(1)


def log_densities(share: Tensor, mean: Tensor, variance: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """log of each mixture, and of the Gaussian of its mean and variance, at x (N, M)."""
    log_q = torch.logsumexp(Gaussian(mean[:, None], variance).log_prob(x[:, :, None]) + share.log()[:, None], 2)
    m, v, _ = moments(share, mean, variance)
    return log_q, Gaussian(m[:, None], v[:, None]).log_prob(x)


def divergence(share: Tensor, mean: Tensor, variance: Tensor, points: int = 1601) -> Tensor:
    """KL(mixture || the Gaussian of its mean and variance), (N,), by the trapezoid rule.

    The integrand is g (r log r - r + 1) with r = q / g, never negative, so that nothing cancels when q is almost g.
    """
    m, v, _ = moments(share, mean, variance)
    low = torch.minimum(m - 10 * v.sqrt(), (mean - 10 * variance.sqrt()).amin(1))
    high = torch.maximum(m + 10 * v.sqrt(), (mean + 10 * variance.sqrt()).amax(1))
    x = low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, points, dtype=torch.float64)
    log_q, log_g = log_densities(share, mean, variance, x)
    u = log_q - log_g
    near = u.clamp(-0.1, 0.1)
    small = log_g.exp() * (near * near.exp() - torch.expm1(near))
    value = torch.where(u.abs() < 0.1, small, log_q.exp() * u - log_q.exp() + log_g.exp())
    return value.sum(1) * (high - low) / (points - 1)


def losses(log_snr: float, size: float, points: int = 601) -> dict[str, float]:
    """Averages over x_t of the step from log_snr to log_snr + size."""
    t, s = (PROCESS.schedule.time_of(value) for value in (log_snr, log_snr + size))
    alpha, sigma = PROCESS.scales(t)
    edge = float((alpha**2 * MIXTURE.covariance()[0, 0] + sigma**2).sqrt()) * 7
    x_t = float(alpha * MIXTURE.mean()) + torch.linspace(-edge, edge, points, dtype=torch.float64)[:, None]
    weight = MIXTURE.log_prob(x_t, PROCESS, t).exp() * 2 * edge / (points - 1)
    true = components(t, x_t, s)
    _, v, _ = moments(*true)
    excess = v / (weight @ v / weight.sum()) - 1
    shared = 0.5 * weight @ (excess - torch.log1p(excess))
    third = moments(*components(t, x_t, torch.zeros((), dtype=torch.float64)))[2]
    law = float((size * math.exp(log_snr)) ** 3 * (weight @ third**2) / 12)
    return {"kl": float(weight @ divergence(*true)), "one_variance": float(shared), "law": law}


def slope(sizes: list[float], values: list[float]) -> float:
    """Of the straight line through log values against log sizes."""
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (sizes, values))
    x = x - x.mean()
    return float((x @ y) / (x @ x))


def kernel(options: argparse.Namespace) -> dict:
    print("KL of the true reverse kernel from its moment-matched Gaussian, mean over x_t, nats, by quadrature")
    print("one variance: what is lost besides if that of the Gaussian may not depend on x_t\n")
    head = f"{'log-SNR of x_t':>15s}{'step':>9s}{'KL':>13s}{'small-step law':>16s}{'one variance':>14s}"
    print(head + "\n" + "-" * len(head))
    results: dict = {}
    for level in LEVELS:
        rows = {size: losses(level, size) for size in SIZES}
        for size in SIZES[::4]:
            row = rows[size]
            print(f"{level:15g}{size:9.3g}{row['kl']:13.4g}{row['law']:16.4g}{row['one_variance']:14.4g}")
        small = [size for size in SIZES if size <= SMALL * 1.001]
        powers = {name: slope(small, [rows[size][name] for size in small]) for name in ("kl", "one_variance")}
        print(
            f"{'':15s}steps up to {SMALL:g}: KL ~ step^{powers['kl']:.3f}; one variance ~ "
            f"step^{powers['one_variance']:.3f}\n",
            flush=True,
        )
        results[level] = {"steps": rows, "powers": powers}
    draw_kernel(results)
    return results


# -- drawing -----------------------------------------------------------------------------------------------------------

FOURTH = "#9a6fb0"
LOOKS = {
    "matching": {"color": FIRST, "marker": "o", "markersize": 6.5},
    "bridge": {"color": SECOND, "marker": "s", "markersize": 4.5},
    "path": {"color": INK, "marker": "D", "markersize": 2.8},
    "consistency_as_printed": {"color": FOURTH, "marker": "^", "markersize": 4.5, "linestyle": (0, (4, 2))},
}


def dress(axes, title: str, below: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK, pad=8)
    axes.set_xlabel(below, fontsize=9, color=SOFT)
    axes.tick_params(labelsize=9, labelcolor=SOFT, color=LINE, length=3)
    axes.tick_params(which="minor", length=0)
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)


def save(figure, name: str) -> None:
    figure.savefig(DOCS / name, dpi=200, facecolor="white")
    print(DOCS / name)


def draw_forms(results: dict) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Figure(figsize=(9, 7.2), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.1)
    panels = figure.subplots(2, 2)
    lengths = list(results)
    for letter, axes, measure in zip("abcd", panels.flat, ("mean", *WAYS), strict=True):
        for form, name in FORMS.items():
            values = [results[length][form][measure] for length in lengths]
            if measure == "mean":
                values = [abs(LOG_P - value) for value in values]
            axes.plot(lengths, values, label=name, linewidth=1.6, **LOOKS[form])
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks([length for length in (2, 5, 10, 20, 50, 100, 200, 500, 1000) if length in lengths])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        title = f"variance, {WAYS[measure]}" if measure in WAYS else "mean: how far it is from log p(x), nats"
        dress(axes, f"({letter}) {title}", "number of steps T")
    mean, last = panels[0, 0], panels[1, 1]
    mean.plot(lengths, [length - 1 for length in lengths], color=SOFT, linewidth=1, linestyle=(0, (1, 2)))
    words = {"fontsize": 9, "color": SOFT, "textcoords": "offset points"}
    mean.annotate("T − 1", (lengths[0], lengths[0] - 1), (2, 12), **words)
    for axes, measure, text in (
        (mean, "mean", "the three valid forms: only the prior's mismatch"),
        (last, "shared", "zero but for the prior's mismatch"),
    ):
        value = results[lengths[0]]["path"][measure]
        axes.annotate(text, (lengths[0], abs(LOG_P - value) if axes is mean else value), (0, 10), **words)
    handles, names = mean.get_legend_handles_labels()
    style = {"frameon": False, "fontsize": 10, "labelcolor": INK}
    figure.legend(handles, names, loc="outside upper left", ncols=4, **style)
    note = "data N(0.5, 0.36), every reverse kernel the true one; all points are exact, nothing is sampled"
    figure.supxlabel(note, fontsize=9, color=SOFT)
    save(figure, "two_forms.png")


def draw_kernel(results: dict) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.1), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    left, right = figure.subplots(1, 2)
    style = {"fontsize": 9, "title_fontsize": 9, "frameon": False, "labelcolor": INK}
    dotted = {"linewidth": 1, "linestyle": (0, (1, 2))}
    for (level, found), colour in zip(results.items(), (INK, FIRST, SECOND, FOURTH), strict=True):
        rows = found["steps"]
        left.plot(rows.keys(), [row["kl"] for row in rows.values()], color=colour, linewidth=1.8, label=f"{level:g}")
        left.plot(rows.keys(), [row["law"] for row in rows.values()], color=colour, **dotted)
    left.plot([], [], color=SOFT, label="~ step³", **dotted)
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_ylim(1e-15, 3)
    left.set_yticks([10.0**k for k in range(-15, 1, 3)])
    dress(left, "(a) KL from its Gaussian, mean over $x_t$, nats", "size of the step in log-SNR")
    names = [text.replace("-", "−") for text in left.get_legend_handles_labels()[1]]
    left.legend(left.get_legend_handles_labels()[0], names, title="log-SNR of $x_t$", loc="lower right", **style)

    level, deviations, sizes = SHOWN
    t = PROCESS.schedule.time_of(level)
    alpha, sigma = PROCESS.scales(t)
    x_t = alpha * MIXTURE.mean() + deviations * (alpha**2 * MIXTURE.covariance()[0] + sigma**2).sqrt()
    for size, colour in zip(sizes, (FIRST, SECOND), strict=True):
        true = components(t, x_t[None], PROCESS.schedule.time_of(level + size))
        m, v, _ = (float(value[0]) for value in moments(*true))
        x = torch.linspace(m - 4 * v**0.5, m + 4 * v**0.5, 801, dtype=torch.float64)
        log_q, log_g = log_densities(*true, x[None])
        gap = float(divergence(*true)[0])
        power = math.floor(math.log10(gap))
        words = f"{gap:.2f}" if power > -3 else f"${gap / 10**power:.0f} \\cdot 10^{{{power}}}$"
        right.plot(x, log_q[0].exp(), color=colour, linewidth=2.2, label=f"true, step {size:g}: KL {words}")
        right.plot(x, log_g[0].exp(), color=INK, linewidth=1.1, linestyle=(0, (3, 2)))
    right.plot([], [], color=INK, linewidth=1.1, linestyle=(0, (3, 2)), label="same mean and variance")
    right.set_ylim(0, 2.0)
    right.set_yticks([0, 0.5, 1.0, 1.5])
    right.set_xlim(-2.8, 2.4)
    dress(right, f"(b) density of $x_s$ given one $x_t$ of log-SNR {level:g}".replace("-1", "−1"), "$x_s$")
    right.legend(loc="upper right", **style)
    save(figure, "reverse_kernel.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("forms", "kernel"), help="default: both")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="T of the forms, at least 2")
    parser.add_argument("--checked", type=int, nargs="*", default=[], help="T at which elbo is sampled as well")
    parser.add_argument("--draws", type=int, default=20_000, help="of each point there")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args()
    if min(options.steps) < 2:
        parser.error("a chain of one step has only its two ends; --steps are at least 2")
    results = {}
    if options.what != "kernel":
        results["forms"] = forms(options)
    if options.what != "forms":
        results["kernel"] = kernel(options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
        print(options.json)


if __name__ == "__main__":
    main()
