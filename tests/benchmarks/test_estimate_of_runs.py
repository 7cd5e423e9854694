"""How near estimates are: the benchmark on a small model, and SmolLM2-135M within a fifth."""

import json
import sys
from pathlib import Path

import pytest

from hf_attnswap import UsageError

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    yield __import__("estimate")
    for name in ("estimate", "figures"):
        sys.modules.pop(name, None)


@pytest.mark.long
def test_the_page_gets_its_tables(benchmark, stories260k, tmp_path, monkeypatch):
    for work in ("PREFILL", "DECODE", "DISTILL"):
        monkeypatch.setattr(benchmark, work, [(2, 32)])
    (tmp_path / "plan.yaml").write_text("attention: window\noptions: {window: 8}\nkeep: ['0.1']\n")
    page = tmp_path / "page.md"
    page.write_text(f"before {benchmark.BEGIN} old {benchmark.END} after")
    given = ["--model_name_or_path", stories260k, "--plan", str(tmp_path / "plan.yaml"), "--rounds", "1"]
    report = benchmark.main([*given, "--output", str(tmp_path / "out.json"), "--page", str(page)])
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(report))
    assert {(r["work"], r["attention"]) for r in report["figures"]} == {
        (work, attention) for work in ("prefill", "decode", "distill") for attention in ("softmax", "plan")
    }
    caches = [r for r in report["memory"] if r["what"].startswith("cache")]
    assert caches and all(r["predicted_mib"] == r["measured_mib"] for r in caches)
    text = page.read_text()
    assert text.startswith("before ") and text.endswith(" after") and "| decode | plan | 2 x 32 |" in text
    page.write_text("without a place")
    with pytest.raises(UsageError, match="has no part between"):
        benchmark.main([*given, "--output", str(tmp_path / "out.json"), "--page", str(page)])


@pytest.mark.long
def test_smollm2_takes_as_long_as_predicted(benchmark, smollm2, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "PREFILL", [(1, 256), (4, 128)])
    monkeypatch.setattr(benchmark, "DECODE", [(1, 256), (4, 1024)])
    monkeypatch.setattr(benchmark, "DISTILL", [(1, 128)])
    plan = FOLDER / "plans" / "smollm2-135m-quarter.yaml"
    given = ["--model_name_or_path", smollm2, "--plan", str(plan), "--rounds", "3"]
    report = benchmark.main([*given, "--output", str(tmp_path / "out.json")])
    for figure in report["figures"]:
        assert 0.8 <= figure["ratio"] <= 1.25, figure
    for figure in report["memory"]:
        assert figure["predicted_mib"] == pytest.approx(figure["measured_mib"], rel=0.2), figure
