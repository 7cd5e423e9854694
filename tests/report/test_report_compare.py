"""Several runs in one table: what stands in a column, where it comes from, and what is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from hf_attnswap.report import Report, compare, write


def test_every_run_has_its_rows_and_its_machine(report: Report) -> None:
    other = copy.deepcopy(report)
    other.machine.processor = "another"
    other.arms = other.arms[:3]
    for arm in other.arms:
        arm.perplexity, arm.speed = arm.perplexity[:1], arm.speed[1:]
    table = compare.side_by_side({"a.json": report, "b.json": other})
    header, body = table.header, table.rows
    assert header[3:5] == ["perplexity at 512 (ratio to softmax, 95 %)", "perplexity at 2,048 (ratio to softmax, 95 %)"]
    assert [row[0] for row in body] == ["a.json"] * len(report.arms) + ["b.json"] * 3
    window = dict(zip(header, body[-1], strict=True))
    assert window["arm"] == "window:w=64 (control)"
    assert window[header[3]] == "44.24; ×1.510 (1.480–1.540)" and window[header[4]] == "not measured"
    assert window["prefill speed-up at 512"] == "not measured"
    assert window["prefill speed-up at 2,048"] == "×1.100 (1.045–1.166)"
    machines = compare.machines({"a.json": report, "b.json": other})
    assert machines[0].startswith("a.json: HuggingFaceTB/SmolLM2-135M-Instruct on x86_64, 2 cores")
    assert "on another, 2 cores" in machines[1]


@pytest.mark.parametrize(
    ("key", "value"), [("evaluation", "Moby Dick"), ("evaluation_size", 512), ("fingerprint", "fedcba9876543210")]
)
def test_runs_on_different_data_are_refused(report: Report, key: str, value: Any) -> None:
    other = copy.deepcopy(report)
    setattr(other.data, key, value)
    with pytest.raises(ValueError, match=rf"a.json and b.json were measured on different data \({key} "):
        compare.side_by_side({"a.json": report, "b.json": other})


def test_a_run_without_a_fingerprint_goes_by_its_text(report: Report) -> None:
    other = copy.deepcopy(report)
    other.data.fingerprint = None
    assert len(compare.side_by_side({"a.json": report, "b.json": other}).rows) == 2 * len(report.arms)


def test_the_command(report: Report, tmp_path, monkeypatch, capsys) -> None:
    from hf_attnswap import cli

    def attnswap(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["attnswap", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return stop.value.code or 0, printed.out, printed.err

    monkeypatch.setenv("COLUMNS", "250")
    first, second, third = (tmp_path / name for name in ("a.json", "b.json", "c.json"))
    write(report, first)
    write(report, second)
    report.data.evaluation = "Moby Dick"
    write(report, third)
    code, out, _ = attnswap(first, second)
    assert code == 0 and "b.json: HuggingFaceTB/SmolLM2-135M-Instruct on x86_64" in out
    code, out, err = attnswap(first, third)
    assert (code, out) == (2, "") and "measured on different data (evaluation 'WikiText-2 test' and 'Moby Dick')" in err
    code, out, err = attnswap(first, "--output_dir", tmp_path / "again")
    assert code == 0 and "Keeps most: relu_power:p=16" in out and (tmp_path / "again" / "report.html").is_file()
    code, _, err = attnswap(first, second, "--output_dir", tmp_path / "x")
    assert code == 2 and "--output_dir is for the pages of a single report" in err
    (tmp_path / "bad.json").write_text("{")
    code, _, err = attnswap(tmp_path / "bad.json")
    assert code == 2 and "bad.json: not readable as JSON" in err and err.count("\n") == 1


COMMITTED = [
    path
    for folder in ("benchmarks/results", "model_cards")
    for path in sorted((Path(__file__).parents[2] / folder).rglob("report.json"))
]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_the_command_reads_every_report_that_was_written(path, attnswap) -> None:
    """Of every kind: trade-offs, training runs, and classifiers of texts and of images."""
    shown = attnswap("report", path)
    assert shown.code == 0 and shown.out.strip(), shown.err
    assert json.loads(attnswap("report", path, "--json").out)["arms"]
    assert attnswap("report", path, path).code == 0


def test_the_command_says_what_is_wrong_with_a_file(tmp_path, attnswap) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "bytes.json").write_bytes(b"\xff{}")
    wrong = {"deep.json": "nested too deep", "bytes.json": "not UTF-8", "none.json": "No such file", ".": "directory"}
    for name, says in wrong.items():
        result = attnswap("report", tmp_path / name)
        assert result.code == 2 and says in result.err and len(result.err.splitlines()) == 1, result.err
