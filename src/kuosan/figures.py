"""What a report shows: numbers, images as data URIs, and plots as SVG in the colours and letters of the page.

matplotlib is imported by the functions that plot, so that importing this module costs nothing.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from kuosan.bound import Bound
from kuosan.image.data import to_levels
from kuosan.image.pictures import to_image
from kuosan.process import Process

#: Colours that plots are drawn in, and the page's variables that they become (dark pages have others).
COLOURS = {"#1d2733": "--ink", "#66727f": "--soft", "#dde3e8": "--line", "#1f6f8c": "--first", "#c2562d": "--second"}
INK, SOFT, LINE, FIRST, SECOND = COLOURS
WIDE, HALF, THIRD = (9.4, 2.9), (4.6, 2.9), (3.0, 2.6)  # inches; at the page's full width letters are of one size
OURS = ("samples", "ours")  # how legends name what the model made
LARGEST = 160  # pixels a side: larger images are made smaller for the page


# -- numbers and words -------------------------------------------------------------------------------------------------


def marked(numbers: Mapping[str, Any]) -> Callable[[str, str], Any]:
    """``number("bound.total", ".3f")``: that number in words, marked in the page with its name and its full value."""
    from markupsafe import Markup

    def number(name: str, form: str) -> Any:
        value: Any = numbers
        for part in name.split("."):
            value = value[int(part)] if isinstance(value, list) else value[part]
        if value is None:
            return "not known"
        words = format(value, form).replace("-", "−").replace("%", "\u202f%")
        if not any(digit in words for digit in "123456789"):
            words = words.removeprefix("−")  # of zero
        return Markup('<data value="{}" data-name="{}">{}</data>').format(value, name, words)

    return number


def conclusion(found: Mapping[str, Any]) -> str:
    """One sentence on memorisation from the report's numbers on neighbours."""
    n, share = found["samples"], found["nearer_than_95_percent_of_held_out"]
    middle = next(q for q in found["quantiles"] if q["quantile"] == 0.5)
    ours, real = middle["samples"], middle["held_out"]
    medians = f"median distance {ours:.2f}, of real held-out images {real:.2f}"
    if found["held_out"] < 50:
        medians += f"; with so few held-out images, {found['held_out']}, that is a rough measure"
    if found["copies"] > max(1, n * found["copies_of_real"] / found["held_out"]):
        return f"{found['copies']} of {n} samples are exact copies of training images: the model has memorised them."
    if share > 0.15:
        return (
            f"{share:.0%} of the samples lie nearer to a training image than 95 % of real held-out images do, where "
            "5 % were to be expected: either they lean on training images, or they are plainer than real ones; the "
            f"pairs below tell which ({medians})."
        )
    if ours > 1.1 * real:
        return (
            "No sign of memorisation: samples lie further from the training images than new real images do "
            f"({medians}), which also says that they are not yet quite like the data."
        )
    if ours < 0.9 * real:
        return (
            f"Samples lie nearer to the training images than new real images do ({medians}), but only {share:.0%} of "
            "them nearer than 95 % of those, where 5 % were to be expected: no sign of copies, but they lean on "
            "training images or are plainer than real ones; the pairs below tell which."
        )
    return (
        "No sign of memorisation: samples lie about as far from the training images as new real images do "
        f"({medians}); {share:.0%} of them lie nearer than 95 % of those, where 5 % were to be expected."
    )


# -- images ------------------------------------------------------------------------------------------------------------


def uri(content: bytes, kind: str, family: str = "image") -> str:
    """A file as a data URI, so that the page needs no other file."""
    return f"data:{family}/{kind};base64,{base64.b64encode(content).decode()}"


def picture(levels: Tensor, count: int) -> str:
    """One image (C, H, W) in 0 .. count - 1 as a PNG in its own size: the page enlarges it without blur."""
    image = to_image(levels, count)
    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return png(image)


def png(image: Image.Image) -> str:
    """An image as a PNG."""
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    return uri(content.getvalue(), "png")


def shades(x: Tensor) -> Tensor:
    """Values in [-1, 1] as bytes; what lies outside is black or white."""
    return to_levels(x, 256)


def film(states: Sequence[tuple[Tensor, Tensor]], seconds: float = 4.0) -> str:
    """A GIF that repeats for ever: each frame two images (C, H, W) of bytes side by side, the last for longer."""
    scale = max(1, 160 // states[0][0].shape[-1])
    frames = []
    for left, right in states:
        left_image, right_image = to_image(left, 256, scale), to_image(right, 256, scale)
        frame = Image.new(left_image.mode, (2 * left_image.width + 6, left_image.height), "grey")
        frame.paste(left_image, (0, 0))
        frame.paste(right_image, (left_image.width + 6, 0))
        frames.append(frame)
    each = max(40, round(1000 * seconds / len(frames)))
    content = io.BytesIO()
    frames[0].save(
        content, "GIF", save_all=True, append_images=frames[1:], duration=[each] * (len(frames) - 1) + [1800], loop=0
    )
    return uri(content.getvalue(), "gif")


def sound(wave: Tensor, rate: int) -> str:
    """A wave (N,) as a 16-bit WAV file; what is beyond [-1, 1] is cut off there."""
    from kuosan.speech.audio import write_wav

    with TemporaryDirectory() as folder:
        path = Path(folder) / "sound.wav"
        write_wav(path, wave, rate)
        return uri(path.read_bytes(), "wav", "audio")


# -- plots -------------------------------------------------------------------------------------------------------------


def _plot(size: tuple[float, float], title: str, below: str) -> tuple[Any, Any]:
    """An empty figure and its axes: title at the top left instead of a label on its side, faint horizontal lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    _plain_axes(axes, title, below)
    return figure, axes


def _plain_axes(axes: Any, title: str, below: str) -> None:
    axes.set_title(title, loc="left", fontsize=8.5, color=INK, pad=18)
    axes.set_xlabel(below, fontsize=8, color=SOFT)
    axes.tick_params(labelsize=8, labelcolor=SOFT, color=LINE, length=3)
    axes.tick_params(which="minor", length=0)
    axes.grid(axis="y", color=LINE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)


def _plain_log(axis: Any, within: Sequence[int]) -> None:
    """Plain numbers on a log axis, at these multiples of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=within))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _legend(axes: Any) -> None:
    """The names of the lines between title and plot, where no data can be; samples first."""
    lines = sorted(zip(*axes.get_legend_handles_labels(), strict=True), key=lambda line: line[1] not in OURS)
    axes.legend(
        *zip(*lines, strict=True),
        loc="lower left",
        bbox_to_anchor=(-0.01, 0.985),
        ncols=4,
        frameon=False,
        fontsize=7.5,
        labelcolor=SOFT,
        handlelength=1.6,
        columnspacing=1.4,
        borderaxespad=0.1,
    )


def _svg(figure: Any, label: str) -> str:
    """A figure as SVG to put into a page: colours become the page's variables, letters stay letters.

    What an SVG file needs and a page does not (declaration, metadata, a style for everything around it) is dropped, and
    every id is made the figure's own, since one page holds many.
    """
    from matplotlib import rc_context

    content = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = content.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    name = re.sub(r"\W+", "-", label.lower()).strip("-")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" aria-label="{label}">', text, count=1)
    for colour, variable in COLOURS.items():
        text = text.replace(colour, f"var({variable})")
    return text.strip()


def _thin(values: np.ndarray, most: int) -> np.ndarray:
    """Indices of at most that many values, evenly spread, both ends included."""
    return np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int))


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over a centred window of about that width, which shrinks towards both ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    half = np.minimum(width // 2, np.minimum(place, len(values) - 1 - place))
    return (total[place + half + 1] - total[place - half]) / (2 * half + 1)


def loss(steps: np.ndarray, losses: np.ndarray) -> tuple[dict[str, Any], str]:
    """The loss of each training step, faint, with its moving average; on a log scale where it falls to a half."""
    window, edge = max(1, len(losses) // 40), max(1, len(losses) // 50)
    smoothed = smooth(losses, window)
    figure, axes = _plot(WIDE, "training loss", "training step")
    raw, line = _thin(steps, 1200), _thin(steps, 400)
    axes.plot(steps[raw], losses[raw], color=FIRST, alpha=0.4, linewidth=0.7, label="each step")
    axes.plot(steps[line], smoothed[line], color=FIRST, linewidth=1.8, label="moving average")
    if losses.min() > 0 and smoothed.max() > 2 * smoothed.min():
        axes.set_yscale("log")
        within_a_decade = losses.max() < 10 * losses.min()
        _plain_log(axes.yaxis, (1, 2, 3, 4, 6, 8) if within_a_decade else (1, 2, 5))
    axes.set_xlim(float(steps[0]), float(steps[-1]) if len(steps) > 1 else float(steps[0]) + 1)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    _legend(axes)
    numbers: dict[str, Any] = {"steps": len(losses), "window": window, "edge": edge}
    numbers |= {"first": float(losses[:edge].mean()), "last": float(losses[-edge:].mean())}
    return numbers, _svg(figure, "loss curve")


def terms(splits: Mapping[str, Bound], process: Process) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """Matching terms against t, in at most 80 groups of neighbouring steps, and their sum from noise to data.

    Args:
        splits: a bound for each split, on the same steps.
        process: their process.

    Returns:
        The numbers of both plots and the plots; None and none for a chain of one step, which has no such terms.
    """
    times = next(iter(splits.values())).times
    rows = len(times) - 1
    if rows < 1:
        return None, {}
    groups = np.array_split(np.arange(rows), min(80, rows))
    t = np.array([float(times[group + 1].mean()) for group in groups])
    log_snr = process.log_snr(times).numpy()  # falls from the least noise to the most
    shown = np.unique(np.searchsorted(-log_snr, -np.linspace(log_snr[0], log_snr[-1], 200)).clip(0, rows))
    numbers: dict[str, Any] = {"t": t, "log_snr": log_snr[shown]}
    left, each_step = _plot(HALF, "bits/dim for one step of the chain", "time t (0: data, 1: noise)")
    right, so_far = _plot(HALF, "bits/dim spent so far, from noise to data", "log signal-to-noise ratio")
    for (split, bound), colour in zip(splits.items(), (FIRST, SECOND), strict=False):
        matching = bound.matching.numpy() / (np.log(2) * bound.dimensions)
        each = np.stack([matching[group].mean(0) for group in groups])  # (groups, examples)
        mean, error = each.mean(1), each.std(1, ddof=min(1, each.shape[1] - 1)) / np.sqrt(each.shape[1])
        spent = (bound.bits_per_dim().prior + np.append(np.cumsum(matching.mean(1)[::-1])[::-1], 0.0))[shown]
        name = {"held_out": "held-out", "train": "training"}.get(split, split)
        each_step.fill_between(t, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
        each_step.plot(t, mean, color=colour, linewidth=1.6, label=name)
        so_far.plot(log_snr[shown], spent, color=colour, linewidth=1.6, label=name)
        numbers |= {split: mean, f"{split}_error": error, f"{split}_sum": spent}
    each_step.set_xlim(0, 1)
    for axes in (each_step, so_far):
        axes.set_ylim(bottom=0)
        _legend(axes)
    plots = {"terms": _svg(left, "matching terms against time"), "running": _svg(right, "bound from noise to data")}
    return numbers, plots


@dataclass(frozen=True)
class Panel:
    """One measure of a sweep and how to draw it.

    Args:
        key: its name in the numbers.
        title: what the page calls it.
        error: the name of its standard error in the numbers, if it has one.
        share: whether it is a share, to be drawn in per cent.
        beside: the name in the numbers of a second measure to draw with it, where it is there, and what to call that.
        from_zero: whether its axis begins there.
    """

    key: str
    title: str
    error: str | None = None
    share: bool = False
    beside: tuple[str, str] | None = None
    from_zero: bool = True


def sweep_plot(
    panel: Panel,
    name: str,
    settings: Sequence[float],
    points: Sequence[Mapping[str, Any]],
    real: float,
    log: bool,
    legend: tuple[str, str] = ("samples", "real images"),
    size: tuple[float, float] = HALF,
    named: bool = True,
) -> str:
    """A measure against a setting of the sampler, with the value of real held-out images as a dashed line.

    Args:
        legend: other names of the two.
        named: the axis says every setting.
    """
    from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

    figure, axes = _plot(size, panel.title, name)
    values = [point[panel.key] for point in points]
    errors = [point[panel.error] for point in points] if panel.error else None
    axes.errorbar(
        settings, values, errors, color=FIRST, linewidth=1.6, marker="o", markersize=4, elinewidth=1, label=legend[0]
    )
    if panel.beside and points[0].get(panel.beside[0]) is not None:
        key, title = panel.beside
        axes.plot(settings, [p[key] for p in points], color=SOFT, linewidth=1.2, marker="s", markersize=3, label=title)
    axes.axhline(real, color=SECOND, linewidth=1.3, linestyle=(0, (4, 3)), label=legend[1])
    if log:
        axes.set_xscale("log")
    if named:
        axes.set_xticks(list(settings))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    if panel.share:
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    elif min(*values, real) > 0 and max(values) > 8 * min(values):
        axes.set_yscale("log")
        _plain_log(axes.yaxis, (1, 2, 5))
    elif panel.from_zero:
        axes.set_ylim(bottom=0)
    else:
        axes.margins(y=0.12)
    _legend(axes)
    return _svg(figure, f"{panel.title} against {name}")


def bars(layers: Sequence[np.ndarray], names: Sequence[str], threshold: float) -> str:
    """The variances of the latents of each layer, largest first, on a log scale, with the threshold of use."""
    figure, axes = _plot(WIDE, "variance of the posterior mean over held-out images", "latent, the most used first")
    colours = (FIRST, SECOND, SOFT, INK)
    for i, (values, name) in enumerate(zip(layers, names, strict=True)):
        place = np.arange(1, len(values) + 1)
        axes.plot(place, values.clip(1e-6), color=colours[i % 4], marker="o", markersize=3, linewidth=1, label=name)
    axes.axhline(threshold, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="in use above")
    axes.set_yscale("log")
    _legend(axes)
    return _svg(figure, "variance of each latent")


def distances_plot(samples: np.ndarray, held_out: np.ndarray) -> str:
    """How far samples, and held-out images, lie from their nearest training image: two histograms and their medians."""
    from matplotlib.ticker import PercentFormatter

    figure, axes = _plot(WIDE, "share of images", "distance to the nearest training image")
    bins = np.linspace(0, 1.02 * max(samples.max(), held_out.max(), 1e-9), 45)
    for name, values, colour in (("samples", samples, FIRST), ("real held-out images", held_out, SECOND)):
        weights = np.full(len(values), 1 / len(values))
        axes.hist(values, bins, weights=weights, color=colour, alpha=0.22)
        axes.hist(values, bins, weights=weights, histtype="step", color=colour, linewidth=1.4, label=name)
        axes.axvline(float(np.median(values)), color=colour, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.plot([], [], color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)), label="median")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.set_xlim(0, float(bins[-1]))
    _legend(axes)
    return _svg(figure, "distance to the nearest training image")


# -- plots of texts ----------------------------------------------------------------------------------------------------


def code_lengths(bars: Sequence[tuple[str, float, float | None]], unit: str) -> str:
    """What a text takes by each model, as bars from above to below; those with an error are this model's.

    Args:
        bars: name, mean and standard error of each.
        unit: of the means, in words.
    """
    figure, axes = _plot((WIDE[0], 0.34 * len(bars) + 1.0), f"{unit}, fewer is better", "")
    for place, (name, mean, error) in enumerate(bars):
        colour = SOFT if error is None else FIRST if "held out" in name else SECOND
        axes.barh(place, mean, 0.62, xerr=error, color=colour, alpha=0.75, error_kw={"ecolor": INK, "elinewidth": 1})
        beside = mean + (error or 0.0)
        axes.annotate(f"{mean:.1f}", (beside, place), (5, 0), textcoords="offset points", fontsize=8, va="center")
        axes.texts[-1].set_color(INK)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlim(0, 1.08 * max(mean + (error or 0.0) for _, mean, error in bars))
    return _svg(figure, "nats of a text by each model")


def tradeoff(points: Sequence[Mapping[str, Any]], real: Mapping[str, Any], order: int) -> str:
    """Agreement with the class against perplexity: one line for each nucleus, guidance along it, real texts a star."""
    from matplotlib.ticker import PercentFormatter

    figure, axes = _plot(WIDE, "judged as the class asked for", f"perplexity, by {order}-grams of real texts")
    nuclei = sorted({point["nucleus"] for point in points}, reverse=True)
    for nucleus, colour, below in zip(nuclei, (FIRST, SECOND, SOFT), (-9, 5, -16), strict=False):
        own = [point for point in points if point["nucleus"] == nucleus]
        x, y = [point["perplexity"] for point in own], [point["agreement"] for point in own]
        errors = [point["agreement_error"] for point in own]
        name = "all tokens" if nucleus == 1 else f"nucleus {nucleus:g}"
        axes.errorbar(x, y, errors, color=colour, linewidth=1.4, marker="o", markersize=4, elinewidth=1, label=name)
        for point in own:
            place = (point["perplexity"], point["agreement"])
            axes.annotate(f"w = {point['guidance']:g}", place, (5, below), textcoords="offset points", fontsize=7)
            axes.texts[-1].set_color(SOFT)
    star = {"color": INK, "marker": "*", "markersize": 11, "linestyle": "none", "label": "real held-out texts"}
    axes.plot([real["perplexity"]], [real["agreement"]], **star)
    axes.set_xscale("log")
    found = [point["perplexity"] for point in (*points, real)]
    _plain_log(axes.xaxis, (1, 2, 5) if max(found) < 200 * min(found) else (1,))
    axes.set_xlim(min(found) / 1.15, max(found) * 1.25)
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    _legend(axes)
    return _svg(figure, "agreement against perplexity")


def rules_plot(panel: Panel, name: str, rules: Sequence[Mapping[str, Any]], real: float) -> str:
    """A measure against the number of steps, a line for each rule, with real texts dashed."""
    from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

    figure, axes = _plot(HALF, panel.title, name)
    settings = [point["steps"] for point in rules[0]["points"]]
    values = []
    for rule, colour in zip(rules, (FIRST, INK, SOFT), strict=False):
        own = [point[panel.key] for point in rule["points"]]
        errors = [point[panel.error] for point in rule["points"]] if panel.error else None
        style = {"linewidth": 1.6, "marker": "o", "markersize": 4, "elinewidth": 1}
        axes.errorbar(settings, own, errors, color=colour, label=rule["rule"], **style)
        values += own
    axes.axhline(real, color=SECOND, linewidth=1.3, linestyle=(0, (4, 3)), label="real texts")
    axes.set_xscale("log")
    axes.set_xticks(settings)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    if panel.share:
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    else:
        axes.set_yscale("log")
        _plain_log(axes.yaxis, (1, 2, 5))
        axes.set_ylim(min(*values, real) / 1.3, max(*values, real) * 1.3)
    _legend(axes)
    return _svg(figure, f"{panel.title} against {name}")


def lengths_plot(samples: np.ndarray, held_out: np.ndarray) -> str:
    """The share of texts of each length, from 0: samples and real held-out ones."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, axes = _plot(WIDE, "share of texts", "tokens of a text")
    edges = np.arange(len(samples) + 1) - 0.5
    for name, shares, colour in (("samples", samples, FIRST), ("real held-out texts", held_out, SECOND)):
        axes.stairs(shares, edges, color=colour, fill=True, alpha=0.22)
        axes.stairs(shares, edges, color=colour, linewidth=1.4, label=name)
        mean = float((np.arange(len(shares)) * shares).sum())
        axes.axvline(mean, color=colour, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.plot([], [], color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)), label="mean")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0.4, float(edges[-1]) + 0.1)
    axes.set_ylim(bottom=0)
    _legend(axes)
    return _svg(figure, "lengths of texts")


# -- plots of speech ---------------------------------------------------------------------------------------------------


def alignment(
    spectrogram: Image.Image,
    symbols: Sequence[str],
    paths: Mapping[str, Sequence[int]],
    parts: Sequence[int],
    name: str,
) -> str:
    """When each symbol of a text is said: downwards the symbols, to the right the frames, under a spectrogram of them.

    Args:
        spectrogram: one pixel for each number.
        symbols: what each is called.
        paths: how many frames each symbol lasts, for each path by its name; the second one is dashed.
        parts: symbols at whose beginning a faint line is drawn, by the first path.
        name: of the figure, in letters, digits and spaces.
    """
    from matplotlib.figure import Figure

    ratios = (0.95, 0.14 * len(symbols))
    figure = Figure(figsize=(WIDE[0], sum(ratios) + 1.1), layout="constrained")
    above, axes = figure.subplots(2, 1, sharex=True, height_ratios=ratios)
    axes.set_zorder(1)  # its legend stands between the two
    above.imshow(
        np.asarray(spectrogram), extent=(0, spectrogram.width, 0, 1), aspect="auto", interpolation="none", zorder=1
    )
    above.set_axis_off()
    _plain_axes(axes, "", "frame")
    places = np.arange(len(symbols))
    for (title, lasting), colour, style in zip(paths.items(), (FIRST, SECOND), ("-", (0, (3, 2))), strict=False):
        ends = np.concatenate([[0], np.cumsum(lasting)])
        along, down = ends.repeat(2)[1:-1], places.repeat(2)
        axes.plot(along, down, color=colour, linewidth=1.7, linestyle=style, label=title)
    begins = np.concatenate([[0], np.cumsum(next(iter(paths.values())))])[list(parts)]
    for x in begins:
        above.axvline(float(x), color="#ffffff", alpha=0.55, linewidth=0.8)
        axes.axvline(float(x), color=LINE, linewidth=0.7, zorder=0)
    axes.set_yticks(places, list(symbols), fontsize=7)
    axes.set_ylim(len(symbols) - 0.4, -0.6)
    axes.set_xlim(0, max(spectrogram.width, *(sum(lasting) for lasting in paths.values())))
    _legend(axes)
    return _svg(figure, name)
