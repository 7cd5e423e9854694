"""Show several reports side by side: one row per run and arm, and a refusal where a column would mix what differs."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from rich.console import Group
from rich.text import Text

from ..errors import UsageError
from . import facts, tables
from .table import Column, Table, name, terminal
from .text import count, interval, plain
from .types import Arm, Report

Row = tuple[str, Report, Arm]


def check_same(reports: Mapping[str, Report]) -> None:
    """Raise UsageError unless all reports were measured on the same data: a column of one metric would mix two things.

    A report without a fingerprint of its data goes by the name and the size of the data.
    """
    (first, start), *others = reports.items()
    for file, report in others:
        for key in ("evaluation", "evaluation_size", "unit", "fingerprint"):
            this, that = getattr(report.data, key), getattr(start.data, key)
            if this != that and None not in (this, that):
                raise UsageError(
                    f"{first} and {file} were measured on different data ({key} {that!r} and {this!r}), so their "
                    "metrics do not stand in one column: compare reports of the same data and tokenizer"
                )


def side_by_side(reports: Mapping[str, Report]) -> Table:
    """Return one table of all arms of all reports, a column per context, metric and length.

    What a run has not measured says so.

    Args:
        reports: by name of the run.

    Raises:
        UsageError: reports on different data.
    """
    check_same(reports)
    contexts = sorted({context for report in reports.values() for context in facts.contexts(report)})
    metrics = {(m.task, m.metric): m for report in reports.values() for m in facts.metrics(report)}
    lengths = sorted({length for report in reports.values() for length in facts.lengths(report)})
    rows: list[Row] = [(plain(file), report, arm) for file, report in reports.items() for arm in report.arms]
    columns = [
        Column("run", lambda row: row[0]),
        Column("arm", lambda row: name(row[2])),
        Column("training tokens", lambda row: count(row[2].training_tokens)),
    ]
    columns += [
        Column(f"perplexity at {count(context)} (ratio to softmax, 95 %)", partial(_perplexity, context=context))
        for context in contexts
    ]
    columns += [Column(tables.metric_title(metric), partial(_metric, like=metric)) for metric in metrics.values()]
    for key, title in (("prefill_speedup", "prefill speed-up"), ("forward_speedup", "speed-up")):
        if any(facts.speedups(arm, key) for _, _, arm in rows):
            columns += [
                Column(f"{title} at {count(length)}", partial(_speedup, key=key, length=length)) for length in lengths
            ]
    return Table.of("Runs", columns, rows)


def _perplexity(row: Row, context: int) -> str:
    return tables.perplexity(row[1], row[2], context)


def _metric(row: Row, like: Any) -> str:
    return tables.metric_cell(row[1], row[2], like)


def _speedup(row: Row, key: str, length: int) -> str:
    entry = facts.speed_at(row[2], length)
    if entry and row[2] is facts.reference(row[1]):
        return "reference"
    spread = getattr(entry, key, None)
    return interval(spread) if spread else tables.UNMEASURED


def machines(reports: Mapping[str, Report]) -> list[str]:
    """Return a line per run on the machine of its times. Speed-ups are over the softmax of the same run."""
    return [f"{plain(file)}: {_machine(report)}" for file, report in reports.items()]


def _machine(report: Report) -> str:
    machine = report.machine
    versions = ", ".join(f"{key} {value}" for key, value in report.versions.items())
    where = f"{machine.processor}, {machine.cores} cores, {machine.threads} threads, {machine.device}"
    return plain(f"{report.model.name} on {where}; {versions}; {report.date}")


def show_all(reports: Mapping[str, Report]) -> Group:
    """Return what the terminal shows: the table, and the machine of each run."""
    return Group(terminal(side_by_side(reports)), Text(), *(Text(line) for line in machines(reports)))
