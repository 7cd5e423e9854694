"""Programs that have code of their own for a model type find no plain model in a conversion."""

import json

import pytest
import torch
from attention_cases import NAMES, small_options
from safetensors import safe_open
from tiny_models import tiny, tokens
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

import hf_attnswap
from hf_attnswap import UsageError


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    tiny().save_pretrained(folder)
    return folder


def names(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def architectures(folder) -> list[str]:
    return json.loads((folder / "config.json").read_text())["architectures"]


@pytest.mark.parametrize("name", NAMES)
def test_neither_architecture_nor_weights_are_those_of_a_plain_model(name, plain, tmp_path):
    hf_attnswap.swap(tiny(), name, layers="1:", **small_options(name)).save_pretrained(tmp_path)
    assert architectures(tmp_path) == ["AttnswapLlamaForCausalLM"] and architectures(plain) == ["LlamaForCausalLM"]
    more = names(tmp_path) - names(plain)
    assert {f"model.layers.{layer}.self_attn.attnswap.marker" for layer in (1, 2)} <= more
    assert not any("layers.0" in key for key in more)


def test_this_package_reads_the_architecture_as_transformers_does(tmp_path):
    model = hf_attnswap.swap(tiny(), "elu")
    model.save_pretrained(tmp_path)
    assert model.config.architectures == AutoConfig.from_pretrained(tmp_path).architectures == ["LlamaForCausalLM"]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)).__name__ == "LlamaForCausalLM"
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again")
    assert architectures(tmp_path / "again") == ["AttnswapLlamaForSequenceClassification"]
    hf_attnswap.restore(again).save_pretrained(tmp_path / "restored")
    assert architectures(tmp_path / "restored") == ["LlamaForSequenceClassification"]


def test_weights_without_a_marker_are_refused(plain, tmp_path):
    """As those of the model that was converted are."""
    hf_attnswap.swap(tiny(), "elu").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((plain / "model.safetensors").read_bytes())
    with pytest.raises(UsageError, match=r"do not belong together: model.layers.0.self_attn.attnswap.marker is not"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_marker_under_a_plain_config_is_refused(plain, tmp_path):
    hf_attnswap.swap(tiny(), "elu").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((plain / "config.json").read_bytes())
    with pytest.raises(UsageError, match=r"attnswap.marker is among the weights, and config.json does not ask for it"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_marker_is_not_a_number_of_the_model(tmp_path):
    model = hf_attnswap.swap(tiny(), "hedgehog")
    assert all(b.dtype == torch.uint8 for n, b in model.half().named_buffers() if n.endswith("marker"))
    model = hf_attnswap.swap(tiny(), "elu")
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in tiny().parameters())
    assert model(tokens(5)).logits.isfinite().all()
