"""Swapped models of several families: logits, padding, packing, training and generation."""

import copy

import pytest
import torch
from attention_cases import NAMES, named, small_options
from tiny_models import FAMILIES, UNUSUAL, randomise, tiny, tokens
from transformers import DynamicCache, set_seed

import hf_attnswap
from hf_attnswap.benchmark.generation import decode
from hf_attnswap.cache import cache_nbytes

STATEFUL = named(lambda cls: cls.stateful)
STATELESS = [name for name in NAMES if name not in STATEFUL]
DENSE = named(lambda cls: cls.any_mask)
SPARSE = [name for name in NAMES if name not in DENSE]
LENGTH, PADDED = 24, 7
# Of logits between -8 and 8, in float32, computed in another order.
CLOSE = dict(rtol=1e-3, atol=1e-3)

every_family = pytest.mark.parametrize("family", FAMILIES)
every_name = pytest.mark.parametrize("name", NAMES)


def swapped(name: str, family: str = "llama", layers=None, **overrides):
    """A tiny model with one variant, its window shorter than the texts, its parameters off their start."""
    model = tiny(family, **overrides)
    return randomise(hf_attnswap.swap(model, name, layers=layers, **small_options(name)))


def positions(attention_mask):
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def left_padded():
    """Two rows, the second with padding before it."""
    ids, mask = tokens(LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    ids[1, :PADDED], mask[1, :PADDED] = 0, 0
    return ids, mask


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


@every_family
@every_name
def test_swap_changes_logits_and_restore_gives_them_back(family, name):
    model, ids = tiny(family), tokens(LENGTH)
    before, keys, config = logits(model, ids), list(model.state_dict()), model.config.to_dict()
    assert hf_attnswap.swap(model, name, **small_options(name)) is model
    assert [entry.swapped for entry in hf_attnswap.inspect(model)] == [name] * 3
    after = logits(model, ids)
    assert after.isfinite().all()
    if name == "softmax":
        torch.testing.assert_close(after, before, **CLOSE)
    else:
        assert (after - before).abs().max() > 0.01
    assert hf_attnswap.restore(model) is model
    assert torch.equal(logits(model, ids), before)
    assert list(model.state_dict()) == keys
    assert model.config.to_dict() == config
    assert [entry.swapped for entry in hf_attnswap.inspect(model)] == [None] * 3
    assert not any(m._forward_pre_hooks for m in model.modules())


@every_name
def test_restored_model_generates_as_before(name):
    model, (ids, mask) = tiny(), left_padded()
    before = greedy(model, ids, mask)
    hf_attnswap.restore(hf_attnswap.swap(model, name))
    assert torch.equal(greedy(model, ids, mask).sequences, before.sequences)


@every_family
@every_name
def test_softmax_layers_beside_a_variant(family, name):
    """A layer that is kept is the layer that the softmax variant would be."""
    ids, mask = left_padded()
    packed = torch.cat([torch.arange(n) for n in (10, 1, 13)]).expand(2, -1)
    for given in (
        dict(),
        dict(attention_mask=mask, position_ids=positions(mask)),
        dict(position_ids=packed, use_cache=False),
    ):
        one = logits(swapped(name, family, layers=[1]), ids, **given)
        plan = {0: "softmax", 1: name, 2: "softmax"}
        all_three = randomise(hf_attnswap.swap(tiny(family), layers=plan, **small_options(name)))
        rows = mask.bool() if "attention_mask" in given else torch.ones_like(mask).bool()
        torch.testing.assert_close(one[rows], logits(all_three, ids, **given)[rows], **CLOSE)


@every_family
@every_name
@pytest.mark.parametrize("side", ("left", "right"))
def test_padding_changes_nothing(family, name, side):
    model, ids = swapped(name, family), tokens(LENGTH)
    kept = slice(PADDED, None) if side == "left" else slice(None, -PADDED)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1] = 0
    mask[1, kept] = 1
    found = logits(model, ids, attention_mask=mask, position_ids=positions(mask))
    torch.testing.assert_close(found[:1], logits(model, ids[:1]), **CLOSE)
    torch.testing.assert_close(found[1:, kept], logits(model, ids[1:, kept]), **CLOSE)


@every_family
@every_name
def test_packed_texts_are_texts_alone(family, name):
    model, ids, lengths = swapped(name, family), tokens(LENGTH, batch=1), (3, 12, 9)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    together = logits(model, ids, position_ids=position_ids, use_cache=False)
    alone = torch.cat([logits(model, text) for text in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, **CLOSE)


@every_name
def test_gradients_of_packed_texts_are_those_of_texts_alone(name):
    model, ids = swapped(name), tokens(LENGTH, batch=1)
    position_ids = torch.cat([torch.arange(10), torch.arange(14)])[None]
    model(ids, position_ids=position_ids, use_cache=False).logits.square().sum().backward()
    together = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    for text in ids.split((10, 14), dim=1):
        model(text).logits.square().sum().backward()
    for parameter, tensor in model.named_parameters():
        torch.testing.assert_close(together[parameter], tensor.grad, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("form", ("bool", "additive"))
@every_name
def test_4d_masks_that_say_what_2d_masks_say(name, form):
    model, (ids, mask) = swapped(name), left_padded()
    lower = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    text = (positions(mask) < 5).long()  # two texts in every row
    same = (text[:, :, None] == text[:, None, :])[:, None]
    for rule in (lower & mask.bool()[:, None, None, :], lower & mask.bool()[:, None, None, :] & same):
        given = rule if form == "bool" else torch.zeros(rule.shape).masked_fill(~rule, torch.finfo(torch.float32).min)
        found = logits(model, ids, attention_mask=given, position_ids=positions(mask))
        for row, start in ((0, 0), (1, PADDED)):
            if rule is not None and (rule[row, 0, -1, start]):
                expected = logits(model, ids[row : row + 1, start:])
            else:  # the second text alone, at the positions that it has in the row
                start += 5
                expected = logits(
                    model, ids[row : row + 1, start:], position_ids=positions(mask)[row : row + 1, start:]
                )
            torch.testing.assert_close(found[row : row + 1, start:], expected, **CLOSE)


@every_name
def test_4d_mask_of_another_rule(name):
    """Any token sees the first four: honoured, or refused with the layer and the reason."""
    model, ids = swapped(name), tokens(LENGTH)
    rule = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    rule[:, :4] = True
    rule[10:, 6] = False
    rule = rule[None, None].expand(2, 1, -1, -1)
    if name in SPARSE:
        with pytest.raises(
            NotImplementedError, match=rf"layer 0 \({name.replace('+', '.')}\): cannot honour an explicit"
        ):
            logits(model, ids, attention_mask=rule)
        return
    found, changed = logits(model, ids, attention_mask=rule), ids.clone()
    changed[:, 6] = (ids[:, 6] + 1) % 61 + 3
    other = logits(model, changed, attention_mask=rule)
    if name == "softmax":
        torch.testing.assert_close(found, logits(tiny(), ids, attention_mask=rule), **CLOSE)
    assert torch.equal(other[:, :6], found[:, :6])
    assert not torch.equal(other[:, 6:], found[:, 6:])
    changed = ids.clone()
    changed[:, 3] = (ids[:, 3] + 1) % 61 + 3
    assert name == "none" or not torch.equal(logits(model, changed, attention_mask=rule)[:, :3], found[:, :3])


def test_additive_bias_is_honoured_or_refused():
    bias = torch.zeros(1, 1, LENGTH, LENGTH).masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -1e30)
    bias[..., 5, 2] = -0.5
    with pytest.raises(NotImplementedError, match="layer 0 .*cannot honour a bias"):
        logits(swapped("elu"), tokens(LENGTH), attention_mask=bias)
    ours = logits(swapped("softmax"), tokens(LENGTH), attention_mask=bias)
    torch.testing.assert_close(ours, logits(tiny(), tokens(LENGTH), attention_mask=bias))


@every_name
def test_gradient_checkpointing(name):
    ids, grads = tokens(LENGTH), []
    for checkpointing in (False, True):
        model = swapped(name).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for parameter, expected in grads[0].items():
        torch.testing.assert_close(grads[1][parameter], expected)
    if name != "none":
        assert all(g is not None and g.abs().sum() > 0 for n, g in grads[0].items() if "norm" not in n)


@every_name
def test_bfloat16(name):
    """Rounding moves logits a little; a wrong dtype somewhere raises or moves them a lot."""
    ids = tokens(LENGTH)
    exact, rounded = logits(swapped(name), ids), logits(swapped(name).bfloat16(), ids)
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).square().mean() < 0.05 * exact.square().mean()


# Sliding windows


@pytest.mark.parametrize("name", DENSE)
def test_sliding_window_is_honoured(name):
    ids, window = tokens(LENGTH), 6
    near = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    rule = (near & ~near.tril(-window))[None, None]
    model = swapped(name, "mistral", sliding_window=window)
    found = logits(model, ids)
    torch.testing.assert_close(found, logits(swapped(name, "mistral"), ids, attention_mask=rule), **CLOSE)
    if name == "softmax":
        torch.testing.assert_close(found, logits(tiny("mistral", sliding_window=window), ids), **CLOSE)
    cached, plain = (greedy(model, ids, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)


@pytest.mark.parametrize("name", SPARSE)
def test_sliding_window_is_refused_where_it_matters(name):
    model = swapped(name, "mistral", sliding_window=16)
    short = tokens(16)
    torch.testing.assert_close(logits(model, short), logits(swapped(name, "mistral"), short), **CLOSE)
    refuses = pytest.raises(NotImplementedError, match=r"layer 0 .*cannot honour")
    with refuses:
        logits(model, tokens(17))
    with refuses:
        greedy(model, tokens(17))
    with refuses:  # the window is passed while generating
        greedy(model, tokens(10), new=10)
    assert greedy(model, tokens(10), new=4).sequences.shape == (2, 14)


@pytest.mark.parametrize("name", NAMES)
def test_sliding_layers_keep_softmax(name):
    """A Qwen2 whose layers from 1 on have a window, swapped where it has none."""
    overrides = dict(use_sliding_window=True, sliding_window=6, max_window_layers=1)
    model, (ids, mask) = swapped(name, "qwen2", layers=[0], **overrides), left_padded()
    given = dict(attention_mask=mask, position_ids=positions(mask))
    by_hand = tiny("qwen2", **overrides)
    assert by_hand.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    hf_attnswap.swap(by_hand, layers={0: name, "1:": "softmax"}, **small_options(name))
    expected = logits(randomise(by_hand), ids, **given)
    torch.testing.assert_close(logits(model, ids, **given)[mask.bool()], expected[mask.bool()], **CLOSE)
    cached, plain = (greedy(model, ids, mask, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)


@pytest.mark.parametrize("name", ("elu", "hedgehog", "hedgehog+window", "sigmoid"))
@pytest.mark.parametrize("family", UNUSUAL)
def test_unusual_models_work_or_are_refused(family, name):
    """Refused by `swap`, or by the first call that makes a cache; never wrong, and never an error of torch."""
    ids = tokens(LENGTH)
    try:
        model = swapped(name, family)
        whole = logits(model, ids, use_cache=False)
    except hf_attnswap.UsageError:
        return
    except NotImplementedError as error:
        assert "layer" in str(error)
        return
    changed = ids.clone()
    changed[:, 15:] = 5
    torch.testing.assert_close(logits(model, changed, use_cache=False)[:, :15], whole[:, :15], **CLOSE)
    try:
        with torch.no_grad():
            first = model(ids[:, :15], use_cache=True)
    except NotImplementedError as error:
        assert "layer" in str(error)
        return
    found = [first.logits, logits(model, ids[:, 15:], past_key_values=first.past_key_values)]
    torch.testing.assert_close(torch.cat(found, dim=1), whole, **CLOSE)


# Generation


def greedy(model, ids, mask=None, new=10, **kwargs):
    """`generate`, with the logits of every step."""
    mask = torch.ones_like(ids) if mask is None else mask
    settings = dict(max_new_tokens=new, do_sample=False, return_dict_in_generate=True, output_logits=True)
    return model.generate(ids, attention_mask=mask, **settings | kwargs)


@every_family
@every_name
def test_greedy_with_cache_without_and_by_hand(family, name):
    model, (ids, mask) = swapped(name, family), left_padded()
    cached, plain = (greedy(model, ids, mask, new=6, use_cache=use_cache) for use_cache in (True, False))
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), **CLOSE)
    assert torch.equal(cached.sequences, plain.sequences)
    alone = ids[1:, PADDED:]
    for step in cached.logits:
        last = logits(model, alone)[:, -1]
        torch.testing.assert_close(step[1:], last, **CLOSE)
        alone = torch.cat([alone, last.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached.sequences[1:, PADDED:], alone)


@every_name
def test_greedy_with_kept_layers(name):
    model, (ids, mask) = swapped(name, layers=[0, 2]), left_padded()
    cached, plain = (greedy(model, ids, mask, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    alone = greedy(model, ids[1:, PADDED:], use_cache=False).sequences
    assert torch.equal(cached.sequences[1:, PADDED:], alone)


@pytest.mark.parametrize("implementation", ("eager", "sdpa"))
@pytest.mark.parametrize("layers", ([1], None), ids=("one", "all"))
def test_softmax_variant_generates_what_the_model_does(implementation, layers):
    model, (ids, mask) = tiny(), left_padded()
    model.set_attn_implementation(implementation)
    expected = greedy(model, ids, mask)
    found = greedy(hf_attnswap.swap(model, "softmax", layers=layers), ids, mask)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), **CLOSE)
    assert hf_attnswap.restore(model).config._attn_implementation == implementation


@pytest.mark.parametrize("layers", ([1], None), ids=("one", "all"))
@every_name
def test_beam_search(name, layers):
    model, (ids, mask) = swapped(name, layers=layers), left_padded()
    cached, plain = (
        greedy(model, ids, mask, new=8, num_beams=3, num_return_sequences=2, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, plain.sequences)


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
        torch.testing.assert_close(torch.stack(found.logits)[:, 0], torch.stack(batch.logits)[:, row], **CLOSE)


@every_name
def test_size_of_the_cache(name):
    """What `generate` remembers: of constant size for stateful variants, a row per token for the others."""
    model = swapped(name)
    sizes = [cache_nbytes(greedy(model, tokens(n), new=m).past_key_values) for n, m in ((8, 2), (24, 2), (24, 20))]
    if name in STATEFUL:
        assert len(set(sizes)) == 1
    else:
        per_token = 2 * 3 * 2 * 2 * 8 * 4  # keys and values, layers, rows, heads, head dimension, bytes
        assert sizes == [(n + m - 1) * per_token for n, m in ((8, 2), (24, 2), (24, 20))]


@pytest.mark.parametrize(
    "name",
    [n if n in ("elu", "window", "hedgehog+window") else pytest.param(n, marks=pytest.mark.long) for n in STATEFUL],
)
def test_state_has_one_size_however_many_tokens_are_written(name):
    """After 8, 64 and 512 new tokens; the window of those that have one is full long before."""
    model = tiny(max_position_embeddings=1024)
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


@pytest.mark.parametrize("layers", ([1], None), ids=("one", "all"))
@pytest.mark.parametrize("kind", ("assistant", "swapped assistant", "lookup", "static"))
@every_name
def test_assistants_and_static_caches(name, kind, layers):
    """The result of greedy search; candidates that are not taken are taken back."""
    if layers and name not in ("window", "elu", "relu", "elu+window"):
        pytest.skip("a mix of layers is tried with one variant of each sort")
    model, ids = swapped(name, layers=layers), tokens(LENGTH, batch=1)
    ids[:, -6:] = ids[:, :6]  # something to look up
    how = {
        "assistant": lambda: dict(assistant_model=tiny()),
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
    model, ids = tiny(), tokens(LENGTH)
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


# Which layers


HYBRID = {"attention": "elu+window", "window": 8, "sinks": 2}


@pytest.mark.parametrize(
    ("layers", "expected"),
    (
        (None, ["relu", "relu", "relu"]),
        ([0, 2], ["relu", None, "relu"]),
        ([-1], [None, None, "relu"]),
        ("1::2", [None, "relu", None]),
        (":-1", ["relu", "relu", None]),
        ((1,), [None, "relu", None]),
        (range(1, 3), [None, "relu", "relu"]),
        ({0: "elu", "1:": HYBRID}, ["elu", "elu+window", "elu+window"]),
        ({-1: "sigmoid", 0: "softmax"}, ["softmax", None, "sigmoid"]),
        ({"0": "elu"}, ["elu", None, None]),
    ),
    ids=str,
)
def test_layer_plans(layers, expected):
    name = None if isinstance(layers, dict) else "relu"
    model, ids = hf_attnswap.swap(tiny(), name, layers=layers), tokens(LENGTH)
    assert [entry.swapped for entry in hf_attnswap.inspect(model)] == expected
    by_hand = {
        index: (HYBRID if found == "elu+window" else found) for index, found in enumerate(expected) if found is not None
    }
    torch.testing.assert_close(
        logits(model, ids), logits(hf_attnswap.swap(tiny(), layers=by_hand), ids), rtol=0, atol=0
    )
    hf_attnswap.restore(model)
    torch.testing.assert_close(logits(model, ids), logits(tiny(), ids), **CLOSE)


def test_options_reach_their_layers():
    model = hf_attnswap.swap(tiny(), layers={0: "window", 1: {"attention": "window", "window": 5}}, window=7, sinks=1)
    found = [getattr(layer.self_attn, "attnswap", None) for layer in model.model.layers]
    assert [(f.window, f.sinks) for f in found[:2]] == [(7, 1), (5, 1)] and found[2] is None


def test_swap_config_is_the_same_as_keywords():
    config = hf_attnswap.SwapConfig("window", layers="1:", options={"window": 8})
    ids = tokens(LENGTH)
    by_config = logits(hf_attnswap.swap(tiny(), config), ids)
    by_keywords = logits(hf_attnswap.swap(tiny(), "window", layers="1:", window=8), ids)
    torch.testing.assert_close(by_config, by_keywords, **CLOSE)
    assert not torch.allclose(by_config, logits(tiny(), ids), **CLOSE)


def test_gpt2_with_scores_scaled_by_layer():
    """scale_attn_by_inverse_layer_idx reaches the variant as its scaling."""
    overrides, ids = dict(scale_attn_by_inverse_layer_idx=True), tokens(LENGTH)
    expected = logits(tiny("gpt2", **overrides), ids)
    assert not torch.allclose(expected, logits(tiny("gpt2"), ids), **CLOSE)
    torch.testing.assert_close(logits(swapped("softmax", "gpt2", **overrides), ids), expected, **CLOSE)
