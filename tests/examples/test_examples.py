"""The examples, each a complete script, on a tiny model in this process."""

import re
from pathlib import Path

import pytest
from training_fixtures import ROOT
from transformers import AutoModelForCausalLM

import hf_attnswap

NAMES = ["align", "finetune", "generate", "onnx_generate", "publish", "swap"]


def swapped(folder) -> set[str]:
    return {module.swapped for module in hf_attnswap.inspect(AutoModelForCausalLM.from_pretrained(folder))}


def losses(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", printed)]


def test_there_are_six_and_each_is_short_and_says_how_to_run_it():
    scripts = sorted((ROOT / "examples").glob("*.py"))
    assert [path.stem for path in scripts] == NAMES
    for path in scripts:
        text = Path(path).read_text()
        assert len(text.splitlines()) < 100 and "pip install hf_attnswap" in text and f"{path.name} " in text
        assert "--model_name_or_path" in text.split('"""')[1]


def test_swap(script, checkpoint, capsys):
    script("examples/swap").main(["--model_name_or_path", checkpoint, "--layers", "1:", "--text", "a word"])
    out = capsys.readouterr().out
    assert out.count(": relu_norm") == 2 and out.count("self_attn: softmax") == 1
    before, after, undone = re.findall(r"\d+\.\d{3}", out.splitlines()[-1])
    assert before == undone != after


@pytest.mark.parametrize("more", [[], ["--use_lora"]])
def test_from_alignment_to_a_push(script, checkpoint, text, tmp_path, capsys, more):
    aligned, finetuned = str(tmp_path / "aligned"), str(tmp_path / "finetuned")
    two_blocks = tmp_path / "two_blocks.txt"
    two_blocks.write_text(Path(text).read_text()[:64])
    given = ["--train_file", str(two_blocks), "--block_size", "32", "--per_device_train_batch_size", "2"]
    given += ["--max_train_steps", "20"]
    variant = ["--attention", "hedgehog"]  # a window is as long as these blocks
    script("examples/align").main(["--model_name_or_path", checkpoint, *given, *variant, "--output_dir", aligned])
    first, *_, last = losses(capsys.readouterr().out)
    assert last < first and swapped(aligned) == {"hedgehog"}
    given += ["--learning_rate", "1e-2", "--output_dir", finetuned, *more]
    script("examples/finetune").main(["--model_name_or_path", aligned, *given])
    first, *_, last = losses(capsys.readouterr().out)
    assert last < first and swapped(finetuned) == {"hedgehog"}

    script("examples/generate").main(["--model_name_or_path", finetuned, "--prompt", "a", "--max_new_tokens", "4"])
    assert "hedgehog: cache of " in capsys.readouterr().out
    given = ["--repo_id", "me/mine", "--base_model", "org/base", "--licence", "mit"]
    script("examples/publish").main(["--model_name_or_path", finetuned, *given])
    out = capsys.readouterr().out
    assert {"model.safetensors", "config.json", "README.md"} <= {line.split(":")[0] for line in out.splitlines()}
    assert "nothing was pushed to me/mine" in out
