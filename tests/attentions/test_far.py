"""Query and key without their rotation, and a decay: what holds for every variant that may have them."""

import math

import pytest
import torch
from attention_cases import (
    NAMES,
    PADDINGS,
    SCALING,
    assert_near,
    build,
    causal,
    far_options,
    inputs,
    mask_of,
    rotation,
    valid_keys,
)
from device_under_test import DEVICE
from test_variants import check_against_reference

from hf_attnswap import attentions
from hf_attnswap.masks import Mask, Rotation
from hf_attnswap.ops.linear import causal_linear
from hf_attnswap.ops.spec import FeatureMap

UNROTATED = [name for name in NAMES if "unrotate" in attentions.get(name).options()]
FADING = [name for name in NAMES if "half_life" in attentions.get(name).options()]


def far(name: str, dtype: torch.dtype = torch.float64, **options):
    return build(name, 6, 2, dtype, **far_options(name) | options)


def test_all_linear_variants_have_both():
    linear = {name for name in NAMES if attentions.get(name).cost_class == "linear"} - {"window"}
    assert set(UNROTATED) == linear
    assert set(FADING) == linear - {"gated", "delta", "gated_delta"}  # which learn how to fade


@pytest.mark.parametrize("padding", ("none", "left", "middle"))
@pytest.mark.parametrize("name", UNROTATED)
def test_fast_form_equals_definition_over_several_chunks(name, padding):
    check_against_reference(far(name), inputs(150, 6, 2), causal(150, valid_keys(padding, 150)))


@pytest.mark.parametrize("half_life", (1.0, 50.0))
@pytest.mark.parametrize("name", [name for name in FADING if name not in ("relu_kernel", "cosformer")])
def test_float32_is_near_the_float64_definition(name, half_life):
    """The shortest half-life has powers from 2^-64 to 2^64 in each chunk.

    Where features may be 0, few keys are left to a row, and it divides by sums that may be small. The gradient of the
    decay is what is left of terms of both signs over all tokens.
    """
    attention, given = far(name, torch.float32, half_life=half_life), inputs(200, 6, 2, dtype=torch.float32)
    check_against_reference(attention, given, causal(200, valid_keys("left", 200)), tolerance=1e-4)


@pytest.mark.parametrize("name", [name for name in UNROTATED if "bidirectional" in attentions.get(name).kinds])
def test_both_directions_without_rotation(name):
    mask = mask_of("bidirectional", 65, "right")
    check_against_reference(far(name, half_life=0.0), inputs(65, 6, 2), mask)


@pytest.mark.parametrize("name", UNROTATED)
def test_future_tokens_change_nothing(name):
    attention, given = far(name), inputs(130, 6, 2)
    with torch.no_grad():
        before = attention(*given, causal(130), SCALING)
        for token in (1, 64, 100):
            changed = [t.clone() for t in given]
            for t in changed:
                t[:, :, token:] = torch.randn_like(t[:, :, token:])
            after = attention(*changed, causal(130), SCALING)
            assert_near(after[:, :, :token], before[:, :, :token], 1e-12, "output")


@pytest.mark.parametrize("padding", PADDINGS[1:])
@pytest.mark.parametrize("name", UNROTATED)
def test_row_of_a_padded_batch_equals_the_row_alone(name, padding):
    attention, given, turned = far(name), inputs(90, 6, 2), rotation(90)
    valid = valid_keys(padding, 90)
    with torch.no_grad():
        out = attention(*given, causal(90, valid), SCALING)
        for row in (0, 1):
            alone = [t[row : row + 1, :, valid[row]] for t in given]
            n = alone[0].shape[2]
            mask = Mask(n, n, rotation=turned.of(turned.turns[row : row + 1, valid[row]]))
            expected = attention(*alone, mask, SCALING)
            assert_near(out[row : row + 1, :, valid[row]], expected, 1e-9, "output")


@pytest.mark.parametrize("padding", ("none", "left"))
@pytest.mark.parametrize("pieces", ([1] * 76, [5, 70, 1]), ids=("ones", "5-70-1"))
@pytest.mark.parametrize("name", UNROTATED)
def test_state_carries_a_text_over_pieces(name, pieces, padding):
    attention, given, turned = far(name), inputs(76, 6, 2), rotation(76)
    valid = valid_keys(padding, 76)
    state, seen, outs = {}, 0, []
    with torch.no_grad():
        whole = attention(*given, causal(76, valid), SCALING)
        for size in pieces:
            new = slice(seen, seen + size)
            seen += size
            mask = Mask(size, seen, None if valid is None else valid[:, :seen], rotation=turned.tokens(new))
            outs.append(attention(*(t[:, :, new] for t in given), mask, SCALING, state))
    rows = torch.ones(2, 76).bool() if valid is None else valid
    assert_near(torch.cat(outs, dim=2).transpose(1, 2)[rows], whole.transpose(1, 2)[rows], 1e-9, "output")
    # A view would keep all the tokens that it is a part of.
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in state.values())


def test_a_key_outside_the_window_fades_from_where_it_leaves_it():
    """The formula, term by term: d^(i - w - j) phi(q_i) . phi(k_j) of key j, between sinks and window."""
    n, w, m, half_life = 30, 8, 2, 5.0
    attention = attentions.get("elu+window")(attentions.Heads(1, 1, 8, 6), window=w, sinks=m, half_life=half_life)
    attention, given = attention.to(DEVICE).double(), inputs(n, 1, 1, batch=1)
    with torch.no_grad():
        attention.log_mix.fill_(0.7)
        out = attention(*given, Mask(n, n), SCALING)[0, 0]
    query, key, value = (t[0, 0].detach() for t in given)
    phi_q, phi_k = (torch.nn.functional.elu(t) + 1 for t in (query, key))
    for i in range(n):
        terms = [
            math.exp(SCALING * query[i] @ key[j])
            if j > i - w or j < m
            else math.exp(0.7) * 2 ** (-(i - w - j) / half_life) * phi_q[i] @ phi_k[j]
            for j in range(i + 1)
        ]
        torch.testing.assert_close(out[i], sum(t * v for t, v in zip(terms, value, strict=False)) / sum(terms))


@pytest.mark.parametrize("name", UNROTATED)
def test_without_a_rotation_there_is_none_to_undo(name):
    given = inputs(70, 6, 2)
    expected = build(name, 6, 2)(*given, causal(70), SCALING)
    assert torch.equal(build(name, 6, 2, unrotate=True)(*given, Mask(70, 70), SCALING), expected)


@pytest.mark.parametrize("neighbours", (False, True))
@pytest.mark.parametrize("start", (0, 2, 4))
def test_undoing_a_rotation(neighbours, start):
    x, angles = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.randn(2, 5, 2, dtype=torch.float64)
    cos, sin = 1.3 * angles.cos(), 1.3 * angles.sin()  # some models scale by their rotation
    first = [start + 2 * p if neighbours else start + p for p in range(2)]
    second = [i + (1 if neighbours else 2) for i in first]
    turned = x.clone()
    turned[..., first] = x[..., first] * cos[:, None] - x[..., second] * sin[:, None]
    turned[..., second] = x[..., second] * cos[:, None] + x[..., first] * sin[:, None]
    turns = torch.cat([cos, sin], dim=-1) / 1.3**2
    torch.testing.assert_close(Rotation(turns, neighbours, start).undo(turned), x)


@pytest.mark.parametrize("masked", (False, True), ids=("whole", "masked"))
@pytest.mark.parametrize("continued", (False, True), ids=("start", "continued"))
def test_gradcheck_of_a_decay(masked, continued):
    """Chunks of 2 in a text of 5; also through the denominator that comes back."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, 5, 2, dtype=torch.float64, requires_grad=True) for h in (2, 2, 2))
    half_lives = torch.tensor([1.5, 4.0], dtype=torch.float64, requires_grad=True)
    key_mask = torch.tensor([[True, True, False, False, True]]) if masked else None
    state = torch.rand(1, 2, 2, 3, dtype=torch.float64) if continued else None
    phi = FeatureMap("of this test", torch.exp)

    def run(query, key, value, half_lives):
        log_decay = -math.log(2) / half_lives
        given = dict(key_mask=key_mask, state=state, chunk=2, log_decay=log_decay)
        return causal_linear(query, key, value, phi, phi, **given)[:2]

    assert torch.autograd.gradcheck(run, (query, key, value, half_lives))


def test_a_half_life_is_what_remains_half():
    attention = attentions.get("elu")(attentions.Heads(4, 2, 8), half_life=12).to(DEVICE)
    torch.testing.assert_close((12 * attention.log_decay()).exp(), torch.full((2,), 0.5))
    assert attention.kinds == ("causal",)
