"""What a call or a config asks for that cannot be done raises, with the layer and the reason."""

import copy
import re

import pytest
import torch
from tiny_models import tiny, tokens
from transformers import AutoModelForCausalLM

import hf_attnswap
from hf_attnswap import UsageError
from hf_attnswap.integration.attention import attnswap_attention

ENDS = torch.tensor([0, 5, 12], dtype=torch.int32)
PACKED = torch.cat([torch.arange(5), torch.arange(7)])[None]


@pytest.mark.parametrize(
    ("given", "says"),
    (
        (dict(s_aux=torch.ones(1, 4, 12, 1)), r"sinks have shape \(1, 4, 12, 1\); expected one score per head"),
        (dict(position_ids=PACKED, softcap=3.0), "packed texts together with a bias, a soft cap or sinks"),
        (
            dict(cu_seq_lens_q=ENDS, attention_mask=torch.ones(1, 1, 12, 12).tril().bool()),
            "cu_seq_lens_q packs several texts, and attention_mask says nothing of them",
        ),
        (dict(cu_seq_lens_q=ENDS, cu_seq_lens_k=ENDS + 1), "cu_seq_lens_q and cu_seq_lens_k differ"),
        (dict(indices=torch.zeros(1)), "the keys that sparse attention has chosen"),
    ),
    ids=("sinks", "packed", "mask", "lengths", "sparse"),
)
def test_calls(given, says):
    model = hf_attnswap.swap(tiny(), "relu_norm")
    with pytest.raises(NotImplementedError, match=rf"layer 0 \(relu_norm\).*{says}"):
        model(tokens(12, batch=1), use_cache=False, **given)


def test_heads_that_the_parameters_were_not_made_for():
    module = hf_attnswap.swap(tiny(), "hedgehog").model.layers[0].self_attn
    query, key, value = (torch.randn(1, heads, 5, 16) for heads in (4, 2, 2))
    with pytest.raises(
        NotImplementedError, match=r"layer 0 \(hedgehog\).*made for Heads.*head_dim=8.*called with.*=16"
    ):
        attnswap_attention(module, query, key, value, None)


def test_dropout_of_a_kept_layer_beside_a_soft_cap():
    model = hf_attnswap.swap(tiny(attention_dropout=0.1), "relu_norm", layers=[1]).train()
    with pytest.raises(NotImplementedError, match="attention dropout 0.1 together with a soft cap of 3.0"):
        model(tokens(12), use_cache=False, softcap=3.0)


def test_config_that_wants_weights_of_every_call():
    model = tiny()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(UsageError, match="output_attentions=True with the call instead"):
        hf_attnswap.swap(model, "relu")


@pytest.mark.parametrize(
    ("attribute", "says"), (("indexer", "sparse attention"), ("sink_proj", "its sinks are scores of each token"))
)
def test_modules_that_no_variant_can_stand_in_for(attribute, says):
    model = tiny()
    setattr(model.model.layers[1].self_attn, attribute, torch.nn.Linear(2, 2))
    with pytest.raises(UsageError, match=re.escape("model.layers.1.self_attn") + f".*{says}"):
        hf_attnswap.swap(model, "relu")


def test_a_missing_mask_is_what_it_is_to_the_implementation_that_the_model_had():
    """SDPA goes by is_causal, eager attention forbids nothing; a padded text has a mask in either."""
    ids = tokens(12)
    for implementation in ("sdpa", "eager"):
        model = tiny()
        model.set_attn_implementation(implementation)
        expected = model(ids).logits
        hf_attnswap.swap(model, "softmax", layers=[0])
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)
        assert hf_attnswap.restore(model).config._attn_implementation == implementation


def test_a_reference_model_that_a_trainer_loads_by_name(tmp_path):
    """trl's DPOTrainer does so where it gets no ref_model, with the attn_implementation of the model that it trains."""
    tiny().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    hf_attnswap.swap(model, "elu")
    with pytest.raises(UsageError, match=r"swapped in memory .* needs ref_model=copy.deepcopy\(model\), or .* saved"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    model.save_pretrained(tmp_path / "swapped")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "swapped", attn_implementation="attnswap")
    ids = tokens(12)
    for reference in (again, copy.deepcopy(model)):
        assert torch.equal(reference(ids).logits, model(ids).logits)


def test_continuous_batching_is_refused_in_our_words():
    """transformers would advise another attention implementation, which would then refuse the swapped layers."""
    model = tiny()
    hf_attnswap.swap(model, "elu", layers=[0])
    with pytest.raises(UsageError, match="keys and values in pages.*call generate on the padded prompts"):
        model.generate_batch([[1, 2, 3]], max_new_tokens=2)
    with pytest.raises(UsageError, match="keys and values in pages"):
        model.init_continuous_batching()
    assert type(hf_attnswap.restore(model).init_continuous_batching()).__name__ == "ContinuousBatchingManager"
