"""The JSON contract: what is refused, in which words, and that a file is written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_attnswap.report import read, validate, write, write_all

DELETE = object()


def change(report: Any, path: list[Any], value: Any) -> None:
    for key in path[:-1]:
        report = report[key]
    if value is DELETE:
        del report[path[-1]]
    else:
        report[path[-1]] = value


def test_a_valid_report_passes(report: dict[str, Any]) -> None:
    validate(report)


def test_keys_that_are_not_listed_pass(report: dict[str, Any]) -> None:
    report["versions"]["numpy"] = "2.0"
    report["arms"][0]["perplexity"][0]["extra"] = 1
    validate(report)


STATUS = "expected one of 'measured', 'failed', 'not measured'"
PERPLEXITY = ["arms", 2, "perplexity", 0]
SPEED = ["arms", 2, "speed", 1]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["arms", 2, "status"], "okay", f"arms[2].status is 'okay'; {STATUS}"),
        (["arms", 2, "status"], ["measured"], f"arms[2].status is ['measured']; {STATUS}"),
        (["arms", 1, "formula"], DELETE, "arms[1].formula is missing; expected a string"),
        (["schema"], "other", "schema is 'other'; expected 'hf_attnswap.tradeoff'"),
        (["schema"], DELETE, "schema is missing; expected 'hf_attnswap.tradeoff'"),
        (["version"], 4, "version is 4; expected 3; a newer hf_attnswap wrote this file: upgrade"),
        (["version"], True, "version is True; expected 3"),
        (["version"], 0, "version is 0; expected 3"),
        (["model"], [], "model is []; expected an object"),
        (["model", "head_dim"], 64.0, "model.head_dim is 64.0; expected a whole number of 0 or more"),
        (["machine", "cores"], True, "machine.cores is True; expected a whole number of 0 or more"),
        (["versions", "torch"], None, "versions.torch is null; expected a string"),
        (["date"], "yesterday", "date is 'yesterday'; expected a date and time"),
        (["arms"], {}, "arms is {}; expected a list"),
        (["arms"], [], "arms is []; expected at least one arm"),
        (["arms", 3, "label"], "softmax", "arms[3].label is 'softmax'; expected a value that arms[0].label"),
        (
            ["arms", 3, "status"],
            "failed",
            "arms[3].reason is null; expected the reason, since status is 'failed'",
        ),
        (["arms", 0, "cost_class"], "cubic", "arms[0].cost_class is 'cubic'; expected one of 'quadratic'"),
        (["arms", 0, "alignment"], 3, "arms[0].alignment is 3; expected an object, or null"),
        ([*PERPLEXITY, "nll"], float("nan"), "arms[2].perplexity[0].nll is nan; expected a finite number"),
        ([*PERPLEXITY, "nll"], "3", "arms[2].perplexity[0].nll is '3'; expected a finite number, or null"),
        (
            [*PERPLEXITY, "perplexity"],
            None,
            "arms[2].perplexity[0].perplexity is null; expected a finite number, ",
        ),
        (
            [*PERPLEXITY, "perplexity"],
            -1.0,
            "arms[2].perplexity[0].perplexity is -1.0; expected a finite number abo",
        ),
        ([*PERPLEXITY, "context"], 2048, "arms[2].perplexity[1].context is 2048; expected a value that"),
        (
            [*PERPLEXITY, "ratio", "low"],
            9.0,
            "arms[2].perplexity[0].ratio.value is 1.51; expected a number from",
        ),
        ([*SPEED, "length"], 0, "arms[2].speed[1].length is 0; expected a whole number of 1 or more"),
        (
            [*SPEED, "prefill_s"],
            None,
            "arms[2].speed[1].note is null; expected the reason, since prefill_s is null",
        ),
        (
            [*SPEED, "prefill_speedup", "high"],
            0.1,
            "arms[2].speed[1].prefill_speedup.median is 1.1; expected",
        ),
        ([*SPEED, "peak_memory_mib"], 10**400, "expected a finite number of 0 or more, or null"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(report: dict[str, Any], path: list, value: Any, said: str) -> None:
    change(report, path, value)
    with pytest.raises(ValueError) as error:
        validate(report)
    assert said in str(error.value)
    assert str(error.value).startswith("report.json: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


@pytest.mark.parametrize("report", [None, [], "text", 3])
def test_what_is_no_object_is_refused(report: Any) -> None:
    with pytest.raises(ValueError, match="the whole is .*; expected an object"):
        validate(report)


def test_a_perplexity_that_is_not_finite_belongs_to_a_failed_arm(report: dict[str, Any]) -> None:
    arm = report["arms"][3]
    arm["perplexity"][0] |= {"perplexity": None, "nll": None, "standard_error": None, "ratio": None}
    arm |= {"status": "failed", "reason": "the perplexity is not finite"}
    validate(report)


def paths(value: Any, here: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here] + [path for key, item in items for path in paths(item, (*here, key))]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_change_is_accepted_or_refused_with_a_value_error(report: dict[str, Any], data: st.DataObject) -> None:
    """Whatever one value becomes: nothing but ValueError, and what is accepted can be rendered."""
    from hf_attnswap.report import html, markdown, table

    broken = json.loads(json.dumps(report))
    path = data.draw(st.sampled_from(paths(broken)[1:]))
    junk = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    change(broken, list(path), data.draw(junk | st.just([]) | st.just({}) | st.just(DELETE)))
    try:
        validate(broken)
    except ValueError:
        return
    table.rows(broken)
    markdown.render(broken, [])
    html.render(broken, [])


def test_read_gives_back_what_write_wrote(report: dict[str, Any], tmp_path: Path) -> None:
    report["arms"][0]["source"] = "Ł. \ud800"  # a lone surrogate, as a broken error message may hold
    report["arms"][1]["new_parameters"] = 123_456_789
    report["arms"][1]["perplexity"][0]["nll"] = 3.14159265
    path = write(report, tmp_path / "report.json")
    assert os.listdir(tmp_path) == ["report.json"]
    entry = read(path)["arms"][1]
    assert (entry["new_parameters"], entry["perplexity"][0]["nll"]) == (123_456_789, 3.14159)  # six digits of a float
    assert same(read(path), report)


def same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(same(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, list):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    return mine == (pytest.approx(theirs, rel=5e-6) if isinstance(theirs, float) else theirs)


def as_version_2(report: dict[str, Any]) -> dict[str, Any]:
    report["version"] = 2
    for arm in report["arms"]:
        del arm["swapped"], arm["training"], arm["training_tokens"], arm["conversion"]
        del arm["tasks"], arm["growth"]["train_s"]
        for entry in arm["speed"]:
            del entry["train_s"], entry["train_speedup"]
        if arm["diagnostics"]:
            del arm["diagnostics"]["layers_by_damage"]
    return report


def as_version_1(report: dict[str, Any]) -> dict[str, Any]:
    as_version_2(report)["version"] = 1
    del report["data"]["fingerprint"]
    for arm in report["arms"]:
        del arm["checks"], arm["growth"], arm["diagnostics"]
    for entry in [entry for arm in report["arms"] for entry in arm["perplexity"]]:
        for key in ("against", "word_perplexity", "byte_perplexity", "by_position"):
            del entry[key]
        for key in ("items", "few", "verdict"):
            (entry["ratio"] or {}).pop(key, None)
    return report


def test_a_report_of_version_2_is_read_as_it_was(report: dict[str, Any], full, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps(as_version_2(full)))
    found = read(tmp_path / "old.json")
    assert found["arms"][2]["tasks"] == [] and found["arms"][2]["speed"][0]["train_s"] is None
    assert found["arms"][2]["diagnostics"]["layers_by_damage"] == []
    assert found["arms"][2]["perplexity"] == report["arms"][2]["perplexity"]
    write_all(found, tmp_path / "drawn")
    assert "Layers by damage" not in (tmp_path / "drawn" / "report.md").read_text(encoding="utf-8")


def test_a_report_of_version_1_is_read_as_one_of_today(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps(as_version_1(report)))
    found = read(tmp_path / "old.json")
    assert found["version"] == 3
    window = found["arms"][2]["perplexity"][0]
    assert window["against"] == [] and window["ratio"]["verdict"] == "worse"
    assert window["ratio"]["items"] == 10240 // 511 and window["ratio"]["few"]
    write_all(found, tmp_path / "drawn")


def test_the_arms_of_version_2_swap_every_layer(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(json.dumps(as_version_2(report)))
    softmax, none, window = read(tmp_path / "old.json")["arms"][:3]
    assert softmax["swapped"] == [] and none["training"] == []
    options = {"window": 64, "sinks": 4}
    assert window["swapped"] == [
        {"attention": "window", "options": options, "kind": "causal", "layers": list(range(30))}
    ]


def test_a_broken_report_of_version_1_is_one_line(report: dict[str, Any], tmp_path: Path) -> None:
    del as_version_1(report)["arms"][2]["perplexity"][0]["tokens"]
    (tmp_path / "old.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="old.json: not a report of version 1: KeyError"):
        read(tmp_path / "old.json")


@pytest.mark.parametrize(
    ("text", "said"), [("{", "not readable as JSON"), ("[]", "the whole is []"), ("{}", "schema is missing")]
)
def test_read_names_the_file(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: {said}")


def test_an_invalid_report_leaves_the_old_file(report: dict[str, Any], tmp_path: Path) -> None:
    path = write(report, tmp_path / "report.json")
    before = path.read_bytes()
    report["arms"][0]["status"] = "okay"
    with pytest.raises(ValueError, match="okay"):
        write(report, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = write(report, tmp_path / "report.json")
    before = path.read_bytes()

    def fail(*arguments: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, step, fail)
    report["seed"] = 7
    with pytest.raises(OSError, match="no space left"):
        write(report, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["report.json"]


def test_nothing_is_written_where_a_page_cannot_be_rendered(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_attnswap.report import html

    def fail(*arguments: Any) -> str:
        raise RuntimeError("no page")

    monkeypatch.setattr(html, "render", fail)
    with pytest.raises(RuntimeError, match="no page"):
        write_all(report, tmp_path)
    assert os.listdir(tmp_path) == []
