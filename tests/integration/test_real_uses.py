"""What programs around a swapped model do: trace it, share its config, pack texts, quantise weights, gate outputs."""

import copy

import pytest
import torch
import transformers
from tiny_models import tiny, tokens
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, DataCollatorWithFlattening, LlamaForCausalLM

import hf_attnswap

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


class Positional(nn.Module):
    """torch.jit.trace passes arguments by position."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(input_ids=ids, attention_mask=mask)[0]


@pytest.mark.parametrize("name", ("relu_power", "elu"))
def test_a_traced_model_keeps_its_mask_an_input(name):
    model = Positional(hf_attnswap.swap(BertModel(BertConfig(**SIZES)).eval(), name))
    ids, full = tokens(12), torch.ones(2, 12, dtype=torch.long)
    padded = full.masked_fill(torch.arange(12) > 6, 0)
    with torch.no_grad():
        traced = torch.jit.trace(model, (ids, full), check_trace=False)
        torch.testing.assert_close(traced(ids, padded)[:, :7], model(ids, padded)[:, :7])


@pytest.mark.parametrize(
    ("family", "name", "layers"),
    (("llama", "elu", [1]), ("llama", "softmax", None), ("gpt2", "elu", None), ("gpt2", "hedgehog+window", None)),
)
def test_a_traced_decoder_keeps_its_mask_an_input(family, name, layers):
    """Beside layers that keep softmax, and where the attention module has a softmax of its own that reads masks."""
    model = Positional(hf_attnswap.swap(tiny(family, use_cache=False), name, layers=layers))
    ids, full = tokens(12), torch.ones(2, 12, dtype=torch.long)
    padded = full.masked_fill(torch.arange(12) < 4, 0)
    with torch.no_grad():
        traced = torch.jit.trace(model, (ids, full), check_trace=False)
        torch.testing.assert_close(traced(ids, padded)[:, 4:], model(ids, padded)[:, 4:], rtol=1e-4, atol=1e-4)


def test_a_swap_leaves_other_models_of_the_same_config_object_alone():
    config = copy.deepcopy(tiny().config)
    baseline, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    before = baseline(tokens(12)).logits
    hf_attnswap.swap(other, "relu_norm")
    assert torch.equal(baseline(tokens(12)).logits, before)
    assert not any("attnswap" in name for name, _ in LlamaForCausalLM(config).named_modules())
    assert other.model.config is other.config and other.model.layers[0].self_attn.config is other.config


@pytest.mark.parametrize("name", ("relu_power", "elu", "hedgehog+window"))
@pytest.mark.parametrize("with_positions", (True, False))
def test_texts_that_a_collator_packs_are_the_texts_alone(name, with_positions):
    texts = [{"input_ids": [1, 40, 40, 26, 37, 4]}, {"input_ids": [1, 31, 29, 27]}, {"input_ids": [1, 4, 41, 30, 29]}]
    batch = DataCollatorWithFlattening(return_seq_idx=True, return_position_ids=True)(texts)
    batch.pop("labels")
    model = hf_attnswap.swap(tiny(), name)
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([text["input_ids"]])).logits[0] for text in texts])
        if not with_positions:  # then seq_idx alone tells the texts apart
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        packed = model(**batch, use_cache=False).logits[0]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ("hedgehog", "hedgehog+window", "gated"))
def test_new_parameters_beside_quantised_weights_are_as_the_rest_of_the_model(name):
    model = tiny().to(device="meta", dtype=torch.bfloat16)  # stands for a GPU
    for projection in (m for m in model.model.layers.modules() if isinstance(m, nn.Linear)):
        packed = torch.empty(projection.weight.numel() // 2, 1, dtype=torch.uint8, device="meta")
        projection.weight = nn.Parameter(packed, requires_grad=False)
    hf_attnswap.swap(model, name)
    new = {(p.device.type, p.dtype) for path, p in model.named_parameters() if ".attnswap." in path}
    assert new == {("meta", torch.bfloat16)}


LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
LINEAR |= dict(num_key_value_heads=2, head_dim=8, layer_types=["linear_attention", "full_attention"])


@pytest.mark.parametrize("name", ("elu", "hedgehog", "hedgehog+window", "gated"))
def test_heads_are_read_where_a_projection_holds_a_gate_too(name):
    config = transformers.Qwen3_5TextConfig(**SIZES, **LINEAR)
    model = hf_attnswap.swap(AutoModelForCausalLM.from_config(config).eval(), name)
    assert torch.isfinite(model(tokens(12)).logits).all()
