"""A layer of mixed groups computes on each group what its variant computes on these heads alone."""

import pytest
import torch
from attention_cases import HEAD_DIM, NAMES, SCALING, VALUE_DIM, assert_near, causal, inputs, small_options, valid_keys

from hf_attnswap.attentions import Heads, get
from hf_attnswap.attentions.groups import Groups
from hf_attnswap.masks import Mask

HEADS, KV_HEADS, LENGTH = 6, 3, 29


def choice(name: str) -> tuple[type, dict]:
    return get(name), get(name).check_options(small_options(name))


def mixed(*names: str) -> Groups:
    """One variant per group, their parameters off the start; None keeps softmax."""
    planned = {group: choice(name) for group, name in enumerate(names) if name}
    made = Groups(Heads(HEADS, KV_HEADS, HEAD_DIM, VALUE_DIM), planned).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made


def by_hand(attention: Groups, query, key, value, mask: Mask):
    """Each group by itself, from its definition."""
    outs = {}
    for part, groups in attention.each():
        for at, group in enumerate(groups):
            heads = slice(2 * group, 2 * group + 2)
            alone = get(part.name)(Heads(2, 1, HEAD_DIM, VALUE_DIM), **part.option_values()).double()
            for (name, own), whole in zip(alone.named_parameters(), part.parameters(), strict=True):
                per_group = whole.shape[0] // len(groups)
                assert own.shape[0] == per_group, name
                own.data.copy_(whole.data[at * per_group : (at + 1) * per_group])
            outs[group] = alone.reference(
                query[:, heads], key[:, group : group + 1], value[:, group : group + 1], mask, SCALING
            )
    return torch.cat([outs[group] for group in range(KV_HEADS)], 1)


MIXES = [
    ("window", None, "window"),
    (None, "hedgehog+window", None),
    ("elu", "window", "hedgehog+window"),
    ("relu_power", None, "sigmoid"),
    ("delta", "none", None),
]


@pytest.mark.parametrize("padding", ("none", "left", "right"))
@pytest.mark.parametrize("names", MIXES, ids=str)
def test_each_group_is_its_variant_on_these_heads(names, padding):
    attention = mixed(*names)
    given = inputs(LENGTH, HEADS, KV_HEADS)
    valid = valid_keys(padding, LENGTH)
    mask = causal(LENGTH, valid)
    rows = slice(None) if valid is None else valid[1]
    found, expected = attention(*given, mask, SCALING), by_hand(attention, *given, mask)
    assert_near(found[0], expected[0], 1e-10, "without padding")
    assert_near(found[1][:, rows], expected[1][:, rows], 1e-10, padding)
    weights = attention.weights(given.query, given.key, mask, SCALING)
    assert_near((weights @ given.value.repeat_interleave(2, 1))[0], expected[0], 1e-10, "by weights")


@pytest.mark.parametrize("name", NAMES)
def test_with_a_state_it_is_what_it_is_at_once(name):
    attention = mixed(name, None, name)
    query, key, value = (t.detach() for t in inputs(LENGTH, HEADS, KV_HEADS))
    whole = attention(query, key, value, causal(LENGTH), SCALING)
    if not attention.stateful:
        assert attention.any_mask  # it has keys and values in the cache of the model
        return
    state, outs, start = {}, [], 0
    for size in (11, 1, 1, 5, 11):
        part = slice(start, start + size)
        new = (t[:, :, part] for t in (query, key, value))
        outs.append(attention(*new, Mask(size, start + size), SCALING, state))
        start += size
    assert_near(torch.cat(outs, 2), whole, 1e-9, name)
    kept = [t for t in state.values() if t.dim() == 4 and t.shape[2] == LENGTH]
    assert sorted(t.shape[1] for t in kept) == [1, 1], "full keys and values of the kept group alone"


@pytest.mark.parametrize("names", MIXES, ids=str)
def test_no_row_sees_what_comes_after_it(names):
    attention, at = mixed(*names), 17
    query, key, value = (t.detach() for t in inputs(LENGTH, HEADS, KV_HEADS))
    before = attention(query, key, value, causal(LENGTH), SCALING)
    for t in (query, key, value):
        t[:, :, at:] += 1.0
    assert torch.equal(before[:, :, :at], attention(query, key, value, causal(LENGTH), SCALING)[:, :, :at])


def test_parameters_are_those_of_the_heads_that_need_them():
    whole, part = get("hedgehog")(Heads(HEADS, KV_HEADS, HEAD_DIM)), mixed("hedgehog", None, None)
    assert 3 * sum(p.numel() for p in part.parameters()) == sum(p.numel() for p in whole.parameters())


@pytest.mark.parametrize("what", ("bias", "sinks", "dense"))
def test_what_a_mask_says_of_heads_goes_to_these_heads(what):
    attention = mixed("sigmoid", None, "relu_norm")
    given = inputs(LENGTH, HEADS, KV_HEADS)
    generator = torch.Generator().manual_seed(5)
    said = {
        "bias": torch.randn(1, HEADS, LENGTH, LENGTH, generator=generator, dtype=torch.float64),
        "sinks": torch.randn(HEADS, generator=generator, dtype=torch.float64),
        "dense": torch.rand(2, HEADS, LENGTH, LENGTH, generator=generator) > 0.5,
    }[what]
    mask = Mask(LENGTH, LENGTH, **{what: said})
    found = attention(*given, mask, SCALING)
    for part, groups in attention.each():
        heads = [2 * group + i for group in groups for i in (0, 1)]
        own = Mask(LENGTH, LENGTH, **{what: said[heads] if what == "sinks" else said[:, heads]})
        alone = part.reference(given.query[:, heads], given.key[:, groups], given.value[:, groups], own, SCALING)
        assert_near(found[:, heads], alone, 1e-9, what)


def test_gradients_reach_each_group_alone():
    attention = mixed("hedgehog+window", None, "elu")
    given = inputs(LENGTH, HEADS, KV_HEADS)
    attention(*given, causal(LENGTH), SCALING)[:, :2].sum().backward()
    assert (given.query.grad[:, 2:] == 0).all() and (given.key.grad[:, 1:] == 0).all()
    assert given.query.grad[:, :2].abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in attention.parts[0].parameters())
