"""Perplexity against models whose likelihoods are known, and against the model's own loss."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny, tokens
from torch import nn

from hf_attnswap.evaluation.perplexity import (
    Perplexity,
    compare,
    count_units,
    octaves,
    perplexity,
    ratio,
    sliding_perplexity,
)


class Known(nn.Module):
    """Over two tokens; the likelihood of a 1 after n tokens is `p(n)`, whatever they are."""

    def __init__(self, p):
        super().__init__()
        self.p, self.anchor = p, nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, use_cache):
        p = torch.tensor([self.p(n + 1) for n in range(input_ids.shape[1])], dtype=torch.float64)
        logits = torch.stack([(1 - p).log(), p.log()], dim=-1)
        return SimpleNamespace(logits=logits.expand(len(input_ids), -1, -1))


def rising(n):
    return n / (n + 1)


ONES = torch.ones(24, dtype=torch.long)


def test_blocks_and_positions_by_hand():
    found = perplexity(Known(rising), ONES, 8, batch_size=2)
    nll = [-math.log(rising(n)) for n in range(1, 8)]
    assert found.nll == pytest.approx([sum(nll) / 7] * 3)
    assert found.perplexity == pytest.approx(math.prod(rising(n) for n in range(1, 8)) ** (-1 / 7))  # 8 ** (1 / 7)
    assert found.perplexity == pytest.approx(8 ** (1 / 7)) and found.tokens == 21
    assert found.standard_error == pytest.approx(0, abs=1e-7)
    expected = [(1, 1, nll[0]), (2, 3, sum(nll[1:3]) / 2), (4, 7, sum(nll[3:]) / 4)]
    assert [x for entry in found.by_position for x in entry] == pytest.approx([x for e in expected for x in e])


def test_octaves_cover_every_position_once():
    assert octaves(9) == [(1, 1), (2, 3), (4, 7), (8, 9)]
    assert octaves(1) == [(1, 1)]


def test_sliding_windows_predict_every_token_once_with_enough_before_it():
    found = sliding_perplexity(Known(rising), ONES, context=8, stride=3, batch_size=2)
    before = [1, 2, 3, 4, 5, 6, *([5, 6, 7] * 5)]  # the third window and all later ones are full
    expected = [-math.log(rising(n)) for n in before]
    assert found.tokens == 21 and found.stride == 3
    assert found.nll == pytest.approx([sum(expected[i : i + 3]) / 3 for i in range(0, 21, 3)])


def test_sliding_agrees_with_the_model_itself():
    model, text = tiny("llama"), tokens(30, batch=1)[0]
    found = sliding_perplexity(model, text, context=10, stride=4)
    with torch.no_grad():
        for window, mean in enumerate(found.nll):
            end = (window + 1) * 4 + 1
            seen = text[max(0, end - 10) : end][None]
            expected = nn.functional.cross_entropy(model(seen).logits[0, -5:-1], seen[0, -4:])
            assert mean == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("stride", (0, 8, 9))
def test_a_stride_that_leaves_gaps_is_refused(stride):
    with pytest.raises(ValueError, match=f"stride is {stride}; expected 1 to 7"):
        sliding_perplexity(Known(rising), ONES, context=8, stride=stride)


def test_standard_error_by_hand():
    assert Perplexity(8, (1.0, 2.0, 3.0)).standard_error == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(Perplexity(8, (1.0,)).standard_error)


class Words:
    """Token i is a text of `pieces[i]`."""

    pieces = ("ein ", "Bär", " und", "\n", "é")

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        return "".join(self.pieces[i] for i in ids.tolist())


def test_units_of_what_was_predicted():
    text = torch.tensor([0, 1, 2, 3, 0, 4, 1, 2])
    found = Perplexity(4, (0.5, 1.0))  # predicts "Bär und\n" and "éBär und"
    units = count_units(Words(), text, 4, 2)
    assert (units.words, units.bytes) == (2 + 2, 9 + 10)
    assert found.per(units.words) == pytest.approx(math.exp((0.5 * 3 + 1.0 * 3) / 4))
    sliding = Perplexity(4, (0.5, 1.0, 1.0), stride=2)  # "Bär und\nein éBär"
    units = count_units(Words(), text, 4, 3, stride=2)
    assert (units.words, units.bytes) == (4, 9 + 4 + 2 + 4)
    assert sliding.per(units.bytes) == pytest.approx(math.exp(5 / 19))


def test_ratio_is_the_exponential_of_the_paired_difference():
    ours, control = Perplexity(8, (1.0, 2.0, 3.5) * 3), Perplexity(8, (0.5, 1.5, 2.5) * 3)
    found = ratio(ours, control)
    assert found["value"] == pytest.approx(math.exp(2 / 3)) and found["low"] <= found["value"] <= found["high"]
    assert found["items"] == 9 and found["few"] and found["verdict"] == "worse"
    assert ratio(ours, Perplexity(8, (0.5, 2.5, 2.5) * 3))["verdict"] == "no measurable difference"
    assert compare(ours, control).value == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="same blocks"):
        ratio(ours, Perplexity(16, (0.5, 1.5, 2.5)))


class Seen(nn.Module):
    """Over ten tokens, all alike; keeps what it has read."""

    def __init__(self):
        super().__init__()
        self.read, self.anchor = [], nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, use_cache):
        self.read += input_ids.tolist()
        logits = torch.zeros(*input_ids.shape, 10)
        logits[..., 0] = torch.arange(input_ids.shape[1])  # less and less likely, whatever stands there
        return SimpleNamespace(logits=logits)


STREAM = torch.arange(1, 10)


@pytest.mark.parametrize("start", ([9], [8, 9]))
def test_every_block_begins_as_a_text_begins_and_that_is_not_scored(start):
    model, given = Seen(), len(start)
    found = perplexity(model, STREAM, 3 + given, start=start)
    assert model.read == [[*start, 1, 2, 3], [*start, 4, 5, 6], [*start, 7, 8, 9]]
    nll = [math.log(9 + math.exp(n)) for n in range(given - 1, given + 2)]  # of three tokens, the first after `start`
    assert found.tokens == 9 and found.nll == pytest.approx([sum(nll) / 3] * 3)
    first, last, value = found.by_position[0]
    assert (first, last) == (given, 2 * given - 1) and value == pytest.approx(sum(nll[:given]) / given)
    with pytest.raises(ValueError, match="same blocks"):
        ratio(found, perplexity(model, STREAM, 3))


def test_every_window_begins_as_a_text_begins():
    model = Seen()
    found = sliding_perplexity(model, STREAM, context=5, stride=2, start=[9])
    assert model.read == [[9, 1, 2], [9, 1, 2, 3, 4], [9, 3, 4, 5, 6], [9, 5, 6, 7, 8]]
    assert found.tokens == 8  # the first token is predicted too
    with pytest.raises(ValueError, match="stride is 5; expected 1 to 4"):
        sliding_perplexity(model, STREAM, context=5, stride=5, start=[9])


def test_units_of_what_was_predicted_after_the_start():
    text = torch.tensor([1, 2, 3, 4, 1, 2])  # "Bär und\n" and "éBär und"
    units = count_units(Words(), text, 4, 2, start=[0])
    assert (units.words, units.bytes) == (2 + 2, 9 + 10)
    units = count_units(Words(), text, 4, 3, stride=2, start=[0])
    assert (units.words, units.bytes) == (4, 9 + 10)
