"""Windows of equal state and of equal time: that they are equal, that they stand beside their arm, what is said."""

import json

import pytest
from tiny_models import tiny

from hf_attnswap import report
from hf_attnswap.benchmark.generation import filled_cache
from hf_attnswap.integration.cache import cache_nbytes
from hf_attnswap.integration.swapping import swapped_modules
from hf_attnswap.report import facts
from hf_attnswap.sources.conversions import Conversion
from hf_attnswap.sources.texts import TextSource
from hf_attnswap.tradeoff import Arm, Settings, controls, measure
from hf_attnswap.tradeoff.arms import build
from hf_attnswap.tradeoff.controls import equal_state, equal_time, equal_windows, with_equal_controls

LENGTH = 96


@pytest.fixture
def clock(monkeypatch):
    """What a call costs is what it returns: no machine's noise."""

    def interleaved(candidates, rounds, device):
        return {name: [run()] * rounds for name, run in candidates.items()}

    monkeypatch.setattr(controls, "interleaved", interleaved)


def beside(arms, tmp_path, model=None):
    given = [Arm.parse(arm) if isinstance(arm, str) else arm for arm in arms]
    made, told = with_equal_controls(given, model or tiny(), LENGTH, tmp_path / "controls.json", lambda line: None)
    return {arm.label: arm for arm in made}, {
        label: {control.equal: control for control in found} for label, found in told.items()
    }


def test_a_window_of_equal_time_is_found_by_halving(clock):
    def find(ours, softmax=1000):
        return equal_time([(lambda: ours, 6)], lambda window: [(lambda: 10 + window, 6)], [(lambda: softmax, 6)], 1024)

    assert find(10 + 400) == 400 and find(10 + 405) == 400 and find(10 + 411) == 416 and find(27) == 16
    assert find(1000) == {"arm": "softmax", "note": "its attention is no faster than softmax at 1,024 tokens"}
    assert find(20) == {"note": "its attention is faster than a window of 16 at 1,024 tokens"}
    assert find(1200, 1300)["note"] == "a window of its time would hold all 1,024 tokens, as softmax does"


def test_the_time_is_that_of_all_layers(clock):
    """Of six layers two keep softmax, and one of each sort stands for the others."""
    ours = [(lambda: 1000, 2), (lambda: 100, 4)]
    assert equal_time(ours, lambda window: [(lambda: window, 6)], [(lambda: 1000, 6)], 1024) == 400


def test_layers_are_alike_whichever_group_runs_which():
    kept = build(Arm.parse("window:window=8,keep=[0.0,1.1]"), tiny())
    assert [count for _, count in controls.Layers.of(kept, 16).runs()] == [2, 1]


def test_a_window_of_equal_state_by_hand():
    def bytes_of(window):
        return 1000 + 64 * (window + 4)

    assert equal_state(bytes_of(37), bytes_of, 512, sinks=4) == 37
    assert equal_state(bytes_of(37) + 31, bytes_of, 512) == 37
    assert equal_state(bytes_of(600), bytes_of, 512, 4)["arm"] == "softmax"
    assert "smaller than that of a window of one token" in equal_state(1100, bytes_of, 512, 4)["note"]


ARMS = (
    "elu+window:window=8,sinks=1", "hedgehog:layers=1::2", "hedgehog+window:window=8,keep=[0.0,2.1]",
    "window:window=8,keep=[0.0,2.1]",
)  # fmt: skip


@pytest.mark.parametrize("text", ARMS)
def test_the_cache_of_the_control_is_as_large(text, tmp_path, monkeypatch):
    monkeypatch.setattr(controls, "equal_time", lambda *given: {"note": "not looked for"})
    model = tiny()
    arms, told = beside(["softmax", text], tmp_path, model)
    control = arms[told[text]["state"].arm]
    assert list(arms) == ["softmax", control.label, text] and control.is_control and control.attention == "window"
    ours, theirs = (cache_nbytes(filled_cache(build(arm, model), LENGTH)) for arm in (arms[text], control))
    per_token = cache_nbytes(filled_cache(model, LENGTH)) / LENGTH
    assert abs(ours - theirs) <= per_token / 2
    assert control.layers == arms[text].layers and control.keep == (None if text == ARMS[3] else arms[text].keep)
    assert control.options["sinks"] == arms[text].options.get("sinks", 4)


def test_controls_and_what_keeps_no_state_have_none(clock, tmp_path):
    arms, told = beside(["softmax", "none", "window", "relu", "window:layers=1::2"], tmp_path)
    assert list(arms) == ["softmax", "none", "window", "relu", "window:layers=1::2"] and told == {}


def test_two_arms_share_a_control_and_a_window_that_is_there_is_one(tmp_path, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(controls, "equal_time", lambda *given: {"arm": "softmax", "note": "slower"})
    arms, told = beside(["softmax", "elu+window:window=8", "t2r+window:window=8"], tmp_path_factory.mktemp("shared"))
    (first, other) = (told[label]["state"].arm for label in ("elu+window:window=8", "t2r+window:window=8"))
    assert first == other and list(arms).count(first) == 1 and len(arms) == 4
    arms, told = beside(["softmax", "hedgehog"], tmp_path)
    first = told["hedgehog"]["state"].arm
    assert list(arms) == ["softmax", first, "hedgehog"] and told["hedgehog"]["time"].arm == "softmax"
    arms, again = beside(["softmax", "hedgehog", first], tmp_path_factory.mktemp("other"))
    assert list(arms) == ["softmax", "hedgehog", first] and not arms[first].is_control and again == told


def test_what_was_found_is_found_again(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(controls.Layers, "runs", lambda self: [(lambda: 1.0, 1)])
    arms, told = beside(["softmax", "elu"], tmp_path)
    assert json.loads((tmp_path / "controls.json").read_text())["elu"][1]["arm"] == "softmax"
    monkeypatch.setattr(controls, "_found", None)  # not called again
    assert beside(["softmax", "elu"], tmp_path) == (arms, told)


def test_why_nothing_was_found_is_said(clock, tmp_path, monkeypatch):
    def fails(*given):
        raise MemoryError

    monkeypatch.setattr(controls, "equal_windows", fails)
    arms, told = beside(["elu"], tmp_path)
    assert list(arms) == ["elu"] and told["elu"]["state"].note == "not found: MemoryError()"


def trained(arm, tokens, **other):
    stages = [{"stage": "align", "tokens": 7, "arguments": {}}] * (arm != "window")
    stages += [{"stage": "distill", "tokens": tokens, "arguments": {"seed": 3}}]
    parsed = Arm.parse(arm)
    conversion = Conversion("here", None, (), None, tuple(stages))
    return Arm(f"{arm} of here", parsed.attention, parsed.options, conversion=conversion)


@pytest.mark.parametrize("tokens", (300, 200))
def test_the_control_of_a_trained_arm_is_trained_alike_or_its_note_says_not(tokens, tmp_path, monkeypatch):
    found = {"window": 32, "sinks": 4, "where": {"layers": None, "keep": None, "places": None}}
    monkeypatch.setattr(controls, "_found", lambda arm, *given: [{"equal": "state"} | found] * (arm.attention == "elu"))
    arms, told = beside([trained("elu", 300), trained("window:window=32", tokens)], tmp_path)
    state = told["elu of here"]["state"]
    if tokens == 300:
        assert (state.arm, state.note) == ("window:window=32 of here", None) and len(arms) == 2
    else:
        assert state.arm == "window:window=32" and len(arms) == 3 and arms[state.arm].is_control
        assert "it is untrained, the arm was trained on 300 tokens" in state.note


def test_a_conversion_by_groups_has_its_controls_in_the_same_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(controls, "equal_time", lambda *given: {"note": "not looked for"})
    model = tiny()
    swapped = build(Arm.parse("elu+window:window=8,keep=[0.0]"), model)
    swapped.save_pretrained(tmp_path / "mine")
    arm = Arm.parse(str(tmp_path / "mine"))
    made = controls.control(arm, equal_windows(arm, swapped, model, LENGTH)[0])
    first, *others = swapped_modules(build(made, model)).values()
    assert [part.name for part in first.parts] == ["softmax", "window"] and first.places == [[0], [1]]
    assert [other.name for other in others] == ["window"] * 2
    assert made.label == f"window:window={made.options['window']} in the groups of elu+window of mine"


class Letters:
    """A tokenizer of bytes."""

    def __call__(self, text, **_):
        return type("Encoding", (), {"input_ids": [3 + b % 60 for b in text.encode()]})

    def decode(self, ids, **_):
        return "".join("a " if i % 2 else "b" for i in map(int, ids))


def test_a_report_has_the_controls_and_what_the_arm_is_beside_them(tmp_path, monkeypatch):
    monkeypatch.setattr(controls, "equal_time", lambda *given: {"arm": "softmax", "note": "slower"})
    (tmp_path / "text.txt").write_text("The cat sat on the mat, and then it went out into the rain. " * 50)
    given = Settings(
        arms=("softmax", "elu+window:window=4"), context_lengths=(32,), max_eval_tokens=None, lengths=(64,), rounds=1,
        decode_tokens=1, align_tokens=0, block_size=32, tasks=("copy",), task_lengths=(24,), task_limit=8,
        equal_controls=True,
    )  # fmt: skip
    said = []
    text = TextSource(str(tmp_path / "text.txt"))
    found = measure(
        tiny(), Letters(), text, None, given, tmp_path / "out", model_name="tiny", command="test", observe=said.append
    )
    softmax, window, hybrid = found.arms
    assert (said[0].line, said[0].total) == ("softmax: controls of equal state and time", 0)
    assert window.control and window.label == hybrid.controls[0].arm and softmax.controls == window.controls == []
    assert (hybrid.controls[1].arm, hybrid.controls[1].note) == ("softmax", "slower")
    assert hybrid.perplexity[0].ratio.items == 19  # all that the text has, of at most 500
    assert [entry.task for entry in hybrid.metrics] == ["copy at 24"] and hybrid.metrics[0].difference.items == 8
    sizes = {arm.label: arm.speed[0].cache_mib for arm in found.arms}
    assert sizes[window.label] == pytest.approx(sizes[hybrid.label], rel=0.05)
    report.validate(found)
    best = facts.better_control(found, hybrid)
    assert best[2].value == max(
        entry.value
        for entry in (hybrid.perplexity[0].ratio, *hybrid.perplexity[0].against)
        if entry.arm in (window.label, "softmax")
    )
