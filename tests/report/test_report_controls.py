"""Controls of equal state and of equal time, and what arms recall, in words, tables, terminal and card."""

import io

import pytest
from changing import change
from rich.console import Console

from hf_attnswap.publish import measured
from hf_attnswap.report import Report, facts, parse, tables, to_json
from hf_attnswap.report.screen import show
from hf_attnswap.report.short import short
from hf_attnswap.report.summary import summary
from hf_attnswap.report.types import Arm, Control

WINDOW = "window:w=64"


def arm(report: Report, label: str) -> Arm:
    return next(arm for arm in report.arms if arm.label == label)


@pytest.fixture
def controlled(full: Report) -> Report:
    """Beside hedgehog+window (1.4) stand a window of equal state (1.85) and elu+window (1.84) as that of equal time."""
    arm(full, "hedgehog+window").controls = [Control("state", WINDOW), Control("time", "elu+window")]
    return full


def told(report: Report) -> str:
    (said,) = [words for words in summary(report) if words.startswith("Controls of hedgehog+window")]
    return said


def printed(report: Report) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(show(report))
    return console.file.getvalue()


def test_the_verdict_is_against_the_better_of_the_two(controlled: Report) -> None:
    hybrid = arm(controlled, "hedgehog+window")
    control, other, compared = facts.better_control(controlled, hybrid)
    assert (control.equal, other.label) == ("time", "elu+window") and compared.value == pytest.approx(1.4 / 1.84)
    assert told(controlled).endswith("Against the better of them, elu+window: better.")
    for entry in hybrid.perplexity:
        for found in entry.against:
            if found.arm == WINDOW:
                change(found, value=1.2, low=1.1, high=1.3, verdict="worse")
    assert facts.better_control(controlled, hybrid)[1].label == WINDOW
    said = told(controlled)
    assert f"of equal state {WINDOW}: worse at context 512, ×1.200 (1.100–1.300) and 2,048" in said
    assert said.endswith(f"Against the better of them, {WINDOW}: worse.")
    assert "in tasks better in 1 of 2 (needle at 2048: found)" in said
    beside = dict(short(controlled))["Controls"]
    assert beside.startswith(f"{WINDOW}, the better of its windows of equal state and of equal time, has ×1.850")
    assert "hedgehog+window is worse" in beside
    assert f"Beside {WINDOW} of equal state hedgehog+window is worse" in printed(controlled)
    column = "over the better control of equal state or time (95 %)"
    quality = tables.quality(controlled)
    cells = {row[0]: row[quality.header.index(column)] for row in quality.rows}
    assert cells["hedgehog+window"] == f"×1.200 (1.100–1.300) of {WINDOW} (equal state)" and cells["elu"] == "-"
    lines = "\n".join(measured._perplexities(controlled, hybrid) + measured._controls(controlled, hybrid))
    assert f"against {WINDOW}, of equal state, not trained: ×1.200" in lines
    assert f"controls of equal state and of equal time, {WINDOW}: ×1.200 (1.100–1.300), worse." in lines


def test_softmax_can_be_the_control_and_there_can_be_none(controlled: Report) -> None:
    hybrid = arm(controlled, "hedgehog+window")
    hybrid.controls = [
        Control("state", None, "it is too small"),
        Control("time", "softmax", "its attention is no faster than softmax"),
    ]
    control, other, compared = facts.better_control(controlled, hybrid)
    assert (control.equal, other.label) == ("time", "softmax") and compared is hybrid.perplexity[1].ratio
    said = told(controlled)
    assert "of equal state none (it is too small); of equal time softmax (its attention is no faster than" in said
    assert "worse in 2 of 2" in said and said.endswith("Against the better of them, softmax: worse.")
    hybrid.controls = hybrid.controls[:1]
    assert facts.better_control(controlled, hybrid) is None and told(controlled).endswith("none (it is too small).")
    with pytest.raises(ValueError, match="a note with the reason, since there is no control"):
        Control("state", None)


def test_without_controls_nothing_is_said_of_them(full: Report) -> None:
    assert not [words for words in summary(full) if words.startswith("Controls of")]
    assert not any("better control" in column for column in tables.quality(full).header)
    assert parse(to_json(full)).arms[0].controls == []


def test_the_card_shows_its_own_controls_alone(controlled: Report) -> None:
    controls = [found.label for found in measured._beside(controlled, arm(controlled, "hedgehog+window")).arms]
    assert {"softmax", WINDOW, "elu+window", "hedgehog+window"} <= set(controls)
    assert WINDOW not in [found.label for found in measured._beside(controlled, arm(controlled, "elu")).arms]


def test_what_arms_recall_stands_in_the_headline_with_its_items(controlled: Report) -> None:
    assert dict(short(controlled))["Recalls"] == (
        "needles found at 512 and 2,048 tokens (20 to 640 items each): softmax 0.950, 0.900; relu_power:p=16 0.950, "
        "0.850; hedgehog+window 0.250, 0.400."
    )
    said = "Needles at 512, 2,048 (of 20): 0.25 0.40, softmax 0.95 0.90, with hedgehog"
    assert said in printed(controlled)
    for one in controlled.arms:
        for entry in one.metrics:
            entry.task, entry.items = entry.task.replace("needle", "copy"), 32
    assert "loss on a text written twice at 512 and 2,048 tokens (32 items each)" in dict(short(controlled))["Recalls"]


def test_a_headline_of_few_blocks_says_how_many(report: Report) -> None:
    assert "on 640 blocks" not in dict(short(report))["Costs"]
    change(arm(report, "hedgehog+window").perplexity[1].ratio, items=20)
    assert "×1.400 (1.372–1.428)* on 20 blocks with hedgehog+window" in dict(short(report))["Costs"]
