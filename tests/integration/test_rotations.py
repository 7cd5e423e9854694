"""What a variant sees without the rotation by position is what the projections gave, in every kind of call."""

import pytest
import torch
from device_under_test import DEVICE
from swapped_models import CLOSE, greedy, left_padded, logits, positions
from tiny_models import randomise, tiny_encoder, tokens
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

import hf_attnswap
from hf_attnswap.benchmark.generation import filled_cache
from hf_attnswap.errors import UsageError
from hf_attnswap.integration.cache import cache_nbytes
from hf_attnswap.integration.observing import answering
from hf_attnswap.integration.rotations import rotary_of, rotation_of
from hf_attnswap.integration.swapping import swapped_modules

SIZES = dict(
    vocab_size=64, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, initializer_range=0.3, pad_token_id=0, eos_token_id=None,
)  # fmt: skip
LATENT = dict(
    q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, head_dim=8,
    num_key_value_heads=4, n_routed_experts=2, n_group=1, topk_group=1, num_experts_per_tok=1, moe_intermediate_size=16,
)  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
# One of each way: halves; neighbours; a part of the numbers; norms behind it; cos and sin for each pair once; scaled by
# their rotation; only some layers; the numbers behind those that are not rotated.
FAMILIES = {
    "llama": {},
    "glm": {"partial_rotary_factor": 0.5},
    "cohere": {},
    "phi": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"rotary_pct": 0.25},
    "qwen3": {},
    "gpt_oss": {"num_local_experts": 2, "layer_types": ["full_attention"] * 2},
    "mistral": {"sliding_window": None, "max_position_embeddings": 256, "rope_parameters": YARN},
    "smollm3": {"no_rope_layers": [1, 0]},
    "deepseek_v3": LATENT,
}
LAYERS = {"gpt_oss": "sinks"}  # which linear variants cannot honour
BOTH = {"unrotate": True, "half_life": 20.0, "window": 8, "sinks": 2}


def model_of(family: str, dtype=torch.float64):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {})})
    return AutoModelForCausalLM.from_config(config).to(DEVICE, dtype).eval()


def without_rotation(model):
    """Let every attention module rotate by no angle."""

    def still(module, args, kwargs):
        cos, sin = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}

    for path in swapped_modules(model):
        model.get_submodule(path).register_forward_pre_hook(still, with_kwargs=True)
    return model


def seen_by_maps(model, ids):
    """Query and key of the first layer as its map gets them, and as they came."""
    found = []

    def answer(path, attention, query, key, value, mask, scaling):
        turned = mask.rotation
        found.append((turned and turned.undo(query), turned and turned.undo(key), query, key))
        return attention(query, key, value, mask, scaling)

    with answering(model, answer):
        logits(model, ids, use_cache=False)
    return found


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in LAYERS])
def test_the_maps_see_what_the_projections_gave(family):
    """Of the first layer, whose input the rotation does not change."""
    ids = tokens(40)
    turned = seen_by_maps(hf_attnswap.swap(model_of(family), "elu", unrotate=True), ids)[0]
    still = seen_by_maps(without_rotation(hf_attnswap.swap(model_of(family), "elu")), ids)[0]
    # Latent attention rotates neighbours and then sorts them.
    for undone, rotated, plain in zip(turned[:2], turned[2:], still[2:], strict=True):
        torch.testing.assert_close(undone, plain)
        assert not torch.allclose(rotated, plain)


def test_layers_that_do_not_rotate_have_nothing_to_undo():
    found = seen_by_maps(hf_attnswap.swap(model_of("smollm3"), "elu", unrotate=True), tokens(20))
    assert [undone is None for undone, *_ in found] == [False, True]


@pytest.mark.parametrize(
    ("family", "name"),
    (("llama", "hedgehog+window"), ("llama", "gated_delta"), ("glm", "hedgehog+window"), ("smollm3", "elu")),
)
def test_all_kinds_of_calls_agree(family, name):
    """A text at once, in pieces, padded, packed with another; and what it generates."""
    known = hf_attnswap.attentions.get(name).options()
    model = hf_attnswap.swap(model_of(family), name, **{n: v for n, v in BOTH.items() if n in known})
    model, (ids, mask) = randomise(model), left_padded()
    padded = logits(model, ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    for row in range(2):
        text = ids[row, mask[row].bool()][None]
        whole = logits(model, text, use_cache=False)
        torch.testing.assert_close(padded[row, mask[row].bool()], whole[0], **CLOSE)
        n = text.shape[1]
        past = model(text[:, : n - 5]).past_key_values
        steps = [logits(model, text[:, i : i + 1], past_key_values=past)[:, 0] for i in range(n - 5, n)]
        torch.testing.assert_close(torch.stack(steps, 1), whole[:, n - 5 :], **CLOSE)
    one, other = tokens(13, 1), tokens(11, 1, seed=1)
    places = torch.cat([torch.arange(13), torch.arange(11)])[None]
    packed = logits(model, torch.cat([one, other], 1), position_ids=places, use_cache=False)
    alone = torch.cat([logits(model, text, use_cache=False) for text in (one, other)], 1)
    torch.testing.assert_close(packed, alone, **CLOSE)
    at_once, beams = greedy(model, ids, mask), greedy(model, ids, mask, num_beams=2)
    for row in range(2):
        text = ids[row, mask[row].bool()][None]
        assert torch.equal(greedy(model, text).sequences[0, -10:], at_once.sequences[row, -10:])
        assert torch.equal(greedy(model, text, num_beams=2).sequences[0, -10:], beams.sequences[row, -10:])


def test_it_is_restored_saved_and_loaded(tmp_path):
    ids, plain = tokens(30), model_of("llama", torch.float32)
    softmax = logits(plain, ids)
    model = randomise(hf_attnswap.swap(plain, "hedgehog+window", **BOTH))
    assert any(name.endswith("decay.log_factor") for name, _ in model.named_parameters())
    expected = logits(model, ids)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path).to(DEVICE), ids), expected)
    assert torch.equal(logits(hf_attnswap.restore(model), ids), softmax)


def test_a_cache_that_is_filled_for_a_benchmark_is_that_of_a_text():
    """Of a family that rotates a part of its numbers."""
    model = hf_attnswap.swap(model_of("glm"), "hedgehog+window", **BOTH)
    filled, read = filled_cache(model, 30), model(tokens(30, 1)).past_key_values
    assert cache_nbytes(filled) == cache_nbytes(read)
    shapes = [{name: t.shape for name, t in cache.layers[0].state.items()} for cache in (filled, read)]
    assert shapes[0] == shapes[1] and "turns" in shapes[0]
    assert logits(model, tokens(1, 1), past_key_values=filled).isfinite().all()


def test_half_precision_keeps_the_rotation_within_its_rounding():
    ids = tokens(40)
    exact, rough = (
        seen_by_maps(hf_attnswap.swap(model_of("llama", dtype), "elu", unrotate=True), ids)[0]
        for dtype in (torch.float64, torch.bfloat16)
    )
    for ours, theirs in zip(rough[:2], exact[:2], strict=True):
        assert (ours - theirs).abs().max() < 0.03 * theirs.abs().max()


def test_a_model_that_does_not_rotate_takes_it_for_nothing_to_do():
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=4, vocab_size=64)
    models = []
    for options in ({}, {"unrotate": True}):
        torch.manual_seed(0)
        models.append(hf_attnswap.swap(AutoModelForCausalLM.from_config(config).eval(), "elu", **options))
    assert torch.equal(*(logits(model, tokens(20)) for model in models))


def test_what_cannot_be_undone_is_refused_before_anything_runs():
    config = AutoConfig.for_model("moshi", **SIZES, audio_vocab_size=64, ffn_dim=96, num_codebooks=2)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UsageError, match="MoshiAttention rotates queries and keys in a way that cannot be undone here"):
        hf_attnswap.swap(model, "elu", unrotate=True)
    assert not swapped_modules(model)
    assert hf_attnswap.swap(model, "elu")


def test_a_norm_behind_the_rotation_is_refused():
    with pytest.raises(UsageError, match="has query_layernorm behind its rotation, which cannot be undone"):
        hf_attnswap.swap(model_of("hunyuan_v1_dense"), "elu", unrotate=True)


class Another(LlamaAttention):
    """Rotates as its base does, of which its own source says nothing."""


class Unclear(LlamaAttention):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, phase=0, **kwargs):
        cos, sin = position_embeddings
        query_states = self.q_proj(hidden_states)
        if phase:
            query_states = apply_rotary_pos_emb(query_states, query_states, cos, sin)  # noqa: F821
        return query_states


class Closed(LlamaAttention):
    def forward(self, hidden_states, position_embeddings=None, attention_mask=None):
        cos, sin = position_embeddings
        query_states = self.q_proj(hidden_states)
        query_states = apply_rotary_pos_emb(query_states, query_states, cos, sin)  # noqa: F821
        return query_states


def test_a_class_that_inherits_its_rotation_has_one():
    config = AutoConfig.for_model("llama", **SIZES)
    assert rotary_of(Another(config, 0), "causal") == rotary_of(LlamaAttention(config, 0), "causal")


def test_a_condition_that_cannot_be_told_is_named():
    globals()["apply_rotary_pos_emb"] = lambda q, k, cos, sin: (q, k)
    with pytest.raises(NotImplementedError, match="rotates queries and keys if phase, which cannot be told here"):
        rotary_of(Unclear(AutoConfig.for_model("llama", **SIZES), 0), "causal")


def test_half_lives_are_for_causal_attention():
    with pytest.raises(UsageError, match="is bidirectional attention, and a half-life is for causal attention only"):
        hf_attnswap.swap(tiny_encoder(), "elu", half_life=20)


def test_a_module_that_cannot_be_handed_its_rotation_is_refused():
    globals()["apply_rotary_pos_emb"] = lambda q, k, cos, sin: (q, k)
    with pytest.raises(NotImplementedError, match="Closed takes no more keywords, such as its rotation"):
        rotary_of(Closed(AutoConfig.for_model("llama", **SIZES), 0), "causal")


def test_a_rotation_of_other_tokens_is_refused():
    rotary = rotary_of(LlamaAttention(AutoConfig.for_model("llama", **SIZES), 0), "causal")
    cos_and_sin, query = (torch.ones(1, 5, 16), torch.zeros(1, 5, 16)), torch.zeros(2, 4, 6, 16)
    assert rotation_of(rotary, cos_and_sin, query[:, :, :5], 5).turns.shape[:2] == (2, 5)
    with pytest.raises(NotImplementedError, match=r"cos of shape \(1, 5, 16\) for 2 rows of 6 tokens"):
        rotation_of(rotary, cos_and_sin, query, 6)
