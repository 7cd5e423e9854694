"""The JSON that examples/classify_all.py writes: accuracies of classifiers that were trained alike, and their speed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..sources.files import write_whole
from . import shape
from .facts import Report
from .markdown import escape, markdown_table
from .schema import IDENTITY, MACHINE, MODEL, SPREAD, VERSIONS
from .shape import AMOUNT, COUNT, DATE, INTEGER, MISSING, NAMED, NUMBER, OBJECT, SIZE, TEXT, Maybe, one_of
from .table import Rows, name
from .text import count, interval, number, plain, seconds

NAME = "hf_attnswap.classification"
VERSION = 1

ESTIMATE = {"value": NUMBER, "low": NUMBER, "high": NUMBER}
STAGE = {"stage": NAMED, "trains": TEXT, "text": TEXT, "texts": COUNT, "steps": COUNT, "learning_rate": AMOUNT} | {
    "first_loss": NUMBER,
    "last_loss": NUMBER,
}
READING = {
    "length": SIZE,
    "forward_s": SPREAD,
    "forward_speedup": Maybe(SPREAD),
    "peak_memory_mib": Maybe(AMOUNT),
}
ARM = {
    **IDENTITY,
    "status": one_of("measured", "failed"),
    "reason": Maybe(TEXT),
    "training": [STAGE],
    "accuracy": Maybe(ESTIMATE),
    "accuracy_by_seed": [AMOUNT],
    "difference": Maybe(ESTIMATE),
    "ratio": Maybe(ESTIMATE),
    "speed": [READING],
}
REPORT = {
    "schema": one_of(NAME),
    "version": INTEGER,
    "title": NAMED,
    "model": MODEL,
    "machine": MACHINE,
    "processes": SIZE,
    "versions": VERSIONS,
    "date": DATE,
    "command": TEXT,
    "seeds": [INTEGER],
    "data": {"training": NAMED, "training_texts": COUNT, "evaluation": NAMED, "evaluation_texts": COUNT},
    "arguments": OBJECT,
    "arms": [ARM],
}


def _problems(report: Any) -> Iterator[shape.Problem]:
    if isinstance(report, dict) and report.get("version") != VERSION:
        yield "version", report.get("version"), f"{VERSION}; of another hf_attnswap, upgrade it"
    yield from shape.problems(report, REPORT, "")
    for index, arm in enumerate(report["arms"]):
        for key in ("accuracy", "ratio", "difference"):
            if (arm[key] is None) != (arm["status"] == "failed"):
                yield f"arms[{index}].{key}", arm[key], f"what status {arm['status']!r} goes with"


def validate(report: Any, name: str = "results.json") -> None:
    """Raise ValueError unless `report` is valid, with one sentence: where, what is there, what should be."""
    for path, value, expected in _problems(report):
        shown = "missing" if value is MISSING else repr(value)[:80]
        raise ValueError(f"{name}: {path or 'the whole'} is {shown}; expected {expected}")


def read(path: str | Path) -> Report:
    """The report in the file `path`; ValueError names the file and the place."""
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    validate(report, str(path))
    return report


def write(report: Report, path: str | Path) -> Path:
    """Validate `report` and write it to `path` whole."""
    validate(report)
    return write_whole(path, (json.dumps(report, indent=1, allow_nan=False) + "\n").encode())


def rows(report: Report) -> Rows:
    """The table of accuracies, its header first: one row per arm."""
    table = [["attention", "cost", "new parameters", "accuracy (95 %)", "of each seed", "points to softmax (95 %)"]]
    table[0].append("share of softmax's (95 %)")
    for arm in report["arms"]:
        cells = [name(arm), plain(arm["cost"]), count(arm["new_parameters"])]
        if arm["status"] == "failed":
            table.append([*cells, f"failed: {plain(arm['reason'])}", "", "", ""])
            continue
        softmax = arm["attention"] == "softmax"
        cells += [percent(arm["accuracy"]), ", ".join(f"{100 * x:.1f} %" for x in arm["accuracy_by_seed"])]
        table.append([*cells, *(["-", "-"] if softmax else [points(arm["difference"]), percent(arm["ratio"])])])
    return table


def speed_rows(report: Report) -> Rows:
    """The table of speed, its header first: one row per length and arm."""
    table = [["tokens", "attention", "forward pass", "speed-up", "peak memory MiB"]]
    for length in sorted({entry["length"] for arm in report["arms"] for entry in arm["speed"]}):
        for arm in report["arms"]:
            for entry in (entry for entry in arm["speed"] if entry["length"] == length):
                faster, memory = entry["forward_speedup"], entry["peak_memory_mib"]
                table.append(
                    [
                        count(length), name(arm), seconds(entry["forward_s"]["median"]),
                        interval(faster, "median") if faster else "reference",
                        "not measured" if memory is None else number(memory),
                    ]
                )  # fmt: skip
    return table


def details(report: Report) -> list[tuple[str, str]]:
    """How the numbers came about."""
    model, machine, data, told = report["model"], report["machine"], report["data"], report["arguments"]
    batch = told["per_device_train_batch_size"] * told["gradient_accumulation_steps"] * report["processes"]
    pairs = [
        ("model", f"{model['name']}: {count(model['parameters'])} parameters, {model['dtype']}"),
        (
            "attention",
            f"{model['attention_layers']} layers, {model['num_attention_heads']} heads, head dimension "
            f"{model['head_dim']}, no dropout in it",
        ),
        (
            "training",
            f"every arm trains all weights on {count(data['training_texts'])} texts of {data['training']}, "
            f"{told['num_train_epochs']} time(s), at most {told['max_length']} tokens each, batches of {batch}, AdamW "
            f"at {told['learning_rate']:g} after {told['num_warmup_steps']} steps of warm-up; attention with "
            f"parameters is aligned before, for {told['align_steps']} steps at {told['align_learning_rate']:g} on the "
            "same texts, the long ones more often",
        ),
        ("evaluation", f"{count(data['evaluation_texts'])} texts of {data['evaluation']}, mean of the seeds"),
        ("seeds", ", ".join(map(str, report["seeds"]))),
        (
            "intervals",
            "95 %, bootstrap over the texts of the evaluation, paired with softmax's; how runs with other seeds "
            "differ is not in them",
        ),
        ("speed", "one text at a time; median of the runs, lowest and highest in parentheses"),
        (
            "machine",
            f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, "
            f"{number(machine['memory_gib'])} GiB, {machine['platform']}; device {machine['device']}",
        ),
        ("versions", ", ".join(f"{key} {value}" for key, value in report["versions"].items())),
        ("date", report["date"]),
        ("command", report["command"]),
    ]
    return [(key, plain(value)) for key, value in pairs]


def render(report: Report) -> str:
    """The whole page, in Markdown."""
    parts = [f"# {escape(plain(report['title']))}", markdown_table(rows(report)), "## Speed"]
    parts += [markdown_table(speed_rows(report)), "## How it was measured"]
    parts += ["\n".join(f"- {key}: {escape(value)}" for key, value in details(report))]
    return "\n\n".join(parts) + "\n"


def percent(found: dict[str, float]) -> str:
    """A share with its bounds: 98.8 % (96.8 to 100.7)."""
    return f"{100 * found['value']:.1f} % ({100 * found['low']:.1f} to {100 * found['high']:.1f})"


def points(found: dict[str, float]) -> str:
    """A difference of shares with its bounds: -1.0 (-2.8 to +0.6)."""
    return f"{100 * found['value']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"
