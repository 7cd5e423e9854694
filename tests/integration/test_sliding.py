"""Models whose layers have a sliding window, swapped to variants that keep a state, in texts beyond that window."""

from contextlib import ExitStack

import pytest
import torch
from attention_cases import small_options
from swapped_models import CLOSE, greedy, logits, positions
from tiny_models import randomise, tokens
from transformers import (
    BltConfig,
    BltForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import hf_attnswap
from hf_attnswap import UsageError
from hf_attnswap.benchmark.generation import decode, filled_cache
from hf_attnswap.integration.cache import cache_nbytes
from hf_attnswap.integration.swapping import swapped_modules
from hf_attnswap.masks import Mask
from hf_attnswap.ops.heads import mix

W, LENGTH = 10, 26
SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, sliding_window=W, max_position_embeddings=1024, pad_token_id=0, eos_token_id=None,
)  # fmt: skip
TYPES = ["sliding_attention", "full_attention", "sliding_attention"]
# Whose masks alone know of the window; torch multiplies by grouped experts in float32 at most.
PHIMOE = dict(num_local_experts=2, experts_implementation="eager")
MODELS = {
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, dict(head_dim=8, layer_types=TYPES, attn_logit_softcapping=None)),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, dict(head_dim=8, layer_types=TYPES)),
    "mistral": (MistralForCausalLM, MistralConfig, {}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, dict(use_sliding_window=True, max_window_layers=1)),
    "phimoe": (PhimoeForCausalLM, PhimoeConfig, PHIMOE),
}
SLIDES = {"gemma2": (0, 2), "gemma3": (0, 2), "mistral": (0, 1, 2), "qwen2": (1, 2), "phimoe": (0, 1, 2)}
NAMES = ("window", "hedgehog", "hedgehog+window")
every_case = pytest.mark.parametrize(
    ("family", "name"), [("gemma3", name) for name in NAMES] + [(family, "hedgehog+window") for family in MODELS][::2]
    + [("mistral", "window"), ("qwen2", "hedgehog"), ("qwen2", "window"), ("gemma2", "window")]
    + [("phimoe", "window")],
)  # fmt: skip


def sliding(family, name, layers=None, options=None, **overrides):
    cls, config, more = MODELS[family]
    torch.manual_seed(0)
    model = cls(config(**SIZES | more | overrides)).double().eval()
    options = small_options(name) if name and options is None else options or {}
    return randomise(hf_attnswap.swap(model, name, layers=layers, **options))


def by_definition(model, family, ids):
    """The logits where every layer weighs all keys, and those beyond its window are dropped from the sums."""

    def answer(attention, query, key, value, mask, scaling):
        length = query.shape[2]
        near = torch.ones(length, length, dtype=torch.bool).tril()
        if attention.layer in SLIDES[family]:
            near &= ~near.tril(-W)
        weights = attention.weights(query, key, Mask(length, length), scaling) * near
        return mix(weights / weights.sum(-1, keepdim=True), value)

    with ExitStack() as stack:
        for attention in swapped_modules(model).values():
            stack.enter_context(attention.answered_by(answer))
        return logits(model, ids, use_cache=False)


@every_case
def test_texts_beyond_the_window(family, name):
    model, ids = sliding(family, name), tokens(LENGTH)
    whole = logits(model, ids)
    torch.testing.assert_close(whole, by_definition(model, family, ids), rtol=1e-4, atol=1e-4)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :7] = 0
    padded = logits(model, ids, attention_mask=mask, position_ids=positions(mask))
    torch.testing.assert_close(padded[0], whole[0], **CLOSE)
    torch.testing.assert_close(padded[1:, 7:], logits(model, ids[1:, 7:]), **CLOSE)
    lengths = (3, 17, 6)
    packed = torch.cat([torch.arange(n) for n in lengths])[None]
    together = logits(model, ids[:1], position_ids=packed, use_cache=False)
    alone = [logits(model, text) for text in ids[:1].split(lengths, dim=1)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), **CLOSE)


@every_case
def test_the_window_is_passed_while_generating(family, name):
    model, ids = sliding(family, name), tokens(8)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    cached, recomputed = (greedy(model, ids, mask, new=14, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, recomputed.sequences)
    torch.testing.assert_close(cached.logits, recomputed.logits, **CLOSE)


@pytest.mark.parametrize("name", ("window", "hedgehog"))
@pytest.mark.parametrize("cache", ("dynamic", "static"))
def test_a_layer_beside_one_that_keeps_softmax(name, cache):
    """The cache of the other holds no more than the window, and the masks are made for that."""
    for layers in ([0], [2]):
        model, ids = sliding("gemma3", name, layers=layers), tokens(8)
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        given = {} if cache == "dynamic" else {"cache_implementation": "static"}
        cached = greedy(model, ids, mask, new=14, disable_compile=True, **given)
        assert torch.equal(cached.sequences, greedy(model, ids, mask, new=14, use_cache=False).sequences)


@pytest.mark.parametrize("name", ("window", "elu"))
def test_several_tokens_at_once_and_tokens_taken_back(name):
    model, ids = sliding("mistral", name), tokens(8, batch=1).repeat(1, 3)
    drafted = greedy(model, ids, new=12, prompt_lookup_num_tokens=3)
    assert torch.equal(drafted.sequences, greedy(model, ids, new=12, use_cache=False).sequences)


@pytest.mark.parametrize("name", NAMES)
def test_the_usual_sizes(name):
    options = {"window": 128} if "window" in name else {}
    model, ids = sliding("gemma3", name, options=options, sliding_window=512), tokens(513, batch=1)
    changed = ids.clone()
    changed[:, 0] = 3 + (ids[:, 0] - 2) % 61
    with torch.no_grad():
        first = model.model.layers[0]
        position = torch.arange(513)[None]
        hidden = [model.model.embed_tokens(t) for t in (ids, changed)]
        rotary = model.model.rotary_emb(hidden[0], position, "sliding_attention")
        mask = torch.ones(513, 513, dtype=torch.bool).tril()
        mask = (mask & ~mask.tril(-512))[None, None]
        before, after = (
            first(h, position_embeddings=rotary, attention_mask=mask, position_ids=position) for h in hidden
        )
    torch.testing.assert_close(before[:, 512:], after[:, 512:], **CLOSE)  # which does not see the first token
    assert greedy(model, ids, new=3).sequences.shape == (1, 516)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_that_is_filled_for_a_benchmark_is_that_of_a_text(name):
    model = sliding("mistral", name)
    filled, read = filled_cache(model, LENGTH), model(tokens(LENGTH, batch=1), use_cache=True).past_key_values
    assert cache_nbytes(filled) == cache_nbytes(read)
    decode(model, filled, torch.full((1, 1), 5), 2)


@pytest.mark.parametrize("name", ("window", "elu"))
def test_a_padded_batch_in_pieces(name):
    """Pieces in which a row has padding at its end, or nothing else."""
    model, ids = sliding("mistral", name), tokens(LENGTH)
    for padding in (slice(0, 13), slice(LENGTH - 5, LENGTH)):
        mask = torch.ones(2, LENGTH, dtype=torch.long)
        mask[1, padding] = 0
        where = positions(mask)
        whole = logits(model, ids, attention_mask=mask, position_ids=where)
        for size in (6, 13):
            cache, found = DynamicCache(config=model.config), []
            for piece in (slice(start, start + size) for start in range(0, LENGTH, size)):
                given = dict(attention_mask=mask[:, : piece.stop], position_ids=where[:, piece])
                found.append(logits(model, ids[:, piece], past_key_values=cache, **given))
            torch.testing.assert_close(torch.cat(found, 1)[mask.bool()], whole[mask.bool()], **CLOSE)


def test_padding_between_tokens_is_refused():
    model, ids = sliding("mistral", "window"), tokens(8)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with pytest.raises(NotImplementedError, match=r"layer 0 .*padding stands between .*pad on the left"):
        greedy(model, ids, mask, new=6)


@pytest.mark.parametrize("name", ("window", "elu"))
def test_short_texts_in_long_rows(name):
    """Rows of which no text is longer than the window, padded or packed, are those of the texts alone."""
    model, ids = sliding("mistral", name), tokens(LENGTH)
    mask = torch.zeros(2, LENGTH, dtype=torch.long)
    mask[0, -9:] = 1  # the other row is padding alone
    padded = logits(model, ids, attention_mask=mask, position_ids=positions(mask))
    torch.testing.assert_close(padded[0, -9:], logits(model, ids[:1, -9:])[0], **CLOSE)
    packed = torch.cat([torch.arange(n) for n in (10, 7, 9)])[None]
    together = logits(model, ids[:1], position_ids=packed, use_cache=False)
    alone = [logits(model, text) for text in ids[:1].split((10, 7, 9), dim=1)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), **CLOSE)


def test_a_mask_that_shows_more_than_the_window_is_refused():
    model, ids = sliding("mistral", "elu"), tokens(LENGTH)
    whole = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    with pytest.raises(NotImplementedError, match=r"layer 0 .*sliding window is 10, and the mask .*farther"):
        logits(model, ids, attention_mask=whole)


@pytest.mark.parametrize("name", ("window", "elu"))
def test_key_value_groups_beside_softmax(name):
    model, ids = sliding("mistral", None, layers={"0.1": name, "2.0": name}), tokens(9)
    cached, recomputed = (greedy(model, ids, new=12, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, recomputed.sequences)
    torch.testing.assert_close(cached.logits, recomputed.logits, **CLOSE)


def seen(model):
    return {entry.name: entry.reach.sliding_window for entry in hf_attnswap.inspect(model) if entry.kind == "causal"}


def test_the_window_of_a_loaded_model_whose_masks_alone_know_it(tmp_path):
    model, ids = sliding("phimoe", "elu").float(), tokens(LENGTH)
    model.save_pretrained(tmp_path)
    loaded = PhimoeForCausalLM.from_pretrained(tmp_path)
    assert set(seen(loaded).values()) == {W}
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_masks_that_a_model_hands_on_to_its_parts():
    """Blt's encoder and decoder see the window of the model, its patcher one of its own, what stands between all."""
    sizes = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=16)
    parts = {
        f"{name}_config": sizes | {"vocab_size": 260, "hidden_size_global": 16, "cross_attn_k": 1}
        for name in ("encoder", "decoder")
    }
    parts |= {"patcher_config": sizes | {"sliding_window": W - 2}, "global_config": sizes}
    torch.manual_seed(0)
    model = BltForCausalLM(BltConfig(
        **parts, local_attention_window_len=W, cross_attn_k=1, encoder_hash_byte_group_vocab=8, initializer_range=0.3
    )).double().eval()  # fmt: skip
    found = {name.split(".")[1]: size for name, size in seen(model).items()}
    assert found == {"local_encoder": W, "local_decoder": W, "global_transformer": None, "patcher": W - 2}
    ids = tokens(LENGTH)
    before = logits(model, ids, use_cache=False)
    hf_attnswap.swap(model, "window", kinds=["causal"], window=LENGTH)
    torch.testing.assert_close(logits(model, ids, use_cache=False), before, **CLOSE)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())  # transformers 5.23 makes none from Blt's config
    torch.testing.assert_close(logits(model, ids, past_key_values=cache, use_cache=True), before, **CLOSE)


def test_a_bias_of_each_token_beside_the_window():
    """Doge's, which it writes into the mask."""
    model = DogeForCausalLM(DogeConfig(**SIZES)).eval()
    assert set(seen(model).values()) == {W}
    with pytest.raises(UsageError, match="has a bias of each token on its scores, which window cannot honour"):
        hf_attnswap.swap(model, "window")
    before = logits(model, tokens(LENGTH))
    torch.testing.assert_close(logits(hf_attnswap.swap(model, "softmax"), tokens(LENGTH)), before)
