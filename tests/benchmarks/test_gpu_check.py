"""The check of a GPU at tiny sizes on the CPU: every part is in the file; without a GPU it says so in one line."""

import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield __import__("gpu_check")
    sys.modules.pop("gpu_check", None)


def test_every_part_is_measured(check, tmp_path):
    report = check.main(["--tiny", "--output", str(tmp_path / "found.json")])
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(json.dumps(report))
    rows = report["kernels"]
    assert {r["attention"] for r in rows} >= set(check.VARIANTS) and not [r for r in rows if "error" in r]
    assert all(r["seconds"] > 0 and r["ratio"] > 0 for r in rows)
    assert {r["attention"] for r in report["models"]} >= {"softmax", "elu", "hedgehog+window"}
    assert {r["attention"] for r in report["models"]} >= set(check.PLANS)
    assert all(r["tokens_per_second"] > 0 for r in report["training"] + report["decoding"])
    assert {r["attention"] for r in report["training"]} == set(check.PLANS)


def test_a_kernel_that_fails_is_a_row_with_the_reason(check):
    def broken(*inputs):
        raise RuntimeError("no such kernel\nmore")

    inputs = [torch.zeros(1)]
    rows = check.timed({"x": broken, "y": lambda x: x}, ["y"], inputs, lambda f, x: f(*x), "cpu", "tiny", 1)
    assert rows[0]["error"] == "RuntimeError: no such kernel" and rows[1]["ratio"] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(check, capsys):
    with pytest.raises(SystemExit) as ended:
        check.main([])
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and said.startswith("gpu-check needs a CUDA GPU") and "\n" not in said
