"""The words: each statement follows from the numbers, and turns when they do."""

import copy
from collections.abc import Callable
from typing import Any

import pytest

from hf_attnswap.report import facts, table, tasks
from hf_attnswap.report.short import short
from hf_attnswap.report.summary import summary
from hf_attnswap.report.tradeoff import tradeoff

Without = Callable[[dict[str, Any], str], dict[str, Any]]


def paragraph(report: dict[str, Any], start: str) -> str:
    found = [words for words in summary(report) if words.startswith(start)]
    assert len(found) == 1, (start, summary(report))
    return found[0]


def arm(report: dict[str, Any], label: str) -> dict[str, Any]:
    return next(arm for arm in report["arms"] if arm["label"] == label)


def set_speed(report: dict[str, Any], factors: dict[int, float], but: str = "") -> None:
    for one in report["arms"]:
        for entry in one["speed"]:
            if entry["prefill_speedup"] and one["label"] != but:
                value = factors[entry["length"]]
                entry["prefill_speedup"] = {
                    "median": value,
                    "low": value - 0.1,
                    "high": value + 0.1,
                    "runs": 5,
                }


def test_the_best_arm_is_named_with_its_interval_and_training(report: dict[str, Any]) -> None:
    said = paragraph(report, "Quality: at context 2,048, softmax has perplexity 21.40.")
    best = "relu_power:p=16 keeps most quality: 1.033 times softmax's perplexity (95 % interval 1.012 to 1.054)"
    assert f"{best}, with no training." in said
    assert "less than quadratic cost, hedgehog+window keeps most: 1.400" in said
    assert "after alignment on 51,200 tokens" in said
    assert "no measurable difference" not in said


def test_an_interval_around_one_is_no_difference_and_ties_are_open(report: dict[str, Any]) -> None:
    best = arm(report, "relu_power:p=16")["perplexity"][1]
    best["ratio"] |= {"low": 0.99, "high": 1.2, "verdict": "no measurable difference"}
    other = next(
        found
        for found in arm(report, "relu_power:p=8")["perplexity"][1]["against"]
        if found["arm"] == "relu_power:p=16"
    )
    other["verdict"] = "no measurable difference"
    said = paragraph(report, "Quality")
    assert "That is no measurable difference from softmax." in said
    assert "Between it and relu_power:p=8 there is no measurable difference, so their order is open." in said


def test_controls_are_never_the_best(report: dict[str, Any]) -> None:
    arm(report, "window:w=64")["perplexity"][1]["ratio"] |= {"value": 0.5, "low": 0.4, "high": 0.6}
    assert "relu_power:p=16 keeps most quality" in paragraph(report, "Quality")


def test_without_softmax_there_is_no_comparison(report: dict[str, Any], without: Without) -> None:
    assert "cannot be compared" in paragraph(without(report, "softmax"), "Quality")


def test_the_first_length_faster_than_softmax(report: dict[str, Any]) -> None:
    said = paragraph(report, "Prefill: from 8,192 tokens on, elu is faster than softmax in every run, 2.400 times")
    assert "from 8,192 on also hedgehog, hedgehog+window, elu+window and t2r+window" in said
    assert '"none" from 512 tokens on and "window:w=64" from 2,048 tokens on' in said


def test_nothing_faster_is_said_plainly(report: dict[str, Any]) -> None:
    set_speed(report, {512: 0.5, 2048: 0.7, 8192: 1.05})  # the slowest run at 8192 is 0.95
    said = paragraph(report, "Prefill: nothing is faster than softmax in every run at any length")
    assert "measured between 512 and 8,192 tokens" in said
    assert "1.050 times as fast" in said and "control" not in said


def test_faster_at_a_short_length_only_does_not_count_as_from_there_on(report: dict[str, Any]) -> None:
    set_speed(report, {512: 1.5, 2048: 0.7, 8192: 0.8})
    assert "1.500 times as fast (runs 1.400 to 1.600) at 512" in paragraph(
        report, "Prefill: nothing stays faster than softmax up to the longest length"
    )


def test_speed_that_was_not_measured(report: dict[str, Any]) -> None:
    for one in report["arms"]:
        for entry in one["speed"]:
            entry["decode_speedup"] = None
    assert paragraph(report, "Decoding") == "Decoding: no speed-up over softmax was measured."


def test_cost_classes_are_told_apart(report: dict[str, Any]) -> None:
    said = paragraph(report, "Cost: an activation applied to the scores")
    quadratic, linear = said.split("Linear arms are O(n)")
    assert "stays O(n^2)" in quadratic and "relu_power, relu_norm, sigmoid and gelu" in quadratic
    assert "hedgehog+window" in linear and "sigmoid" not in linear


def test_none_says_how_much_attention_is_needed(report: dict[str, Any], without: Without) -> None:
    assert "has 5,200 times softmax's perplexity" in paragraph(report, 'The control "none"')
    assert "is not known" in paragraph(without(report, "none"), 'The control "none"')
    arm(report, "none").update(status="failed", reason="it broke", perplexity=[])
    assert "has no ratio to softmax (it broke)" in paragraph(report, 'The control "none"')


@pytest.mark.parametrize(
    ("hybrid", "verdict"),
    [("hedgehog", "better"), ("elu", "no measurable difference"), ("t2r", "worse")],
)
def test_hybrids_are_compared_with_the_window(report: dict[str, Any], hybrid: str, verdict: str) -> None:
    said = paragraph(report, f"Hybrid {hybrid}+window against the control window:w=64: {verdict} at context 512, ×")
    assert "(the hybrid after alignment on 51,200 tokens, the control with no training)" in said


def against(report: dict[str, Any], label: str, other: str, context: int) -> dict[str, Any]:
    return next(found for found in arm(report, label)["perplexity"][context]["against"] if found["arm"] == other)


def test_verdicts_that_differ_by_context_are_both_said(report: dict[str, Any]) -> None:
    against(report, "hedgehog+window", "window:w=64", 1)["verdict"] = "worse"
    said = paragraph(report, "Hybrid hedgehog+window")
    assert "better at context 512, ×0.841 (0.824–0.858) and worse at context 2,048, ×0.757 " in said


def test_a_paired_difference_counts_where_intervals_overlap(report: dict[str, Any]) -> None:
    for entry in arm(report, "elu+window")["perplexity"]:
        entry["ratio"] |= {"low": 0.1, "high": 100.0}
    against(report, "elu+window", "window:w=64", 0).update(verdict="better", high=0.999)
    assert "window:w=64: better at context 512, ×0.993 (0.974–0.999)" in paragraph(report, "Hybrid elu+window")


def test_few_samples_are_marked(report: dict[str, Any]) -> None:
    against(report, "elu+window", "window:w=64", 0)["few"] = True
    assert "×0.993 (0.974–1.013)* and" in paragraph(report, "Hybrid elu+window")


def test_a_hybrid_is_compared_with_its_linear_part_alone(report: dict[str, Any]) -> None:
    said = paragraph(report, "Hybrid hedgehog+window")
    assert "; against its linear part alone, hedgehog: better at context 512, ×0.255 (0.250–0.260)" in said
    assert "linear part alone" not in paragraph(report, "Hybrid t2r+window")


def test_a_window_of_another_size_is_no_control(report: dict[str, Any]) -> None:
    arm(report, "elu+window")["options"] = {"window": 128, "sinks": 4}
    assert "was compared with no window control of the same window and sinks" in paragraph(report, "Hybrid elu+window")


def test_what_failed_is_named(report: dict[str, Any]) -> None:
    assert "performer" in paragraph(report, "Failed: ")
    assert "delta" in paragraph(report, "Not measured: ")


def test_growth_is_said_with_its_interval(report: dict[str, Any]) -> None:
    said = paragraph(report, "Growth: the time of the prefill grows as n^1.400 for softmax (1.200 to 1.600), ")
    assert "for relu_power:p=16 (1.200 to 1.600) and n^1.400 for hedgehog+window (1.200 to 1.600), measured" in said
    assert "measured between 512 and 8,192 tokens, the rest of the model included (95 % intervals)" in said
    for one in report["arms"]:
        one["growth"]["prefill_s"] = None
    assert not [words for words in summary(report) if words.startswith("Growth")]


def test_without_attention_is_the_bound(report: dict[str, Any]) -> None:
    said = paragraph(report, "Bound: at 8,192 tokens attention is 75 % of the time of the prefill")
    assert "no swap can be more than 4.000 times as fast (runs 3.800 to 4.240)" in said
    arm(report, "none")["speed"][-1]["prefill_speedup"].update(median=0.98, low=0.9)
    assert "is no faster without any attention" in paragraph(report, "Bound")
    arm(report, "none")["speed"] = []
    assert not [words for words in summary(report) if words.startswith("Bound")]


def test_tasks_are_said_by_their_verdicts(full: dict[str, Any]) -> None:
    said = paragraph(full, "Tasks, against softmax on the same items: ")
    assert "relu_power:p=16 no measurable difference in 2 of 2;" in said
    both = "worse in 2 of 2 (needle at 512: found and needle at 2048: found)"
    assert f"relu_norm, hedgehog, elu and hedgehog+window {both}." in said
    hybrid = paragraph(full, "Hybrid hedgehog+window")
    told = "in tasks better in 1 of 2 (needle at 2048: found) and no measurable difference in 1 of 2"
    assert hybrid.count(told) == 1 and hybrid.index(told) < hybrid.index("its linear part alone")
    for one in full["arms"]:
        one["tasks"] = []
    assert not [words for words in summary(full) if words.startswith("Tasks")]


def test_the_training_step_is_said_where_it_was_measured(full: dict[str, Any]) -> None:
    assert ", elu is faster than softmax" in paragraph(full, "Training step: from 8,192 tokens on")


def test_it_is_said_in_four_lines(report: dict[str, Any]) -> None:
    arm(report, "hedgehog+window")["speed"][-1]["cache_mib"] = 9.0
    said = dict(short(report))
    assert list(said) == ["Costs", "Gains", "Pays", "Controls"]
    assert said["Costs"] == (
        "perplexity over softmax's at context 2,048: ×1.033 (1.012–1.054) with relu_power:p=16 (O(n^2), untrained) and "
        "×1.400 (1.372–1.428) with hedgehog+window (O(n), trained on 51,200 tokens)."
    )
    assert said["Gains"] == (
        "at 8,192 tokens, relu_power:p=16: prefill ×0.550 as fast, decoding ×0.742 as fast; hedgehog+window: prefill "
        "×1.600 as fast, decoding ×1.265 as fast, 9.0 MiB of cache in place of 163.8."
    )
    assert said["Pays"] == (
        "relu_power:p=16: at no length up to 8,192; hedgehog+window: prefill and decoding from 8,192 tokens on."
    )
    assert said["Controls"].startswith("the window alone has ×1.850 (1.813–1.887), hedgehog+window is better; ")
    against(report, "hedgehog+window", "window:w=64", 1)["verdict"] = "no measurable difference"
    assert "hedgehog+window is not measurably different; no att" in dict(short(report))["Controls"]


def test_four_lines_where_less_was_measured(report: dict[str, Any], without: Without) -> None:
    alone = dict(short(without(without(report, "window"), "none")))
    assert "Controls" not in alone and "relu_power" in alone["Costs"]
    assert "hedgehog+window: prefill ×1.600 as fast" in dict(short(without(report, "softmax")))["Gains"]
    for one in report["arms"]:
        one["speed"] = []
    assert [what for what, _ in short(report)] == ["Costs", "Controls"]
    for one in report["arms"]:
        one["perplexity"] = []
    assert short(report) == []


def test_a_trained_arm_is_said_beside_the_softmax_that_was_trained_too(report: dict[str, Any]) -> None:
    hybrid, tuned = arm(report, "hedgehog+window"), copy.deepcopy(arm(report, "softmax"))
    tuned.update(label="tuned", training=[{}], training_tokens=4096)
    hybrid["training"] = [{}]
    report["arms"].append(tuned)
    assert "×1.400" in dict(short(report))["Costs"]  # the two were not compared
    for entry in hybrid["perplexity"]:
        entry["against"].append(entry["ratio"] | {"arm": "tuned", "value": 1.75, "low": 1.7, "high": 1.8})
    told = (
        "×1.750 (1.700–1.800) with hedgehog+window (O(n), trained on 51,200 tokens) beside a softmax trained on 4,096"
    )
    assert told in dict(short(report))["Costs"] and "×1.400" not in dict(short(report))["Costs"]
    cells = {row[0]: row[4] for row in table.rows(report)}
    assert cells["hedgehog+window"].endswith("×1.750 (1.700–1.800)†") and "†" not in cells["elu+window"]
    assert ("trained arms", "† beside tuned, trained on 4,096 tokens") in table.details(report)
    assert "Trained arms stand beside tuned" in tradeoff(report).caption
    said = paragraph(report, "Quality: ")
    assert (
        "1.750 times softmax's perplexity (95 % interval 1.700 to 1.800), with a softmax that was trained too" in said
    )
    assert "1.033 times softmax's perplexity (95 % interval 1.012 to 1.054), with no training" in said


def test_trained_arms_are_ranked_by_the_softmax_that_was_trained_too(report: dict[str, Any]) -> None:
    def order() -> list[str]:
        return [one["label"] for one in facts.ranked(report) if one["label"].endswith("+window")]

    assert order() == ["hedgehog+window", "elu+window", "t2r+window"]
    hybrid, tuned = arm(report, "hedgehog+window"), copy.deepcopy(arm(report, "softmax"))
    tuned.update(label="tuned", training=[{}], training_tokens=4096)
    hybrid["training"] = [{}]
    report["arms"].append(tuned)
    for entry in hybrid["perplexity"]:
        entry["against"].append(entry["ratio"] | {"arm": "tuned", "value": 1.95, "low": 1.9, "high": 2.0})
    assert order() == ["elu+window", "hedgehog+window", "t2r+window"]
    assert "elu+window" in dict(short(report))["Costs"]


def test_tasks_of_trained_arms_are_compared_with_that_softmax_too(full: dict[str, Any]) -> None:
    hybrid, tuned = arm(full, "hedgehog+window"), copy.deepcopy(arm(full, "softmax"))
    tuned.update(label="tuned", training=[{}], training_tokens=4096)
    hybrid["training"] = [{}]
    full["arms"].append(tuned)
    entry = hybrid["tasks"][0]
    before = tasks.cell(full, hybrid, (entry["task"], entry["metric"]))
    entry["against"].append(entry["difference"] | {"arm": "tuned", "value": 0.125, "low": 0.11, "high": 0.15})
    after = tasks.cell(full, hybrid, (entry["task"], entry["metric"]))
    assert "†" not in before and "+0.125 (+0.110 to +0.150)" in after and after.endswith("†")
