"""Turn what was measured into the arms of the report."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from .. import attentions
from ..benchmark.measure import speedup
from ..evaluation.perplexity import Perplexity, Units, ratio
from ..plans import layers_in
from ..report import types
from ..statistics import Estimate, Spread, estimate, growth
from .arms import Arm

COST_CLASSES = ("constant", "linear", "quadratic")
SOFTMAX = "softmax"
SPEEDS = {"prefill": "prefill_s", "decode": "decode_s", "forward": "forward_s", "train": "train_s"}


def row(
    arm: Arm, results: dict[str, dict], runs: dict, units: dict[int, Units], controls: Sequence[types.Control] = ()
) -> types.Arm:
    """Return the entry of one arm in the report.

    Args:
        results: what was measured of the quality of every arm, by label.
        runs: rounds of timings by length, see `speed.Rounds`.
        units: words and bytes of the held-out text, by context length.
        controls: what the arm must beat.
    """
    result = results[arm.label]
    training = [stage_of(stage) for stage in arm.conversion.training] if arm.conversion else []
    alignment = types.Alignment(**result["alignment"]) if result["alignment"] else None
    described = describe(arm.attention, result["swapped"], result["kept"], result["kept_groups"])
    fields = dict(
        label=arm.label,
        attention=arm.attention,
        options=arm.options,
        **described | {"control": described["control"] or arm.is_control},
        controls=list(controls),
        swapped=[types.Group(**group) for group in result["swapped"]],
        alignment=alignment,
        training=training,
        training_tokens=sum(stage.size or 0 for stage in training) + (alignment.tokens if alignment else 0),
        conversion=arm.conversion.name if arm.conversion else None,
        checks=[
            types.Check(check["name"], check["passed"], _finite(check["worst"]), check["limit"])
            for check in result["checks"]
        ],
        diagnostics=diagnostics(result["diagnostics"]) if result["diagnostics"] else None,
        growth=_growths(arm.label, runs),
        perplexity=[_perplexity(arm.label, int(context), results, units[int(context)]) for context in result["nll"]],
        metrics=_metrics(arm.label, results),
        speed=[_speed(arm.label, int(length), rounds) for length, rounds in runs.items() if result["sound"]],
    )
    # What was measured under the name of a field of the report is that field.
    as_it_is = {field.name for field in dataclasses.fields(types.Arm)} - set(fields)
    return types.Arm(**fields, **{name: value for name, value in result.items() if name in as_it_is})


def stage_of(stage: dict[str, Any]) -> types.Stage:
    """Return the report's entry for a training stage that a conversion recorded."""
    return types.Stage(**{"size" if key == "tokens" else key: value for key, value in stage.items()})


def diagnostics(found: dict[str, Any]) -> types.Diagnostics:
    """Return the report's entry for a diagnosis, which `evaluation.diagnose` returned."""
    layers = [
        types.Layer(
            **layer
            | {key: types.Gradient(**layer[key]) for key in ("gradient", "gradient_of_softmax")}
            | {"output_scale": [types.Scale(**scale) for scale in layer["output_scale"]]}
        )
        for layer in found["layers"]
    ]
    return types.Diagnostics(**found | {"layers": layers})


def describe(attention: str, groups: list[dict[str, Any]], kept: int, kept_groups: list[int]) -> dict[str, Any]:
    """Return formula, cost, cost class and source of the variants of an arm, and whether all of them are controls.

    The texts of several variants are joined. The cost class is the highest one, softmax's included where some layers or
    groups keep softmax. A window that leaves some groups on softmax is no control.

    Args:
        attention: the variant of an arm without groups.
        groups: what is swapped, each with `attention`, `layers` and, where there are any, `groups`.
        kept: number of attention layers that are not swapped.
        kept_groups: the number of key/value groups that run softmax, and of all groups.
    """
    names = dict.fromkeys(group["attention"] for group in groups) if groups else [attention]
    classes = [attentions.get(name) for name in names if name != "mixed"]
    costs = dict.fromkeys(cls.cost for cls in classes)
    swapped = len({layer for group in groups for layer in layers_in(group)})
    parted = any(group.get("groups") for group in groups)
    ran = [*classes, attentions.get(SOFTMAX)] if (kept or parted) and swapped else classes
    beside = f", softmax in {kept} of {kept + swapped} layers" if kept and swapped else ""
    if parted:
        beside = f", softmax in {kept_groups[0]} of {kept_groups[1]} key/value groups"
    return {
        "control": bool(classes) and all(cls.control for cls in classes) and not parted,
        "formula": "; ".join(cls.formula for cls in classes),
        "cost": "; ".join(costs) + beside,
        "cost_class": max((cls.cost_class for cls in ran), key=COST_CLASSES.index, default="quadratic"),
        "source": "; ".join(cls.source for cls in classes),
    }


def compared(arm: str, value: Estimate, lower_is_better: bool) -> types.Comparison:
    """Return a difference to `arm`, with its interval and its verdict."""
    return types.Comparison(arm, value.value, value.low, value.high, value.items, value.verdict(lower_is_better))


def perplexity_ratio(arm: str, ours: Perplexity, control: Perplexity) -> types.Comparison:
    """Return the perplexity of `ours` divided by that of `arm` on the same blocks, with interval and verdict."""
    made = ratio(ours, control)
    return types.Comparison(arm, *(made[key] for key in ("value", "low", "high", "items", "verdict")))


def _growths(label: str, runs: dict) -> dict[str, Any]:
    """Return how the seconds of prefill, decoding and training grow with the length, where enough were timed."""
    grown = {}
    for key in SPEEDS.values():
        points = [
            (int(length), result[label][key])
            for length, rounds in runs.items()
            for result in rounds
            if key in result.get(label, {})
        ]
        grown[key] = growth(*map(list, zip(*points, strict=True))) if points else None
    return {key: value for key, value in grown.items() if value}


def _perplexity(label: str, context: int, results: dict[str, dict], units: Units) -> types.Perplexity:
    measured = {
        other: Perplexity(context, tuple(result["nll"][str(context)]), given=result["given"])
        for other, result in results.items()
        if str(context) in result["nll"]
    }
    own = measured.pop(label)
    against = {other: perplexity_ratio(other, own, control) for other, control in measured.items()}
    return types.Perplexity(
        context=context,
        perplexity=_finite(own.perplexity),
        nll=own.mean,
        standard_error=_finite(own.standard_error),
        tokens=own.tokens,
        ratio=None if label == SOFTMAX else against.pop(SOFTMAX, None),
        against=list(against.values()),
        word_perplexity=_finite(own.per(units.words)) if units.words else None,
        byte_perplexity=_finite(own.per(units.bytes)) if units.bytes else None,
        by_position=[types.Range(*entry) for entry in results[label]["by_position"][str(context)]],
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _metrics(label: str, results: dict[str, dict]) -> list[types.Metric]:
    """Return every metric of the tasks of an arm, compared with the same metric of the other arms."""
    rows = []
    for metric in results[label]["tasks"]:
        others = {other: _metric_of(result, metric) for other, result in results.items() if other != label}
        against = {other: _difference(other, metric, found) for other, found in others.items() if found}
        kept = ("task", "metric", "higher_is_better", "standard_error", "items")
        rows.append(
            types.Metric(
                **{key: metric[key] for key in kept},
                value=_finite(metric["value"]),
                difference=against.pop(SOFTMAX, None),
                against=[value for value in against.values() if value],
            )
        )
    return rows


def _metric_of(result: dict[str, Any], like: dict[str, Any]) -> dict[str, Any] | None:
    """Return the same metric of the same task of another arm, on as many items; None where it has none."""
    keys = ("task", "metric", "items")
    return next((found for found in result["tasks"] if all(found[key] == like[key] for key in keys)), None)


def _difference(arm: str, ours: dict[str, Any], control: dict[str, Any]) -> types.Comparison | None:
    """Return the metric minus that of `arm` on the same items; None where either value is not finite.

    Both metrics were computed on the same resamples of the items, so their differences give a paired bootstrap.
    """
    value = ours["value"] - control["value"]
    if not math.isfinite(value):
        return None
    drawn = [a - b for a, b in zip(ours["resampled"], control["resampled"], strict=True)]
    return compared(arm, estimate(value, drawn, ours["items"]), not ours["higher_is_better"])


def _speed(label: str, length: int, rounds: list[dict]) -> types.Speed:
    errors = [r[label][key] for r in rounds for key in ("error", "train_error") if key in r.get(label, {})]
    ours = [r[label] for r in rounds if "prefill_s" in r.get(label, {}) or "forward_s" in r.get(label, {})]
    measured: dict[str, Any] = {"note": errors[0] if errors else None if ours else "not measured"}
    for name, key in SPEEDS.items():
        took, softmax = ([r[key] for r in both] for both in _paired(label, rounds, key))
        if not took:
            continue
        if label != SOFTMAX:
            measured[f"{name}_speedup"] = speedup(softmax, took)
        if name == "decode":
            measured["decode_tokens_per_s"] = Spread.of([1 / s for s in took])
        else:
            measured[key] = Spread.of(took)
    if ours:
        measured["cache_mib"] = ours[0]["cache_bytes"] / 2**20 if "cache_bytes" in ours[0] else None
        peaks = [r["peak_memory_mib"] for r in ours if r["peak_memory_mib"] is not None]
        measured["peak_memory_mib"] = max(0.0, statistics.median(peaks)) if peaks else None
    return types.Speed(length, **measured)


def _paired(label: str, rounds: list[dict], key: str) -> tuple[list[dict], list[dict]]:
    """Return what the arm and softmax measured in the rounds in which both have `key`."""
    both = [(r[label], r[SOFTMAX]) for r in rounds if all(key in r.get(name, {}) for name in (label, SOFTMAX))]
    return [ours for ours, _ in both], [control for _, control in both]
