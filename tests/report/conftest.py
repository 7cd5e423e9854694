"""One report with every kind of arm, the numbers in the range of SmolLM2-135M's."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from hf_attnswap.report import Report, parse
from hf_attnswap.report.types import Comparison, Diagnostics, Gradient, Layer, Metric, Scale
from hf_attnswap.statistics import Spread

LENGTHS = (512, 2048, 8192)
SOFTMAX = {512: 29.3, 2048: 21.4}


def spread(median: float) -> dict[str, Any]:
    return {"median": median, "low": median * 0.95, "high": median * 1.06, "runs": 5}


def compared(value: float, spread: float = 0.02, few: bool = False, arm: str = "softmax") -> dict[str, Any]:
    low, high = value * (1 - spread), value * (1 + spread)
    verdict = "worse" if low > 1 else "better" if high < 1 else "no measurable difference"
    items = 20 if few else 640
    return {"arm": arm, "value": value, "low": low, "high": high, "items": items, "verdict": verdict}


def compare_all(arms: list[dict[str, Any]]) -> None:
    """Every arm against every other but softmax, at each context where both are."""
    for mine in arms:
        for index, entry in enumerate(mine["perplexity"]):
            others = [o for o in arms if o is not mine and o["attention"] != "softmax" and len(o["perplexity"]) > index]
            pairs = [(o["label"], entry["perplexity"] / o["perplexity"][index]["perplexity"]) for o in others]
            entry["against"] = [compared(value, arm=label) for label, value in pairs]


def arm(
    attention: str,
    cost: tuple[str, str],
    ratios: tuple[float, ...] | None = None,
    speeds: tuple[float, ...] = (),
    label: str | None = None,
    **other: Any,
) -> dict[str, Any]:
    """An arm with a ratio per context of SOFTMAX and a prefill speed-up per length of LENGTHS."""
    is_softmax = attention == "softmax"
    perplexity = [
        {
            "context": context,
            "perplexity": SOFTMAX[context] * ratio,
            "nll": 3.4,
            "standard_error": 0.02,
            "tokens": 10240,
            "ratio": None if is_softmax else compared(ratio),
            "against": [],
            "word_perplexity": SOFTMAX[context] * ratio * 2,
            "byte_perplexity": (SOFTMAX[context] * ratio) ** 0.25,
            "by_position": [{"first": 1, "last": 1, "nll": 5.5}, {"first": 2, "last": context - 1, "nll": 3.3}],
        }
        for context, ratio in zip(SOFTMAX, ratios or (), strict=False)
    ]
    speed = [
        {
            "length": length,
            "prefill_s": spread(length / 4000 / factor),
            "prefill_speedup": None if is_softmax else spread(factor),
            "decode_tokens_per_s": spread(40 * factor**0.5),
            "decode_speedup": None if is_softmax else spread(factor**0.5),
            "train_s": None,
            "train_speedup": None,
            "peak_memory_mib": 600.0 + length / 8,
            "cache_mib": length / 50,
            "note": None,
        }
        for length, factor in zip(LENGTHS, speeds, strict=False)
    ]
    made = {
        "label": label or attention,
        "attention": attention,
        "options": {},
        "control": False,
        "formula": f"{attention}: sum_j a_ij v_j",
        "cost": cost[0],
        "cost_class": cost[1],
        "source": "a paper",
        "new_parameters": 0,
        "status": "measured",
        "reason": None,
        "alignment": None,
        "swapped": [] if is_softmax else [whole(attention)],
        "training": [],
        "conversion": None,
        "checks": [] if is_softmax else [{"name": "causal", "passed": True, "worst": 1e-6, "limit": 1e-3}],
        "growth": {"prefill_s": {"exponent": 1.4, "low": 1.2, "high": 1.6, "lengths": 3}} if speed else {},
        "diagnostics": None,
        "perplexity": perplexity,
        "metrics": [],
        "speed": speed,
    }
    made |= other
    made["training_tokens"] = made["alignment"]["tokens"] if made["alignment"] else 0
    return made


def whole(attention: str) -> dict[str, Any]:
    """The group of a swap of all layers."""
    return {"attention": attention, "options": {}, "kind": "causal", "layers": list(range(30))}


SQUARE, LINEAR = ("O(n^2 d)", "quadratic"), ("O(n d^2)", "linear")
HYBRID, WINDOW = ("O(n (w d + d d'))", "linear"), ("O(n (w+m) d)", "linear")
ALIGNED = {"tokens": 51200, "seconds": 310.0, "first_loss": 0.9, "last_loss": 0.2}


def power(p: int, shift: str, *ratios: float) -> dict[str, Any]:
    options = {"p": p, "shift": shift, "temperature": False}
    label = f"relu_power:p={p}" + (",shift=none" if shift == "none" else "")
    return arm("relu_power", SQUARE, ratios, (0.62, 0.6, 0.55), label, options=options)


def make_report() -> dict[str, Any]:
    """A valid report: controls, a dial with two shifts, hybrids on each side of the window, failures."""
    window = {"window": 64, "sinks": 4}
    arms = [
        arm("softmax", SQUARE, (1.0, 1.0), (1.0, 1.0, 1.0), control=True),
        arm("none", ("0", "constant"), (4.1e3, 5.2e3), (1.2, 1.5, 4.0), control=True),
        arm("window", WINDOW, (1.51, 1.85), (0.8, 1.1, 2.6), "window:w=64", control=True, options=window),
        *[power(p, "max", ratio, ratio) for p, ratio in ((2, 2.03), (4, 1.32), (8, 1.105), (16, 1.033))],
        *[power(p, "none", ratio, ratio) for p, ratio in ((1, 8.1), (2, 3.45), (4, 1.99), (8, 1.34))],
        arm("relu_norm", SQUARE, (5.08, 5.5), (0.9, 0.88, 0.85)),
        arm("hedgehog", LINEAR, (4.98, 6.1), (0.5, 0.9, 2.1), new_parameters=2_211_840, alignment=ALIGNED),
        arm("elu", LINEAR, (252.0, 270.0), (0.6, 1.02, 2.4)),
        arm("sigmoid", SQUARE, (3.7e10, 4e10), (0.8, 0.82, 0.85), new_parameters=270),
        *[
            arm(f"{name}+window", HYBRID, ratios, (0.4, 0.7, 1.6), options=window, alignment=ALIGNED)
            for name, ratios in (("hedgehog", (1.27, 1.4)), ("elu", (1.50, 1.84)), ("t2r", (1.9, 2.3)))
        ],
        arm("gelu", SQUARE, (1.8, 1.9)),
        arm("performer", LINEAR, status="failed", reason="loss NaN at step 3 | <b>1</b> & [red]"),
        arm("delta", LINEAR, status="not measured", reason="the time limit of 600 s was reached"),
    ]
    compare_all(arms)
    return {
        "schema": "hf_attnswap.report",
        "version": 1,
        "kind": "tradeoff",
        "title": "Attention swaps in HuggingFaceTB/SmolLM2-135M-Instruct",
        "model": {
            "name": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "parameters": 134_515_008,
            "attention_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "dtype": "float32",
        },
        "machine": {
            "processor": "x86_64",
            "cores": 2,
            "threads": 2,
            "memory_gib": 15.6,
            "device": "cpu",
            "platform": "Linux-6.1",
        },
        "versions": {"hf_attnswap": "0.1.0", "torch": "2.9.0", "transformers": "5.0.0", "python": "3.11.7"},
        "date": "2026-11-21T22:00:00+00:00",
        "command": "attnswap tradeoff HuggingFaceTB/SmolLM2-135M-Instruct",
        "seeds": [0],
        "data": {
            "training": "WikiText-2 valid",
            "training_size": 51200,
            "evaluation": "WikiText-2 test",
            "evaluation_size": 10240,
            "unit": "tokens",
            "fingerprint": "0123456789abcdef",
        },
        "arms": arms,
    }


@pytest.fixture
def content() -> dict[str, Any]:
    """The report as its JSON has it."""
    return make_report()


@pytest.fixture
def report(content: dict[str, Any]) -> Report:
    """A fresh copy: tests change it."""
    return parse(content)


def metric(task: str, value: float, softmax: float, others: dict[str, float] | None, few: bool) -> Metric:
    """The entry of a task; `others` None for softmax's own."""

    def told(arm: str, other: float, spread: float = 0.1) -> Comparison:
        less = value - other
        low, high = less - spread, less + spread
        verdict = "better" if low > 0 else "worse" if high < 0 else "no measurable difference"
        return Comparison(arm, less, low, high, 20 if few else 640, verdict)

    return Metric(
        task, "found", True, value, 0.05, 20 if few else 640,
        difference=None if others is None else told("softmax", softmax),
        against=[told(label, other) for label, other in (others or {}).items()],
    )  # fmt: skip


def layer(kl: float, gradient: float, keys: float) -> Layer:
    return Layer(
        layer="model.layers.0.self_attn", kl=kl, perplexity_ratio=1.1,
        gradient=Gradient(1.0, 1.0, 1.0, gradient), gradient_of_softmax=Gradient(1.0, 1.0, 1.0, 2.0),
        dead=0.1, effective_keys=keys, softmax_effective_keys=10.0, row_sum=1.0,
        negative=0.0, sparsity=0.2, distance=0.3, output_scale=[Scale(1, 1, 1.0)],
    )  # fmt: skip


# What an arm finds of the needles at two lengths.
FOUND = {
    "softmax": (0.95, 0.9), "none": (0.0, 0.0), "window:w=64": (0.2, 0.1), "relu_power:p=16": (0.95, 0.85),
    "relu_norm": (0.5, 0.1), "elu": (0.0, 0.0), "hedgehog": (0.1, 0.0), "hedgehog+window": (0.25, 0.4),
}  # fmt: skip


@pytest.fixture
def full(report: Report) -> Report:
    """The report with tasks, the time of training steps, and a look at three layers of some arms."""
    for one in report.arms:
        found = FOUND.get(one.label)
        for number, length in enumerate((512, 2048) if found else ()):
            values = {label: both[number] for label, both in FOUND.items()}
            value, softmax = values.pop(one.label), FOUND["softmax"][number]
            others = None if one.attention == "softmax" else {k: v for k, v in values.items() if k != "softmax"}
            one.metrics.append(metric(f"needle at {length}", value, softmax, others, few=not number))
        for entry in one.speed[1:]:
            entry.train_s = Spread(**spread(entry.prefill_s.median * 3))
            entry.train_speedup = entry.prefill_speedup
        if found and one.attention != "softmax":
            layers = [layer(kl, 1.0 + kl, 5.0) for kl in (0.3, 0.1, 0.2)]
            one.diagnostics = Diagnostics(64, 64, layers, [1, 2, 0])
    return report


@pytest.fixture
def without() -> Callable[[Report, str], Report]:
    """The report without the arms of one attention."""

    def remove(report: Report, attention: str) -> Report:
        return replace(copy.deepcopy(report), arms=[a for a in report.arms if a.attention != attention])

    return remove
