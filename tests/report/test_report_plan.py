"""The opening of a report: the picture of what each layer runs, and three sentences."""

from pathlib import Path

from hf_attnswap.report import Report, plan, read
from hf_attnswap.report.short import opening
from hf_attnswap.report.types import Group

DEMO = Path(__file__).parents[2] / "benchmarks" / "results" / "demo" / "report.json"
WINDOW = {"window": 128, "sinks": 4}


def test_a_plan_is_drawn_group_by_group() -> None:
    report = read(DEMO)
    (arm,) = plan.shown(report)
    ((title, grid),) = plan._grids(report, arm)
    assert title == "smollm2-135m-quarter: softmax in 22 of 90 key/value groups"
    assert len(grid) == 3 and {len(row) for row in grid} == {30}
    assert [row[8] for row in grid] == ["softmax"] + ["window (sinks=4, window=128)"] * 2
    assert sum(cell == "softmax" for row in grid for cell in row) == 22
    assert "Not drawn, since they run one attention in every layer: none, window," in plan.plan(report).caption


def test_without_a_plan_the_best_arms_are_drawn(report: Report) -> None:
    assert [arm.label for arm in plan.shown(report)] == ["relu_power:p=16", "hedgehog+window"]
    ((title, grid),) = plan._grids(report, plan.shown(report)[1])
    assert title == "hedgehog+window: no softmax" and grid == [["hedgehog+window"] * 30]
    report.arms = report.arms[:1]
    assert plan.shown(report) == []


def test_each_kind_of_attention_has_its_grid(report: Report) -> None:
    arm = report.arms[-3]
    arm.swapped = [
        Group("window", WINDOW, [0, 1], "causal", ["3.2"]),
        Group("elu", {"unrotate": False, "half_life": 0.0}, list(range(31)), "cross"),
    ]
    (causal, own), (cross, other) = plan._grids(report, arm)
    assert causal == f"{arm.label}, causal attention: softmax in {90 - 7} of 90 key/value groups" and len(own) == 3
    assert [row[3] for row in own] == ["softmax", "softmax", "window (sinks=4, window=128)"]
    assert cross == f"{arm.label}, cross attention: no softmax" and other == [["elu"] * 31]


def test_three_sentences() -> None:
    kept, gained, beside = opening(read(DEMO))
    assert kept == (
        "smollm2-135m-quarter (O(n^2), untrained) keeps most; "
        "perplexity over softmax's at context 512: ×1.015 (1.009–1.022)* on 8 blocks."
    )
    assert gained == "At 2,048 tokens it gains prefill ×1.191 as fast, 26.4 MiB of cache in place of 90.2."
    assert beside.startswith("Beside its controls: window:window=596, the better of its windows of equal state")
    assert beside.endswith("softmax 0.875; smollm2-135m-quarter 0.000.")


def test_losses_are_said_and_nothing_is_said_of_nothing(report: Report) -> None:
    assert ", and loses prefill ×0.550 as fast, decoding ×0.742 as fast." in opening(report)[1]
    report.arms = report.arms[:1]
    assert opening(report) == []
