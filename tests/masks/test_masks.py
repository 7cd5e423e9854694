"""What masks of models become, and that they take O(n) memory."""

import pytest
import torch
from attention_cases import Largest, build, inputs
from device_under_test import DEVICE

from hf_attnswap.integration.mask_function import attnswap_mask
from hf_attnswap.masks import Mask, Packed, find_segments, from_segments, parse, split
from hf_attnswap.masks.packing import unpack_rows

N = 12
CAUSAL = torch.ones(1, 1, N, N, dtype=torch.bool).tril()
LEFT = torch.arange(N)[None] >= torch.tensor([[0], [5]])
MIDDLE = torch.ones(2, N, dtype=torch.bool)
MIDDLE[1, 3:6] = False
SEGMENTS = torch.tensor([[1] * 4 + [5] * 3 + [8] * 5, [0] * 2 + [3] * 10])


def padded(valid):
    """The 4D mask of causal attention with padding, as transformers makes it."""
    return CAUSAL & valid[:, None, None, :]


def packed(segments):
    return CAUSAL & (segments[:, None, :, None] == segments[:, None, None, :]) & (segments > 0)[:, None, None, :]


def additive(dense, dtype=torch.float32, lowest=None):
    return torch.zeros(dense.shape, dtype=dtype).masked_fill(~dense, lowest or torch.finfo(dtype).min)


def segments_matrix(segments):
    """Which token shares a text with which; how the texts are numbered is nobody's business."""
    return (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, :, None]


def test_no_mask_is_causal():
    assert parse(None, 3, 5) == Mask(3, 5)
    expected = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    assert torch.equal(parse(None, 3, 5).matrix(DEVICE)[0, 0], expected)


def test_2d_bool_is_padding():
    mask = parse(LEFT, N, N)
    assert mask.valid is not None and mask.dense is None
    assert torch.equal(mask.matrix(DEVICE), padded(LEFT))
    assert torch.equal(mask.new_tokens(), LEFT)


def test_2d_bool_of_a_longer_cache_is_cut():
    longer = torch.cat([LEFT, torch.zeros(2, 4, dtype=torch.bool)], 1)
    mask = parse(longer, 1, N, longer=True)
    assert torch.equal(mask.valid, LEFT)
    assert torch.equal(mask.new_tokens(), LEFT[:, -1:])


@pytest.mark.parametrize("shape", ((2, N + 1), (2, N - 1), (2, 1, 1, N + 1), (2, 1, 3, N), (2, 1, 1, 1)))
def test_a_mask_with_other_columns_or_rows_is_refused(shape):
    with pytest.raises(ValueError, match=r"attention_mask has shape .* there are .*; expected"):
        parse(torch.ones(shape, dtype=torch.bool), N, N)


def test_2d_int_is_packed():
    mask = parse(SEGMENTS, N, N)
    assert isinstance(mask, Packed) and torch.equal(mask.segments, SEGMENTS)


@pytest.mark.parametrize(
    "form", (lambda m: m, additive, lambda m: additive(m, torch.bfloat16)), ids=("bool", "f", "bf")
)
class Test4D:
    def test_causal(self, form):
        assert parse(form(CAUSAL), N, N) == Mask(N, N)

    @pytest.mark.parametrize("valid", (LEFT, ~LEFT | LEFT[:1], MIDDLE), ids=("left", "none", "middle"))
    def test_padding(self, form, valid):
        mask = parse(form(padded(valid)), N, N)
        assert isinstance(mask, Mask) and mask.dense is None
        rows = valid[:, None, :, None]
        assert torch.equal(mask.matrix(DEVICE) & rows, padded(valid) & rows)

    def test_right_padding(self, form):
        valid = LEFT.flip(1)
        mask = parse(form(padded(valid)), N, N)
        assert mask.dense is None and torch.equal(mask.valid, valid)

    def test_packed(self, form):
        mask = parse(form(packed(SEGMENTS)), N, N)
        assert isinstance(mask, Packed)
        assert torch.equal(segments_matrix(mask.segments), segments_matrix(SEGMENTS))

    @pytest.mark.parametrize("custom", ("window", "random", "prefix"))
    def test_custom(self, form, custom):
        dense = {
            "window": CAUSAL & ~CAUSAL.tril(-3),
            "random": CAUSAL & (torch.rand(2, 1, N, N, generator=torch.Generator().manual_seed(0)) < 0.5),
            "prefix": CAUSAL | (torch.arange(N) < 4),
        }[custom]
        assert torch.equal(parse(form(dense), N, N).dense, dense)

    def test_with_a_past(self, form):
        dense = padded(LEFT)[:, :, -4:]
        mask = parse(form(dense), 4, N)
        assert mask.dense is None and torch.equal(mask.matrix(DEVICE), dense)
        assert torch.equal(mask.new_tokens(), LEFT[:, -4:])

    def test_padding_among_new_tokens(self, form):
        """Batched texts that go on by different numbers of tokens."""
        for valid in (MIDDLE, MIDDLE & (torch.arange(N) != N - 1)):
            dense = padded(valid)[:, :, 4:]
            mask = parse(form(dense), N - 4, N)
            assert mask.dense is None and torch.equal(mask.valid, valid)
            assert torch.equal(mask.matrix(DEVICE), dense)

    def test_one_row_with_a_past(self, form):
        assert parse(form(CAUSAL[:, :, -1:]), 1, N) == Mask(1, N)
        hole = CAUSAL[:, :, -1:].clone()
        hole[..., 3] = False
        assert torch.equal(parse(form(hole), 1, N).matrix(DEVICE), hole)

    def test_per_head(self, form):
        dense = CAUSAL.expand(1, 2, N, N).clone()
        dense[:, 1, :, 3] = False
        assert torch.equal(parse(form(dense), N, N).dense, dense)


@pytest.mark.parametrize("lowest", (float("-inf"), torch.finfo(torch.float32).min))
def test_additive_lows(lowest):
    assert parse(additive(CAUSAL, lowest=lowest), N, N) == Mask(N, N)


@pytest.mark.parametrize("value", (-1.0, 0.5, -1e4))
def test_what_an_additive_mask_adds_is_a_bias(value):
    given = additive(CAUSAL)
    given[0, 0, 5, 2] = value
    mask = parse(given, N, N)
    assert torch.equal(mask.matrix(DEVICE), CAUSAL) and mask.causal and not mask.plain
    assert mask.bias[0, 0, 5, 2] == value and mask.bias.count_nonzero() == 1


def test_a_bias_on_packed_texts_keeps_both():
    given = additive(packed(SEGMENTS))
    given[0, 0, 2, 1] = 0.5
    mask = parse(given, N, N)
    assert torch.equal(mask.matrix(DEVICE), packed(SEGMENTS)) and mask.bias[0, 0, 2, 1] == 0.5


def test_nan_is_refused():
    given = additive(CAUSAL)
    given[0, 0, 5, 2] = float("nan")
    with pytest.raises(ValueError, match="attention_mask has NaN"):
        parse(given, N, N)


def test_split():
    given = additive(CAUSAL, torch.bfloat16)
    allowed, bias = split(given)
    assert torch.equal(allowed, CAUSAL) and bias is None
    assert split(CAUSAL)[0] is CAUSAL


@pytest.mark.parametrize("form", (lambda m: m, additive), ids=("bool", "float"))
@pytest.mark.parametrize("valid", (LEFT, MIDDLE), ids=("left", "middle"))
class TestBidirectional:
    def test_one_row_for_all_queries(self, form, valid):
        mask = parse(form(valid[:, None, None]), N - 2, N)
        assert mask == Mask(N - 2, N, valid=mask.valid, causal=False) and torch.equal(mask.valid, valid)

    def test_equal_rows(self, form, valid):
        mask = parse(form(valid[:, None, None].expand(2, 1, N, N)), N, N)
        assert not mask.causal and mask.dense is None and torch.equal(mask.valid, valid)

    def test_one_query_is_causal_only_where_that_is_said(self, form, valid):
        given = form(valid[:, None, None])
        assert parse(given, 1, N, causal=True).causal
        assert not parse(given, 1, N, causal=False).causal
        assert torch.equal(parse(given, 1, N, causal=True).valid, valid)

    def test_texts_that_see_themselves(self, form, valid):
        dense = segments_matrix(SEGMENTS)[:, None]
        mask = parse(form(dense), N, N)
        assert isinstance(mask, Packed) and not mask.causal
        assert torch.equal(segments_matrix(mask.segments)[:, None], dense)


def test_nothing_forbidden():
    assert parse(None, 3, 5, causal=False) == Mask(3, 5, causal=False)
    assert parse(torch.ones(1, 1, 1, 5).bool(), 3, 5) == Mask(3, 5, causal=False)
    assert Mask(3, 5, causal=False).matrix(DEVICE).expand(1, 1, 3, 5).all()


@pytest.mark.parametrize(
    "dense",
    (
        CAUSAL & ~CAUSAL.tril(-3),
        CAUSAL | (torch.arange(N) < 4)[None, None, None, :],
        torch.eye(N, dtype=torch.bool)[None, None] | (torch.arange(N) % 3 == 0),
    ),
    ids=("sliding", "prefix", "custom"),
)
def test_any_other_matrix_stays_a_matrix(dense):
    mask = parse(dense, N, N)
    assert not mask.plain and torch.equal(mask.matrix(DEVICE), dense)


@pytest.mark.parametrize("shape", ((N,), (1, N, N), (1, 1, 1, N, N)))
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="expected 2 or 4 dimensions"):
        parse(torch.ones(shape, dtype=torch.bool), N, N)


def test_a_mask_changed_in_place_is_read_again():
    """A mask is parsed once for all layers of a forward pass, but not once and for all."""
    dense = CAUSAL.clone()
    assert parse(dense, N, N) == Mask(N, N)
    dense[:, :, 8:, :4] = False
    found = parse(dense, N, N)
    assert not isinstance(found, Mask) or torch.equal(found.matrix(DEVICE), dense)


@pytest.mark.parametrize("where", ("inference_mode", "numpy"))
def test_a_mask_that_changes_unseen_is_read_again(where):
    """Tensors of inference mode have no version, and numpy writes past it."""
    with torch.inference_mode(where == "inference_mode"):
        array = CAUSAL.cpu().numpy().copy()
        dense = torch.from_numpy(array) if where == "numpy" else CAUSAL.clone()
        assert parse(dense, N, N) == Mask(N, N)
        (array if where == "numpy" else dense)[:, :, 8:, :4] = False
        found = parse(dense, N, N)
        assert not isinstance(found, Mask) or torch.equal(found.matrix(dense.device), dense)


def test_a_mask_whose_data_changes_is_read_again_in_the_next_call():
    """Writing on `tensor.data` leaves the version as it is; each layer asks once in a call."""
    dense, layers = CAUSAL.clone(), (object(), object())
    first = [parse(dense, N, N, asker=layer) for layer in layers]
    assert first[0] is first[1]
    dense.data[:, :, 8:, :4] = False
    for layer in layers:
        found = parse(dense, N, N, asker=layer)
        assert not isinstance(found, Mask) or torch.equal(found.matrix(DEVICE), dense)


def test_tiles_cover_every_row_once():
    bidirectional = Mask(N, N, valid=LEFT, causal=False)
    for mask in (Mask(N, N), Mask(5, N), Mask(N, N, valid=LEFT), Mask(N, N, dense=padded(LEFT)), bidirectional):
        rows = torch.zeros(mask.query_length, dtype=torch.long)
        for tile in mask.tiles(4, DEVICE):
            rows[tile.rows] += 1
            matrix = mask.matrix(DEVICE).expand(-1, -1, mask.query_length, -1)[:, :, tile.rows]
            allowed = matrix[..., tile.columns]
            assert allowed[..., : tile.free].all()
            assert torch.equal(tile.allowed.expand(-1, -1, matrix.shape[2], -1), allowed[..., tile.free :])
            assert torch.equal(
                tile.count().expand(-1, -1, matrix.shape[2], -1), allowed.sum(-1, keepdim=True).clamp(min=1)
            )
            assert not matrix[..., tile.columns.stop :].any()
        assert (rows == 1).all()


@pytest.mark.parametrize("length", (N, 300))
def test_find_segments_over_several_blocks(length):
    torch.manual_seed(0)
    segments = (torch.rand(3, length) < 0.1).long().cumsum(1) + 1
    segments[0, :3] = 0
    segments[1, -4:] = 0
    dense = (segments[:, None, :, None] == segments[:, None, None, :]).tril() & (segments > 0)[:, None, None]
    found = find_segments(lambda start, stop: dense[:, :, start:stop], length, block=64)
    assert torch.equal(segments_matrix(found), segments_matrix(segments))
    dense[2, 0, length - 1] = ~dense[2, 0, length - 1]
    dense[2, 0, length - 1, length - 1] = True
    assert find_segments(lambda start, stop: dense[:, :, start:stop], length, block=64) is None


def test_segments_of_one_text_are_a_plain_mask():
    assert from_segments(torch.full((2, N), 3)) == Mask(N, N)
    assert torch.equal(from_segments(SEGMENTS[1:]).valid, SEGMENTS[1:] > 0)
    assert isinstance(from_segments(SEGMENTS), Packed)


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("name", ("softmax", "elu", "relu"))
def test_unpacked_rows_are_texts_alone(name, causal):
    attention, given = build(name), [t.detach() for t in inputs(N)]

    def attend(q, k, v, valid=None):
        if causal:
            valid = None
        return attention(q, k, v, Mask(q.shape[2], k.shape[2], valid, causal=causal), 0.4)

    out = unpack_rows(attend, *given, SEGMENTS)
    assert (out[1, :, :2] == 0).all()
    for row, text in ((0, slice(0, 4)), (0, slice(4, 7)), (0, slice(7, 12)), (1, slice(2, 12))):
        alone = attend(*(t[row : row + 1, :, text] for t in given))
        torch.testing.assert_close(out[row : row + 1, :, text], alone)


def mask_of_transformers(position_ids=None, attention_mask=None, length=N, past=0, **kwargs):
    """`attnswap_mask` called as transformers' `create_causal_mask` calls it."""
    from transformers import DynamicCache, LlamaConfig
    from transformers.masking_utils import create_causal_mask

    config = LlamaConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
    config._attn_implementation = "attnswap"
    cache = None
    if past:
        cache = DynamicCache(config=config)
        cache.update(torch.zeros(1, 1, past, 8), torch.zeros(1, 1, past, 8), 0)
    batch = 1 if attention_mask is None else attention_mask.shape[0]
    return create_causal_mask(
        config,
        torch.zeros(batch, length, 8),
        attention_mask,
        past_key_values=cache,
        position_ids=position_ids,
        **kwargs,
    )


def test_mask_function_plain_is_none():
    assert mask_of_transformers() is None
    assert mask_of_transformers(attention_mask=torch.ones(2, N, dtype=torch.long)) is None
    assert mask_of_transformers(length=1, past=N) is None
    # After a past, a missing mask would mean the upper left triangle to SDPA.
    assert torch.equal(mask_of_transformers(length=4, past=N), torch.ones(1, N + 4, dtype=torch.bool))


def test_mask_function_bidirectional_is_one_row():
    from transformers import BertConfig
    from transformers.masking_utils import create_bidirectional_mask

    config = BertConfig()
    config._attn_implementation = "attnswap"
    found = create_bidirectional_mask(config, torch.zeros(2, N, 8), LEFT.long())
    assert torch.equal(found, LEFT[:, None, None].expand(2, 1, N, N)) and found.stride(2) == 0
    assert create_bidirectional_mask(config, torch.zeros(2, N, 8), None) is None
    found = create_bidirectional_mask(config, torch.zeros(2, N, 8), None, allow_is_bidirectional_skip=False)
    assert found.all() and found.shape == (2, 1, N, N)


def test_mask_function_padding_is_2d():
    found = mask_of_transformers(attention_mask=LEFT.long())
    assert found.dtype == torch.bool and torch.equal(found, LEFT)
    found = mask_of_transformers(attention_mask=LEFT.long(), length=4, past=8)
    assert torch.equal(found, LEFT)


@pytest.mark.parametrize(
    ("shape", "past"), (((1, N + 1), 4), ((1, N - 1), 4), ((3, N), 4), ((1, N, N), 0), ((3, N), 0)), ids=str
)
def test_mask_function_refuses_a_mask_of_another_shape(shape, past):
    with pytest.raises(ValueError, match=r"attention_mask has shape .*; expected \(1, 12\)"):
        attnswap_mask(1, N - past, N, past, attention_mask=torch.ones(shape, dtype=torch.bool))


def test_mask_function_of_inference_mode_makes_masks_that_layers_share():
    with torch.inference_mode():
        found = mask_of_transformers(attention_mask=LEFT.long())
        assert not found.is_inference() and torch.equal(found, LEFT)
        assert parse(found, N, N) is parse(found, N, N)


def test_what_a_mask_says_of_the_past_is_not_the_callers_to_change():
    given = LEFT.clone()
    kept = parse(given, N, N).valid
    given[:] = True
    assert torch.equal(kept, LEFT)


def test_mask_function_passes_a_4d_mask_on():
    dense = packed(SEGMENTS)
    assert torch.equal(mask_of_transformers(attention_mask=dense), dense)


def test_mask_function_of_another_rule_is_4d():
    found = mask_of_transformers(and_mask_function=lambda b, h, q, k: q - k < 3)
    assert torch.equal(found, CAUSAL & ~CAUSAL.tril(-3))


def test_mask_function_of_packed_texts_is_one_int_per_token():
    n = 2048
    position_ids = torch.cat([torch.arange(700), torch.arange(1000), torch.arange(n - 1700)])[None]
    with Largest() as largest:
        found = mask_of_transformers(position_ids, length=n)
    assert found.dtype == torch.int32 and found.shape == (1, n)
    _, counts = found.unique_consecutive(return_counts=True)
    assert counts.tolist() == [700, 1000, 348]
    assert largest.elements < n * n // 4


def test_mask_function_in_use_is_attnswaps():
    found = attnswap_mask(2, N, N, attention_mask=LEFT)
    assert torch.equal(found, LEFT)
