"""The words: each statement follows from the numbers, and turns when they do."""

import copy
import io
from collections.abc import Callable
from dataclasses import replace

import pytest
from changing import change
from rich.console import Console

from hf_attnswap.report import Report, facts, tables
from hf_attnswap.report.details import details
from hf_attnswap.report.screen import show
from hf_attnswap.report.short import short
from hf_attnswap.report.summary import summary
from hf_attnswap.report.tradeoff import tradeoff
from hf_attnswap.report.types import Arm, Comparison, Stage
from hf_attnswap.statistics import Spread

STAGE = Stage("finetune", "all weights", "book.txt", 4096, 8, 1e-5)
Without = Callable[[Report, str], Report]


def paragraph(report: Report, start: str) -> str:
    found = [words for words in summary(report) if words.startswith(start)]
    assert len(found) == 1, (start, summary(report))
    return found[0]


def arm(report: Report, label: str) -> Arm:
    return next(arm for arm in report.arms if arm.label == label)


def set_speed(report: Report, factors: dict[int, float], but: str = "") -> None:
    for one in report.arms:
        for entry in one.speed:
            if entry.prefill_speedup and one.label != but:
                value = factors[entry.length]
                entry.prefill_speedup = Spread(value, value - 0.1, value + 0.1, 5)


def test_the_best_arm_is_named_with_its_interval_and_training(report: Report) -> None:
    said = paragraph(report, "Quality: at context 2,048, softmax has perplexity 21.40.")
    best = "relu_power:p=16 keeps most quality: 1.033 times softmax's perplexity (95 % interval 1.012 to 1.054)"
    assert f"{best}, with no training." in said
    assert "less than quadratic cost, hedgehog+window keeps most: 1.400" in said
    assert "after alignment on 51,200 tokens" in said
    assert "no measurable difference" not in said


def test_an_interval_around_one_is_no_difference_and_ties_are_open(report: Report) -> None:
    best = arm(report, "relu_power:p=16").perplexity[1]
    change(best.ratio, low=0.99, high=1.2, verdict="no measurable difference")
    other = next(
        found for found in arm(report, "relu_power:p=8").perplexity[1].against if found.arm == "relu_power:p=16"
    )
    other.verdict = "no measurable difference"
    said = paragraph(report, "Quality")
    assert "That is no measurable difference from softmax." in said
    assert "Between it and relu_power:p=8 there is no measurable difference, so their order is open." in said


def test_controls_are_never_the_best(report: Report) -> None:
    change(arm(report, "window:w=64").perplexity[1].ratio, value=0.5, low=0.4, high=0.6)
    assert "relu_power:p=16 keeps most quality" in paragraph(report, "Quality")


def test_without_softmax_there_is_no_comparison(report: Report, without: Without) -> None:
    assert "cannot be compared" in paragraph(without(report, "softmax"), "Quality")


def test_the_first_length_faster_than_softmax(report: Report) -> None:
    said = paragraph(report, "Prefill: from 8,192 tokens on, elu is faster than softmax in every run, 2.400 times")
    assert "from 8,192 on also hedgehog, hedgehog+window, elu+window and t2r+window" in said
    assert '"none" from 512 tokens on and "window:w=64" from 2,048 tokens on' in said


def test_nothing_faster_is_said_plainly(report: Report) -> None:
    set_speed(report, {512: 0.5, 2048: 0.7, 8192: 1.05})  # the slowest run at 8192 is 0.95
    said = paragraph(report, "Prefill: nothing is faster than softmax in every run at any length")
    assert "measured between 512 and 8,192 tokens" in said
    assert "1.050 times as fast" in said and "control" not in said


def test_faster_at_a_short_length_only_does_not_count_as_from_there_on(report: Report) -> None:
    set_speed(report, {512: 1.5, 2048: 0.7, 8192: 0.8})
    assert "1.500 times as fast (runs 1.400 to 1.600) at 512" in paragraph(
        report, "Prefill: nothing stays faster than softmax up to the longest length"
    )


def test_speed_that_was_not_measured(report: Report) -> None:
    for one in report.arms:
        for entry in one.speed:
            entry.decode_speedup = None
    assert paragraph(report, "Decoding") == "Decoding: no speed-up over softmax was measured."


def test_cost_classes_are_told_apart(report: Report) -> None:
    said = paragraph(report, "Cost: an activation applied to the scores")
    quadratic, linear = said.split("Linear arms are O(n)")
    assert "stays O(n^2)" in quadratic and "relu_power, relu_norm, sigmoid and gelu" in quadratic
    assert "hedgehog+window" in linear and "sigmoid" not in linear


def test_none_says_how_much_attention_is_needed(report: Report, without: Without) -> None:
    assert "has 5,200 times softmax's perplexity" in paragraph(report, 'The control "none"')
    assert "is not known" in paragraph(without(report, "none"), 'The control "none"')
    change(arm(report, "none"), status="failed", reason="it broke", perplexity=[])
    assert "has no ratio to softmax (it broke)" in paragraph(report, 'The control "none"')


@pytest.mark.parametrize(
    ("hybrid", "verdict"),
    [("hedgehog", "better"), ("elu", "no measurable difference"), ("t2r", "worse")],
)
def test_hybrids_are_compared_with_the_window(report: Report, hybrid: str, verdict: str) -> None:
    said = paragraph(report, f"Hybrid {hybrid}+window against the control window:w=64: {verdict} at context 512, ×")
    assert "(the hybrid after alignment on 51,200 tokens, the control with no training)" in said


def against(report: Report, label: str, other: str, context: int) -> Comparison:
    return next(found for found in arm(report, label).perplexity[context].against if found.arm == other)


def test_verdicts_that_differ_by_context_are_both_said(report: Report) -> None:
    against(report, "hedgehog+window", "window:w=64", 1).verdict = "worse"
    said = paragraph(report, "Hybrid hedgehog+window")
    assert "better at context 512, ×0.841 (0.824–0.858) and worse at context 2,048, ×0.757 " in said


def test_a_paired_difference_counts_where_intervals_overlap(report: Report) -> None:
    for entry in arm(report, "elu+window").perplexity:
        change(entry.ratio, low=0.1, high=100.0)
    change(against(report, "elu+window", "window:w=64", 0), verdict="better", high=0.999)
    assert "window:w=64: better at context 512, ×0.993 (0.974–0.999)" in paragraph(report, "Hybrid elu+window")


def test_few_samples_are_marked(report: Report) -> None:
    against(report, "elu+window", "window:w=64", 0).items = 20
    assert "×0.993 (0.974–1.013)* and" in paragraph(report, "Hybrid elu+window")


def test_a_hybrid_is_compared_with_its_linear_part_alone(report: Report) -> None:
    said = paragraph(report, "Hybrid hedgehog+window")
    assert "; against its linear part alone, hedgehog: better at context 512, ×0.255 (0.250–0.260)" in said
    assert "linear part alone" not in paragraph(report, "Hybrid t2r+window")


def test_a_window_of_another_size_is_no_control(report: Report) -> None:
    arm(report, "elu+window").options = {"window": 128, "sinks": 4}
    assert "was compared with no window control of the same window and sinks" in paragraph(report, "Hybrid elu+window")


def test_what_failed_is_named(report: Report) -> None:
    assert "performer" in paragraph(report, "Failed: ")
    assert "delta" in paragraph(report, "Not measured: ")


def test_growth_is_said_with_its_interval(report: Report) -> None:
    said = paragraph(report, "Growth: the time of the prefill grows as n^1.400 for softmax (1.200 to 1.600), ")
    assert "for relu_power:p=16 (1.200 to 1.600) and n^1.400 for hedgehog+window (1.200 to 1.600), measured" in said
    assert "measured between 512 and 8,192 tokens, the rest of the model included (95 % intervals)" in said
    for one in report.arms:
        one.growth = {}
    assert not [words for words in summary(report) if words.startswith("Growth")]


def test_without_attention_is_the_bound(report: Report) -> None:
    said = paragraph(report, "Bound: at 8,192 tokens attention is 75 % of the time of the prefill")
    assert "no swap can be more than 4.000 times as fast (runs 3.800 to 4.240)" in said
    change(arm(report, "none").speed[-1].prefill_speedup, median=0.98, low=0.9)
    assert "is no faster without any attention" in paragraph(report, "Bound")
    arm(report, "none").speed = []
    assert not [words for words in summary(report) if words.startswith("Bound")]


def test_tasks_are_said_by_their_verdicts(full: Report) -> None:
    said = paragraph(full, "Tasks, against softmax on the same items: ")
    assert "relu_power:p=16 no measurable difference in 2 of 2;" in said
    both = "worse in 2 of 2 (needle at 512: found and needle at 2048: found)"
    assert f"relu_norm, hedgehog, elu and hedgehog+window {both}." in said
    hybrid = paragraph(full, "Hybrid hedgehog+window")
    told = "in tasks better in 1 of 2 (needle at 2048: found) and no measurable difference in 1 of 2"
    assert hybrid.count(told) == 1 and hybrid.index(told) < hybrid.index("its linear part alone")
    for one in full.arms:
        one.metrics = []
    assert not [words for words in summary(full) if words.startswith("Tasks")]


def test_the_training_step_is_said_where_it_was_measured(full: Report) -> None:
    assert ", elu is faster than softmax" in paragraph(full, "Training step: from 8,192 tokens on")


def test_it_is_said_in_four_lines(report: Report) -> None:
    arm(report, "hedgehog+window").speed[-1].cache_mib = 9.0
    said = dict(short(report))
    assert list(said) == ["Costs", "Gains", "Pays", "Controls"]
    assert said["Costs"] == (
        "perplexity over softmax's at context 2,048: ×1.033 (1.012–1.054) with relu_power:p=16 (O(n^2), untrained) and "
        "×1.400 (1.372–1.428) with hedgehog+window (O(n), trained on 51,200 tokens); at 8,192 tokens, "
        "relu_power:p=16: prefill ×0.550 as fast, decoding ×0.742 as fast."
    )
    assert said["Gains"] == (
        "at 8,192 tokens, hedgehog+window: prefill ×1.600 as fast, decoding ×1.265 as fast, 9.0 MiB of cache in place "
        "of 163.8."
    )
    assert said["Pays"] == (
        "relu_power:p=16: at no length up to 8,192; hedgehog+window: prefill and decoding from 8,192 tokens on."
    )
    assert said["Controls"].startswith("the window alone has ×1.850 (1.813–1.887), hedgehog+window is better; ")
    against(report, "hedgehog+window", "window:w=64", 1).verdict = "no measurable difference"
    assert "hedgehog+window is not measurably different; no att" in dict(short(report))["Controls"]


def test_four_lines_where_less_was_measured(report: Report, without: Without) -> None:
    alone = dict(short(without(without(report, "window"), "none")))
    assert "Controls" not in alone and "relu_power" in alone["Costs"]
    assert "hedgehog+window: prefill ×1.600 as fast" in dict(short(without(report, "softmax")))["Gains"]
    for one in report.arms:
        one.speed = []
    assert [what for what, _ in short(report)] == ["Costs", "Controls"]
    for one in report.arms:
        one.perplexity = []
    assert short(report) == []


def test_a_trained_arm_is_said_beside_the_softmax_that_was_trained_too(report: Report) -> None:
    hybrid, tuned = arm(report, "hedgehog+window"), copy.deepcopy(arm(report, "softmax"))
    change(tuned, label="tuned", training=[STAGE], training_tokens=4096)
    hybrid.training = [STAGE]
    report.arms.append(tuned)
    assert "×1.400" in dict(short(report))["Costs"]  # the two were not compared
    for entry in hybrid.perplexity:
        entry.against.append(replace(entry.ratio, arm="tuned", value=1.75, low=1.7, high=1.8))
    told = (
        "×1.750 (1.700–1.800) with hedgehog+window (O(n), trained on 51,200 tokens) beside a softmax trained on 4,096"
    )
    assert told in dict(short(report))["Costs"] and "×1.400" not in dict(short(report))["Costs"]
    cells = {row[0]: row[4] for row in tables.quality(report).rows}
    assert cells["hedgehog+window"].endswith("×1.750 (1.700–1.800)†") and "†" not in cells["elu+window"]
    assert ("trained arms", "† beside tuned, trained on 4,096 tokens") in details(report)
    assert "Trained arms stand beside tuned" in tradeoff(report).caption
    said = paragraph(report, "Quality: ")
    assert (
        "1.750 times softmax's perplexity (95 % interval 1.700 to 1.800), with a softmax that was trained too" in said
    )
    assert "1.033 times softmax's perplexity (95 % interval 1.012 to 1.054), with no training" in said


def test_trained_arms_are_ranked_by_the_softmax_that_was_trained_too(report: Report) -> None:
    def order() -> list[str]:
        return [one.label for one in facts.ranked(report) if one.label.endswith("+window")]

    assert order() == ["hedgehog+window", "elu+window", "t2r+window"]
    hybrid, tuned = arm(report, "hedgehog+window"), copy.deepcopy(arm(report, "softmax"))
    change(tuned, label="tuned", training=[STAGE], training_tokens=4096)
    hybrid.training = [STAGE]
    report.arms.append(tuned)
    for entry in hybrid.perplexity:
        entry.against.append(replace(entry.ratio, arm="tuned", value=1.95, low=1.9, high=2.0))
    assert order() == ["elu+window", "hedgehog+window", "t2r+window"]
    assert "elu+window" in dict(short(report))["Costs"]


def test_tasks_of_trained_arms_are_compared_with_that_softmax_too(full: Report) -> None:
    hybrid, tuned = arm(full, "hedgehog+window"), copy.deepcopy(arm(full, "softmax"))
    change(tuned, label="tuned", training=[STAGE], training_tokens=4096)
    hybrid.training = [STAGE]
    full.arms.append(tuned)
    entry = hybrid.metrics[0]
    before = tables.metric_cell(full, hybrid, entry)
    entry.against.append(replace(entry.difference, arm="tuned", value=0.125, low=0.11, high=0.15))
    after = tables.metric_cell(full, hybrid, entry)
    assert "†" not in before and "+0.125 (+0.110 to +0.150)" in after and after.endswith("†")


def test_a_loss_is_never_among_the_gains(report: Report) -> None:
    for one in report.arms:
        for entry in one.speed:
            for key in ("prefill_speedup", "decode_speedup"):
                if getattr(entry, key) and one.attention != "none":
                    setattr(entry, key, Spread(0.8, 0.7, 0.9, 5))
    said = dict(short(report))
    assert said["Gains"] == "at 8,192 tokens, nothing that was measured." and "prefill ×0.800 as fast" in said["Costs"]
    for entry in arm(report, "hedgehog+window").speed:
        entry.prefill_speedup = Spread(1.01, 0.9, 1.2, 5)  # neither: some runs were slower, some faster
    said = dict(short(report))
    assert "×1.010" not in said["Gains"] + said["Costs"]


@pytest.mark.parametrize("place", (-1, 0), ids=("shown", "on the page alone"))
def test_the_terminal_explains_the_mark_where_it_shows_it(report: Report, place: int) -> None:
    """The terminal shows the speeds at the longest length; `none` is 4 times as fast there."""
    for entry in arm(report, "elu").speed:
        entry.prefill_speedup = Spread(1.0, 0.9, 1.1, 5)
    arm(report, "elu").speed[place].prefill_speedup = Spread(4.5, 4.4, 4.6, 5)
    console = Console(width=80, file=io.StringIO())
    console.print(show(report))
    text = console.file.getvalue()
    assert ("‡ faster than without any attention" in text) == ("×4.500‡" in text) == (place == -1)


def test_what_is_faster_than_no_attention_is_noise_and_never_praised(report: Report) -> None:
    """`none` is 4 times as fast at 8,192 tokens, which no attention can exceed."""
    assert not [words for words in summary(report) if words.startswith("Noise")]
    elu = arm(report, "elu")
    elu.speed[2].prefill_speedup = Spread(4.5, 4.4, 4.6, 5)
    assert "elu came out faster somewhere than without any attention" in paragraph(report, "Noise: ")
    assert "elu," not in paragraph(report, "Prefill: ") and facts.faster_from(report, elu, "prefill_speedup") is None
    assert "elu" not in [one.label for one, _ in facts.pareto(report, "prefill_speedup")]
    shown = tables.speed(report)
    cell = next(row[3] for row in shown.rows if row[:2] == ["8,192", "elu"])
    assert cell == "×4.500 (4.400–4.600)‡" and any(
        "‡ faster than without any attention" in note for note in shown.notes
    )
    assert "left out as noise, faster than without any attention: elu" in tradeoff(report).caption
    hybrid = arm(report, "hedgehog+window")
    hybrid.speed[2].prefill_speedup = Spread(4.5, 4.4, 4.6, 5)
    assert "prefill" not in dict(short(report))["Gains"]


def test_two_rounds_give_no_range_and_no_claim(report: Report) -> None:
    for one in report.arms:
        for entry in one.speed:
            for key in ("prefill_s", "prefill_speedup", "decode_tokens_per_s", "decode_speedup"):
                if getattr(entry, key):
                    setattr(entry, key, replace(getattr(entry, key), runs=2))
    shown = tables.speed(report)
    assert "No ranges: a range needs 3 rounds, there are 2." in shown.notes
    assert not any("–" in cell for row in shown.rows for cell in row)
    assert "takes 3 rounds, there are 2" in paragraph(report, "Prefill: ")
    assert "it needs 3 rounds, there are 2" in dict(short(report))["Pays"]
    assert "(runs" not in paragraph(report, "Bound: ")


def test_fewer_than_eight_blocks_give_no_interval(report: Report) -> None:
    for one in report.arms:
        for entry in one.perplexity:
            for compared in [entry.ratio, *entry.against]:
                if compared:
                    change(compared, low=None, high=None, items=4, verdict=None)
    shown = tables.quality(report)
    assert "No intervals: an interval needs 8 blocks, there are 4." in shown.notes
    assert not any("–" in cell for row in shown.rows for cell in row)
    assert "95 %" not in paragraph(report, "Quality") and "no measurable difference" not in " ".join(summary(report))
    assert "too few blocks to say at context 512, ×0.841" in paragraph(report, "Hybrid hedgehog+window")
    tradeoff(report)


def test_two_lengths_give_no_exponent(report: Report) -> None:
    for one in report.arms:
        one.growth, one.speed = {}, one.speed[:2]
    notes = tables.speed(report).notes
    assert "No growth with the length: an exponent needs 3 lengths, there are 2." in notes
