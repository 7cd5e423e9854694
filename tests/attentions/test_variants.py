"""The fast form of every variant against its float64 definition, and what holds for all of them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    KINDS,
    NAMES,
    PADDINGS,
    SCALING,
    WITH_OPTIONS,
    Inputs,
    Largest,
    assert_near,
    build,
    case_id,
    causal,
    gradients,
    inputs,
    mask_of,
    named,
    small_options,
    valid_keys,
)
from device_under_test import DEVICE

from hf_attnswap.masks import Mask
from hf_attnswap.ops.linear import causal_linear
from hf_attnswap.ops.rows import by_rows
from hf_attnswap.ops.spec import FeatureMap

# Lengths, with numbers of heads and of key/value heads by turns.
RATIOS = ((2, 2), (6, 2), (8, 1))
CAUSAL = list(zip((1, 2, 63, 64, 65, 150), RATIOS * 2, strict=True))
OTHER = [(1, RATIOS[1]), *((65, ratio) for ratio in RATIOS)]
STATEFUL = named(lambda cls: cls.stateful)
LINEAR = named(lambda cls: cls.cost_class == "linear")
DENSE = named(lambda cls: cls.any_mask)
# Largest error over largest value. bfloat16 has 8 bits: rounding the result alone gives 0.004, and the gradients of
# relu_kernel, which divides by sums that may be small, are ten times that.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 4e-2}


def check_against_reference(attention, given: Inputs, mask: Mask, tolerance: float | None = None) -> None:
    """Outputs and gradients, at the rows of valid tokens, in the dtype of the inputs against float64."""
    tolerance = tolerance or TOLERANCE[given.query.dtype]
    exact = copy.deepcopy(attention).double()
    exact_given = Inputs(*(t.detach().double().requires_grad_() for t in given))
    out = attention(*given, mask, SCALING)
    expected = exact.reference(*exact_given, mask, SCALING)
    assert out.dtype == given.query.dtype and out.shape == expected.shape
    rows = mask.new_tokens()
    rows = torch.ones(out.shape[0], out.shape[2]).bool() if rows is None else rows
    assert_near(out.transpose(1, 2)[rows], expected.transpose(1, 2)[rows], tolerance, "output")
    names = ["query", "key", "value", *(name for name, _ in attention.named_parameters())]
    ours = gradients(out, [*given, *attention.parameters()], rows)
    theirs = gradients(expected, [*exact_given, *exact.parameters()], rows)
    # Against the largest of all: a gradient that is zero but for rounding has no scale of its own.
    scale = max(g.abs().max() for g in theirs).clamp(min=1e-3)
    for name, g, e in zip(names, ours, theirs, strict=True):
        assert g.dtype == given.query.dtype
        error = (g.double() - e).abs().max() / scale
        assert error <= tolerance, f"gradient of {name}: error {error:.2e}, allowed {tolerance:.0e}"


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_fast_form_equals_definition(name, kind, padding):
    for length, (heads, kv_heads) in CAUSAL if kind == "causal" else OTHER:
        mask = mask_of(kind, length, padding)
        attention = build(name, heads, kv_heads, **small_options(name))
        check_against_reference(attention, inputs(length, heads, kv_heads, key_length=mask.key_length), mask)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("name", "options"), WITH_OPTIONS, ids=case_id)
def test_fast_form_equals_definition_with_other_options(name, options, padding):
    check_against_reference(build(name, 6, 2, **options), inputs(65, 6, 2), causal(65, valid_keys(padding, 65)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_float32_and_bfloat16_are_near_the_float64_definition(name, kind, dtype):
    attention = build(name, 6, 2, dtype, **small_options(name))
    for padding in ("none", "left"):
        mask = mask_of(kind, 150, padding)
        check_against_reference(attention, inputs(150, 6, 2, dtype=dtype, key_length=mask.key_length), mask)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_long_text(name, kind):
    mask = mask_of(kind, 520, "none")
    attention, given = build(name, 6, 2), inputs(520, 6, 2, batch=1, key_length=mask.key_length)
    with torch.no_grad():
        out = attention(*given, mask, SCALING)
        assert_near(out, attention.reference(*given, mask, SCALING), 1e-9, "output")


@pytest.mark.parametrize("sign", (-1, 1), ids=("below", "above"))
@pytest.mark.parametrize("name", NAMES)
def test_scores_far_from_zero(name, sign):
    """All scores near -160 or 160, where exp of the score itself would underflow or overflow in float32."""
    attention, given = build(name, 6, 2, torch.float32, **small_options(name)), inputs(40, 6, 2)
    query, key = (sign * 10 + given.query * 0.1).float(), (5 + given.key * 0.1).float()
    exact = copy.deepcopy(attention).double()
    with torch.no_grad():
        out = attention(query, key, given.value.float(), causal(40), SCALING)
        expected = exact.reference(query.double(), key.double(), given.value, causal(40), SCALING)
    assert_near(out, expected, 1e-3, "output")


@pytest.mark.parametrize("name", DENSE)
def test_dense_mask_equals_definition(name):
    torch.manual_seed(3)
    dense = torch.rand(2, 1, 40, 40) < 0.5
    dense[:, :, :, 0] = True
    check_against_reference(build(name, 6, 2), inputs(40, 6, 2), Mask(40, 40, dense=dense))


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
def test_row_that_may_attend_to_nothing_is_zero(name, dtype):
    attention, given = build(name, dtype=dtype), inputs(20, dtype=dtype)
    dense = torch.ones(2, 1, 20, 20, dtype=torch.bool).tril()
    dense[0, :, 7] = dense[1, :, 0] = False
    out = attention(*given, Mask(20, 20, dense=dense), SCALING)
    assert (out[0, :, 7] == 0).all() and (out[1, :, 0] == 0).all()
    for grad in gradients(out, [*given, *attention.parameters()], None):
        assert grad.isfinite().all()


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in KINDS if kind != "causal"])
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
def test_text_without_any_key_gives_zeros(name, kind, dtype):
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1] = False
    attention, given = build(name, dtype=dtype), inputs(20, dtype=dtype)
    out = attention(*given, Mask(20, 20, valid, causal=False), SCALING)
    assert (out[1] == 0).all() and out.isfinite().all()
    for grad in gradients(out, [*given, *attention.parameters()], None):
        assert grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_padding_that_comes_first_is_zero(name):
    """Its rows may attend to nothing; NaN would spread through the rest of the model."""
    valid = valid_keys("left", 20)
    valid[0] = False
    attention, given = build(name, **small_options(name)), inputs(20)
    out = attention(*given, causal(20, valid), SCALING)
    assert out.isfinite().all()
    assert (out.transpose(1, 2)[~valid] == 0).all()
    for grad in gradients(out, [*given, *attention.parameters()], None):
        assert grad.isfinite().all()


@pytest.mark.parametrize("p", (1, 16, 1024))
def test_a_row_of_relu_power_sums_to_one_however_large_its_scores_are(p):
    given = inputs(4, dtype=torch.float32)
    key = torch.zeros_like(given.key)
    key[:, :, 0] = 1e8 * p
    for learning in (True, False):
        with torch.set_grad_enabled(learning):
            out = build("relu_power", dtype=torch.float32, p=p)(
                torch.ones_like(given.query), key, given.value, causal(4), SCALING
            )
        torch.testing.assert_close(out, given.value[:, :, :1].expand_as(out))


@pytest.mark.parametrize("name", NAMES)
def test_future_tokens_change_nothing(name):
    attention, given = build(name, 6, 2, **small_options(name)), inputs(130, 6, 2)
    mask = causal(130)
    with torch.no_grad():
        before = attention(*given, mask, SCALING)
        for token in (1, 63, 64, 100):
            changed = [t.clone() for t in given]
            for t in changed:
                t[:, :, token:] = 10 * torch.randn_like(t[:, :, token:])
            after = attention(*changed, mask, SCALING)
            assert torch.equal(after[:, :, :token], before[:, :, :token])
            assert name == "none" or not torch.equal(after[:, :, token:], before[:, :, token:])


@pytest.mark.parametrize("padding", PADDINGS[1:])
@pytest.mark.parametrize("name", NAMES)
def test_row_of_a_padded_batch_equals_the_row_alone(name, padding):
    attention, given = build(name, 6, 2, **small_options(name)), inputs(90, 6, 2)
    valid = valid_keys(padding, 90)
    with torch.no_grad():
        out = attention(*given, causal(90, valid), SCALING)
        for row in (0, 1):
            alone = [t[row : row + 1, :, valid[row]] for t in given]
            expected = attention(*alone, causal(alone[0].shape[2]), SCALING)
            torch.testing.assert_close(out[row : row + 1, :, valid[row]], expected, rtol=1e-9, atol=1e-9)


def in_pieces(attention, given, valid, pieces):
    """The outputs of a text given piece by piece, joined, and the state after it."""
    state, seen, outs = {}, 0, []
    for size in pieces:
        new = slice(seen, seen + size)
        seen += size
        mask = Mask(size, seen, valid=None if valid is None else valid[:, :seen])
        outs.append(attention(*(t[:, :, new] for t in given), mask, SCALING, state))
    return torch.cat(outs, dim=2), state


@pytest.mark.parametrize("padding", ("none", "left"))
@pytest.mark.parametrize("pieces", ([1] * 76, [5, 70, 1], [1, 2, 3, 70]), ids=("ones", "5-70-1", "1-2-3-70"))
@pytest.mark.parametrize("name", STATEFUL)
def test_state_carries_a_text_over_pieces(name, pieces, padding):
    attention, given = build(name, 6, 2, **small_options(name)), inputs(76, 6, 2)
    valid = valid_keys(padding, 76)
    with torch.no_grad():
        whole = attention(*given, causal(76, valid), SCALING)
        joined, _ = in_pieces(attention, given, valid, pieces)
    rows = torch.ones(2, 76).bool() if valid is None else valid
    assert_near(joined.transpose(1, 2)[rows], whole.transpose(1, 2)[rows], 1e-9, "output")


@pytest.mark.parametrize("name", STATEFUL)
def test_state_does_not_grow(name):
    attention = build(name, 6, 2, torch.bfloat16, **small_options(name))
    given, sizes = inputs(300, 6, 2, dtype=torch.bfloat16), set()
    with torch.no_grad():
        for pieces in ([8], [8] * 8, [64], [64] * 4 + [44], [300]):
            state = in_pieces(attention, given, None, pieces)[1]
            sizes.add(sum(t.numel() * t.element_size() for t in state.values()))
            # A view would keep all the keys that it is a part of.
            assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in state.values())
    assert len(sizes) == 1


@pytest.mark.parametrize("padding", ("none", "left"))
@pytest.mark.parametrize("name", ("window", "elu+window"))
def test_a_window_costs_no_more_than_the_text(name, padding):
    """One that is never full says the same as any other that is never full, and takes what the text takes."""
    wide, usual, given = build(name, window=1_000_000), build(name, window=64), inputs(20)
    valid = valid_keys(padding, 20)
    with torch.no_grad(), Largest() as largest:
        outs = [in_pieces(attention, given, valid, [9, 1, 1, 8, 1])[0] for attention in (wide, usual)]
        outs += [attention(*given, causal(20, valid), SCALING) for attention in (wide, usual)]
    assert largest.elements < 10_000
    rows = torch.ones(2, 20).bool() if valid is None else valid
    for out in outs[1:]:
        assert_near(out.transpose(1, 2)[rows], outs[0].transpose(1, 2)[rows], 1e-9, "output")


@pytest.mark.parametrize("padding", ("none", "left"))
@pytest.mark.parametrize("name", ("window", "elu+window"))
@pytest.mark.parametrize("window", (8, 14, 30))
def test_sinks_cost_no_more_than_the_text(name, padding, window):
    many, given, valid = build(name, window=window, sinks=1_000_000), inputs(20), valid_keys(padding, 20)
    with torch.no_grad(), Largest() as largest:
        outs = [many(*given, causal(20, valid), SCALING)]
        outs += [in_pieces(many, given, valid, pieces)[0] for pieces in ([9, 1, 1, 8, 1], [1] * 20)]
    assert largest.elements < 10_000
    rows = torch.ones(2, 20).bool() if valid is None else valid
    expected = many.reference(*given, causal(20, valid), SCALING)
    for out in outs:
        assert_near(out.transpose(1, 2)[rows], expected.transpose(1, 2)[rows], 1e-9, "output")


@pytest.mark.parametrize("padding", (False, True), ids=("whole", "padded"))
@pytest.mark.parametrize("name", LINEAR)
def test_linear_variants_make_no_square_matrix(name, padding):
    n, saved = 512, []
    attention, given = build(name, 2, 1), inputs(n, 2, 1, batch=1)
    valid = torch.arange(n)[None] >= 100 if padding else None
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        attention(*given, Mask(n, n, valid=valid), SCALING).sum().backward()
    assert saved and max(t.numel() for t in saved) < n * n
    assert n <= largest.elements < n * n


@pytest.mark.parametrize("eps", (None, 1e-6))
@pytest.mark.parametrize("masked", (False, True), ids=("whole", "masked"))
@pytest.mark.parametrize("continued", (False, True), ids=("start", "continued"))
def test_gradcheck_of_causal_linear(eps, masked, continued):
    """Chunks of 2 in a text of 5; also through the denominator that comes back."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, 5, 2, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    weight = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    key_mask = torch.tensor([[False, True, True, False, True]]) if masked else None
    state = None

    def feature_map(weight):
        return FeatureMap("of this test", lambda x, weight: (x @ weight).exp(), tensors={"weight": weight})

    if continued:
        earlier = (torch.randn(1, h, 3, 2, dtype=torch.float64) for h in (2, 1, 1))
        with torch.no_grad():
            state = causal_linear(*earlier, feature_map(weight), feature_map(weight), chunk=2)[2]

    def run(query, key, value, weight):
        maps = feature_map(weight), feature_map(weight)
        out, denominator, _ = causal_linear(query, key, value, *maps, key_mask=key_mask, state=state, eps=eps, chunk=2)
        # A row that sees no key is 0 / eps, whose slope no finite difference finds.
        seen = torch.ones(1, 5).bool() if key_mask is None or continued else key_mask.cumsum(1) > 0
        return out.transpose(1, 2)[seen], denominator

    assert torch.autograd.gradcheck(run, (query, key, value, weight))


def test_gradcheck_of_by_rows():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 5, 2, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 1, 1, dtype=torch.float64, requires_grad=True)
    table = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)

    def attend(query, key, value, added, tile, carry):
        scores = (query @ key.transpose(-1, -2) + bias + added).tanh()
        scores = scores.masked_fill(~F.pad(tile.allowed, (tile.free, 0), value=True), 0)
        return (scores @ value, scores.square().sum(-1, keepdim=True)), carry

    def run(*tensors):
        return by_rows(attend, *tensors[:3], Mask(5, 5).tiles(2, DEVICE), tensors[3:4], tensors[4])[0]

    assert torch.autograd.gradcheck(run, (query, key, value, bias, table))


@pytest.mark.parametrize("chunk", (0, -1))
def test_causal_linear_refuses_a_chunk_of_no_tokens(chunk):
    with pytest.raises(ValueError, match=f"chunk must be at least 1, got {chunk}"):
        causal_linear(*inputs(4), *[FeatureMap("identity", lambda x: x)] * 2, chunk=chunk)


# In bfloat16, 256 + 1 = 256: a sum over more tiles or chunks than that stalls unless it is kept in float32.
def test_by_rows_sums_parameter_gradients_in_float32():
    ones = torch.ones(1, 1, 1024, 1, dtype=torch.bfloat16)
    factor = torch.ones((), dtype=torch.bfloat16, requires_grad=True)

    def attend(query, key, value, bias, tile, carry):
        return (query * factor,), carry

    (out,), _ = by_rows(attend, ones, ones, ones, Mask(1024, 1024).tiles(1, DEVICE), (factor,))
    (grad,) = torch.autograd.grad(out.sum(), factor)
    assert grad.item() == 1024


def test_causal_linear_sums_parameter_gradients_in_float32():
    grads = []
    for dtype in (torch.float64, torch.bfloat16):
        ones = torch.ones(1, 1, 1024, 1, dtype=dtype)
        factor = torch.ones((), dtype=dtype, requires_grad=True)
        maps = (
            FeatureMap("factor", lambda x, factor: x * factor, tensors={"factor": factor}),
            FeatureMap("identity", lambda x: x),
        )
        out = causal_linear(ones, ones, ones, *maps, eps=None, chunk=1)[0]
        grads.append(torch.autograd.grad(out.sum(), factor)[0].item())
    assert grads[1] == pytest.approx(grads[0], rel=0.01)
