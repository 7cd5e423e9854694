"""Draw the plot `tradeoff`: quality against speed, one row of points per arm, one point per length."""

from collections.abc import Sequence
from math import log2, log10

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..statistics import Spread
from . import beside, facts
from .drawing import CLIP, GRID, INK, Picture, bounds, literal, ticks
from .table import MARK
from .text import count, listing, plain, times
from .types import Arm, Comparison, Report

_CLASSES = {  # Okabe and Ito's colours, and shapes for those who see none of them
    "quadratic": ("#D55E00", "s"),
    "linear": ("#0072B2", "o"),
    "constant": ("#6B6B6B", "D"),
}
_SPEEDS = {"prefill_speedup": "prefill", "decode_speedup": "decoding", "train_speedup": "training step"}
_TITLE = "Quality against speed"
_STEP = 1.16  # from one row of the clipped band to the next


def tradeoff(report: Report) -> Picture:
    """Draw the plot; an empty one that says so where no arm has both a ratio and a speed-up."""
    context = facts.headline_context(report)
    arms = [arm for arm in report.arms if facts.ratio(report, arm, context) and arm.attention != "softmax"]
    arms = [arm for arm in arms if any(facts.real_speedups(report, arm, key) for key in _SPEEDS)]
    arms.sort(key=lambda arm: facts.ratio(report, arm, context).value)
    keys = [key for key in _SPEEDS if any(facts.real_speedups(report, arm, key) for arm in arms)]
    width = 10 if len(keys) < 3 else 13.5
    figure = Figure(figsize=(width, max(5.0, 2.2 + 0.27 * len(arms))))
    if not arms:
        words = "No arm has both a perplexity and a speed relative to softmax's."
        figure.text(0.5, 0.5, words, ha="center", fontsize=12)
        return Picture("tradeoff", _TITLE, words, figure)
    values = [facts.ratio(report, arm, context) for arm in arms]
    heights = _heights([value.value for value in values])
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    bottom = 1.05 / figure.get_figheight()
    figure.subplots_adjust(left=0.75 / width, right=1 - 2.65 / width, top=0.93, bottom=bottom, wspace=0.06)
    lengths = facts.lengths(report)
    for panel, key in zip(panels, keys, strict=True):
        for arm, value, height in zip(arms, values, heights, strict=True):
            _arm(panel, arm, value, height, facts.real_speedups(report, arm, key), lengths)
        height_of = {arm.label: height for arm, height in zip(arms, heights, strict=True)}
        front = [(speed, height_of.get(arm.label, 1.0)) for arm, speed in facts.pareto(report, key)]
        panel.plot(*zip(*front, strict=True), color=INK, linewidth=0.9, linestyle=":", zorder=1)
        _speed_axis(panel, [spread for arm in arms for _, spread in facts.real_speedups(report, arm, key)])
        panel.set_xlabel(f"{_SPEEDS[key]} speed / softmax's")
    _ratio_axis(panels, values, heights)
    panels[0].set_ylabel(f"perplexity / softmax's, context {count(context)}")
    _labels(panels[-1], arms, values, heights)
    _legend(figure, arms, lengths)
    return Picture("tradeoff", _TITLE, _caption(report, arms, context), figure)


def _heights(ratios: Sequence[float]) -> list[float]:
    """Return where each of the ascending ratios is drawn: at its value, or on a separate row above the clip."""
    inside = sum(ratio <= CLIP for ratio in ratios)
    return [*ratios[:inside], *(CLIP * _STEP ** (row + 1) for row in range(len(ratios) - inside))]


def _arm(axes: Axes, arm: Arm, value: Comparison, height: float, points: list, lengths: Sequence[int]) -> None:
    colour, marker = _CLASSES[arm.cost_class]
    medians = [spread.median for _, spread in points]
    if medians:
        axes.hlines(height, min(medians), max(medians), color=colour, linewidth=1.0, alpha=0.5, zorder=2)
        if value.value <= CLIP:
            low, high = bounds(value)
            axes.vlines(medians[-1], low, min(high, CLIP), color=colour, linewidth=1.4, zorder=2)
    for length, spread in reversed(points):  # the small marks over the large ones
        axes.hlines(height, spread.low, spread.high, color=colour, linewidth=2.2, alpha=0.4, zorder=2)
        axes.scatter(
            spread.median,
            height,
            s=_size(length, lengths),
            marker="^" if value.value > CLIP else marker,
            facecolor="white" if arm.control else colour,
            edgecolor=colour if arm.control else "white",
            linewidth=1.2 if arm.control else 0.5,
            zorder=3,
        )


def _size(length: int, lengths: Sequence[int]) -> float:
    """Return the area of a mark, which grows with the logarithm of the length."""
    span = log2(lengths[-1] / lengths[0]) or 1.0
    return 18 + 62 * log2(length / lengths[0]) / span


def _speed_axis(axes: Axes, spreads: Sequence[Spread]) -> None:
    axes.set_xscale("log")
    low = min(1.0, *(spread.low for spread in spreads)) / 1.08
    high = max(1.0, *(spread.high for spread in spreads)) * 1.08
    axes.set_xlim(low, high)
    ticks(axes.xaxis, low, high, most=8)
    axes.axvline(1, color=INK, linewidth=0.9, zorder=1)
    axes.grid(True, **GRID)
    axes.set_axisbelow(True)
    axes.set_title("slower than softmax", loc="left", fontsize=9, color="#555555")
    axes.set_title("faster", loc="right", fontsize=9, color="#555555")


def _ratio_axis(panels: Sequence[Axes], values: Sequence[Comparison], heights: Sequence[float]) -> None:
    low = min(1.0, *(min(bounds(value)[0], CLIP) for value in values)) / 1.06
    top = max(1.0, *(min(bounds(value)[1], CLIP) for value in values), *heights) * 1.08
    panels[0].set_yscale("log")
    if heights[-1] > CLIP:
        top *= _STEP
        words = f"clipped: above {CLIP:g}"
        panels[0].text(0.01, 0.99, words, transform=panels[0].transAxes, va="top", fontsize=8)
    panels[0].set_ylim(low, top)
    ticks(panels[0].yaxis, low, min(top, CLIP), most=10)
    for panel in panels:
        panel.axhline(1, color=INK, linewidth=0.9, zorder=1)
        panel.scatter(1, 1, marker="*", s=150, color=INK, zorder=4)
        if heights[-1] > CLIP:
            panel.axhspan(CLIP * _STEP**0.5, top, color="#EEEEEE", zorder=0)
    for panel in panels[1:]:
        panel.tick_params(axis="y", length=0)


def _labels(axes: Axes, arms: Sequence[Arm], values: Sequence[Comparison], heights: Sequence[float]) -> None:
    """Write labels to the right of the panel, moved apart, each tied to its height by a line."""
    entries = [("softmax", 1.0, INK)]
    for arm, value, height in zip(arms, values, heights, strict=True):
        label = plain(arm.label)
        label = label if len(label) <= 25 else f"{label[:24]}…"
        entries.append((f"{literal(label)} {times(value.value)}", height, _CLASSES[arm.cost_class][0]))
    entries.sort(key=lambda entry: entry[1])
    low, high = (log10(limit) for limit in axes.get_ylim())
    places = [(log10(height) - low) / (high - low) for _, height, _ in entries]
    gap = 0.19 / (axes.get_position().height * axes.figure.get_figheight())
    for (words, _, colour), at, to in zip(entries, places, _apart(places, gap), strict=True):
        style = {"transform": axes.transAxes, "color": colour}
        axes.add_line(Line2D([1.0, 1.04, 1.06], [at, to, to], linewidth=0.7, clip_on=False, **style))
        axes.text(1.07, to, words, va="center", fontsize=8.5, **style)


def _apart(places: Sequence[float], gap: float) -> list[float]:
    """Return the ascending places, moved until neighbours are `gap` apart: each crowd stays around its middle."""
    crowds: list[list[float]] = []  # [sum of its places, how many], spread evenly around the mean
    for place in places:
        crowds.append([place, 1])
        while len(crowds) > 1 and _edge(crowds[-2], gap, 1) > _edge(crowds[-1], gap, -1) - gap:
            total, number = crowds.pop()
            crowds[-1] = [crowds[-1][0] + total, crowds[-1][1] + number]
    return [_edge(crowd, gap, -1) + gap * index for crowd in crowds for index in range(int(crowd[1]))]


def _edge(crowd: list[float], gap: float, side: int) -> float:
    total, number = crowd
    return total / number + side * gap * (number - 1) / 2


def _legend(figure: Figure, arms: Sequence[Arm], lengths: Sequence[int]) -> None:
    used = {arm.cost_class for arm in arms}
    classes = [(name, *style) for name, style in _CLASSES.items() if name in used]
    marks = [_mark(marker, colour, colour, name) for name, colour, marker in classes]
    if any(arm.control for arm in arms):
        marks.append(_mark("o", "white", "#444444", "control (hollow)"))
    marks.append(_mark("*", INK, INK, "softmax", 12))
    shown = lengths if len(lengths) <= 3 else [lengths[0], lengths[len(lengths) // 2], lengths[-1]]
    for length in shown:
        size = _size(length, lengths) ** 0.5
        marks.append(_mark("o", "#BBBBBB", "#888888", f"{count(length)} tokens", size))
    style = {"fontsize": 8.5, "frameon": False, "handletextpad": 0.2, "columnspacing": 1.1}
    figure.legend(handles=marks, loc="lower left", bbox_to_anchor=(0.06, 0.0), ncols=len(marks), **style)


def _mark(marker: str, face: str, edge: str, label: str, size: float = 7) -> Line2D:
    style = {"markerfacecolor": face, "markeredgecolor": edge, "markersize": size}
    return Line2D([], [], linestyle="", marker=marker, label=label, **style)


def _caption(report: Report, arms: Sequence[Arm], context: int | None) -> str:
    said = [
        "One point per arm and length; right of the vertical line is faster than softmax, lower is better. "
        f"The height is the perplexity at context {count(context)} over softmax's, with its 95 % interval "
        "upright at the longest length; level bars span the runs. A larger mark is a longer text; hollow "
        "marks are controls. The dotted line joins the arms that no other is both better and faster than at the "
        "longest length (the Pareto front)."
    ]
    ratios = [(plain(arm.label), facts.ratio(report, arm, context).value) for arm in arms]
    clipped = [f"{label} ({times(ratio)})" for label, ratio in ratios if ratio > CLIP]
    if clipped:
        said.append(f"Clipped, drawn as triangles in the grey band above {CLIP:g}: {listing(clipped)}.")
    absent = [arm for arm in report.arms if arm not in arms and arm.attention != "softmax"]
    if absent:
        names = listing([plain(arm.label) for arm in absent])
        said.append(f"Not drawn, for want of a ratio or a speed-up: {names}.")
    noisy = {
        plain(arm.label): None
        for arm in report.arms
        for key in _SPEEDS
        if facts.speedups(arm, key) != facts.real_speedups(report, arm, key)
    }
    if noisy:
        said.append(f"Points left out as noise, faster than without any attention: {listing(list(noisy))}.")
    note = beside.note(report).removeprefix(f"{MARK} ")
    if note:
        said.append(f"Trained arms stand {note}, the others beside softmax.")
    return " ".join(said)
