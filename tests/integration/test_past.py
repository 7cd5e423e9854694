"""A state knows what it took in: another past, another variant or another kind of layer is refused, never ignored."""

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_settings import examples
from swapped_models import CLOSE, LENGTH, STATEFUL, greedy, left_padded, logits, plain, positions, swapped
from tiny_models import tiny, tokens
from transformers import DynamicCache

import hf_attnswap

# `none` takes any mask: its output is zero whatever there is to see.
STATES = [name for name in STATEFUL if name != "none"]
SOME = ("elu", "gated", "hedgehog+window")


def taken(name, mask=None, new=1):
    """A model, and a cache that holds all but the last tokens of two rows."""
    model, ids = swapped(name), tokens(LENGTH)
    mask = torch.ones_like(ids) if mask is None else mask
    where, cache = positions(mask), DynamicCache(config=model.config)
    first = slice(0, LENGTH - new)
    logits(model, ids[:, first], attention_mask=mask[:, first], position_ids=where[:, first], past_key_values=cache)
    return model, ids[:, -new:], cache


@pytest.mark.parametrize("new", (1, 3))
@pytest.mark.parametrize("name", STATES)
def test_tokens_that_are_hidden_after_they_were_read(name, new):
    """A turn of a chat is dropped; a variant on the scores would follow."""
    model, last, cache = taken(name, new=new)
    later = torch.ones(2, LENGTH, dtype=torch.long)
    later[1, 2:5] = 0
    with pytest.raises(NotImplementedError, match=r"layer 0 .*attention_mask hides earlier tokens"):
        logits(model, last, attention_mask=later, past_key_values=cache)


@pytest.mark.parametrize("later", ("ones", "none", "moved", "dense"))
@pytest.mark.parametrize("name", SOME)
def test_padding_that_is_shown_or_moved_afterwards(name, later):
    _, mask = left_padded()
    model, last, cache = taken(name, mask)
    moved = mask.flip(0) if later == "moved" else torch.ones_like(mask)
    given = {"none": None, "dense": moved[:, None, None].bool()}.get(later, moved)
    with pytest.raises(NotImplementedError, match="or shows some that it has not"):
        logits(model, last, attention_mask=given, past_key_values=cache)


def test_under_torch_func_nobody_can_look():
    _, mask = left_padded()
    model, last, cache = taken("elu", mask)

    def call(ids):
        return model(ids, attention_mask=mask, past_key_values=cache).logits

    with pytest.raises(NotImplementedError, match="under torch.func nobody can look"):
        torch.func.vmap(call)(last[None])


def test_a_mask_that_the_caller_writes_on():
    """Its buffer is bool and has room for more tokens, so that a view of it would change with it."""
    model, ids = swapped("elu"), tokens(LENGTH)
    buffer, cache = torch.ones(2, LENGTH, dtype=torch.bool), DynamicCache(config=model.config)
    buffer[1, 0] = False
    for stop in (10, 11):
        logits(model, ids[:, cache.get_seq_length() : stop], attention_mask=buffer[:, :stop], past_key_values=cache)
    buffer[0, 3] = False
    with pytest.raises(NotImplementedError, match="hides earlier tokens"):
        logits(model, ids[:, 11:12], attention_mask=buffer[:, :12], past_key_values=cache)


@pytest.mark.parametrize("how", ("reorder", "repeat", "select"))
def test_the_past_of_a_row_goes_where_the_row_goes(how):
    _, mask = left_padded()
    model, last, cache = taken("elu", mask)
    if how == "reorder":
        cache.reorder_cache(torch.tensor([1, 0]))
        rows = [1, 0]
    elif how == "repeat":
        cache.batch_repeat_interleave(2)
        rows = [0, 0, 1, 1]
    else:
        cache.batch_select_indices(torch.tensor([1]))
        rows = [1]
    found = logits(model, last[:1].expand(len(rows), -1), attention_mask=mask[rows], past_key_values=cache)
    assert found.shape[0] == len(rows)
    model, last, cache = taken("elu", mask)
    cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(NotImplementedError, match="hides earlier tokens"):
        logits(model, last, attention_mask=mask, past_key_values=cache)


def test_layers_compare_once_for_all(monkeypatch):
    """On a GPU every comparison waits for the device."""
    calls = []
    compare = torch.equal
    monkeypatch.setattr(torch, "equal", lambda *given: calls.append(given) or compare(*given))
    for context in (torch.no_grad, torch.inference_mode):
        model, (ids, mask) = swapped("elu"), left_padded()
        with context():
            cache = model(ids[:, :-2], attention_mask=mask[:, :-2]).past_key_values
            calls.clear()
            for stop in (LENGTH - 1, LENGTH):
                model(ids[:, stop - 1 : stop], attention_mask=mask[:, :stop], past_key_values=cache)
                cache.reorder_cache(torch.tensor([0, 1]))
        assert len(calls) == 2


@pytest.mark.parametrize("name", SOME)
def test_texts_packed_behind_a_past(name):
    """They begin anew, and the past is none of them."""
    model, last, cache = taken(name)
    cache.batch_select_indices(torch.tensor([0]))
    ends = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="layer 0 .*packed texts cannot continue a past"):
        logits(model, last[:1], cu_seq_lens_q=ends, past_key_values=cache)


def test_another_past_under_compile():
    """The values of a mask are hidden there: the program looks when it runs."""
    _, mask = left_padded()
    _, _, cache = taken("elu", mask)
    layer = cache.layers[0]

    def look(valid):
        layer._check_past(valid)
        return valid.sum()

    torch._dynamo.reset()
    compiled = torch.compile(look, backend="eager", fullgraph=True)
    assert compiled(mask.bool()) == mask.sum()
    with pytest.raises(RuntimeError, match="hides earlier tokens"):
        compiled(mask.flip(0).bool())


FILLED = [("elu", "relu_kernel"), ("hedgehog", "elu"), ("window", "elu+window"), ("elu", "relu"), ("elu", "softmax")]


@pytest.mark.parametrize(("filled", "runs"), FILLED)
def test_a_cache_that_another_variant_filled(filled, runs):
    _, last, cache = taken(filled)
    other = swapped(runs)
    with pytest.raises(ValueError, match=f"state of {filled[:6]}.*start from a new cache"):
        logits(other, last, past_key_values=cache)


def test_a_cache_that_the_same_variant_filled_with_other_options():
    _, last, cache = taken("window")
    other = hf_attnswap.swap(plain(), "window", window=4)
    with pytest.raises(ValueError, match="window=8.* for layer 0, which runs .*window=4"):
        logits(other, last, past_key_values=cache)


def test_a_cache_of_states_after_restore():
    model, last, cache = taken("elu")
    hf_attnswap.restore(model)
    with pytest.raises(ValueError, match="the state of elu.*, and this layer of the model keeps keys and values"):
        logits(model, last, past_key_values=cache)


def test_a_call_that_failed_half_way_leaves_no_cache_to_go_on_with():
    model, last, cache = taken("elu")
    later = torch.ones(2, LENGTH, dtype=torch.long)
    later[:, 3] = 0
    with pytest.raises(NotImplementedError):
        logits(model, last, attention_mask=later, past_key_values=cache)
    with pytest.raises(ValueError, match="failed half-way: start from a new cache"):
        logits(model, last, past_key_values=cache)


def test_a_reset_cache_takes_any_variant():
    _, _, cache = taken("elu")
    cache.reset()
    ids = tokens(LENGTH)
    torch.testing.assert_close(logits(swapped("gated"), ids, past_key_values=cache), logits(swapped("gated"), ids))


@pytest.mark.parametrize("shape", ((2, LENGTH + 2), (2, LENGTH - 1), (3, LENGTH), (1, LENGTH)), ids=str)
@pytest.mark.parametrize("use_cache", (True, False))
@pytest.mark.parametrize("name", ("elu", "relu", "softmax"))
def test_a_2d_mask_of_another_shape(name, use_cache, shape):
    with pytest.raises(ValueError, match=rf"attention_mask has shape \({shape[0]}, .*expected"):
        logits(swapped(name), tokens(LENGTH), attention_mask=torch.ones(shape).long(), use_cache=use_cache)


@pytest.mark.parametrize("shape", ((3, 1, 1, 1), (2, 3, 1, 1), (2, 1, 5, 1)), ids=str)
@pytest.mark.parametrize("name", ("elu", "relu"))
def test_a_4d_mask_of_another_shape(name, shape):
    given = torch.ones(LENGTH, LENGTH).tril().bool()[: shape[2] if shape[2] > 1 else None].expand(*shape[:2], -1, -1)
    with pytest.raises(ValueError, match=r"layer 0 .*attention_mask has shape"):
        logits(swapped(name), tokens(LENGTH), attention_mask=given)


@pytest.mark.parametrize("name", ("elu", "window", "relu"))
def test_a_4d_mask_for_all_rows(name):
    """Padding that all rows share, told once."""
    _, mask = left_padded()
    valid, ids, model = mask[1:].bool(), tokens(LENGTH), swapped(name)
    dense = torch.ones(LENGTH, LENGTH).tril().bool() & valid[:, None, None]
    where = positions(mask[1:]).expand(2, -1)
    expected = logits(model, ids, attention_mask=mask[1:].expand(2, -1), position_ids=where)
    found = logits(model, ids, attention_mask=dense, position_ids=where)
    torch.testing.assert_close(found[:, valid[0]], expected[:, valid[0]])


def test_variants_made_under_inference_mode_train():
    for name in ("gated", "delta", "hedgehog+window"):
        model = tiny()
        with torch.inference_mode():
            hf_attnswap.swap(model, name)
        model(tokens(LENGTH), labels=tokens(LENGTH), use_cache=False).loss.backward()
        for path, parameter in model.named_parameters():
            assert ".attnswap." not in path or parameter.grad is not None, f"{name}: {path} has no gradient"


@pytest.mark.parametrize("name", SOME)
def test_generation_of_a_padded_batch_under_inference_mode(name):
    ids, mask = left_padded()
    with torch.inference_mode():
        found = greedy(swapped(name), ids, mask).sequences
    assert torch.equal(found, greedy(swapped(name), ids, mask).sequences)


@st.composite
def histories(draw):
    """What happens to a cache of two rows: pieces of text with their masks, and changes of the rows."""
    steps = []
    for _ in range(draw(st.integers(2, 5))):
        what = draw(st.sampled_from(("text", "text", "text", "edit", "reorder", "repeat", "select", "crop")))
        steps.append((what, draw(st.integers(1, 4)), draw(st.integers(0, 2**16))))
    return steps


@pytest.mark.drawn
@pytest.mark.parametrize("name", ("elu", "hedgehog+window"))
@examples(12, tests=2)
@given(steps=histories())
def test_whatever_happened_to_a_cache_its_logits_are_those_of_the_text_or_are_refused(name, steps):
    model = _model(name)
    ids = mask = read = torch.empty(2, 0, dtype=torch.long)  # the text, its mask, and the mask with which it was read
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    for what, size, seed in [("text", 3, 1), *steps, ("text", 2, 5)]:
        random, rows = torch.Generator().manual_seed(seed), ids.shape[0]
        if what == "text":
            new = (torch.rand(rows, size, generator=random) < 0.8).long()
            new[:, -1] = 1
            ids = torch.cat([ids, torch.randint(3, 64, (rows, size), generator=random)], 1)
            mask, before = torch.cat([mask, new], 1), mask
            where = positions(mask)
            try:
                given_now = dict(attention_mask=mask, position_ids=where[:, -size:], past_key_values=cache)
                found = logits(model, ids[:, -size:], **given_now)
            except NotImplementedError:
                assert not torch.equal(before, read)
                return
            assert torch.equal(before, read)
            whole = logits(model, ids, attention_mask=mask, position_ids=where)[:, -size:]
            torch.testing.assert_close(found[new.bool()], whole[new.bool()], **CLOSE)
            read = mask.clone()
        elif what == "edit":
            mask = mask.clone()
            place = int(torch.randint(mask.shape[1], (1,), generator=random))
            mask[0, place] = 1 - mask[0, place]
        elif what == "crop":
            try:
                cache.crop(-1)
            except NotImplementedError:  # tokens of other rows than those that were recorded
                return
            ids, mask, read = (t[:, :-1] for t in (ids, mask, read))
        else:
            index = torch.randint(rows, (rows,), generator=random)
            if what == "reorder":
                cache.reorder_cache(index)
            elif what == "repeat":
                cache.batch_repeat_interleave(2)
                index = torch.arange(rows).repeat_interleave(2)
            else:
                cache.batch_select_indices(index)
            ids, mask, read = (t[index] for t in (ids, mask, read))


@functools.cache
def _model(name):
    return swapped(name)
