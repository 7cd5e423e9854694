"""What the benchmarks do with their figures: name the run, show them as ratios with their spread, and draw them."""

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from hf_attnswap.report.drawing import GRID, Picture, fix_ticks, ticks
from hf_attnswap.statistics import Spread, crossover
from hf_attnswap.tradeoff import machine, now, versions

Record = dict[str, Any]


def heading(argv: Sequence[str] | None, **settings: Any) -> Record:
    """Return machine, date, versions and command of a run."""
    return {
        "date": now(),
        "machine": asdict(machine(torch.device("cpu"))),
        "versions": versions(),
        "command": command(argv),
        "spread": "median, low and high: median and quartiles over the rounds",
        **settings,
    }


def command(argv: Sequence[str] | None) -> str:
    """Return the command of this run, without the folders that files lie in here."""
    words = argv
    if words is None:
        script = Path(sys.argv[0]).resolve().relative_to(Path(__file__).parents[1])
        words = ["python", str(script), *sys.argv[1:]]
    return shlex.join(named(word) for word in words)


def named(word: str) -> str:
    """Return a path of this machine as its last part, and anything else as it is."""
    return Path(word).name if Path(word).is_absolute() else word


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def spread(found: Record | None) -> str:
    """Return a cell of a table: the median, and below it the quartiles, where the rounds are enough for them."""
    return "" if found is None else str(Spread(**found)).replace(" (", "\n(", 1)


def quartiles(values: Sequence[float]) -> Record:
    return Spread.quartiles(values).as_dict()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    table = Table(title=title, caption=caption, show_lines=True, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=not index)
    for row in rows:
        table.add_row(*row)
    # A file has no width of its own; a table of nine lengths needs this much.
    Console(width=None if sys.stdout.isatty() else 40 + 17 * len(columns)).print(table)


def draw(panels: dict[str, dict[str, list[Record]]], ylabel: str) -> bytes:
    """A PNG: a panel per title with a line per name, speed-up against length, its quartiles and its crossover.

    Args:
        panels: for each title and name the points, `{"length": n, "ratio": {"median", "low", "high"}}`.
    """
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.2 * columns, 4 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        axis.set(title=title, xscale="log", yscale="log", xlabel="tokens", ylabel=ylabel)
        axis.grid(**GRID)
        axis.axhline(1, color="black", linewidth=0.8)
        for name, points in lines.items():
            lengths, ratios = [p["length"] for p in points], [p["ratio"] for p in points]
            color = f"C{names.index(name)}"
            low, high = ([r[key] for r in ratios] for key in ("low", "high"))
            axis.plot(lengths, [r["median"] for r in ratios], ".-", color=color, label=name, linewidth=1.2)
            axis.fill_between(lengths, low, high, color=color, alpha=0.2, linewidth=0)
            crossed = crossover([(n, r["median"]) for n, r in zip(lengths, ratios, strict=True)])
            if crossed is not None and crossed > lengths[0]:
                axis.plot([crossed], [1], "o", color=color, markersize=6, fillstyle="none")
        everything = [p for points in lines.values() for p in points]
        found = sorted({p["length"] for p in everything})
        if found:
            fix_ticks(axis.xaxis, found)
            low, high = (f(p["ratio"][k] for p in everything) for f, k in ((min, "low"), (max, "high")))
            ticks(axis.yaxis, min(low, 1), max(high, 1), 9)
        axis.tick_params(axis="x", labelsize=7, rotation=45)
    for axis in list(axes)[len(panels) :]:
        axis.set_axis_off()
    by_name = {t: h for axis in figure.axes for h, t in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(by_name.values(), by_name.keys(), loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return Picture("speed", ylabel, "", figure).png
