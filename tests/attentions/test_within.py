"""Layers with a sliding window: a row sees the last W tokens, and of these what its variant sees."""

from dataclasses import replace

import pytest
import torch
from attention_cases import (
    SCALING,
    Largest,
    assert_near,
    build,
    causal,
    far_options,
    gradients,
    inputs,
    named,
    rotation,
    small_options,
    valid_keys,
)
from device_under_test import DEVICE

from hf_attnswap.masks import Mask
from hf_attnswap.ops.heads import mix

LENGTH, W = 40, 12
SLIDING = named(lambda cls: cls.slides)


def expected(attention, given, valid, window=W):
    """The weights that all keys before would have, of which those beyond W are dropped, and a denominator of the rest.

    A variant whose rows sum to one weighs a key by a term of its own, over the sum of the terms of the row.
    """
    mask = causal(LENGTH, valid)
    weights = attention.weights(given.query, given.key, mask, SCALING)
    near, all_before = (m.matrix(DEVICE).double() for m in (replace(mask, window=window), mask))
    if getattr(attention, "divide_by_count", False):
        weights = weights * all_before.sum(-1, keepdim=True) / near.sum(-1, keepdim=True).clamp(min=1) * near
    else:
        weights = weights * near
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return mix(weights, given.value)


def in_pieces(attention, given, valid, pieces, window=W):
    state, seen, outs = {}, 0, []
    for size in pieces:
        new, seen = slice(seen, seen + size), seen + size
        of_all = None if valid is None else valid[:, :seen]
        mask = Mask(size, seen, of_all, rotation=rotation(LENGTH).tokens(new), window=window)
        outs.append(attention(*(t[:, :, new] for t in given), mask, SCALING, state))
    return torch.cat(outs, dim=2), state


def options(name):
    return [small_options(name), far_options(name)] if far_options(name) != small_options(name) else [{}]


CASES = [(name, given) for name in SLIDING for given in options(name)]


@pytest.mark.parametrize("padding", ("none", "left", "right"))
@pytest.mark.parametrize(("name", "given_options"), CASES)
def test_a_row_sees_the_last_tokens_only(name, given_options, padding):
    attention, given, valid = build(name, 6, 2, **given_options), inputs(LENGTH, 6, 2), valid_keys(padding, LENGTH)
    rows = torch.ones(2, LENGTH).bool() if valid is None else valid
    attention.eps = 1e-30  # which stands in the sum of some, beside the terms of the keys
    with torch.no_grad():
        right = expected(attention, given, valid)
        mask = replace(causal(LENGTH, valid), window=W)
        pieces = [4, 1, 7, 1, 14, 1, 1, 11]
        outs = attention(*given, mask, SCALING), attention.reference(*given, mask, SCALING)
        outs += (in_pieces(attention, given, valid, pieces)[0],) if padding != "right" else ()
        for out in outs:
            assert_near(out.transpose(1, 2)[rows], right.transpose(1, 2)[rows], 1e-9, "output")
            assert_near(out.transpose(1, 2)[rows], outs[0].transpose(1, 2)[rows], 1e-9, "output")


@pytest.mark.parametrize("name", ("window", "hedgehog+window", "elu"))
@pytest.mark.parametrize("window", (5, 8, 400))
def test_windows_narrower_and_wider_than_that_of_the_variant(name, window):
    attention, given = build(name, 6, 2, **small_options(name)), inputs(LENGTH, 6, 2)
    attention.eps = 1e-30
    with torch.no_grad():
        right = expected(attention, given, None, window)
        mask = replace(causal(LENGTH), window=window)
        for out in (attention(*given, mask, SCALING), in_pieces(attention, given, None, [3, 1, 30, 6], window)[0]):
            assert_near(out, right, 1e-9, "output")


@pytest.mark.parametrize("name", SLIDING)
def test_what_is_remembered_does_not_grow(name):
    attention, given, sizes = build(name, 6, 2, **small_options(name)), inputs(LENGTH, 6, 2), set()
    with torch.no_grad():
        for pieces in ([12], [20], [30, 1, 1, 8]):
            state = in_pieces(attention, given, None, pieces)[1]
            sizes.add(sum(t.numel() for t in state.values()))
            assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in state.values())
    assert len(sizes) == 1


@pytest.mark.parametrize("name", ("window", "hedgehog", "t2r+window"))
def test_gradients_are_those_of_the_definition(name):
    attention, given, valid = build(name, 6, 2, **small_options(name)), inputs(LENGTH, 6, 2), valid_keys("left", LENGTH)
    mask, wanted = replace(causal(LENGTH, valid), window=W), [*given, *attention.parameters()]
    found, right = (
        gradients(f(*given, mask, SCALING), wanted, valid) for f in (attention.forward, attention.reference)
    )
    for one, other in zip(found, right, strict=True):
        assert_near(one, other, 1e-8, "gradient")


@pytest.mark.parametrize("name", named(lambda cls: cls.any_mask))
def test_variants_on_the_scores_beside_them_in_a_layer(name):
    """They take a matrix from the model, and the window itself where they share a layer with a variant that has it."""
    attention, given, valid = build(name, 6, 2), inputs(LENGTH, 6, 2), valid_keys("left", LENGTH)
    mask = Mask(LENGTH, LENGTH, valid, window=W)
    with torch.no_grad():
        found = attention(*given, mask, SCALING)
        right = attention(*given, Mask(LENGTH, LENGTH, dense=mask.matrix(DEVICE), causal=False), SCALING)
    assert_near(found, right, 1e-9, "output")


def test_memory_is_linear_in_the_text():
    attention, given = build("hedgehog"), inputs(1024, batch=1)
    with torch.no_grad(), Largest() as largest:
        attention(*given, Mask(1024, 1024, window=16), SCALING)
    assert largest.elements <= 2 * 256 * (256 + 16)


def test_what_a_recurrence_forgets_by_itself_is_not_said_to_slide():
    stateful = set(named(lambda cls: cls.stateful and not cls.any_mask))
    assert stateful - set(SLIDING) == {"delta", "gated", "gated_delta"}
