"""The JSON that `attnswap tradeoff` writes and every rendering here reads: checked, read, written."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..sources.files import write_whole
from . import shape
from .shape import (
    AMOUNT,
    COUNT,
    DATE,
    FLAG,
    INTEGER,
    MISSING,
    NAMED,
    NUMBER,
    OBJECT,
    POSITIVE,
    SIZE,
    TEXT,
    Maybe,
    Problem,
    is_count,
    one_of,
)

NAME = "hf_attnswap.tradeoff"
VERSION = 3

SPREAD = {"median": POSITIVE, "low": POSITIVE, "high": POSITIVE, "runs": SIZE}
ALIGNMENT = {"tokens": COUNT, "seconds": AMOUNT, "first_loss": NUMBER, "last_loss": NUMBER}
STAGE = {
    "stage": NAMED,
    "trains": TEXT,
    "text": TEXT,
    "tokens": COUNT,
    "steps": COUNT,
    "learning_rate": AMOUNT,
    "first_loss": NUMBER,
    "last_loss": NUMBER,
    "arguments": OBJECT,
}
GROUP = {"attention": NAMED, "options": OBJECT, "kind": NAMED, "layers": [COUNT]}
VERDICT = {"items": SIZE, "few": FLAG, "verdict": one_of("better", "no measurable difference", "worse")}
RATIO = {"value": POSITIVE, "low": POSITIVE, "high": POSITIVE} | VERDICT
DIFFERENCE = {"value": NUMBER, "low": NUMBER, "high": NUMBER} | VERDICT
PERPLEXITY = {
    "context": SIZE,
    "perplexity": Maybe(POSITIVE),
    "nll": Maybe(NUMBER),
    "standard_error": Maybe(AMOUNT),
    "tokens": COUNT,
    "ratio": Maybe(RATIO),
    "against": [{"arm": NAMED} | RATIO],
    "word_perplexity": Maybe(POSITIVE),
    "byte_perplexity": Maybe(POSITIVE),
    "by_position": [{"first": SIZE, "last": SIZE, "nll": NUMBER}],
}
SPEED = {
    "length": SIZE,
    "prefill_s": Maybe(SPREAD),
    "prefill_speedup": Maybe(SPREAD),
    "decode_tokens_per_s": Maybe(SPREAD),
    "decode_speedup": Maybe(SPREAD),
    "train_s": Maybe(SPREAD),
    "train_speedup": Maybe(SPREAD),
    "peak_memory_mib": Maybe(AMOUNT),
    "cache_mib": Maybe(AMOUNT),
    "note": Maybe(TEXT),
}
TASK = {
    "task": NAMED,
    "metric": NAMED,
    "higher_is_better": FLAG,
    "value": Maybe(NUMBER),
    "standard_error": Maybe(AMOUNT),
    "items": SIZE,
    "few": FLAG,
    "difference": Maybe(DIFFERENCE),
    "against": [{"arm": NAMED} | DIFFERENCE],
}
GROWTH = {"exponent": NUMBER, "low": NUMBER, "high": NUMBER, "lengths": SIZE}
GRADIENT = dict.fromkeys(["query", "key", "value", "layer_input"], Maybe(AMOUNT))
LAYER = {
    "layer": NAMED,
    "kl": Maybe(NUMBER),
    "perplexity_ratio": Maybe(POSITIVE),
    "gradient": GRADIENT,
    "gradient_of_softmax": GRADIENT,
    "dead": Maybe(AMOUNT),
    "saturated": Maybe(AMOUNT),
    "effective_keys": Maybe(AMOUNT),
    "softmax_effective_keys": Maybe(POSITIVE),
    "row_sum": Maybe(NUMBER),
    "negative": Maybe(AMOUNT),
    "sparsity": Maybe(AMOUNT),
    "distance": Maybe(AMOUNT),
    "output_scale": [{"first": SIZE, "last": SIZE, "scale": Maybe(AMOUNT)}],
}
DIAGNOSTICS = {"context": SIZE, "tokens": SIZE, "layers": [LAYER], "layers_by_damage": [COUNT]}
# What an arm is, in reports of every kind.
IDENTITY = {
    "label": NAMED,
    "attention": NAMED,
    "options": OBJECT,
    "control": FLAG,
    "formula": TEXT,
    "cost": TEXT,
    "cost_class": one_of("quadratic", "linear", "constant"),
    "source": TEXT,
    "swapped": [GROUP],
    "new_parameters": COUNT,
}
ARM = {
    **IDENTITY,
    "status": one_of("measured", "failed", "not measured"),
    "reason": Maybe(TEXT),
    "alignment": Maybe(ALIGNMENT),
    "training": [STAGE],
    "training_tokens": COUNT,
    "conversion": Maybe(NAMED),
    "checks": [{"name": NAMED, "passed": FLAG, "worst": Maybe(AMOUNT), "limit": AMOUNT}],
    "growth": dict.fromkeys(["prefill_s", "decode_s", "train_s"], Maybe(GROWTH)),
    "diagnostics": Maybe(DIAGNOSTICS),
    "perplexity": [PERPLEXITY],
    "tasks": [TASK],
    "speed": [SPEED],
}
MODEL = {"name": NAMED, "dtype": TEXT} | dict.fromkeys(
    ["parameters", "attention_layers", "num_attention_heads", "num_key_value_heads", "head_dim"], COUNT
)
MACHINE = {"cores": COUNT, "threads": COUNT, "memory_gib": AMOUNT} | dict.fromkeys(
    ["processor", "device", "platform"], TEXT
)
VERSIONS = dict.fromkeys(["hf_attnswap", "torch", "transformers", "python"], TEXT)
REPORT = {
    "model": MODEL,
    "machine": MACHINE,
    "versions": VERSIONS,
    "date": DATE,
    "command": TEXT,
    "seed": INTEGER,
    "data": {"text": TEXT, "training_tokens": COUNT, "evaluation_tokens": COUNT, "fingerprint": Maybe(TEXT)},
    "arms": [ARM],
}


def _repeats(items: list[dict], key: str, path: str) -> Iterator[Problem]:
    seen: dict[Any, int] = {}
    for index, item in enumerate(items):
        first = seen.setdefault(item[key], index)
        if first != index:
            yield f"{path}[{index}].{key}", item[key], f"a value that {path}[{first}].{key} does not have"


def _intervals(value: Any, path: str) -> Iterator[Problem]:
    """Every object below `value` with low and high whose middle (median or value) is not between them."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _intervals(item, f"{path}[{index}]")
    elif isinstance(value, dict):
        middle = next((key for key in ("median", "value") if key in value), None)
        if middle and "low" in value and not value["low"] <= value[middle] <= value["high"]:
            bounds = f"from low {value['low']!r} to high {value['high']!r}"
            yield f"{path}.{middle}", value[middle], f"a number {bounds}"
        for key, item in value.items():
            yield from _intervals(item, f"{path}.{key}")


def _rules(arms: list[dict]) -> Iterator[Problem]:
    """What no single value shows: uniqueness, reasons, nulls, order of intervals."""
    if not arms:
        yield "arms", arms, "at least one arm"
    yield from _repeats(arms, "label", "arms")
    for index, arm in enumerate(arms):
        path = f"arms[{index}]"
        if arm["status"] != "measured" and not (arm["reason"] or "").strip():
            yield f"{path}.reason", arm["reason"], f"the reason, since status is {arm['status']!r}"
        yield from _repeats(arm["perplexity"], "context", f"{path}.perplexity")
        yield from _repeats(arm["speed"], "length", f"{path}.speed")
        metrics = [{"metric": f"{entry['metric']} of {entry['task']}"} for entry in arm["tasks"]]
        yield from _repeats(metrics, "metric", f"{path}.tasks")
        yield from _intervals({key: arm[key] for key in ("perplexity", "tasks", "speed")}, path)
        for number, entry in enumerate(arm["perplexity"]):
            where = f"{path}.perplexity[{number}]"
            if arm["status"] == "measured":
                for key in ("perplexity", "nll", "standard_error"):
                    if entry[key] is None:
                        yield f"{where}.{key}", None, f"a finite number, since status is {arm['status']!r}"
            if entry["perplexity"] is None and entry["ratio"] is not None:
                yield f"{where}.ratio", entry["ratio"], "null, since perplexity is null"
        for number, entry in enumerate(arm["speed"]):
            if entry["prefill_s"] is None and not (entry["note"] or "").strip():
                yield f"{path}.speed[{number}].note", entry["note"], "the reason, since prefill_s is null"


def _problems(report: Any) -> Iterator[Problem]:
    if not isinstance(report, dict):
        yield "the whole", report, "an object"
        return
    schema, version = report.get("schema", MISSING), report.get("version", MISSING)
    if schema != NAME:
        yield "schema", schema, repr(NAME)
    elif is_count(version) and version > VERSION:
        advice = "a newer hf_attnswap wrote this file: upgrade hf_attnswap to read it"
        yield "version", version, f"{VERSION}; {advice}"
    elif version != VERSION or not is_count(version):
        yield "version", version, str(VERSION)
    else:
        wrong = False
        for problem in shape.problems(report, REPORT, ""):
            wrong = True
            yield problem
        if not wrong:
            yield from _rules(report["arms"])


def _upgraded(report: Any) -> Any:
    """A report of an earlier version with what the later ones add; what was not measured then is empty now."""
    version = report.get("version") if isinstance(report, dict) else None
    if isinstance(version, bool) or version not in (1, 2):
        return report
    report = copy.deepcopy(report)
    arms = report["arms"] if isinstance(report.get("arms"), list) else []
    if version == 1:
        _upgrade_first(report, arms)
    _upgrade_second(report, arms)
    return report | {"version": VERSION}


def _upgrade_first(report: dict, arms: list[dict]) -> None:
    report["data"]["fingerprint"] = None
    for arm in arms:
        arm |= {"checks": [], "growth": {"prefill_s": None, "decode_s": None}, "diagnostics": None}
    for entry in [entry for arm in arms for entry in arm["perplexity"]]:
        entry |= {"against": [], "word_perplexity": None, "byte_perplexity": None, "by_position": []}
        if entry["ratio"]:
            low, high = entry["ratio"]["low"], entry["ratio"]["high"]
            items = entry["tokens"] // max(1, entry["context"] - 1)
            verdict = "worse" if low > 1 else "better" if high < 1 else "no measurable difference"
            entry["ratio"] |= {"items": items, "few": items < 500, "verdict": verdict}


def _upgrade_second(report: dict, arms: list[dict]) -> None:
    every = list(range(report["model"]["attention_layers"]))  # each arm swapped all of them
    for arm in arms:
        group = {"attention": arm["attention"], "options": arm["options"], "kind": "causal", "layers": every}
        arm |= {"swapped": [] if arm["attention"] == "softmax" else [group], "training": [], "conversion": None}
        arm["training_tokens"] = arm["alignment"]["tokens"] if arm["alignment"] else 0
        arm["tasks"] = []
        arm["growth"]["train_s"] = None
        for entry in arm["speed"]:
            entry |= {"train_s": None, "train_speedup": None}
        if arm["diagnostics"]:
            arm["diagnostics"]["layers_by_damage"] = []


def _validate(report: Any, name: str) -> None:
    problem = next(_problems(report), None)
    if problem is None:
        return
    path, value, expected = problem
    if value is MISSING:
        raise ValueError(f"{name}: {path} is missing; expected {expected}")
    shown = "null" if value is None else repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    raise ValueError(f"{name}: {path} is {shown}; expected {expected}")


def validate(report: dict) -> None:
    """Raise ValueError unless `report` is valid, with one sentence: where, what is there, what should be."""
    _validate(report, "report.json")


def read(path: str | Path) -> dict:
    """The report in the file `path`, of this version or upgraded to it; ValueError names the file and the place."""
    path = Path(path)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable as JSON: {error}") from error
    try:
        report = _upgraded(report)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a report of version {report['version']}: {error!r}") from error
    _validate(report, str(path))
    return report


def write(report: dict, path: str | Path) -> Path:
    """Validate `report` and write it to `path` whole, numbers with six significant digits: on failure the file that was
    there stays."""
    validate(report)
    return write_whole(path, f"{_text(_rounded(report))}\n".encode())


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _text(value: Any, margin: str = "\n") -> str:
    """JSON with a line for each list or object that holds no other: of a layer and its heads there are many."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not any(isinstance(item, dict | list) for item in items):
        return json.dumps(value, allow_nan=False)
    inner = f"{margin} "
    if isinstance(value, list):
        return f"[{inner}{f',{inner}'.join(_text(item, inner) for item in value)}{margin}]"
    lines = [f"{json.dumps(key)}: {_text(item, inner)}" for key, item in value.items()]
    return f"{{{inner}{f',{inner}'.join(lines)}{margin}}}"
