"""From what was measured to the rows of the report."""

import math
from typing import Any

from .. import attentions
from ..benchmark.growth import growth
from ..benchmark.measure import Spread, speedup
from ..evaluation.paired import FEW
from ..evaluation.perplexity import Perplexity, Units, ratio
from .arms import Arm
from .task_runs import difference

COST_CLASSES = ("constant", "linear", "quadratic")


def row(arm: Arm, results: dict[str, dict], runs: dict, units: dict[int, Units]) -> dict[str, Any]:
    """What the report says of one arm, from what was measured of all."""
    result = results[arm.label]
    training = list(arm.conversion.training) if arm.conversion else []
    trained = [*training, result["alignment"]] if result["alignment"] else training
    return {
        "label": arm.label, "attention": arm.attention, "options": arm.options,
        **_described(arm, result["swapped"], result["kept"]), "swapped": result["swapped"],
        "new_parameters": result["new_parameters"], "status": result["status"], "reason": result["reason"],
        "alignment": result["alignment"],
        "training": training,
        "training_tokens": sum(stage["tokens"] for stage in trained),
        "conversion": arm.conversion.name if arm.conversion else None,
        "checks": [
            {name: check[name] for name in ("name", "passed", "limit")}
            | {"worst": None if math.isnan(check["worst"]) else check["worst"]}
            for check in result["checks"]
        ],
        "diagnostics": result["diagnostics"],
        "growth": {key: _growth(arm.label, runs, key) for key in ("prefill_s", "decode_s", "train_s")},
        "perplexity": [
            _perplexity_row(arm.label, int(context), results, units[int(context)]) for context in result["nll"]
        ],
        "tasks": _task_rows(arm.label, results),
        "speed": [_speed_row(arm.label, int(length), rounds) for length, rounds in runs.items()
                  if result["status"] == "measured"],
    }  # fmt: skip


def _described(arm: Arm, groups: list[dict[str, Any]], kept: int) -> dict[str, Any]:
    """What the variants say of themselves; of several, and of softmax where layers keep it, the highest cost class."""
    names = dict.fromkeys(group["attention"] for group in groups) if groups else [arm.attention]
    classes = [attentions.get(name) for name in names if name != "mixed"]
    costs = dict.fromkeys(cls.cost for cls in classes)
    swapped = sum(len(group["layers"]) for group in groups)
    ran = [*classes, attentions.get("softmax")] if kept and swapped else classes
    return {
        "control": bool(classes) and all(cls.control for cls in classes),
        "formula": "; ".join(cls.formula for cls in classes),
        "cost": "; ".join(costs) + (f", softmax in {kept} of {kept + swapped} layers" if kept and swapped else ""),
        "cost_class": max((cls.cost_class for cls in ran), key=COST_CLASSES.index, default="quadratic"),
        "source": "; ".join(cls.source for cls in classes),
    }


def _growth(label: str, runs: dict, key: str) -> dict[str, Any] | None:
    """How the seconds of every run grow with the length."""
    points = [
        (int(length), found[label][key])
        for length, rounds in runs.items()
        for found in rounds
        if key in found.get(label, {})
    ]
    found = growth(*map(list, zip(*points, strict=True))) if points else None
    return None if found is None else dict(vars(found))


def _perplexity_row(label: str, context: int, results: dict[str, dict], units: Units) -> dict[str, Any]:
    measured = {
        other: Perplexity(context, tuple(result["nll"][str(context)]))
        for other, result in results.items()
        if str(context) in result["nll"]
    }
    found = measured.pop(label)
    against = {other: ratio(found, control) for other, control in measured.items()}
    return {
        "context": context,
        "perplexity": found.perplexity,
        "nll": found.mean,
        "standard_error": found.standard_error,
        "tokens": found.tokens,
        "ratio": None if label == "softmax" else against.pop("softmax", None),
        "against": [{"arm": other} | compared for other, compared in against.items()],
        "word_perplexity": _finite(found.per(units.words)) if units.words else None,
        "byte_perplexity": _finite(found.per(units.bytes)) if units.bytes else None,
        "by_position": [
            {"first": first, "last": last, "nll": nll}
            for first, last, nll in results[label]["by_position"][str(context)]
        ],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _task_rows(label: str, results: dict[str, dict]) -> list[dict[str, Any]]:
    """Every metric of the tasks, beside the same of the other arms."""
    rows = []
    for number, metric in enumerate(results[label]["tasks"]):
        others = {other: result["tasks"][number] for other, result in results.items() if result["tasks"]}
        against = {other: difference(metric, found) for other, found in others.items() if other != label}
        kept = ("task", "metric", "higher_is_better", "standard_error", "items")
        rows.append(
            {key: metric[key] for key in kept}
            | {"value": _finite(metric["value"]), "few": metric["items"] < FEW}
            | {"difference": against.pop("softmax", None)}
            | {"against": [{"arm": other} | found for other, found in against.items() if found]}
        )
    return rows


def _speed_row(label: str, length: int, rounds: list[dict]) -> dict[str, Any]:
    errors = [r[label][key] for r in rounds for key in ("error", "train_error") if key in r.get(label, {})]
    ours, control = _paired(label, rounds, "prefill_s")
    row: dict[str, Any] = {"length": length, "note": errors[0] if errors else None}
    row |= dict.fromkeys(("peak_memory_mib", "cache_mib"))
    for name, key in (("prefill", "prefill_s"), ("decode", "decode_s"), ("train", "train_s")):
        took, softmax = ([r[key] for r in found] for found in _paired(label, rounds, key))
        row[f"{name}_speedup"] = speedup(softmax, took).as_dict() if took and label != "softmax" else None
        if name == "decode":
            row["decode_tokens_per_s"] = Spread.of([1 / s for s in took]).as_dict() if took else None
        else:
            row[key] = Spread.of(took).as_dict() if took else None
    if not ours:
        return row | {"note": row["note"] or "not measured"}
    row["cache_mib"] = ours[0]["cache_bytes"] / 2**20
    peaks = [r["peak_memory_mib"] for r in ours if r["peak_memory_mib"] is not None]
    row["peak_memory_mib"] = max(0.0, Spread.of(peaks).median) if peaks else None
    return row


def _paired(label: str, rounds: list[dict], key: str) -> tuple[list[dict], list[dict]]:
    """What the arm and softmax found in the rounds in which both have `key`."""
    both = [(r[label], r["softmax"]) for r in rounds if all(key in r.get(name, {}) for name in (label, "softmax"))]
    return [ours for ours, _ in both], [control for _, control in both]
