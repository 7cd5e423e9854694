"""Sliding windows and chunks: `inspect` says which layers have one, and a swap says at once what texts may not pass."""

import logging
import re

import pytest
import torch
from tiny_models import tiny, tokens
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    ModernBertConfig,
    ModernBertModel,
)

import hf_attnswap
from hf_attnswap import UsageError

SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0,
)  # fmt: skip


def gemma3(**overrides):
    torch.manual_seed(0)
    types = ["sliding_attention", "full_attention"]
    return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL | dict(sliding_window=16, layer_types=types) | overrides)).eval()


def llama4():
    torch.manual_seed(0)
    config = Llama4TextConfig(
        **SMALL, intermediate_size_mlp=48, num_local_experts=1, attention_chunk_size=8, moe_layers=[],
        layer_types=["chunked_attention", "full_attention"], no_rope_layers=[1, 0],
    )  # fmt: skip
    return Llama4ForCausalLM(config).eval()


def sees(model) -> list[str]:
    return [str(entry.reach) for entry in hf_attnswap.inspect(model)]


def test_inspect_says_how_far_layers_see():
    assert sees(gemma3()) == ["the last 16 tokens", "all"]
    assert sees(llama4()) == ["its chunk of 8 tokens", "all"]
    assert sees(tiny()) == ["all"] * 3
    assert sees(tiny("mistral", sliding_window=6)) == ["the last 6 tokens"] * 3  # read from the config at every call
    assert sees(tiny("qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=2)) == [
        "all", "all", "the last 6 tokens",
    ]  # fmt: skip
    encoder = ModernBertModel(ModernBertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        local_attention=8, global_attn_every_n_layers=2, pad_token_id=0,
    ))  # fmt: skip
    assert sees(encoder) == ["all", "the last 5 tokens"]
    told = [entry.as_dict() for entry in hf_attnswap.inspect(gemma3())]
    assert [entry["sliding_window"] for entry in told] == [16, None]
    assert [entry["attention_chunk_size"] for entry in told] == [None, None]


@pytest.mark.parametrize(
    ("make", "name"),
    ((gemma3, "delta"), (gemma3, "gated"), (llama4, "elu"), (llama4, "window"), (llama4, "hedgehog+window")),
)
def test_a_swap_that_nobody_chose_layers_for(make, name):
    model = make()
    says = rf"layer 0 sees no more than .*, which {re.escape(name)} cannot .*layers=\[1\]"
    with pytest.raises(UsageError, match=says):
        hf_attnswap.swap(model, name)
    assert not hasattr(model.config, "attnswap")
    hf_attnswap.swap(model, name, layers=[1])
    ids = tokens(12)
    assert model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None).shape == (2, 24)


@pytest.mark.parametrize("how", ("chosen", "all slide"))
def test_a_warning_where_there_is_no_other_choice(caplog, how):
    with caplog.at_level(logging.WARNING):
        if how == "chosen":
            hf_attnswap.swap(gemma3(), "delta", layers="0:")
        else:
            hf_attnswap.swap(tiny("mistral", sliding_window=16), "delta")
    (said,) = (record.getMessage() for record in caplog.records)
    assert "texts of more than 16 tokens will be refused, also while they are generated" in said
    assert ("layers=[1] swaps the layers that see all" in said) == (how == "chosen")


@pytest.mark.parametrize(
    ("make", "name"),
    (
        (gemma3, "relu_power"),
        (gemma3, "none"),
        (gemma3, "elu"),
        (gemma3, "window"),
        (gemma3, "hedgehog+window"),
        (tiny, "elu"),
        (lambda: tiny("mistral", sliding_window=512), "delta"),  # no text of the model is longer
        (lambda: gemma3(layer_types=["full_attention"] * 2), "delta"),
    ),
)
def test_nothing_to_say(caplog, make, name):
    with caplog.at_level(logging.WARNING):
        hf_attnswap.swap(make(), name)
    assert not caplog.records


@pytest.mark.parametrize("name", ("elu", "gated", "window"))
def test_a_chunk_that_is_left_while_generating_is_refused(name):
    """Beyond its chunk a layer sees nothing of what its state has taken in; a text in one call is exact."""
    model, ids = hf_attnswap.swap(llama4(), name, layers="0:"), tokens(12)
    with pytest.raises(NotImplementedError, match=r"layer 0 .*hides earlier tokens"):
        model.generate(ids[:, :6], max_new_tokens=6, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        found = model(ids)
        torch.testing.assert_close(found.logits, whole)
        with pytest.raises(NotImplementedError, match=r"layer 0 .*packed texts, which cannot be continued"):
            model(ids[:, :1], past_key_values=found.past_key_values)


def test_a_loaded_conversion_of_all_layers(tmp_path):
    """What somebody chose is not refused when it comes back."""
    hf_attnswap.swap(gemma3(), "delta", layers="0:").save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [entry.swapped for entry in hf_attnswap.inspect(loaded)] == ["delta", "delta"]
