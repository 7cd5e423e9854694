"""The comparison of exported graphs with torch, on a tiny model."""

import json
import sys

import numpy as np
import pytest
import torch
from tiny_models import tiny
from training_fixtures import ROOT

import hf_attnswap

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (pip install 'hf_attnswap[onnx]')")
pytest.importorskip("onnxscript", reason="onnxscript is not installed (pip install 'hf_attnswap[onnx]')")


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield __import__("exported")
    for name in ("exported", "figures"):
        sys.modules.pop(name, None)


def test_torch_reads_a_text_and_then_token_by_token(benchmark):
    model = hf_attnswap.swap(tiny(), layers={0: "elu"})
    tokens = np.random.default_rng(0).integers(3, 60, (1, 12))
    found = benchmark.timed({"torch": benchmark.InTorch(model)}, tokens, 3)["torch"]
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(torch.from_numpy(found["logits"]), expected, rtol=1e-5, atol=1e-5)
    # Two layers keep keys and values, 2 heads of 8 numbers each; one keeps 2 states of 8 x 9, and a count.
    assert 0 <= found["bytes"] - 4 * (2 * 2 * 12 * 2 * 8 + 2 * 8 * 9) <= 8


@pytest.mark.long
def test_the_table(benchmark, stories260k, tmp_path, capsys):
    (tmp_path / "plan.yaml").write_text("attention: elu\nkeep: ['0.1']\n")
    given = [stories260k, "--plan", str(tmp_path / "plan.yaml"), "--output_dir", str(tmp_path / "out")]
    benchmark.main([*given, "--length", "32", "--steps", "2", "--rounds", "1"])
    rows = json.loads((tmp_path / "out" / "exported.json").read_text())["rows"]
    names = [f"{model}, {runtime}" for model in ("softmax", "plan") for runtime in ("torch", "onnxruntime")]
    assert [row["name"] for row in rows] == names and all(row["differs"] < 1e-4 for row in rows)
    assert "MiB remembered" in capsys.readouterr().out
