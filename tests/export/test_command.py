"""The command `attnswap export`, and what runs what it writes."""

import importlib.util
import sys

import pytest
import torch
from command_line import attnswap  # noqa: F401
from tiny_conversion import save_conversion
from tiny_models import tiny
from training_fixtures import ROOT
from transformers import AutoModelForCausalLM

import hf_attnswap
from hf_attnswap.sources.models import load, load_any
from hf_attnswap.sources.plans import read_plan

WRITES = [importlib.util.find_spec(package) is None for package in ("onnx", "onnxscript", "onnxruntime")]
needs_onnx = pytest.mark.skipif(any(WRITES), reason="pip install 'hf_attnswap[onnx]' is missing")


def test_what_is_wrong_is_said_in_one_line(attnswap, tmp_path, monkeypatch):  # noqa: F811
    def told(*arguments):
        result = attnswap("export", *arguments)
        assert result.code == 2 and not (tmp_path / "out").exists()
        (line,) = result.err.splitlines()
        return line

    out = "--output_dir", tmp_path / "out"
    tiny().save_pretrained(tmp_path / "llama")
    assert "format is 'tflite'; expected onnx" in told(tmp_path / "llama", "--format", "tflite", *out)
    assert "is no conversion: its config.json swaps no attention" in told(tmp_path / "llama", *out)
    assert "has no config.json" in told(tmp_path / "nowhere", *out)
    assert "is not empty" in told(tmp_path / "llama", "--output_dir", tmp_path)
    hf_attnswap.swap(tiny(), "elu").save_pretrained(tmp_path / "converted")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnx", sys)
    assert "needs the package onnxscript: pip install 'hf_attnswap[onnx]'" in told(tmp_path / "converted", *out)


def example():
    """examples/onnx_generate.py as a module."""
    spec = importlib.util.spec_from_file_location("onnx_generate", ROOT / "examples" / "onnx_generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def greedy(folder, ids: list[int], new: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    written = model.generate(torch.tensor([ids]), max_new_tokens=new, do_sample=False)
    return written[0, len(ids) :].tolist()


@pytest.mark.long
@needs_onnx
def test_a_conversion_is_written_and_writes(attnswap, tmp_path, capsys):  # noqa: F811
    folder, out = save_conversion(tmp_path / "converted"), tmp_path / "out"
    result = attnswap("export", folder, "--output_dir", out)
    assert result.code == 0 and "hedgehog+window in 3 layers" in result.out
    files = {path.name for path in out.iterdir()}
    assert {"model.onnx", "tokenizer.json", "generation_config.json"} <= files
    script = example()
    script.main(["--model_name_or_path", str(out), "--prompt", "the cat sat on", "--max_new_tokens", "4"])
    assert "7 tokens remembered in" in capsys.readouterr().out
    session = script.onnxruntime.InferenceSession(out / "model.onnx")
    ids = [3, 4, 5, 6]
    assert script.generate(session, ids, 30, set())[0] == greedy(folder, ids, 30)


@pytest.mark.long
@needs_onnx
def test_smollm2_with_a_plan_writes_the_same_64_tokens(attnswap, tmp_path, smollm2):  # noqa: F811
    from onnx_runs import Graph

    model, tokenizer = load(smollm2)
    hf_attnswap.swap(model, read_plan(ROOT / "benchmarks" / "plans" / "smollm2-135m-quarter.yaml").swap)
    model.save_pretrained(tmp_path / "converted")
    tokenizer.save_pretrained(tmp_path / "converted")
    assert attnswap("export", tmp_path / "converted", "--output_dir", tmp_path / "out").code == 0
    ids = tokenizer((ROOT / "docs" / "findings.md").read_text()[:1500]).input_ids
    assert len(ids) > 200  # more than the window
    script = example()
    session = script.onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        expected = model.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)[0, len(ids) :]
        logits = model(torch.tensor([ids])).logits
    assert script.generate(session, ids, 64, set())[0] == expected.tolist()
    graph = Graph(str(tmp_path / "out" / "model.onnx"))
    found, _ = graph.reads([ids], [[1] * len(ids)], graph.empty(1))
    torch.testing.assert_close(torch.from_numpy(found["logits"]), logits, rtol=1e-5, atol=1e-4)


@pytest.mark.long
@needs_onnx
def test_minilm_gives_the_same_hidden_states(attnswap, tmp_path, minilm):  # noqa: F811
    """Of texts of several lengths in one batch, by a graph of the encoder with every layer converted."""
    from onnx_runs import Graph

    model, tokenizer = load_any(minilm, dtype="float32")
    hf_attnswap.swap(model.eval(), "elu")
    model.save_pretrained(tmp_path / "converted")
    tokenizer.save_pretrained(tmp_path / "converted")
    assert attnswap("export", tmp_path / "converted", "--output_dir", tmp_path / "out").code == 0
    graph = Graph(str(tmp_path / "out" / "model.onnx"))
    words = (ROOT / "docs" / "findings.md").read_text().split()
    texts = [" ".join(words[:count]) for count in (1, 20, 150)]
    given = tokenizer(texts, padding=True, return_tensors="pt")
    ids, mask = given.input_ids, given.attention_mask
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).last_hidden_state
    found, _ = graph.reads(ids, mask, {})
    seen = mask.bool()
    torch.testing.assert_close(torch.from_numpy(found["last_hidden_state"])[seen], expected[seen], rtol=0, atol=1e-4)
