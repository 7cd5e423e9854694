"""Swapped models of several families: logits, padding, packing, training, layer plans."""

import pytest
import torch
from attention_cases import NAMES, small_options
from swapped_models import (
    CLOSE,
    DENSE,
    LENGTH,
    PADDED,
    SPARSE,
    every_name,
    every_pair,
    greedy,
    left_padded,
    logits,
    plain,
    positions,
    swapped,
)
from tiny_models import UNUSUAL, randomise, tokens

import hf_attnswap
from hf_attnswap.attentions import get

LEAST = torch.finfo(torch.float64).min


@every_pair
def test_swap_changes_logits_and_restore_gives_them_back(family, name):
    model, ids = plain(family), tokens(LENGTH)
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
    model, (ids, mask) = plain(), left_padded()
    before = greedy(model, ids, mask)
    hf_attnswap.restore(hf_attnswap.swap(model, name))
    assert torch.equal(greedy(model, ids, mask).sequences, before.sequences)


@every_pair
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
        all_three = randomise(hf_attnswap.swap(plain(family), layers=plan, **small_options(name)))
        rows = mask.bool() if "attention_mask" in given else torch.ones_like(mask).bool()
        torch.testing.assert_close(one[rows], logits(all_three, ids, **given)[rows], **CLOSE)


@every_pair
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


@every_pair
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
        torch.testing.assert_close(together[parameter], tensor.grad, **CLOSE)


@pytest.mark.parametrize("form", ("bool", "additive"))
@every_name
def test_4d_masks_that_say_what_2d_masks_say(name, form):
    model, (ids, mask) = swapped(name), left_padded()
    lower = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    text = (positions(mask) < 5).long()  # two texts in every row
    same = (text[:, :, None] == text[:, None, :])[:, None]
    for rule in (lower & mask.bool()[:, None, None, :], lower & mask.bool()[:, None, None, :] & same):
        given = rule if form == "bool" else torch.zeros(rule.shape).double().masked_fill(~rule, LEAST)
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
        torch.testing.assert_close(found, logits(plain(), ids, attention_mask=rule), **CLOSE)
    assert torch.equal(other[:, :6], found[:, :6])
    assert not torch.equal(other[:, 6:], found[:, 6:])
    changed = ids.clone()
    changed[:, 3] = (ids[:, 3] + 1) % 61 + 3
    assert name == "none" or not torch.equal(logits(model, changed, attention_mask=rule)[:, :3], found[:, :3])


def test_additive_bias_is_honoured_or_refused():
    future = torch.ones(LENGTH, LENGTH).triu(1).bool()
    bias = torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.float64).masked_fill(future, -1e30)
    bias[..., 5, 2] = -0.5
    with pytest.raises(NotImplementedError, match="layer 0 .*cannot honour a bias"):
        logits(swapped("elu"), tokens(LENGTH), attention_mask=bias)
    ours = logits(swapped("softmax"), tokens(LENGTH), attention_mask=bias)
    torch.testing.assert_close(ours, logits(plain(), tokens(LENGTH), attention_mask=bias))


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


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@every_name
def test_lower_precision(name, dtype):
    """Rounding moves logits a little, at once and step by step; a wrong dtype somewhere raises or moves them a lot."""
    ids = tokens(LENGTH)
    exact, model = logits(swapped(name), ids), swapped(name).to(dtype)
    with torch.no_grad():
        first = model(ids[:, :-2], use_cache=True)
    cache = first.past_key_values
    parts = [first.logits, *(logits(model, ids[:, i : i + 1], past_key_values=cache) for i in (LENGTH - 2, LENGTH - 1))]
    for rounded in (logits(model, ids), torch.cat(parts, dim=1)):
        assert rounded.dtype == dtype
        error = (rounded - exact).square().mean() / exact.square().mean()
        assert error < (0.05 if dtype == torch.bfloat16 else 1e-6)


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
        torch.testing.assert_close(found, logits(plain("mistral", sliding_window=window), ids), **CLOSE)
    cached, recomputed = (greedy(model, ids, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, recomputed.sequences)


@pytest.mark.parametrize("name", [name for name in SPARSE if not get(name).slides])
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
    by_hand = plain("qwen2", **overrides)
    assert by_hand.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    hf_attnswap.swap(by_hand, layers={0: name, "1:": "softmax"}, **small_options(name))
    expected = logits(randomise(by_hand), ids, **given)
    torch.testing.assert_close(logits(model, ids, **given)[mask.bool()], expected[mask.bool()], **CLOSE)
    cached, recomputed = (greedy(model, ids, mask, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, recomputed.sequences)


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
    model, ids = hf_attnswap.swap(plain(), name, layers=layers), tokens(LENGTH)
    assert [entry.swapped for entry in hf_attnswap.inspect(model)] == expected
    by_hand = {
        index: (HYBRID if found == "elu+window" else found) for index, found in enumerate(expected) if found is not None
    }
    torch.testing.assert_close(
        logits(model, ids), logits(hf_attnswap.swap(plain(), layers=by_hand), ids), rtol=0, atol=0
    )
    hf_attnswap.restore(model)
    torch.testing.assert_close(logits(model, ids), logits(plain(), ids), **CLOSE)


def test_options_reach_their_layers():
    model = hf_attnswap.swap(plain(), layers={0: "window", 1: {"attention": "window", "window": 5}}, window=7, sinks=1)
    found = [getattr(layer.self_attn, "attnswap", None) for layer in model.model.layers]
    assert [(f.window, f.sinks) for f in found[:2]] == [(7, 1), (5, 1)] and found[2] is None


def test_swap_config_is_the_same_as_keywords():
    config = hf_attnswap.SwapConfig("window", layers="1:", options={"window": 8})
    ids = tokens(LENGTH)
    by_config = logits(hf_attnswap.swap(plain(), config), ids)
    by_keywords = logits(hf_attnswap.swap(plain(), "window", layers="1:", window=8), ids)
    torch.testing.assert_close(by_config, by_keywords, **CLOSE)
    assert not torch.allclose(by_config, logits(plain(), ids), **CLOSE)


def test_gpt2_with_scores_scaled_by_layer():
    """scale_attn_by_inverse_layer_idx reaches the variant as its scaling."""
    overrides, ids = dict(scale_attn_by_inverse_layer_idx=True), tokens(LENGTH)
    expected = logits(plain("gpt2", **overrides), ids)
    assert not torch.allclose(expected, logits(plain("gpt2"), ids), **CLOSE)
    torch.testing.assert_close(logits(swapped("softmax", "gpt2", **overrides), ids), expected, **CLOSE)
