"""Share between plots the picture with its words, the limits of ratios, and plain ticks."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from math import ceil, floor, log10
from typing import Any

import matplotlib
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from .text import plain
from .types import Comparison

DPI = 150
CLIP = 30.0  # Drawn to scale, a ratio of 1e10 would press all the others into one line.
INK = "#222222"
GRID = {"color": "#DDDDDD", "linewidth": 0.6}


@dataclass(frozen=True)
class Picture:
    """Hold a plot, the name of its files without the ending, and the words that go with the plot.

    The same plot makes the same bytes, on white, which a dark page does not swallow.
    """

    name: str
    title: str
    caption: str
    figure: Figure

    @cached_property
    def png(self) -> bytes:
        """Return the plot as PNG."""
        return self._render("png")

    @cached_property
    def svg(self) -> bytes:
        """Return the plot as SVG, without a date and with fixed ids."""
        return self._render("svg", metadata={"Date": None})

    def _render(self, kind: str, **options: Any) -> bytes:
        stream = BytesIO()
        with matplotlib.rc_context({"svg.hashsalt": "hf_attnswap"}):  # else its ids are random
            self.figure.savefig(stream, format=kind, dpi=DPI, facecolor="white", **options)
        return stream.getvalue()


def literal(value: object) -> str:
    """Return `value` as `plain` does, for plots: matplotlib reads what stands between two $ as mathematics."""
    return plain(value).replace("$", r"\$")


def bounds(value: Comparison) -> tuple[float, float]:
    """Return the interval of a ratio; the ratio itself as both bounds where it has none."""
    return (value.value, value.value) if value.low is None or value.high is None else (value.low, value.high)


def ticks(axis: Axis, low: float, high: float, most: int) -> None:
    """Put round ticks, `most` at most, on a logarithmic axis from `low` to `high`, as plain numbers."""
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    for steps in ((1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        found = [round(step * 10.0**power, 9) for power in powers for step in steps]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) >= 5:
            break
    if len(found) < 4:
        found = [tick for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]
    fix_ticks(axis, found[:: ceil(len(found) / most) or 1])


def fix_ticks(axis: Axis, places: Sequence[float]) -> None:
    """Put ticks at `places` and nowhere else."""
    axis.set_major_locator(FixedLocator(list(places)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FixedFormatter([f"{place:g}" for place in places]))
