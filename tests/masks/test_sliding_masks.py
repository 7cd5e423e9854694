"""Sliding causal masks, read off the matrix that a model makes."""

import pytest
import torch
from device_under_test import DEVICE

from hf_attnswap.masks import Mask, Packed, parse

N, W = 12, 5
SLIDING = torch.ones(N, N, dtype=torch.bool).tril() & ~torch.ones(N, N, dtype=torch.bool).tril(-W)


def matrix(valid=None, rows=N):
    whole = SLIDING[None] if valid is None else SLIDING & valid[:, None, :]
    return whole[:, None, N - rows :]


def columns(*padding):
    """bool `[1, N]`, False at these columns."""
    valid = torch.ones(1, N, dtype=torch.bool)
    valid[0, list(padding)] = False
    return valid


@pytest.mark.parametrize("padding", ((), (0, 1, 2, 3), (9, 10, 11), (0, 11)), ids=str)
@pytest.mark.parametrize("additive", (False, True))
def test_a_whole_text(padding, additive):
    valid = columns(*padding)
    given = matrix(valid)
    given = torch.zeros(given.shape).masked_fill(~given, torch.finfo(torch.float32).min) if additive else given
    mask = parse(given, N, N, window=W)
    assert mask.window == W and mask.dense is None
    assert valid.all() if mask.valid is None else torch.equal(mask.valid, valid)
    rows = valid[0]
    assert torch.equal(mask.matrix(DEVICE)[0, 0, rows], matrix(valid)[0, 0, rows])
    whole = parse(given, N, N)  # for variants that take any
    assert whole.window is None and torch.equal(whole.matrix(DEVICE)[0, 0, rows], matrix(valid)[0, 0, rows])


@pytest.mark.parametrize("rows", (1, 3, 7))
@pytest.mark.parametrize("kept", ("all", "window"))
def test_new_tokens_behind_a_past(rows, kept):
    """Of a cache that keeps no more than the window, the mask has the last columns alone."""
    given = matrix(rows=rows)
    given = given[..., -(rows + W - 1) :] if kept == "window" else given
    mask = parse(given, rows, N, window=W)
    assert mask.window == W and mask.valid is None
    assert torch.equal(mask.matrix(DEVICE), matrix(rows=rows))


def test_padding_within_the_window_of_new_tokens():
    mask = parse(matrix(columns(*range(9)), rows=2), 2, N, window=W)
    seen = torch.ones(N, dtype=torch.bool)
    seen[6:9] = False  # before these the mask tells nothing
    assert mask.window == W and torch.equal(mask.valid[0], seen)


def test_new_tokens_that_do_not_see_themselves():
    """Padding where no row sees them; else the mask is something else."""
    rows = slice(6, N)
    given = matrix(columns(N - 2, N - 1))[:, :, rows]
    mask = parse(given, N - 6, N, window=W)
    assert mask.window == W and mask.valid[0].tolist() == [True] * (N - 2) + [False] * 2
    strict = SLIDING & ~torch.eye(N, dtype=torch.bool)
    assert parse(strict[None, None, rows], N - 6, N, window=W).window is None


def test_packed_texts():
    segments = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 0]])
    same = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
    mask = parse((SLIDING & same)[:, None], N, N, window=W)
    assert isinstance(mask, Packed) and mask.window == W
    found = mask.segments[:, :, None] == mask.segments[:, None, :]
    assert torch.equal(found & (mask.segments > 0)[:, None, :], same)


@pytest.mark.parametrize(
    "given",
    (
        matrix(columns(5)),
        torch.ones(N, N, dtype=torch.bool).tril()[None, None] & ~torch.ones(N, N, dtype=torch.bool).tril(-4),
        matrix() & (torch.arange(N) != 6),
    ),
    ids=("padding between tokens", "another window", "a key that only its row sees"),
)
def test_anything_else_is_no_sliding_mask(given):
    assert parse(given, N, N, window=W).window is None


def test_one_tensor_for_layers_that_know_their_window_and_layers_that_do_not():
    given = matrix()
    parsed = [parse(given, N, N, window=window) for window in (W, None, W, None)]
    assert parsed[0] is parsed[2] and parsed[1] is parsed[3] and parsed[0] is not parsed[1]


def test_score_variants_take_such_a_mask_as_well():
    mask = Mask(N, N, window=W)
    tiles = torch.zeros(N, N, dtype=torch.bool)
    for tile in mask.tiles(5):
        tiles[tile.rows, tile.columns] = tile.allowed[0, 0] if tile.free == 0 else True
    assert torch.equal(tiles, SLIDING)
