"""The command: what it says of a conversion, of models larger than this machine, and of wrong use."""

import json

import pytest
import torch
from tiny_models import tiny
from transformers import AutoConfig

import hf_attnswap
from hf_attnswap.estimate import estimate
from hf_attnswap.estimate.devices import GPUS
from hf_attnswap.sources.plans import write_plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a config of 0.4B parameters, without weights, and a plan for it."""
    folder = tmp_path_factory.mktemp("model")
    config = AutoConfig.for_model(
        "llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    (folder / "plan.yaml").write_text("attention: hedgehog+window\nkeep: ['0.1', '1.7']\n")
    return folder


def test_the_command_tells_of_each_stage_and_of_serving(attnswap, folder):
    given = ["--plan", folder / "plan.yaml", "--device", "h100", "--num_devices", 8, "--length", 512]
    found = attnswap("estimate", folder, *given, "--tokens", "100M", "--price_per_hour", 2, "--json")
    assert found.code == 0, found.err
    content = json.loads(found.out)
    assert content["tokens"] == 10**8
    stages = {(stage["stage"], stage["attention"]): stage for stage in content["stages"]}
    assert list(stages) == [("align", "swapped"), ("distill", "swapped"), ("finetune", "swapped"),
                            ("finetune", "softmax")]  # fmt: skip
    for stage in stages.values():
        memory = stage["memory"]
        assert memory["total"] == sum(size for part, size in memory.items() if part != "total")
        assert stage["fits"] and not stage["sharded"]
        assert stage["hours"] * 3600 * stage["tokens_per_s"] == pytest.approx(1e8)
        assert stage["cost"] == pytest.approx(stage["hours"] * 8 * 2)
    assert stages["distill", "swapped"]["step_s"] > stages["finetune", "swapped"]["step_s"]
    serving = [(s["work"], s["attention"], s["batch"]) for s in content["serving"]]
    assert [entry[:2] for entry in serving] == [(work, attention) for attention in ("softmax", "swapped")
                                               for work in ("prefill", "decode", "decode")]  # fmt: skip
    most = {attention: max(batch for _, name, batch in serving if name == attention)
            for attention in ("softmax", "swapped")}  # fmt: skip
    assert most["swapped"] > most["softmax"] > 1
    table = attnswap("estimate", folder, *given)
    assert table.code == 0 and "8 x h100" in table.out and "distill" in table.out and "decode" in table.out


def test_a_model_of_another_size_than_the_devices(attnswap, folder):
    large = folder / "large"
    large.mkdir()
    config = json.loads((folder / "config.json").read_text()) | {"hidden_size": 16384}
    (large / "config.json").write_text(json.dumps(config))
    given = ["estimate", large, "--attention", "elu", "--length", 256, "--device", "rtx4090"]
    content = json.loads(attnswap(*given, "--num_devices", 4, "--json").out)
    assert [stage["sharded"] for stage in content["stages"]] == [False, True, True, True]
    alone = attnswap(*given)
    assert "does not fit: distill (swapped)" in alone.out


def test_a_conversion_is_estimated_as_it_is(attnswap, tmp_path):
    hf_attnswap.swap(tiny(), "elu").save_pretrained(tmp_path)
    found = attnswap("estimate", tmp_path, "--device", "a100", "--length", 64, "--json")
    assert found.code == 0, found.err
    assert json.loads(found.out)["swapped"] == "elu in 3 layers"


def test_recomputing_saves_memory_and_costs_time():
    model = hf_attnswap.swap(tiny(), "elu").to("meta", torch.bfloat16)
    plain, again = (
        estimate(model, "tiny", GPUS["h100"], tokens=1000, length=256, gradient_checkpointing=given)
        for given in (False, True)
    )
    for before, after in zip(plain.stages[1:], again.stages[1:], strict=True):
        assert after.memory.activations < before.memory.activations
        assert after.step_s > before.step_s


def test_wrong_use_is_told_in_one_sentence(attnswap, folder, tmp_path):
    other = write_plan(tmp_path / "other.yaml", hf_attnswap.SwapConfig("elu"), tiny())
    hf_attnswap.swap(tiny(), "elu").save_pretrained(tmp_path / "converted")
    for arguments, expected in (
        ((folder, "--plan", other), "was made for a model whose layers is 3, and that of this LlamaForCausalLM is 2"),
        ((folder, "--attention", "elu", "--device", "h999"), "device 'h999' is not known"),
        ((folder, "--attention", "elu", "--tokens", "lots"), "--tokens is 'lots'; expected a number above 0"),
        ((folder, "--attention", "elu", "--length", "0"), "Invalid value for '--length'"),
        ((folder, "--attention", "elu", "--dtype", "int8", "--device", "h100"), "dtype is 'int8'"),
        ((folder, "--attention", "elu", "--dtype", "float64", "--device", "h100"), "h100 is known for bfloat16"),
        ((folder, "--attention", "elo", "--device", "h100"), "Did you mean 'elu'"),
        ((folder, "--plan", other, "--attention", "elu"), "leave out --attention"),
        ((folder, "--plan", folder / "none.yaml"), "cannot be read"),
        ((folder, "--device", "h100"), "the model is not swapped: say what is swapped, such as --plan plan.yaml"),
        ((tmp_path / "converted", "--attention", "elu", "--device", "h100"), "already swapped"),
        ((tmp_path / "nothing", "--attention", "elu", "--device", "h100"), "cannot read the model"),
    ):
        found = attnswap("estimate", *arguments)
        assert (found.code, found.out) == (2, ""), arguments
        assert expected in found.err and "\n" not in found.err
