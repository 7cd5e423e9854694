"""The table of architectures counts a type as covered only where its attention ran."""

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"

COVERED = {"llama": 2, "bert": 2, "bart": 6, "vit": 2, "clip": 4}


def coverage(process, folder, *arguments):
    child = process(FOLDER / "coverage.py", "--output_dir", folder, "--num_processes", "1", *arguments)
    assert child.wait(timeout=300) == 0
    return read(folder)


def read(folder):
    report = json.loads((folder / "coverage.json").read_text())
    return {record["model_type"]: record for record in report["types"]}, (folder / "coverage.md").read_text()


def test_families_of_every_sort(script, tmp_path):
    chosen = ",".join([*COVERED, "bloom", "mamba"])
    script("benchmarks/coverage").main(["--output_dir", str(tmp_path), "--num_processes", "1", "--model_types", chosen])
    found, table = read(tmp_path)
    assert {name: found[name]["verdict"] for name in COVERED} == dict.fromkeys(COVERED, "covered")
    assert {name: found[name]["ran"] for name in COVERED} == COVERED
    assert found["bloom"]["verdict"] == "refused" and "written out in the model's own file" in str(found["bloom"])
    assert found["mamba"]["verdict"] == "no attention"
    assert "| encoder-decoder | 1 | 1 |" in table


@pytest.mark.long
def test_shared_keys_caches_and_parameters_are_looked_at(process, tmp_path):
    found, table = coverage(process, tmp_path, "--model_types", "gemma3n_text,bert")
    assert found["gemma3n_text"]["modules"] == 4  # the last two use the keys and values of the first two
    assert set(found["gemma3n_text"]["cache"]) == {"cache, softmax", "cache, relu_norm", "cache, elu"}
    assert (
        found["gemma3n_text"]["cache"]["cache, relu_norm"]
        == found["gemma3n_text"]["cache"]["cache, softmax"]
        == "equal"
    )
    assert found["bert"]["cache"] == {} and found["bert"]["with_parameters"] == "ran"
    assert "- parameters: ran: 2" in table
    kept, _ = coverage(process, tmp_path, "--model_types", "llama", "--keep")
    assert set(kept) == {"gemma3n_text", "bert", "llama"}


@pytest.mark.long
def test_what_linear_variants_refuse(process, tmp_path):
    found, _ = coverage(process, tmp_path, "--attention", "elu", "--model_types", "t5,gemma2,gpt_oss,opt")
    assert found["opt"]["verdict"] == "covered"
    for name, reason in (("t5", "a bias on its scores"), ("gemma2", "a soft cap"), ("gpt_oss", "learned sinks")):
        assert found[name]["verdict"] != "covered" and reason in str(found[name])
