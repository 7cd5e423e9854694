"""Several reports side by side: one row per run and arm, and a refusal where a column would mix what differs."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.text import Text

from . import facts
from .facts import Report
from .table import UNMEASURED, Rows, as_table, name, perplexity
from .text import count, interval, plain


def check_same(reports: Mapping[str, Report]) -> None:
    """Raise ValueError unless all were measured on the same text: a column of perplexities would mix two things.

    Reports of version 1 have no fingerprint of their tokens; their text and its length must be the same.
    """
    (first, start), *others = reports.items()
    for file, report in others:
        for key in ("text", "evaluation_tokens", "fingerprint"):
            ours, theirs = report["data"][key], start["data"][key]
            if ours != theirs and None not in (ours, theirs):
                raise ValueError(
                    f"{first} and {file} were measured on different data ({key} {theirs!r} and {ours!r}), so their "
                    "perplexities do not stand in one column: compare reports of the same text and tokenizer"
                )


def rows(reports: Mapping[str, Report]) -> Rows:
    """The table, its header first. A column is of one context or one length; what a run has not measured says so."""
    check_same(reports)
    contexts = sorted({context for report in reports.values() for context in facts.contexts(report)})
    lengths = sorted({length for report in reports.values() for length in facts.lengths(report)})
    header = ["run", "arm", "training tokens"]
    header += [f"perplexity at {count(context)} (ratio to softmax, 95 %)" for context in contexts]
    header += [f"prefill speed-up at {count(length)}" for length in lengths]
    table = [header]
    for file, report in reports.items():
        for arm in report["arms"]:
            cells = [plain(file), name(arm), count(arm["training_tokens"])]
            cells += [perplexity(report, arm, context) for context in contexts]
            entries = [facts.speed_at(arm, length) for length in lengths]
            cells += [_speedup(arm is facts.reference(report), entry) for entry in entries]
            table.append(cells)
    return table


def _speedup(reference: bool, entry: dict | None) -> str:
    if entry and reference:
        return "reference"
    return interval(entry["prefill_speedup"], "median") if entry and entry["prefill_speedup"] else UNMEASURED


def machines(reports: Mapping[str, Report]) -> list[str]:
    """A line per run: where its times come from. Speed-ups are over the softmax of the same run."""
    return [f"{plain(file)}: {_machine(report)}" for file, report in reports.items()]


def _machine(report: Report) -> str:
    machine: dict[str, Any] = report["machine"]
    versions = ", ".join(f"{key} {value}" for key, value in report["versions"].items())
    where = f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, {machine['device']}"
    return plain(f"{report['model']['name']} on {where}; {versions}; {report['date']}")


def show_all(reports: Mapping[str, Report]) -> Group:
    """For the terminal: the table, and which machine each run comes from."""
    return Group(as_table("Runs", rows(reports), sections=True), Text(), *(Text(line) for line in machines(reports)))
