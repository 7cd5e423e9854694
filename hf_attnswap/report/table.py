"""The tables: rows of plain text that terminal, Markdown and HTML share, and the rich rendering of them."""

import json
import re
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from . import beside, facts, tasks
from .facts import Arm, Report
from .short import short
from .summary import summary
from .text import count, interval, number, plain, seconds

UNMEASURED = "not measured"
QUALITY = "Quality"
UNIT = "Perplexity by token, word and byte"
TASKS = "Tasks: value, and difference from softmax (95 %)"
SPEED = "Speed and memory"
ARMS = "Arms"
GROWTH = "Growth of the time with the length n"
LAYERS = "Layers by damage"
WORDS = ("cost", "status", "note", "formula", "options", "source", "least damage first")  # columns that may wrap
UNITS = {"token": "perplexity", "word": "word_perplexity", "byte": "byte_perplexity"}
Rows = list[list[str]]
# What is measured, its speed-up, the titles of both columns, and how seconds or tokens are shown.
SPEEDS = (
    ("prefill_s", "prefill_speedup", ("prefill", "prefill speed-up"), seconds),
    ("decode_tokens_per_s", "decode_speedup", ("decode tokens/s", "decode speed-up"), number),
    ("train_s", "train_speedup", ("training step", "training speed-up"), seconds),
)


def rows(report: Report) -> Rows:
    """The quality table, its header first: one row per arm, whatever its status."""
    contexts = facts.contexts(report)
    header = ["arm", "cost", "new parameters", "training tokens"]
    header += [f"perplexity at {count(context)} (ratio to softmax, 95 %)" for context in contexts]
    header += [] if contexts else ["perplexity"]
    table = [[*header, "status"]]
    for arm in report["arms"]:
        cells = [name(arm), _cost(arm), count(arm["new_parameters"]), count(arm["training_tokens"])]
        cells += [perplexity(report, arm, context) for context in contexts or [None]]
        table.append([*cells, _status(arm)])
    return table


def unit_rows(report: Report) -> Rows:
    """Perplexity by word and by byte beside that by token, its header first: one row per arm that has them.

    Those by word and byte compare with those of other tokenizers; words are what white space separates.
    """
    contexts = facts.contexts(report)
    table = [["arm", *(f"per {unit} at {count(context)}" for context in contexts for unit in UNITS)]]
    for arm in report["arms"]:
        entries = [facts.perplexity_at(arm, context) for context in contexts]
        if any(entry and entry["byte_perplexity"] for entry in entries):
            found = [entry and entry[key] for entry in entries for key in UNITS.values()]
            table.append([name(arm), *(number(value) if value else UNMEASURED for value in found)])
    return table


def task_rows(report: Report) -> Rows:
    """The table of tasks, its header first: one row per arm that has any, one column per metric."""
    metrics = facts.metrics(report)
    table = [["arm", *(tasks.title(entry) for entry in metrics.values())]]
    for arm in report["arms"]:
        if arm["tasks"]:
            table.append([name(arm), *(tasks.cell(report, arm, key) for key in metrics)])
    return table


def speed_rows(report: Report) -> Rows:
    """The speed table, its header first: one row per length and arm; arms without any speed come last."""
    columns = SPEEDS if facts.with_training(report) else SPEEDS[:2]
    header = ["length", "arm", *(title for _, _, titles, _ in columns for title in titles)]
    table = [[*header, "peak memory MiB", "cache MiB", "note"]]
    absent = [UNMEASURED] * (2 * len(columns) + 2)
    for length in facts.lengths(report):
        for arm in report["arms"]:
            entry = facts.speed_at(arm, length)
            if entry:
                table.append([count(length), name(arm), *_speed(report, arm, entry, columns)])
            elif arm["speed"]:
                table.append([count(length), name(arm), *absent, ""])
    for arm in report["arms"]:
        if not arm["speed"]:
            note = "" if arm["status"] == "measured" else _status(arm)
            table.append(["-", name(arm), *absent, note])
    return table


def arm_rows(report: Report) -> Rows:
    """What each arm computes, its header first: formula, options and source."""
    table = [["arm", "formula", "options", "source"]]
    for arm in report["arms"]:
        options = ", ".join(f"{key}={json.dumps(value)}" for key, value in arm["options"].items())
        table.append([name(arm), plain(arm["formula"]), plain(options) or "-", plain(arm["source"])])
    return table


def growth_rows(report: Report) -> Rows:
    """The exponents of the time by length, its header first: one row per arm that has one."""
    shown = {"prefill_s": "prefill", "decode_s": "decoding a token", "train_s": "training step"}
    keys = [key for key in shown if any(arm["growth"][key] for arm in report["arms"])]
    table = [["arm", *(f"{shown[key]} (95 %)" for key in keys)]]
    for arm in report["arms"]:
        found = [arm["growth"][key] for key in keys]
        if any(found):
            table.append([name(arm), *(_exponent(growth) if growth else UNMEASURED for growth in found)])
    return table


def _exponent(growth: dict) -> str:
    return f"n^{number(growth['exponent'])} ({number(growth['low'])} to {number(growth['high'])})"


def layer_rows(report: Report) -> Rows:
    """The layers of each arm that was looked at, in the order of what they cost alone, its header first."""
    table = [["arm", "least damage first", "half of them, for --layers"]]
    for arm in facts.with_diagnostics(report):
        order = arm["diagnostics"]["layers_by_damage"]
        if order:
            half = sorted(order[: (len(order) + 1) // 2])
            table.append([name(arm), ", ".join(map(str, order)), ",".join(map(str, half))])
    return table


def tables(report: Report) -> dict[str, Rows]:
    """Those with numbers by their titles, in their order; none without a row."""
    found = {QUALITY: rows(report), UNIT: unit_rows(report), TASKS: task_rows(report), SPEED: speed_rows(report)}
    found |= {GROWTH: growth_rows(report), LAYERS: layer_rows(report)}
    return {title: table for title, table in found.items() if len(table) > 1}


def details(report: Report) -> list[tuple[str, str]]:
    """How the numbers came about: model, machine, versions, data, seed, date and command."""
    model, machine, data = report["model"], report["machine"], report["data"]
    heads = f"{model['num_attention_heads']} heads, {model['num_key_value_heads']} of keys and values"
    memory = f"{machine['cores']} cores, {machine['threads']} threads, {number(machine['memory_gib'])} GiB"
    training, evaluation = count(data["training_tokens"]), count(data["evaluation_tokens"])
    pairs = [
        ("model", f"{model['name']}: {count(model['parameters'])} parameters, {model['dtype']}"),
        ("attention", f"{model['attention_layers']} layers, {heads}, head dimension {model['head_dim']}"),
        ("machine", f"{machine['processor']}, {memory}, {machine['platform']}; device {machine['device']}"),
        ("versions", ", ".join(f"{key} {value}" for key, value in report["versions"].items())),
        ("data", f"{data['text']}: {training} tokens for training, {evaluation} for evaluation"),
        ("intervals", "95 %, paired bootstrap over blocks of text; * from fewer than 500 of them"),
        *([("trained arms", beside.note(report))] if beside.note(report) else []),
        ("checks", _checks(report)),
        ("speed", f"{_runs(report)}; lowest and highest run in parentheses; prefill is the time to first token"),
        ("seed", str(report["seed"])),
        ("date", report["date"]),
        ("command", report["command"]),
    ]
    return [(key, plain(value)) for key, value in pairs]


def _checks(report: Report) -> str:
    """Which checks of the swap itself were made, and which arms fail them."""
    names = dict.fromkeys(check["name"] for arm in report["arms"] for check in arm["checks"])
    if not names:
        return UNMEASURED
    failed = [plain(arm["label"]) for arm in report["arms"] if not all(check["passed"] for check in arm["checks"])]
    return f"{', '.join(names)}: " + (f"failed by {', '.join(failed)}" if failed else "passed by every arm swapped")


def show(report: Report) -> Group:
    """Everything for the terminal: the summary, the tables, and how the numbers came about."""
    grid = Table.grid(padding=(0, 2))
    for key, value in details(report):
        grid.add_row(Text(key, style="dim"), Text(value))
    words = [Text.assemble((f"{what}: ", "bold"), f"{said}\n") for what, said in short(report)]
    words += [Text(f"{paragraph}\n") for paragraph in summary(report)]
    shown = [as_table(title, table, sections=title == SPEED) for title, table in tables(report).items()]
    return Group(*words, *(part for table in shown for part in (table, Text())), grid)


def name(arm: Arm) -> str:
    """The label, controls marked."""
    return f"{plain(arm['label'])} (control)" if arm["control"] else plain(arm["label"])


def _cost(arm: Arm) -> str:
    return f"{plain(arm['cost'])} ({arm['cost_class']})"


def _status(arm: Arm) -> str:
    return arm["status"] if arm["status"] == "measured" else f"{arm['status']}: {plain(arm['reason'])}"


def perplexity(report: Report, arm: Arm, context: int | None) -> str:
    """Perplexity and its ratio to softmax's."""
    entry = facts.perplexity_at(arm, context)
    if entry is None:
        return UNMEASURED
    if entry["perplexity"] is None:
        return "not finite"
    value = number(entry["perplexity"])
    if arm is facts.reference(report):
        return f"{value} (reference)"
    ratio = beside.ratio(report, arm, context)
    return f"{value}; {ratio}" if ratio else f"{value} (no ratio)"


def _speed(report: Report, arm: Arm, entry: dict, columns: Sequence[tuple]) -> list[str]:
    absent = "reference" if arm is facts.reference(report) else UNMEASURED
    cells = []
    for key, speedup, _, show in columns:
        cells.append(show(entry[key]["median"]) if entry[key] else UNMEASURED)
        without = absent if entry[key] else UNMEASURED
        cells.append(interval(entry[speedup], "median") if entry[speedup] else without)
    for key in ("peak_memory_mib", "cache_mib"):
        cells.append(UNMEASURED if entry[key] is None else number(entry[key]))
    return [*cells, plain(entry["note"] or "")]


def _runs(report: Report) -> str:
    keys = ("prefill_s", "decode_tokens_per_s")
    runs = sorted({e[key]["runs"] for arm in report["arms"] for e in arm["speed"] for key in keys if e[key]})
    if not runs:
        return UNMEASURED
    return f"median of {runs[0]} runs" if len(runs) == 1 else f"median of {runs[0]} to {runs[-1]} runs"


def two_lines(cell: str) -> str:
    """The cell with what closes in parentheses, an interval as a rule, on a line of its own."""
    return re.sub(rf" (\([^()]*\)\*?{beside.MARK}?)$", r"\n\1", cell)


def as_table(title: str, table: Rows, sections: bool) -> Table:
    """`sections` draws a line where the first column changes."""
    header, *body = table
    rendered = Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(header):
        lines = [line for row in body for line in two_lines(row[index]).splitlines()]
        longest = max(map(len, [*lines, *column.split()]), default=0)
        # A header wraps rather than widen a column of numbers. No minimum: rich would crop what does not fit.
        rendered.add_column(Text(column), overflow="fold", max_width=None if column in WORDS else longest)
    for row, following in zip(body, [*body[1:], None], strict=True):
        last = sections and following is not None and following[0] != row[0]
        style = "dim" if any(cell.endswith("(control)") for cell in row) else ""
        # Text, not str: [brackets] in a label or a reason are no markup.
        rendered.add_row(*[Text(two_lines(cell)) for cell in row], style=style, end_section=last)
    return rendered
