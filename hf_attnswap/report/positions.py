"""Draw the plot `positions`: log-likelihood by position in the context, what each arm makes of a longer past."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from . import facts
from .drawing import GRID, INK, Picture, fix_ticks, literal
from .text import count, listing, plain
from .types import Arm, Range, Report

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6B6B6B", "#A6761D"]
LINES = ["-", "--", "-.", ":"]
ROOM = 4.0  # nats above softmax's lowest; what is worse everywhere is named, not drawn


def positions(report: Report) -> Picture:
    """Draw the plot; `facts.with_positions(report)` must not be empty."""
    context = facts.positions_context(report)
    every = facts.with_positions(report)
    softmax = facts.reference(report)
    floor = min(point.nll for point in _points(softmax if softmax in every else every[0], context))
    drawn = [arm for arm in every if min(point.nll for point in _points(arm, context)) < floor + ROOM]
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for index, arm in enumerate(drawn):
        own = arm is softmax
        points = _points(arm, context)
        axes.plot(
            [(point.first * point.last) ** 0.5 for point in points],
            [point.nll for point in points],
            LINES[index // len(COLOURS) % len(LINES)],
            color=INK if own else COLOURS[index % len(COLOURS)],
            linewidth=2.2 if own else 1.3,
            marker="." if arm.control else None,
            label=literal(arm.label),
        )
    axes.set_xscale("log", base=2)
    highest = max(point.nll for arm in drawn for point in _points(arm, context))
    axes.set_ylim(floor - 0.3, min(highest + 0.3, floor + ROOM + 1))
    fix_ticks(axes.xaxis, [point.first for point in _points(drawn[0], context)])
    axes.grid(True, **GRID)
    axes.set_xlabel("position in the context (tokens, log2 axis)")
    axes.set_ylabel("negative log-likelihood per token (nats)")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return Picture("positions", "Likelihood by position", _caption(context, every, drawn), figure)


def _points(arm: Arm, context: int | None) -> list[Range]:
    return facts.perplexity_at(arm, context).by_position


def _caption(context: int | None, every: Sequence[Arm], drawn: Sequence[Arm]) -> str:
    said = (
        f"Means over ranges of positions that double, in contexts of {count(context)} tokens: a curve that falls as "
        "softmax's does makes as much of a longer past. Dots mark controls."
    )
    absent = [plain(arm.label) for arm in every if arm not in drawn]
    return said + (f" Not drawn, more than {ROOM:g} nats worse everywhere: {listing(absent)}." if absent else "")
