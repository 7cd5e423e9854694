"""The JSON contract: what is refused, in which words, and that a file is written whole or not at all."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples

from hf_attnswap.report import Report, parse, read, to_json, validate, write, write_all
from hf_attnswap.report.files import VERSION
from hf_attnswap.report.types import Comparison

DELETE = object()


def change(report: Any, path: list[Any], value: Any) -> None:
    for key in path[:-1]:
        report = report[key]
    if value is DELETE:
        del report[path[-1]]
    else:
        report[path[-1]] = value


def test_a_valid_report_passes(report: Report) -> None:
    validate(report)


def test_keys_that_are_not_listed_pass(content: dict[str, Any]) -> None:
    content["versions"]["numpy"] = "2.0"
    content["arms"][0]["perplexity"][0]["extra"] = 1
    assert parse(content).versions["numpy"] == "2.0"


STATUS = "expected 'measured', 'failed' or 'not measured'"
PERPLEXITY = ["arms", 2, "perplexity", 0]
SPEED = ["arms", 2, "speed", 1]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["arms", 2, "status"], "okay", f"arms[2].status is 'okay'; {STATUS}"),
        (["arms", 2, "status"], ["measured"], f"arms[2].status is ['measured']; {STATUS}"),
        (["arms", 1, "formula"], DELETE, "arms[1].formula is missing; expected a value"),
        (["schema"], "other", "schema is 'other'; expected 'hf_attnswap.report'"),
        (["schema"], DELETE, "schema is null; expected 'hf_attnswap.report'"),
        (["kind"], "other", "kind is 'other'; expected 'tradeoff', 'classification' or 'quality'"),
        (["version"], 2, "version is 2; expected 1; a newer hf_attnswap wrote this file: upgrade"),
        (["version"], True, "version is True; expected 1"),
        (["version"], 0, "version is 0; expected 1"),
        (["model"], [], "model is []; expected "),
        (["model", "head_dim"], 64.5, "model.head_dim is 64.5; expected a valid integer"),
        (["machine", "cores"], True, "machine.cores is True; expected a valid integer"),
        (["machine", "cores"], -1, "machine.cores is -1; expected greater than or equal to 0"),
        (["versions", "torch"], None, "versions.torch is null; expected a valid string"),
        (["date"], "yesterday", "date is 'yesterday'; expected "),
        (["arms"], {}, "arms is {}; expected a valid array"),
        (["arms"], [], "arms is []; expected "),
        (["arms", 3, "label"], " ", "arms[3].label is ' '; expected "),
        (["arms", 3, "label"], "softmax", "expected every arms.label once, 'softmax' is there twice"),
        (["arms", 3, "status"], "failed", "expected a reason, since status is 'failed'"),
        (["arms", 0, "cost_class"], "cubic", "arms[0].cost_class is 'cubic'; expected 'quadratic'"),
        (["arms", 0, "alignment"], 3, "arms[0].alignment is 3; expected "),
        ([*PERPLEXITY, "nll"], float("nan"), "arms[2].perplexity[0].nll is nan; expected a finite number"),
        ([*PERPLEXITY, "nll"], "3", "arms[2].perplexity[0].nll is '3'; expected a valid number"),
        ([*PERPLEXITY, "perplexity"], None, "expected no ratio, since perplexity is null"),
        ([*PERPLEXITY, "perplexity"], -1.0, "arms[2].perplexity[0].perplexity is -1.0; expected greater than 0"),
        ([*PERPLEXITY, "context"], 2048, "arms[2] is {"),
        ([*PERPLEXITY, "ratio", "low"], 9.0, "expected low <= value <= high"),
        ([*PERPLEXITY, "ratio", "items"], 7, "expected no interval: it needs 8 items, there are 7"),
        ([*PERPLEXITY, "ratio", "high"], None, "expected low and high together, or neither"),
        ([*SPEED, "length"], 0, "arms[2].speed[1].length is 0; expected greater than or equal to 1"),
        ([*SPEED, "prefill_s"], None, "expected a note with the reason, since no time was measured"),
        ([*SPEED, "prefill_speedup", "high"], 0.1, "expected 0 < low <= median <= high"),
        ([*SPEED, "peak_memory_mib"], 10**400, "arms[2].speed[1].peak_memory_mib is 1000"),
        (["arms", 0, "growth", "prefill_s", "lengths"], 2, "expected an exponent of 3 lengths or more"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(content: dict[str, Any], path: list, value: Any, said: str) -> None:
    change(content, path, value)
    with pytest.raises(ValueError) as error:
        parse(content)
    assert said in str(error.value)
    assert str(error.value).startswith("report.json: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


@pytest.mark.parametrize("content", [None, [], "text", 3])
def test_what_is_no_object_is_refused(content: Any) -> None:
    with pytest.raises(ValueError, match="the whole is .*; expected an object"):
        parse(content)


def test_what_was_set_since_is_checked_again(report: Report) -> None:
    report.arms[2].status = "okay"
    with pytest.raises(ValueError, match="arms.2..status is 'okay'; expected 'measured'"):
        validate(report)
    report.arms[2].status = object()
    with pytest.raises(ValueError):
        validate(report)


def test_a_wrong_value_is_refused_where_it_is_made(report: Report) -> None:
    with pytest.raises(ValueError, match="low <= value <= high"):
        Comparison("softmax", 1.0, 1.5, 2.0, 640, "worse")


def test_a_perplexity_that_is_not_finite_belongs_to_a_failed_arm(content: dict[str, Any]) -> None:
    arm = content["arms"][3]
    arm["perplexity"][0] |= {"perplexity": None, "nll": None, "standard_error": None, "ratio": None}
    with pytest.raises(ValueError, match="expected finite perplexities, since status is 'measured'"):
        parse(content)
    arm |= {"status": "failed", "reason": "the perplexity is not finite"}
    parse(content)


def paths(value: Any, here: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here] + [path for key, item in items for path in paths(item, (*here, key))]


@pytest.mark.drawn
@examples(50)
@given(data=st.data())
def test_any_change_is_accepted_or_refused_with_a_value_error(content: dict[str, Any], data: st.DataObject) -> None:
    """Whatever one value becomes: nothing but ValueError, and what is accepted can be rendered."""
    from hf_attnswap.report import pages, show

    broken = json.loads(json.dumps(content))
    path = data.draw(st.sampled_from(paths(broken)[1:]))
    junk = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    change(broken, list(path), data.draw(junk | st.just([]) | st.just({}) | st.just(DELETE)))
    try:
        accepted = parse(broken)
    except ValueError:
        return
    show(accepted)
    pages.paper(accepted, [])
    pages.html(accepted, [])


def test_read_gives_back_what_write_wrote(report: Report, tmp_path: Path) -> None:
    report.arms[0] = replace(report.arms[0], source="Ł. \ud800")  # a lone surrogate, as a broken error message may hold
    assert report.arms[0].source == "Ł. ?"
    report.arms[1].new_parameters = 123_456_789
    report.arms[1].perplexity[0].nll = 3.14159265358
    path = write(report, tmp_path / "report.json")
    assert os.listdir(tmp_path) == ["report.json"]
    entry = read(path).arms[1]
    assert (entry.new_parameters, entry.perplexity[0].nll) == (123_456_789, 3.14159265)  # nine digits of a float
    assert same(to_json(read(path)), to_json(report))


def same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(same(mine[key], theirs[key]) for key in mine)
    if isinstance(mine, list):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    return mine == (pytest.approx(theirs, rel=5e-6) if isinstance(theirs, float) else theirs)


@pytest.mark.parametrize("version", (0, 2, "1", True, None))
def test_other_versions_are_not_read(content: dict[str, Any], tmp_path: Path, version: Any) -> None:
    (tmp_path / "other.json").write_text(json.dumps(content | {"version": version}))
    with pytest.raises(ValueError, match=f"other.json: version is .*; expected {VERSION}"):
        read(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("text", "said"), [("{", "not readable as JSON"), ("[]", "the whole is []"), ("{}", "schema is null")]
)
def test_read_names_the_file(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: {said}")


def test_an_invalid_report_leaves_the_old_file(report: Report, tmp_path: Path) -> None:
    path = write(report, tmp_path / "report.json")
    before = path.read_bytes()
    report.arms[0].status = "okay"
    with pytest.raises(ValueError, match="okay"):
        write(report, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = write(report, tmp_path / "report.json")
    before = path.read_bytes()

    def fail(*arguments: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, step, fail)
    report.seeds = [7]
    with pytest.raises(OSError, match="no space left"):
        write(report, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["report.json"]


def test_nothing_is_written_where_a_page_cannot_be_rendered(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_attnswap.report import pages

    def fail(*arguments: Any) -> str:
        raise RuntimeError("no page")

    monkeypatch.setattr(pages, "html", fail)
    with pytest.raises(RuntimeError, match="no page"):
        write_all(report, tmp_path)
    assert os.listdir(tmp_path) == []
