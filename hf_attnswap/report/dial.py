"""Draw the plot `dial`: perplexity against the power p of relu_power, the dial between ReLU and softmax."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import facts
from .drawing import CLIP, GRID, INK, Picture, bounds, fix_ticks, literal, ticks
from .text import count, listing, plain, times
from .types import Comparison, Report

_STYLES = [("#0072B2", "o", "-"), ("#D55E00", "s", "--"), ("#009E73", "D", "-."), ("#CC79A7", "v", ":")]


def dial(report: Report) -> Picture:
    """Draw the plot; `facts.dial(report)` must not be empty."""
    context = facts.headline_context(report)
    groups = facts.dial(report)
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for index, (shared, arms) in enumerate(groups):
        points = [(arm.options["p"], facts.ratio(report, arm, context)) for arm in arms]
        _line(axes, points, _STYLES[index % len(_STYLES)], _differing(shared, groups))
    every = [arm for _, arms in groups for arm in arms]
    _axes(axes, sorted({arm.options["p"] for arm in every}), [facts.ratio(report, arm, context) for arm in every])
    axes.set_ylabel(f"perplexity / softmax's, context {count(context)}")
    if len(groups) > 1:
        axes.legend(frameon=False, fontsize=9)
    caption = f"Perplexity over softmax's at context {count(context)} for relu_power by its power p; "
    caption += "vertical bars are 95 % intervals."
    over = [(plain(arm.label), facts.ratio(report, arm, context).value) for arm in every]
    over = [f"{label} ({times(value)})" for label, value in over if value > CLIP]
    if over:
        caption += f" Clipped at {times(CLIP)}, drawn as hollow triangles: {listing(over)}."
    return Picture("dial", "The dial between ReLU and softmax", caption, figure)


def _line(axes: Axes, points: Sequence[tuple[float, Comparison]], style: tuple[str, str, str], name: str) -> None:
    colour, marker, line = style
    axes.plot(
        [p for p, _ in points],
        [min(value.value, CLIP) for _, value in points],
        line,
        color=colour,
        linewidth=1.3,
        label=name,
    )
    for p, value in points:
        height = min(value.value, CLIP)
        axes.vlines(p, *(min(bound, CLIP) for bound in bounds(value)), color=colour, linewidth=1.6)
        if value.value > CLIP:
            axes.plot(p, height, "^", color=colour, markersize=10, markerfacecolor="white", zorder=4)
        else:
            axes.plot(p, height, marker, color=colour)
        axes.annotate(times(value.value), (p, height), (5, 7), textcoords="offset points", fontsize=8.5, color=colour)


def _axes(axes: Axes, powers: Sequence[float], values: Sequence[Comparison]) -> None:
    axes.axhline(1, color=INK, linewidth=1)
    axes.text(0.01, 1, "softmax", transform=axes.get_yaxis_transform(), va="bottom", fontsize=8.5)
    axes.set_xlim(powers[0] / 1.25, powers[-1] * 1.45)
    fix_ticks(axes.xaxis, powers)
    low = min(1.0, *(min(bounds(value)[0], CLIP) for value in values)) / 1.06
    high = max(1.0, *(min(bounds(value)[1], CLIP) for value in values)) * 1.2
    axes.set_ylim(low, high)
    ticks(axes.yaxis, low, high, most=10)
    axes.grid(True, **GRID)
    axes.set_xlabel("p in relu(1 + (s - c)/p)^p; softmax is its limit for large p (log2 axis)")


def _differing(shared: dict[str, Any], groups: Sequence[tuple[dict[str, Any], Any]]) -> str:
    """Return what sets one group apart from the other groups."""
    keys = [key for key in shared if any(other.get(key) != shared[key] for other, _ in groups)]
    return ", ".join(literal(f"{key}={shared[key]}") for key in keys) or "the other"
