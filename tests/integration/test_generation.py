"""Generation by swapped models: greedy, sampling, beams, chunks, continued caches, assistants."""

import copy

import pytest
import torch
from attention_cases import NAMES, crossed, small_options
from device_under_test import DEVICE
from swapped_models import (
    CLOSE,
    LENGTH,
    PADDED,
    STATEFUL,
    every_name,
    every_pair,
    greedy,
    left_padded,
    logits,
    plain,
    positions,
    swapped,
)
from tiny_models import tiny, tokens
from transformers import BertConfig, DynamicCache, EncoderDecoderConfig, EncoderDecoderModel, set_seed

import hf_attnswap
from hf_attnswap import swap
from hf_attnswap.benchmark.generation import decode
from hf_attnswap.integration.cache import cache_nbytes


@every_pair
def test_greedy_with_cache_without_and_by_hand(family, name):
    model, (ids, mask) = swapped(name, family), left_padded()
    cached, recomputed = (greedy(model, ids, mask, new=6, use_cache=use_cache) for use_cache in (True, False))
    torch.testing.assert_close(cached.logits, recomputed.logits, **CLOSE)
    assert torch.equal(cached.sequences, recomputed.sequences)
    alone = ids[1:, PADDED:]
    for step in cached.logits:
        last = logits(model, alone)[:, -1]
        torch.testing.assert_close(step[1:], last, **CLOSE)
        alone = torch.cat([alone, last.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached.sequences[1:, PADDED:], alone)


@every_name
def test_greedy_with_kept_layers(name):
    model, (ids, mask) = swapped(name, layers=[0, 2]), left_padded()
    cached, recomputed = (greedy(model, ids, mask, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, recomputed.sequences)
    alone = greedy(model, ids[1:, PADDED:], use_cache=False).sequences
    assert torch.equal(cached.sequences[1:, PADDED:], alone)


@pytest.mark.parametrize("implementation", ("eager", "sdpa"))
@pytest.mark.parametrize("layers", ([1], None), ids=("one", "all"))
def test_softmax_variant_generates_what_the_model_does(implementation, layers):
    # Eager attention rounds its softmax to float32, where padding that sees nothing is NaN in a wider model.
    model, (ids, mask) = tiny() if implementation == "eager" else plain(), left_padded()
    model.set_attn_implementation(implementation)
    expected = greedy(model, ids, mask)
    found = greedy(hf_attnswap.swap(model, "softmax", layers=layers), ids, mask)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4 * expected.logits.abs().max())
    assert hf_attnswap.restore(model).config._attn_implementation == implementation


@pytest.mark.parametrize("layers", ([1], None), ids=("one", "all"))
@every_name
def test_beam_search(name, layers):
    model, (ids, mask) = swapped(name, layers=layers), left_padded()
    cached, recomputed = (
        greedy(model, ids, mask, new=8, num_beams=3, num_return_sequences=2, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, recomputed.sequences)


@every_name
def test_sampling_with_a_seed(name):
    model, (ids, mask) = swapped(name), left_padded()
    found = []
    for use_cache in (True, False):
        set_seed(3)
        settings = dict(do_sample=True, temperature=0.8, num_return_sequences=3, use_cache=use_cache)
        found.append(greedy(model, ids, mask, new=6, **settings).sequences)
    assert torch.equal(found[0], found[1])
    assert len(found[0].unique(dim=0)) == 6


@pytest.mark.parametrize("layers", ([1], None), ids=("one", "all"))
@every_name
def test_prefill_in_chunks(name, layers):
    model, (ids, mask) = swapped(name, layers=layers), left_padded()
    where = positions(mask)
    whole, cache, parts = logits(model, ids, attention_mask=mask, position_ids=where), None, []
    for start, stop in ((0, 10), (10, 11), (11, LENGTH)):
        with torch.no_grad():
            out = model(
                ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=where[:, start:stop],
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
        cache = out.past_key_values
        parts.append(out.logits)
    assert cache.get_seq_length() == LENGTH
    rows = mask.bool()
    torch.testing.assert_close(torch.cat(parts, dim=1)[rows], whole[rows], **CLOSE)


@every_name
def test_generation_prefills_in_chunks(name):
    model, ids = swapped(name), tokens(LENGTH)
    assert torch.equal(greedy(model, ids, prefill_chunk_size=9).sequences, greedy(model, ids).sequences)


@pytest.mark.parametrize("layers", ([1], None), ids=("one", "all"))
@every_name
def test_continue_from_a_returned_cache(name, layers):
    model, (ids, mask) = swapped(name, layers=layers), left_padded()
    first = greedy(model, ids, mask)
    longer = torch.cat([first.sequences, tokens(5, seed=1)], dim=1)
    mask = torch.cat([mask, torch.ones(2, longer.shape[1] - LENGTH, dtype=torch.long)], dim=1)
    expected = greedy(model, longer, mask)
    found = greedy(model, longer, mask, past_key_values=first.past_key_values)
    assert torch.equal(found.sequences, expected.sequences)


@every_name
def test_row_of_a_left_padded_batch_generates_what_it_generates_alone(name):
    """Alone with its padding, and alone without."""
    model, (ids, mask) = swapped(name), left_padded()
    batch = greedy(model, ids, mask)
    for found, row in (
        (greedy(model, ids[:1]), 0),
        (greedy(model, ids[1:], mask[1:]), 1),
        (greedy(model, ids[1:, PADDED:]), 1),
    ):
        assert torch.equal(found.sequences[:, -10:], batch.sequences[row : row + 1, -10:])
        torch.testing.assert_close(found.logits[:, 0], batch.logits[:, row], **CLOSE)


@every_name
def test_size_of_the_cache(name):
    """What `generate` remembers: of constant size for stateful variants, a row per token for the others."""
    model = swapped(name)
    sizes = [cache_nbytes(greedy(model, tokens(n), new=m).past_key_values) for n, m in ((8, 2), (24, 2), (24, 20))]
    if name in STATEFUL:
        assert len(set(sizes)) == 1
    else:
        per_token = 2 * 3 * 2 * 2 * 8 * 8  # keys and values, layers, rows, heads, head dimension, bytes
        assert sizes == [(n + m - 1) * per_token for n, m in ((8, 2), (24, 2), (24, 20))]


@pytest.mark.parametrize(
    "name",
    [n if n in ("elu", "window", "hedgehog+window") else pytest.param(n, marks=pytest.mark.long) for n in STATEFUL],
)
def test_state_has_one_size_however_many_tokens_are_written(name):
    """After 8, 64 and 512 new tokens; the window of those that have one is full long before."""
    model = plain(max_position_embeddings=1024)
    del model.model.layers[1:]  # the others would say the same
    model.config.num_hidden_layers = 1
    hf_attnswap.swap(model, name, **small_options(name))
    out = greedy(model, tokens(LENGTH, batch=1), new=8)
    cache, token = out.past_key_values, out.sequences[:, -1:]
    sizes = [cache_nbytes(cache)]
    for more in (64 - 8, 512 - 64):
        token = decode(model, cache, token, more)
        sizes.append(cache_nbytes(cache))
    assert cache.get_seq_length() == LENGTH + 512 - 1
    assert len(set(sizes)) == 1 and (sizes[0] > 0 or name == "none")


ASSISTED = ("assistant", "swapped assistant", "lookup", "static")


@pytest.mark.parametrize("layers", ([1], None), ids=("one", "all"))
@pytest.mark.parametrize(("kind", "name"), crossed(ASSISTED, ["window", "elu", "relu", "elu+window"], every=2))
def test_assistants_and_static_caches_of_each_sort(name, kind, layers):
    """A mix of layers is tried with one variant of each sort."""
    _assisted(name, kind, layers)


@pytest.mark.parametrize(("kind", "name"), crossed(ASSISTED, NAMES, whole=0))
def test_assistants_and_static_caches(name, kind):
    _assisted(name, kind, None)


def _assisted(name, kind, layers):
    """The result of greedy search; candidates that are not taken are taken back."""
    model, ids = swapped(name, layers=layers), tokens(LENGTH, batch=1)
    ids[:, -6:] = ids[:, :6]  # something to look up
    how = {
        "assistant": lambda: dict(assistant_model=plain()),
        "swapped assistant": lambda: dict(assistant_model=swapped("elu")),
        "lookup": lambda: dict(prompt_lookup_num_tokens=3),
        "static": lambda: dict(cache_implementation="static"),
    }[kind]
    assert torch.equal(greedy(model, ids, **how()).sequences, greedy(model, ids).sequences)


@pytest.mark.parametrize("name", STATEFUL)
def test_tokens_are_taken_back(name):
    """Over several calls, into the middle of one; then on with the text."""
    model, (ids, mask) = swapped(name), left_padded()
    where, cache = positions(mask), DynamicCache(config=model.config)
    cache.activate_past_recording()

    def take_in(start, stop):
        given = dict(attention_mask=mask[:, :stop], position_ids=where[:, start:stop])
        return logits(model, ids[:, start:stop], past_key_values=cache, **given)

    for start, stop in ((0, 10), (10, 14), (14, 15)):
        take_in(start, stop)
    cache.crop(-3)
    assert cache.get_seq_length() == 12
    take_in(12, 20)
    cache.crop(0)
    take_in(20, 21)
    cache.crop(-1)
    with pytest.raises(NotImplementedError, match="cannot forget tokens from before .* or the last crop"):
        cache.crop(-1)
    whole = logits(model, ids, attention_mask=mask, position_ids=where)
    torch.testing.assert_close(take_in(20, LENGTH), whole[:, 20:], **CLOSE)


@pytest.mark.parametrize("name", STATEFUL)
def test_state_moves_to_where_it_is_offloaded(name):
    """What transformers does with an offloaded cache, which itself needs CUDA."""
    cache = greedy(swapped(name), tokens(LENGTH)).past_key_values
    before = copy.deepcopy(cache.layers[0].state)
    cache.layers[0].offload()
    cache.layers[0].prefetch()
    assert all(torch.equal(t, before[n]) for n, t in cache.layers[0].state.items())


@pytest.mark.parametrize("name", STATEFUL)
def test_a_cache_of_softmax_is_refused(name):
    model, ids = plain(), tokens(LENGTH)
    cache = greedy(model, ids).past_key_values
    hf_attnswap.swap(model, name)
    with pytest.raises(ValueError, match="the cache holds .* tokens of softmax for layer 0"):
        logits(model, tokens(1), past_key_values=cache)


@pytest.mark.parametrize("name", STATEFUL)
def test_cache_forgets_nothing_it_was_not_asked_to(name):
    model = swapped(name)
    cache = greedy(model, tokens(LENGTH)).past_key_values
    with pytest.raises(NotImplementedError, match="cannot forget tokens from before"):
        cache.crop(-2)
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = tokens(LENGTH, seed=1)
    torch.testing.assert_close(logits(model, ids, past_key_values=cache), logits(model, ids), **CLOSE)


def test_an_encoder_and_a_decoder_of_two_models_generate_with_a_cache_as_without():
    """The decoder's config does not say that it is one of both; its cross-attention has a cache without states."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        initializer_range=0.3,
    )  # fmt: skip
    both = EncoderDecoderConfig.from_encoder_decoder_configs(config, config)
    model = swap(EncoderDecoderModel(config=both).to(DEVICE).eval(), "elu")
    given = dict(max_new_tokens=6, decoder_start_token_id=1, pad_token_id=0, output_scores=True)
    ids = torch.randint(2, 60, (2, 9))
    scores = (
        torch.stack(model.generate(ids, **given, use_cache=use, return_dict_in_generate=True).scores)
        for use in (True, False)
    )
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)
