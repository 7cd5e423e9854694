"""A cache of one size: what a step writes stays where it is, and one program serves all steps."""

import pytest
import torch
from attention_cases import small_options
from swapped_models import CLOSE, STATEFUL, greedy, left_padded, logits, plain, positions, swapped
from tiny_models import randomise, tokens
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig, StaticCache

import hf_attnswap
from hf_attnswap import SwapConfig
from hf_attnswap.integration.cache import StateLayer
from hf_attnswap.integration.static_cache import StaticStateLayer

SMALL = {"window": 8, "sinks": 2}
PLANS = {
    "plan of windows": SwapConfig("window", options=SMALL, keep=["0.1", "1.0", "2.0", "2.1"]),
    "plan of hybrids": SwapConfig("hedgehog+window", options=SMALL, keep=["0.0", "2.1"]),
    "plan of several": SwapConfig(
        layers={"0": "elu", "1.0": {"attention": "hedgehog+window", **SMALL}, "2.0": "gated", "2.1": "relu_norm"}
    ),
    "plan of layers": SwapConfig(layers={"0": "softmax", "1": "elu", "2": {"attention": "window", **SMALL}}),
}
NAMES = (*STATEFUL, *PLANS)


def made(name: str):
    return randomise(hf_attnswap.swap(plain(), PLANS[name])) if name in PLANS else swapped(name)


def empty(model, room: int = 48) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=room)


def places(cache) -> dict:
    """Where each tensor of a cache stands."""
    named = [(i, n, t) for i, layer in enumerate(cache.layers) for n, t in vars(layer).items() if torch.is_tensor(t)]
    for i, layer in enumerate(cache.layers):
        named += [(i, n, t) for n, t in getattr(layer, "state", {}).items()]
    return {(i, n): (t.data_ptr(), tuple(t.shape)) for i, n, t in named if n not in ("keys", "values") or t.numel()}


@pytest.mark.parametrize("name", NAMES)
def test_a_padded_batch_writes_what_the_dynamic_cache_writes_and_nothing_moves(name):
    model, (ids, mask) = made(name), left_padded()
    static = greedy(model, ids, mask, new=6, cache_implementation="static")
    assert torch.equal(static.sequences, greedy(model, ids, mask, new=6).sequences)
    assert static.past_key_values.is_compileable
    cache, where = empty(model), positions(mask)
    whole = logits(model, ids, attention_mask=mask, position_ids=where)
    found, stands = [], []
    for start, stop in ((0, 9), (9, 14), *((i, i + 1) for i in range(14, 24))):
        given = dict(attention_mask=mask[:, :stop], position_ids=where[:, start:stop])
        found.append(logits(model, ids[:, start:stop], past_key_values=cache, **given))
        stands.append(places(cache))
    seen = mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[seen], whole[seen], **CLOSE)
    assert all(later == stands[0] for later in stands)


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_one_program_serves_all_steps(name):
    model, ids = made(name), tokens(40)
    whole, cache, counter = logits(model, ids), empty(model), CompileCounter()
    torch._dynamo.reset()
    step = torch.compile(model, backend=counter, fullgraph=True)
    logits(model, ids[:, :20], past_key_values=cache)
    stands = places(cache)
    for i in range(20, 40):
        found = logits(step, ids[:, i : i + 1], past_key_values=cache)[:, 0]
        torch.testing.assert_close(found, whole[:, i], **CLOSE)
    assert counter.frame_count == 1 and places(cache) == stands
    cache.reset()  # the next text goes into the same memory, by the same program
    logits(model, ids[:, 10:20], past_key_values=cache)
    last = logits(step, ids[:, 20:21], past_key_values=cache)[:, 0]
    torch.testing.assert_close(last, logits(model, ids[:, 10:21])[:, -1], **CLOSE)
    assert counter.frame_count == 1 and places(cache) == stands


def test_generate_compiles_a_step_by_itself():
    model, ids = plain(), tokens(12)
    del model.model.layers[1:]
    model.config.num_hidden_layers = 1
    randomise(hf_attnswap.swap(model, layers={"0.0": {"attention": "hedgehog+window", **SMALL}}))
    torch._dynamo.reset()
    how = CompileConfig(backend="eager", mode=None, fullgraph=True)
    how._compile_all_devices = True
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = greedy(model, ids, new=6, cache_implementation="static", compile_config=how)
    assert torch.equal(found.sequences, greedy(model, ids, new=6).sequences)


@pytest.mark.parametrize("name", ("elu", "window", "plan of hybrids"))
def test_beams_and_rows_that_are_chosen(name):
    model, (ids, mask) = made(name), left_padded()
    static, dynamic = (
        greedy(model, ids, mask, new=5, num_beams=3, **how) for how in ({"cache_implementation": "static"}, {})
    )
    assert torch.equal(static.sequences, dynamic.sequences)
    cache = empty(model)
    logits(model, ids, attention_mask=mask, past_key_values=cache)
    stands = places(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert places(cache) == stands
    mask = torch.cat([mask, torch.ones(2, 1).long()], 1)
    given = dict(attention_mask=mask[[1, 0]], past_key_values=cache, position_ids=positions(mask)[[1, 0], -1:])
    again, new = empty(model), tokens(1)
    logits(model, ids, attention_mask=mask[:, :-1], past_key_values=again)
    expected = logits(model, new, attention_mask=mask, past_key_values=again, position_ids=positions(mask)[:, -1:])
    torch.testing.assert_close(logits(model, new[[1, 0]], **given)[[1, 0]], expected, **CLOSE)


def test_a_cache_of_another_batch_begins_anew():
    model = made("plan of hybrids")
    cache = empty(model)
    for batch in (2, 3):
        cache.reset()
        ids = tokens(12, batch=batch)
        found = [logits(model, ids[:, :9], past_key_values=cache)]
        found += [logits(model, ids[:, i : i + 1], past_key_values=cache) for i in range(9, 12)]
        torch.testing.assert_close(torch.cat(found, 1), logits(model, ids), **CLOSE)


@pytest.mark.parametrize("compiled", (False, pytest.param(True, marks=pytest.mark.long)))
def test_a_step_whose_mask_says_another_past_is_refused(compiled):
    model, (ids, mask) = made("elu"), left_padded()
    other, more = torch.ones(2, 25, dtype=torch.long), torch.cat([mask, torch.ones(2, 1).long()], 1)
    hides_itself = more.clone()
    hides_itself[0, -1] = 0
    torch._dynamo.reset()
    step = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    for wrong in (other, hides_itself):
        cache = empty(model)
        logits(model, ids, attention_mask=mask, past_key_values=cache)
        kind = RuntimeError if compiled else NotImplementedError
        with pytest.raises(kind, match="attention_mask hides earlier tokens"):
            logits(step, ids[:, :1], attention_mask=wrong, past_key_values=cache)


def test_what_a_static_cache_cannot_do_is_refused():
    model, ids = made("elu"), tokens(12)
    cache = empty(model, room=10)
    with pytest.raises(NotImplementedError, match="12 tokens are more than the 10 of the static cache"):
        logits(model, ids, past_key_values=cache)
    cache = empty(model, room=12)
    logits(model, ids, past_key_values=cache)
    assert not cache.is_croppable
    with pytest.raises(NotImplementedError, match="cannot forget tokens: use the dynamic one"):
        cache.layers[0].crop(-1)
    with pytest.raises(ValueError, match=r"a step of this static cache takes \(batch, 1, 1, 12\)"):
        logits(model, ids[:, :1], attention_mask=torch.ones(2, 1, 1, 13, dtype=torch.bool), past_key_values=cache)
    cache = empty(model, room=12)
    logits(model, ids, past_key_values=cache)
    with pytest.raises(NotImplementedError, match="has room for 12 tokens"):
        logits(model, ids[:, :1], past_key_values=cache)


def test_layers_whose_window_slides_keep_a_state_that_grows():
    """Which is not compiled; the results are those of the dynamic cache."""
    model = randomise(hf_attnswap.swap(plain("mistral", sliding_window=6), "elu", **small_options("elu")))
    cache = empty(model)
    assert not cache.is_compileable
    assert all(isinstance(layer, StateLayer) and not isinstance(layer, StaticStateLayer) for layer in cache.layers)
    ids = tokens(9)
    static = greedy(model, ids, new=6, cache_implementation="static")
    assert torch.equal(static.sequences, greedy(model, ids, new=6).sequences)
