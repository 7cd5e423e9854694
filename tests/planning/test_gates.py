"""Gates, texts and costs of a model: each beside what it stands for."""

import pytest
import torch
from encoders import CLS, MASK, SEP, bert, words_tokenizer
from tiny_models import tiny, tokens
from transformers import BertForMaskedLM, BertModel, Gemma3ForCausalLM, Gemma3TextConfig

from hf_attnswap import UsageError, restore, swap
from hf_attnswap.benchmark.generation import filled_cache
from hf_attnswap.evaluation.predictions import NOTHING
from hf_attnswap.integration.cache import cache_nbytes
from hf_attnswap.integration.swapping import swapped_modules
from hf_attnswap.planning.costs import cache_bytes, cache_share, prefill_seconds, prefill_speed
from hf_attnswap.planning.gates import gated, gradient, swapped_everywhere
from hf_attnswap.planning.groups import find_groups
from hf_attnswap.planning.losses import Texts, answer, distance

WINDOW = {"window": 4, "sinks": 1}


class NoStart:
    """A tokenizer that adds nothing to a text."""

    mask_token_id = None

    def __call__(self, text, **_):
        return type("Encoding", (), {"input_ids": [3 + b % 60 for b in text.encode()]})


def text_of(model, length=24):
    return Texts.of(model, NoStart(), length).plain(tokens(length, 1)[0], 0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gates_of_0_and_1_are_a_real_swap(family):
    model = tiny(family)
    groups = find_groups(model, "window", WINDOW)
    kept = [0, 3, len(groups) - 1]
    text = text_of(model)
    with swapped_everywhere(model, groups), torch.no_grad():
        gates = torch.zeros(len(groups))
        gates[kept] = 1
        with gated(model, groups, gates):
            mixed = answer(model, text)
    swap(model, groups.config(kept))
    with torch.no_grad():
        torch.testing.assert_close(mixed, answer(model, text), atol=1e-4, rtol=1e-4)


def test_the_gradient_is_that_of_finite_differences():
    model = tiny("llama", dtype=torch.float64)
    groups = find_groups(model, "window", WINDOW)
    text = text_of(model)
    gates = torch.full((len(groups),), 0.3, dtype=torch.float64)
    with swapped_everywhere(model, groups):
        lost, found = gradient(model, groups, gates, text)

        def loss(gates):
            with torch.no_grad():
                with gated(model, groups, torch.ones(len(groups))):
                    wanted = answer(model, text)
                with gated(model, groups, gates):
                    return distance(wanted, answer(model, text), text).item()

        step = torch.zeros_like(gates)
        step[2] = 1e-2
        assert loss(gates) == pytest.approx(lost, rel=1e-5)
        assert (loss(gates + step) - loss(gates - step)) / 2e-2 == pytest.approx(found[2].item(), rel=1e-2, abs=1e-6)
    assert all(p.requires_grad for p in model.parameters())


def test_a_group_is_its_query_heads_alone():
    groups = find_groups(tiny(), "window", WINDOW)
    assert groups.names == ("0.0", "0.1", "1.0", "1.1", "2.0", "2.1")
    assert groups.by_layer() == {0: [0, 1], 1: [2, 3], 2: [4, 5]}
    assert groups.config([3, 0]).keep == ["0.0", "1.1"]
    assert groups.config([]).keep is None


def gemma(**overrides):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, sliding_window=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes | overrides)).eval()


def test_sliding_layers_keep_what_they_are():
    model = gemma()
    groups = find_groups(model, "window", WINDOW)
    assert groups.names == ("1.0", "1.1")
    swap(model, groups.config([1]))
    assert list(swapped_modules(model)) == ["model.layers.1.self_attn"]
    with pytest.raises(UsageError, match="no layer that sees the whole text"):
        find_groups(gemma(layer_types=["sliding_attention"] * 3), "window", WINDOW)


def test_next_tokens_are_told_everywhere_and_of_copies_in_the_second_half():
    texts = Texts.of(tiny(), NoStart(), 16)
    stream = torch.arange(3, 63)
    plain, twice = texts.plain(stream, 2), texts.twice(stream, 2)
    assert plain.ids.tolist() == list(range(5, 21))
    assert plain.labels.tolist() == [*range(6, 21), NOTHING]
    assert twice.ids.tolist() == [*range(5, 13)] * 2
    assert twice.labels.tolist() == [NOTHING] * 8 + [*range(6, 13), NOTHING]


def test_masked_tokens_are_told_where_they_are_masked():
    texts = Texts.of(bert(BertForMaskedLM), words_tokenizer(), 32)
    stream = torch.arange(5, 20).repeat(10)
    plain, twice = texts.plain(stream, 0), texts.twice(stream, 0)
    for text, first in ((plain, 1), (twice, 16)):
        told = text.labels != NOTHING
        assert text.ids[0] == CLS and text.ids[-1] == SEP and len(text.ids) == 32
        assert (text.ids[told] == MASK).all() and told.any() and not told[:first].any() and not told[-1]
    told = plain.labels != NOTHING
    assert torch.equal(plain.labels[told], stream[:30][told[1:-1]])
    assert torch.equal(twice.ids[1:16], stream[:15])  # of what is copied nothing is masked
    assert not torch.equal(texts.plain(stream, 0, seed=1).labels, texts.plain(stream, 0, seed=2).labels)


def test_what_tells_no_tokens_is_compared_by_its_answers():
    model = bert(BertModel)
    texts = Texts.of(model, words_tokenizer(), 32)
    assert not texts.tells_tokens
    text = texts.plain(torch.arange(5, 20).repeat(10), 0)
    with torch.no_grad():
        found = answer(model, text)
    assert found.shape == (32,)
    assert distance(found, found, text) == 0
    assert distance(found, 0 * found, text).item() == pytest.approx(1)


@pytest.mark.parametrize(("length", "says"), [(8, "too short to plan on"), (65, "--context_length takes 65 tokens")])
def test_lengths_that_cannot_be_are_refused(length, says):
    with pytest.raises(UsageError, match=says):
        Texts.of(bert(BertForMaskedLM), words_tokenizer(), length)


def test_the_share_of_the_cache_is_what_a_real_cache_has():
    model = tiny("llama")
    groups = find_groups(model, "window", WINDOW)
    found = cache_bytes(model, groups, 96)
    kept = [0, 1, 4]
    softmax = cache_nbytes(filled_cache(model, 96))
    swap(model, groups.config(kept))
    real = cache_nbytes(filled_cache(model, 96))
    restore(model)
    assert cache_share(groups, kept, found) == pytest.approx(real / softmax, rel=0.02)


def test_the_speed_of_a_plan_lies_between_softmax_and_all_swapped():
    model = tiny("llama")
    groups = find_groups(model, "window", WINDOW)
    times = prefill_seconds(model, groups, 64, rounds=1)
    assert [len(of) for of in times["layers"].values()] == [3]  # none, one or both groups kept
    everything = list(range(len(groups)))
    assert prefill_speed(groups, everything, times) == pytest.approx(1)
    by_hand = {"model": 3.0, "layers": dict.fromkeys(times["layers"], [0.5, 0.75, 1.0])}
    assert prefill_speed(groups, [], by_hand) == pytest.approx(2)
    assert prefill_speed(groups, [0, 1, 2], by_hand) == pytest.approx(3 / 2.25)
