"""Make the tables of a report: which columns each has, and what a column shows.

What nothing was measured for is left out. A new column is a field in types.py, filled where it is measured, and a
`Column` here.
"""

import json
from collections.abc import Callable
from functools import partial

from ..statistics import MIN_ITEMS, MIN_LENGTHS, MIN_ROUNDS, Growth, Spread, lacking
from . import beside, facts
from .table import NOISE, Column, Table, name
from .text import count, difference, interval, number, plain, seconds
from .types import Arm, Comparison, Metric, Report, Speed

UNMEASURED = "not measured"
QUALITY = "Quality"
UNIT = "Perplexity by token, word and byte"
METRICS = "Tasks: value, and difference from softmax (95 %)"
SPEED = "Speed and memory"
ARMS = "Arms"
GROWTH = "Growth of the time with the length n"
LAYERS = "Layers by damage"
CURVES = "Perplexity on the validation text of the runs"
UNITS = {"token": "perplexity", "word": "word_perplexity", "byte": "byte_perplexity"}
# A time or speed, its speed-up over softmax, the titles of both, and how the first is shown.
SPEEDS: tuple[tuple[str, str, tuple[str, str], Callable[[float], str]], ...] = (
    ("prefill_s", "prefill_speedup", ("prefill", "prefill speed-up"), seconds),
    ("forward_s", "forward_speedup", ("forward pass", "speed-up"), seconds),
    ("decode_tokens_per_s", "decode_speedup", ("decode tokens/s", "decode speed-up"), number),
    ("train_s", "train_speedup", ("training step", "training speed-up"), seconds),
)


def tables(report: Report) -> list[Table]:
    """Return all tables that have a row, in the order of the page."""
    made = [quality(report), units(report), metrics(report), curves(report), speed(report), growth(report)]
    return [table for table in [*made, layers(report)] if table.rows]


def quality(report: Report) -> Table:
    """Return the table of quality: one row per arm, whatever its status."""
    contexts = facts.contexts(report)
    trained = [arm.training_tokens for arm in report.arms]
    ratio = "ratio to softmax" if report.kind == "tradeoff" else "ratio to its control"
    columns = [
        Column("arm", name),
        Column("cost", _cost),
        Column("new parameters", lambda arm: count(arm.new_parameters)),
        *([Column("training tokens", lambda arm: count(arm.training_tokens))] if contexts or any(trained) else []),
        *(
            [Column("minutes", lambda arm: number((arm.training_seconds or 0) / 60))]
            if report.kind == "quality"
            else []
        ),
        *(
            Column(f"perplexity at {count(context)} ({ratio}, 95 %)", partial(perplexity, report, context=context))
            for context in contexts
        ),
        *(
            [Column("its control", _control), Column("over window (95 %)", _over_window)]
            if report.kind == "quality"
            else []
        ),
        *(
            [Column("over the better control of equal state or time (95 %)", partial(_over_control, report))]
            if any(arm.controls for arm in report.arms)
            else []
        ),
        Column("status", _status),
    ]
    return Table.of(QUALITY, columns, report.arms, [_few_items(report, "perplexity"), beside.note(report)])


def units(report: Report) -> Table:
    """Return the table of perplexity by word and byte beside that by token, for the arms that have them.

    Perplexity by word and byte compares with that of other tokenizers; words are what white space separates.
    """

    def cell(arm: Arm, context: int, key: str) -> str:
        entry = facts.perplexity_at(arm, context)
        value = entry and getattr(entry, key)
        return number(value) if value else UNMEASURED

    columns = [Column("arm", name)]
    for context in facts.contexts(report):
        columns += [
            Column(f"per {unit} at {count(context)}", partial(cell, context=context, key=key))
            for unit, key in UNITS.items()
        ]
    rows = [arm for arm in report.arms if any(entry.byte_perplexity for entry in arm.perplexity)]
    return Table.of(UNIT, columns, rows)


def metrics(report: Report) -> Table:
    """Return the table of metrics of tasks: one row per arm that has any, one column per metric.

    Two more columns per metric show its values by seed and its share of softmax, where there are any.
    """
    columns = [Column("arm", name)]
    for metric in facts.metrics(report):
        entries = [entry for arm in report.arms if (entry := facts.metric_of(arm, metric))]
        title = plain(f"{metric.task}: {metric.metric}")
        columns.append(Column(metric_title(metric), partial(metric_cell, report, like=metric)))
        if any(len(entry.by_seed) > 1 for entry in entries):
            columns.append(Column(f"{title}, of each seed", partial(_by_seed, like=metric)))
        if any(entry.ratio for entry in entries):
            columns.append(Column(f"{title}, share of softmax's (95 %)", partial(_share, like=metric)))
    rows = [arm for arm in report.arms if arm.metrics]
    return Table.of(METRICS, columns, rows, [_few_items(report, "metrics")])


def metric_title(metric: Metric) -> str:
    """Return the title of the column of a metric: "needle at 512: found (20 items)"."""
    worse = "" if metric.higher_is_better else ", lower is better"
    return plain(f"{metric.task}: {metric.metric}{worse} ({count(metric.items)} items)")


def metric_cell(report: Report, arm: Arm, like: Metric) -> str:
    """Return value and interval of a metric of `arm`, and the difference to softmax with its interval."""
    entry = facts.metric_of(arm, like)
    if entry is None:
        return UNMEASURED
    if entry.value is None:
        return "not finite"
    value = number(entry.value)
    value += f" ({number(entry.low)} to {number(entry.high)})" if entry.low is not None else ""
    if arm is facts.reference(report):
        return value if entry.low is not None else f"{value} (reference)"
    compared = facts.difference(report, arm, entry)
    return f"{value}; {difference(compared)}{beside.mark(report, arm)}" if compared else f"{value} (no interval)"


def _by_seed(arm: Arm, like: Metric) -> str:
    entry = facts.metric_of(arm, like)
    return ", ".join(map(number, entry.by_seed)) if entry else UNMEASURED


def _share(arm: Arm, like: Metric) -> str:
    entry = facts.metric_of(arm, like)
    return interval(entry.ratio) if entry and entry.ratio else "-"


def curves(report: Report) -> Table:
    """Return the table of perplexity during training, for the arms that have such a curve."""
    columns = [
        Column("arm", name),
        Column("on its way", lambda arm: "; ".join(f"{count(p.tokens)}: {number(p.perplexity)}" for p in arm.curve)),
    ]
    return Table.of(CURVES, columns, [arm for arm in report.arms if arm.curve])


def speed(report: Report) -> Table:
    """Return the table of speed: one row per length and arm; arms without any speed come last."""
    rows: list[tuple[int | None, Arm]] = [
        (length, arm) for length in facts.lengths(report) for arm in report.arms if arm.speed
    ]
    rows += [(None, arm) for arm in report.arms if not arm.speed] if rows else []
    columns = [
        Column("length", lambda row: "-" if row[0] is None else count(row[0])),
        Column("arm", lambda row: name(row[1])),
    ]
    every = [entry for arm in report.arms for entry in arm.speed]
    for key, speedup, titles, show in speeds(report):
        columns.append(Column(titles[0], partial(_speed, key=key, show=show)))
        columns.append(Column(titles[1], partial(_speedup, report, key=key, speedup=speedup)))
    for key, title in (("peak_memory_mib", "peak memory MiB"), ("cache_mib", "cache MiB")):
        if key == "peak_memory_mib" or any(getattr(entry, key) is not None for entry in every):
            columns.append(Column(title, partial(_memory, key=key)))
    columns.append(Column("note", _note))
    return Table.of(SPEED, columns, rows, _speed_notes(report))


def speeds(report: Report) -> list[tuple[str, str, tuple[str, str], Callable[[float], str]]]:
    """Return the entries of `SPEEDS` that were measured for any arm."""
    every = [entry for arm in report.arms for entry in arm.speed]
    return [entry for entry in SPEEDS if any(getattr(speed, entry[0]) for speed in every)]


def _speed_at(row: tuple[int | None, Arm]) -> Speed | None:
    return None if row[0] is None else facts.speed_at(row[1], row[0])


def _speed(row: tuple[int | None, Arm], key: str, show: Callable[[float], str]) -> str:
    spread: Spread | None = getattr(_speed_at(row), key, None)
    return show(spread.median) if spread else UNMEASURED


def _speedup(report: Report, row: tuple[int, Arm], key: str, speedup: str) -> str:
    entry = _speed_at(row)
    spread: Spread | None = getattr(entry, speedup, None)
    if spread:
        return interval(spread) + (NOISE if facts.is_noise(report, row[1], speedup, row[0]) else "")
    reference = row[1] is facts.reference(report) and getattr(entry, key, None)
    return "reference" if reference else UNMEASURED


def _memory(row: tuple[int | None, Arm], key: str) -> str:
    value = getattr(_speed_at(row), key, None)
    return UNMEASURED if value is None else number(value)


def _note(row: tuple[int | None, Arm]) -> str:
    entry, arm = _speed_at(row), row[1]
    if entry:
        return plain(entry.note or "")
    return "" if arm.status == "measured" or row[0] is not None else _status(arm)


def _speed_notes(report: Report) -> list[str]:
    """Return notes on what is marked as noise, and on what few rounds and lengths do not allow to say."""
    notes, every = [], [entry for arm in report.arms for entry in arm.speed]
    keys = [speedup for _, speedup, _, _ in speeds(report)]
    if any(
        facts.is_noise(report, arm, key, entry.length) for arm in report.arms for entry in arm.speed for key in keys
    ):
        notes.append(f"{NOISE} faster than without any attention at all, which no attention can be: noise.")
    few = facts.few_rounds([getattr(entry, key) for entry in every for key in keys])
    if few:
        notes.append(f"No ranges: {lacking('a range', MIN_ROUNDS, 'rounds', few[-1])}.")
    lengths = facts.lengths(report)
    if 1 < len(lengths) < MIN_LENGTHS:
        notes.append(f"No growth with the length: {lacking('an exponent', MIN_LENGTHS, 'lengths', len(lengths))}.")
    return notes


def growth(report: Report) -> Table:
    """Return the table of the exponents of time by length, for the arms that have one."""
    shown = {"prefill_s": "prefill", "forward_s": "forward pass", "decode_s": "decoding a token"}
    shown |= {"train_s": "training step"}
    keys = [key for key in shown if any(key in arm.growth for arm in report.arms)]
    columns = [Column("arm", name)]
    columns += [Column(f"{shown[key]} (95 %)", lambda arm, key=key: _exponent(arm.growth.get(key))) for key in keys]
    return Table.of(GROWTH, columns, [arm for arm in report.arms if arm.growth])


def _exponent(growth: Growth | None) -> str:
    if growth is None:
        return UNMEASURED
    bounds = "" if growth.low is None else f" ({number(growth.low)} to {number(growth.high)})"
    return f"n^{number(growth.exponent)}{bounds}"


def layers(report: Report) -> Table:
    """Return the table of the layers of each arm with diagnostics, in the order of what each layer costs alone."""

    def half(arm: Arm) -> str:
        order = arm.diagnostics.layers_by_damage
        return ",".join(map(str, sorted(order[: (len(order) + 1) // 2])))

    columns = [
        Column("arm", name),
        Column("least damage first", lambda arm: ", ".join(map(str, arm.diagnostics.layers_by_damage))),
        Column("half of them, for --layers", half),
    ]
    rows = [arm for arm in facts.with_diagnostics(report) if arm.diagnostics.layers_by_damage]
    return Table.of(LAYERS, columns, rows)


def arms(report: Report) -> Table:
    """Return the table of what each arm computes: formula, options and source."""

    def options(arm: Arm) -> str:
        return plain(", ".join(f"{key}={json.dumps(value)}" for key, value in arm.options.items())) or "-"

    columns = [
        Column("arm", name),
        Column("formula", lambda arm: plain(arm.formula)),
        Column("options", options),
        Column("source", lambda arm: plain(arm.source)),
        *([Column("runs", _forms)] if any(arm.backends for arm in report.arms) else []),
    ]
    return Table.of(ARMS, columns, report.arms)


def _forms(arm: Arm) -> str:
    """Return which form of which op ran."""
    return plain(", ".join(f"{op}: {' and '.join(forms)}" for op, forms in sorted(arm.backends.items()))) or "-"


def perplexity(report: Report, arm: Arm, context: int | None) -> str:
    """Return the text for perplexity and its ratio to that of softmax."""
    entry = facts.perplexity_at(arm, context)
    if entry is None:
        return UNMEASURED
    if entry.perplexity is None:
        return "not finite"
    value = number(entry.perplexity)
    if arm is facts.reference(report):
        return f"{value} (reference)"
    ratio = beside.ratio(report, arm, context)
    return f"{value}; {ratio}" if ratio else f"{value} (no ratio)"


def _control(arm: Arm) -> str:
    ratios = [entry.ratio.arm for entry in arm.perplexity if entry.ratio]
    return plain(ratios[0]) if ratios else "-"


def _over_window(arm: Arm) -> str:
    compared = [other for entry in arm.perplexity for other in entry.against]
    return interval(compared[0]) if compared else "-"


def _over_control(report: Report, arm: Arm) -> str:
    best = facts.better_control(report, arm)
    return f"{interval(best[2])} of {plain(best[1].label)} (equal {best[0].equal})" if best else "-"


def _few_items(report: Report, what: str) -> str:
    """Return a note on what is missing where comparisons have no interval; empty where all have one."""
    key, unit = ("ratio", "blocks") if what == "perplexity" else ("difference", "items")
    compared: list[Comparison | None] = [getattr(e, key) for arm in report.arms for e in getattr(arm, what)]
    items = [value.items for value in compared if value and value.low is None and value.items < MIN_ITEMS]
    return f"No intervals: {lacking('an interval', MIN_ITEMS, unit, max(items))}." if items else ""


def _cost(arm: Arm) -> str:
    return f"{plain(arm.cost)} ({arm.cost_class})"


def _status(arm: Arm) -> str:
    return arm.status if arm.status == "measured" else f"{arm.status}: {plain(arm.reason)}"


def speedup_words(spread: Spread) -> str:
    """Return a speed-up as prose: "2.400 times as fast (runs 2.280 to 2.544)"."""
    runs = f" (runs {number(spread.low)} to {number(spread.high)})" if spread.enough else ""
    return f"{number(spread.median)} times as fast{runs}"
