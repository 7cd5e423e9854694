"""Registered benchmarks: what the Hub's leaderboards read, and nothing of what was measured in part."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import parse_eval_result_entries

from hf_attnswap.publish import benchmarks
from hf_attnswap.publish.contents import files_of
from hf_attnswap.publish.folder import write_card
from hf_attnswap.publish.push import prepare
from hf_attnswap.report import Report, read, write
from hf_attnswap.report.types import Metric

MEASURED = Path(__file__).parent / "measured.json"
GSM8K = Metric("gsm8k", "exact_match,strict-match", True, 0.21456, 0.01, 1319)


@pytest.fixture
def report() -> Report:
    found = read(MEASURED)
    found.arms = [arm for arm in found.arms if arm.attention in ("softmax", "elu")]
    return found


def test_a_whole_benchmark_is_an_entry_that_the_hub_reads(report):
    arm = report.arms[1]
    arm.metrics = [replace(GSM8K, metric="exact_match,flexible-extract", value=0.3), GSM8K]
    ((path, data),) = benchmarks.files(report, arm).items()
    (entry,) = parse_eval_result_entries(yaml.safe_load(data))
    assert path == ".eval_results/gsm8k.yaml"
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 21.456)
    assert entry.date == report.date and entry.notes == "lm-eval gsm8k, exact_match,strict-match"


@pytest.mark.parametrize("metric", [replace(GSM8K, items=100), replace(GSM8K, task="needle at 512"), None])
def test_what_is_no_whole_benchmark_is_none(report, metric):
    report.arms[1].metrics = [metric] if metric else []
    assert benchmarks.files(report, report.arms[1]) == {}


def test_the_card_brings_the_file_and_a_push_sends_it(report, conversion, tmp_path):
    saved = json.loads((conversion / "config.json").read_text())["attnswap"]["swapped"]
    (arm,) = (arm for arm in report.arms if arm.attention == "elu")
    arm.metrics = [GSM8K]
    arm.attention, arm.options = saved[0]["attention"], saved[0]["options"]
    arm.swapped = [replace(arm.swapped[0], **saved[0])]
    given = {"base_model": "none", "licence": "mit"}
    written = write_card(conversion, "user/name", write(report, tmp_path / "report.json"), tmp_path / "card", **given)
    assert tmp_path / "card" / ".eval_results" / "gsm8k.yaml" in written
    # Without a card in the folder, a push writes both from the report that lies there.
    folder = tmp_path / "converted"
    folder.mkdir()
    for path in [*files_of(conversion), tmp_path / "report.json"]:
        (folder / path.name).write_bytes(path.read_bytes())
    sent = {operation.path_in_repo for operation in prepare(folder, "user/name", **given)}
    assert {"README.md", ".eval_results/gsm8k.yaml"} <= sent
    write_card(folder, "user/name", folder / "report.json", **given)
    assert {operation.path_in_repo for operation in prepare(folder, "user/name", **given)} == sent
