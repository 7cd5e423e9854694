"""Models whose caches are not keys and values of every layer: hybrids, shared keys, layers that look at an image."""

import json

import pytest
import swapped_models
import torch
import transformers
from swapped_models import greedy, left_padded
from tiny_models import randomise, tokens

import hf_attnswap
from hf_attnswap import UsageError
from hf_attnswap.integration.cache import StateLayer, cache_nbytes

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
SHARED = dict(
    **SIZES, vocab_size_per_layer_input=64, head_dim=8, hidden_size_per_layer_input=8, sliding_window=64,
    num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2, max_position_embeddings=64,
)  # fmt: skip
HYBRIDS = {  # a convolution or recurrence beside keys and values in one layer
    "falcon_h1": dict(
        head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8,
    ),
    "zamba": dict(  # two layers with the same weights, called with their index
        num_hidden_layers=6, attn_layer_period=2, attn_layer_offset=1, attention_hidden_size=64, attention_head_dim=16,
        mamba_d_state=8, n_mamba_heads=2, mamba_dt_rank=4,
    ),
    "zamba2": dict(  # its own recurrence rounds otherwise step by step, which large weights make visible
        initializer_range=0.1, layers_block_type=["mamba", "hybrid"] * 2, mamba_d_state=8, mamba_ngroups=1,
        n_mamba_heads=8, mamba_headdim=8, num_mem_blocks=1, use_mem_rope=True, adapter_rank=4,
    ),
    "zaya": dict(head_dim=8, num_local_experts=2, num_experts=2, experts_implementation="eager"),
}  # fmt: skip
SHARING = {"gemma3n_text": dict(laurel_rank=4), "gemma4_text": dict(global_head_dim=8)}
every_hybrid = pytest.mark.parametrize("family", HYBRIDS)
every_sharing = pytest.mark.parametrize("family", SHARING)


def made(family: str):
    torch.manual_seed(0)
    settings = {**SHARED, **SHARING[family]} if family in SHARING else {**SIZES, **HYBRIDS[family]}
    config = transformers.AutoConfig.for_model(family, **settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def swapped(family: str, name: str, **given):
    small = dict(window=4, sinks=1) if "window" in name else {}
    return randomise(hf_attnswap.swap(made(family), name, **small, **given))


def pieces(model, ids):
    """The logits of a text that comes in pieces, and its cache."""
    with torch.no_grad():
        out = model(ids[:, :7], use_cache=True)
        cache, found = out.past_key_values, [out.logits]
        for i in range(7, ids.shape[1]):
            found.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
    return torch.cat(found, dim=1), cache


@pytest.mark.parametrize("name", ("relu_power", "elu", "hedgehog+window", "gated"))
@pytest.mark.parametrize("family", (*HYBRIDS, *SHARING))
def test_a_text_in_pieces_is_the_text(family, name):
    model, ids = swapped(family, name), tokens(11)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
    found, cache = pieces(model, ids)
    # Recurrences of these models compute in float32, and step by step in another order.
    torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-3)
    assert any(isinstance(layer, StateLayer) for layer in cache.layers) == (name != "relu_power")


@pytest.mark.parametrize("family", ("falcon_h1", "zamba", "gemma3n_text", "gemma4_text"))
def test_beams_of_a_padded_batch(family):
    model, ids = swapped(family, "elu"), tokens(9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    beams = dict(new=4, num_beams=2)
    cached, recomputed = (greedy(model, ids, mask, use_cache=use_cache, **beams) for use_cache in (True, False))
    assert torch.equal(cached.sequences, recomputed.sequences)


@every_hybrid
def test_the_bytes_of_a_hybrid_do_not_grow(family):
    model = swapped(family, "elu")
    sizes = {cache_nbytes(greedy(model, tokens(n), new=2).past_key_values) for n in (5, 11)}
    assert len(sizes) == 1 and sizes.pop() > 0


@pytest.mark.parametrize("one", (False, True))
@every_hybrid
def test_a_hybrid_is_saved_and_comes_back(family, one, tmp_path):
    """Modules with the weights of others have their own variants, and those of several layers no index of their own."""
    layers = [max(entry.layer for entry in hf_attnswap.inspect(made(family)))] if one else None
    model, ids = swapped(family, "hedgehog", layers=layers), tokens(9)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again.tie_weights()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@every_sharing
def test_softmax_through_the_seam_is_the_model(family):
    model, ids = made(family), tokens(12)
    padded = torch.ones_like(ids).masked_fill(torch.arange(12) < 4, 0)
    calls = ({}, {"use_cache": False}, {"attention_mask": padded}, {"logits_to_keep": 1}, {"logits_to_keep": 3},
             {"logits_to_keep": 3, "attention_mask": padded})  # fmt: skip
    with torch.no_grad():
        before = [model(ids, **call).logits[:, -3:] for call in calls]
        hf_attnswap.swap(model, "softmax")
        for call, expected in zip(calls, before, strict=True):
            torch.testing.assert_close(model(ids, **call).logits[:, -3:], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ("relu_power", "elu", "hedgehog+window"))
@every_sharing
def test_the_last_rows_alone_are_the_last_rows(family, name):
    """Gemma 4 asks the layers without keys of their own for no others."""
    model, ids = swapped(family, name), tokens(12)
    padded = torch.ones_like(ids).masked_fill(torch.arange(12) < 4, 0)
    with torch.no_grad():
        for given in ({}, {"attention_mask": padded}, {"use_cache": False}):
            whole = model(ids, **given).logits
            for rows in (1, 3):
                found = model(ids, **given, logits_to_keep=rows).logits
                torch.testing.assert_close(found, whole[:, -rows:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layers", "says"),
    (
        ([1], r"layers 1, 3 share the keys of one layer, .* elu .*: swap layers=\[1, 3\] for a state on all of them"),
        ([0, 2, 3], r"layers 1, 3 share .*: swap layers=\[0, 1, 2, 3\] for a state .*, layers=\[0, 2\] for none"),
        ([0, 3], r"layers 0, 2 and layers 1, 3 share .*: swap layers=\[0, 1, 2, 3\] .*, other layers for none"),
        ({1: "softmax", 3: "elu"}, "layers 1, 3 share"),
    ),
)
@every_sharing
def test_layers_with_the_same_keys_keep_them_together(family, layers, says):
    model = made(family)
    with pytest.raises(UsageError, match=says):
        hf_attnswap.swap(model, None if isinstance(layers, dict) else "elu", layers=layers)
    assert not any(entry.swapped for entry in hf_attnswap.inspect(model))
    for allowed in ([0, 2], [1, 3], {3: "relu_power", 1: "softmax"}):
        model, name = made(family), None if isinstance(allowed, dict) else "elu"
        hf_attnswap.swap(model, name, layers=allowed)
        with torch.no_grad():
            found, _ = pieces(model, tokens(11))
            torch.testing.assert_close(found, model(tokens(11), use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_a_conversion_that_parts_layers_with_the_same_keys_is_refused(tmp_path):
    hf_attnswap.swap(made("gemma3n_text"), "elu", layers=[1, 3]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["attnswap"]["swapped"][0]["layers"] = [1]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="layers 1, 3 share the keys of one layer"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


IMAGES = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_global_layers=1, attention_heads=4, image_size=16,
    patch_size=8, max_num_tiles=2, intermediate_layers_indices=[0], vision_output_dim=64,
    supported_aspect_ratios=[[1, 1], [1, 2], [2, 1]],
)  # fmt: skip


@pytest.mark.parametrize("name", ("softmax", "relu_power", "elu", "hedgehog+window"))
def test_a_model_whose_layers_look_at_an_image_generates(name):
    torch.manual_seed(0)
    text = {**SIZES, "cross_attention_layers": [1, 3]}
    config = transformers.MllamaConfig(vision_config=IMAGES, text_config=text, image_token_index=63)
    model, ids = transformers.MllamaForConditionalGeneration(config).eval(), tokens(9)
    for parameter in model.parameters():  # the gates of the layers that look at the image are closed at the start
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    ids[:, 1] = 63
    image = dict(
        pixel_values=torch.randn(2, 1, 2, 3, 16, 16), aspect_ratio_ids=torch.ones(2, 1, dtype=torch.long),
        aspect_ratio_mask=torch.ones(2, 1, 2, dtype=torch.long), cross_attention_mask=torch.ones(2, 9, 1, 2).long(),
    )  # fmt: skip
    before = greedy(model, ids, new=4, **image)
    hf_attnswap.swap(model, name, kinds=["causal"])
    cached, recomputed = (greedy(model, ids, new=4, use_cache=use_cache, **image) for use_cache in (True, False))
    torch.testing.assert_close(cached.logits, recomputed.logits, rtol=1e-4, atol=1e-4)
    if name == "softmax":
        torch.testing.assert_close(cached.logits, before.logits, rtol=1e-4, atol=1e-4)


def test_a_bias_of_the_scores_is_told_at_the_swap():
    config = transformers.AutoConfig.for_model(
        "inkling_text", **SIZES, head_dim=8, swa_head_dim=8, swa_num_attention_heads=4, swa_num_key_value_heads=2,
        d_rel=4, n_routed_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UsageError, match="has a bias on its scores, which elu cannot honour"):
        hf_attnswap.swap(model, "elu")
    found, _ = pieces(hf_attnswap.swap(model, "relu_power"), tokens(11))
    torch.testing.assert_close(found, model(tokens(11), use_cache=False).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", ([0], [2], [0, 1, 2]), ids=str)
def test_states_and_keys_share_a_static_cache(layers):
    model, (ids, mask) = swapped_models.swapped("window", layers=layers), left_padded()
    cached = greedy(model, ids, mask, new=6, cache_implementation="static")
    assert torch.equal(cached.sequences, greedy(model, ids, mask, new=6, use_cache=False).sequences)
