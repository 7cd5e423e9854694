"""Show the answer in the terminal: a verdict, one table of at most six columns, and the path of the page; 80 by 25."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Group
from rich.text import Text

from ..statistics import MIN_ROUNDS, lacking
from . import facts, tables
from .beside import mark
from .short import CLASSES, leading, score
from .table import NOISE, Column, Table, terminal
from .text import count, number, plain, times
from .types import Arm, Report

WIDTH, ROWS = 80, 10
LABEL = 22


def show(report: Report, page: Path | None = None) -> Group:
    """Return the answer for the terminal.

    Args:
        page: where report.html lies; None says how to write it.
    """
    shown = arms(report)
    table = Table.of("", _columns(report), shown)
    notes = _notes(report, table, len(report.arms) - len(shown))
    where = f"All of it: {page}" if page else "All of it: report.html, which attnswap report --output_dir DIR writes"
    return Group(
        *(Text(_cut(line)) for line in [*verdict(report), "", _title(report)]),
        terminal(table, folds=False),
        *(Text(_cut(note)) for note in notes),
        Text(where, overflow="fold"),
    )


def arms(report: Report) -> list[Arm]:
    """Return at most `ROWS` arms: softmax, controls, the arms of the verdict, then those of the best quality.

    The arms stand in the order of the report.
    """
    first = [arm for arm in report.arms if arm is facts.reference(report)]
    controls = [arm for name in ("none", "window") for arm in report.arms if arm.attention == name][:2]
    beaten = [found[1] for arm in leading(report) if (found := facts.better_control(report, arm))]
    faster = [arm for key, _ in _SPEEDS for _, arm in _faster_from(report, key)[:2]]
    order = [*first, *controls, *leading(report), *beaten, *faster, *facts.ranked(report), *report.arms]
    kept = {arm.label for arm in list({arm.label: arm for arm in order}.values())[:ROWS]}
    return [arm for arm in report.arms if arm.label in kept]


def verdict(report: Report) -> list[str]:
    """Return two to six lines: the best quality, beside its control, what it recalls, speed, the need for attention."""
    said, shown = [], leading(report)
    for arm in shown:
        what = "Below O(n^2)" if said else "Keeps most"
        said.append(f"{what}: {_label(arm.label)}, {score(report, arm)}{mark(report, arm)} {_unit(report)}")
    best = next(((arm, found) for arm in shown[::-1] if (found := facts.better_control(report, arm))), None)
    if best:
        arm, (control, other, compared) = best
        verdict = "no different" if compared.verdict == "no measurable difference" else compared.verdict or "open"
        said.append(f"Beside {_label(other.label)} of equal {control.equal} {_label(arm.label)} is {verdict}")
    said += [_needles(report, arm) for arm in shown[-1:] if "needle" in dict(facts.retrieval(report))]
    said = said or ["Quality: no arm was compared with softmax."]
    key, doing = next(((key, doing) for key, doing in _SPEEDS if _measured(report, key)), (None, ""))
    if key:
        said.append(_faster(report, key, doing))
    none = facts.without_attention(report)
    if none and facts.headline(report, none):
        said.append(f"No attention at all: {score(report, none)}: so much it is needed here")
    return said if len(said) > 1 else [*said, f"{len(report.arms)} arms on {plain(report.model.name)}"]


def _needles(report: Report, arm: Arm) -> str:
    """Return a line on the needles that an arm and softmax find, at three of the lengths where there are more."""
    entries = dict(facts.retrieval(report))["needle"]
    entries = entries if len(entries) < 4 else [entries[0], entries[len(entries) // 2], entries[-1]]

    def values(of: Arm | None) -> str:
        found = [facts.metric_of(of, entry) if of else None for _, entry in entries]
        return " ".join("-" if own is None or own.value is None else f"{own.value:.2f}" for own in found)

    fewest, at = min(entry.items for _, entry in entries), ", ".join(count(length) for length, _ in entries)
    softmax = values(facts.reference(report))
    return f"Needles at {at} (of {count(fewest)}): {values(arm)}, softmax {softmax}, with {_label(arm.label)}"


_SPEEDS = (("prefill_speedup", "prefill"), ("forward_speedup", "forward pass"), ("decode_speedup", "decoding"))


def _measured(report: Report, key: str) -> bool:
    return any(facts.speedups(arm, key) for arm in report.arms)


def _unit(report: Report) -> str:
    if facts.headline_context(report) is None:
        return f"in {plain(facts.metrics(report)[0].metric)}"
    return "softmax's perplexity" if report.kind == "tradeoff" else "its control's"


def _faster(report: Report, key: str, doing: str) -> str:
    """Return a line on the lengths from which on arms are faster than softmax, the earliest first."""
    every = [spread for arm in report.arms for _, spread in facts.speedups(arm, key)]
    few = facts.few_rounds(every)
    if few:
        return f"Faster in the {doing}: open, {lacking('to say so', MIN_ROUNDS, 'rounds', few[-1])}"
    known = _faster_from(report, key)
    if not known:
        return f"Faster than softmax in the {doing}: none up to {count(facts.lengths(report)[-1])} tokens"
    said = [f"{_label(arm.label)} from {count(start)} on" for start, arm in known[:2]]
    more = f", and {len(known) - 2} more" if len(known) > 2 else ""
    return f"Faster in the {doing}: {', '.join(said)}{more}"


def _faster_from(report: Report, key: str) -> list[tuple[int, Arm]]:
    """Return the length from which on each arm is faster than softmax, the earliest first; controls left out."""
    starts = [(facts.faster_from(report, arm, key), arm) for arm in report.arms if not arm.control]
    return sorted(((start, arm) for start, arm in starts if start), key=lambda pair: pair[0])


def _columns(report: Report) -> list[Column]:
    """Return the columns, at most six."""
    context, metrics, lengths = facts.headline_context(report), facts.metrics(report), facts.lengths(report)
    columns = [Column("arm", _name), Column("cost", lambda arm: CLASSES[arm.cost_class])]
    if context is not None:
        columns.append(Column("perplexity", partial(_perplexity, context=context)))
        control = "softmax's" if report.kind == "tradeoff" else "control's"
        columns.append(Column(f"over {control} (95 %)", _score(report)))
    elif metrics:
        columns.append(Column(plain(metrics[0].metric)[:12], partial(_metric, report)))
        columns.append(Column("less softmax's (95 %)", _score(report)))
    if not lengths:
        return [*columns, Column("training tokens", lambda arm: count(arm.training_tokens))]
    measured = [(key, doing) for key, doing in _SPEEDS if _measured(report, key)]
    cells = [Column(doing, partial(_speed, report, key=key, length=lengths[-1])) for key, doing in measured]
    return [*columns, *cells][:6]


def _title(report: Report) -> str:
    """Return in words what the columns measure."""
    context, lengths = facts.headline_context(report), facts.lengths(report)
    said = f"context {count(context)}" if context is not None else ""
    said += f"{'; ' if said else ''}speed over softmax's at {count(lengths[-1])} tokens" if lengths else ""
    return f"{plain(report.model.name).rpartition('/')[2]}: {said}"


def _score(report: Report) -> Callable[[Arm], str]:
    def cell(arm: Arm) -> str:
        if arm.status != "measured":
            return arm.status
        return f"{score(report, arm)}{mark(report, arm)}" if facts.headline(report, arm) else "-"

    return cell


def _perplexity(arm: Arm, context: int) -> str:
    entry = facts.perplexity_at(arm, context)
    return number(entry.perplexity) if entry and entry.perplexity is not None else "-"


def _metric(report: Report, arm: Arm) -> str:
    entry = facts.metric_of(arm, facts.metrics(report)[0])
    return number(entry.value) if entry and entry.value is not None else "-"


def _speed(report: Report, arm: Arm, key: str, length: int) -> str:
    """Return the median, marked where it is noise; the ranges are on the page."""
    spread = dict(facts.speedups(arm, key)).get(length)
    if spread is None:
        return "-"
    return times(spread.median) + (NOISE if facts.is_noise(report, arm, key, length) else "")


def _notes(report: Report, table: Table, left_out: int) -> list[str]:
    """Return at most three lines: the arms left out, what is marked in `table`, what is missing."""
    marked = any(NOISE in cell for row in table.rows for cell in row)
    every = tables.tables(report)
    notes = [f"{left_out} more arms are on the page."] if left_out else []
    said = dict.fromkeys(note for each in every for note in each.notes if marked or not note.startswith(NOISE))
    return [*notes, *said][:3]


def _name(arm: Arm) -> str:
    return f"{_label(arm.label, LABEL - 10)} (control)" if arm.control else _label(arm.label)


def _label(label: str, most: int = LABEL) -> str:
    label = plain(label)
    return label if len(label) <= most else f"{label[: most - 1]}…"


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"
