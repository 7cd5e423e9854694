"""What likelihood hides, on models that know the answer and on models that do not."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny, tokens
from torch import nn
from transformers import AutoTokenizer

import hf_attnswap
from hf_attnswap import UsageError
from hf_attnswap.evaluation.likelihood import Request, encode_pair, log_likelihoods
from hf_attnswap.evaluation.tasks import TaskInputs
from hf_attnswap.evaluation.tasks.needle import found_needles, needles
from hf_attnswap.evaluation.tasks.recall import recalled, recalls, word_tokens
from hf_attnswap.evaluation.tasks.registry import get
from hf_attnswap.evaluation.tasks.writing import agreement, continuations, repetition_rate


class Letters:
    """Tokens are characters."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text, add_special_tokens=False):
        return SimpleNamespace(input_ids=[ord(c) for c in text])

    def decode(self, ids):
        return "".join(map(chr, ids))


class Copies(nn.Module):
    """Says what stood after the last place where the last `match` tokens stood before, within `reach` tokens."""

    def __init__(self, match=1, reach=10**9):
        super().__init__()
        self.match, self.reach, self.anchor = match, reach, nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(max_position_embeddings=None)

    def forward(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, 5000)
        for row, ids in zip(logits, input_ids.tolist(), strict=True):
            for at in range(self.match - 1, len(ids)):
                for j in range(at - 1, max(self.match - 2, at - self.reach), -1):
                    if ids[j - self.match + 1 : j + 1] == ids[at - self.match + 1 : at + 1]:
                        row[at, ids[j + 1]] = 9.0
                        break
        return SimpleNamespace(logits=logits)


def test_needles_are_hidden_where_they_should_be():
    made = needles(Letters(), [400, 600], [0.0, 0.5, 1.0], repeats=2, seed=3)
    assert len(made) == 12
    for item in made:
        text, key = "".join(map(chr, item.request.prompt)), "".join(map(chr, item.request.target))
        assert len(text) + len(key) == item.length
        assert key.isdigit() and len(key) == 5 and text.count(key) == 2
        assert text.endswith("What is the pass key? The pass key is ")  # the space is a token, and not what is asked
        at, room = text.index(f"The pass key is {key}. Remember"), item.length - 65 - 38 - 6
        assert at / room == pytest.approx(item.depth, abs=0.1)
    assert needles(Letters(), [400], [0.5], seed=3)[0] == needles(Letters(), [400], [0.5], seed=3)[0]
    assert len({item.request.target for item in made}) == 12


def test_a_haystack_without_room_is_refused():
    with pytest.raises(ValueError, match="a haystack of 40 tokens has no room for its needle: give at least"):
        needles(Letters(), [40], [0.5])


def test_a_model_that_copies_finds_every_needle_and_one_with_a_window_only_the_near_ones():
    made = needles(Letters(), [400], [0.0, 1.0])
    assert found_needles(Copies(match=15), made) == [True, True]
    assert found_needles(Copies(match=15, reach=150), made) == [False, True]


def test_a_tokenizer_without_words_is_refused():
    letters = Letters()
    letters.get_vocab = lambda: {"a": 0}
    with pytest.raises(UsageError, match="recall at 64 tokens: .* it has 0. Leave recall out"):
        get("recall").run(tiny(), letters, TaskInputs(lengths=(64,)))


def test_recall_by_hand():
    task = recalls(torch.arange(100, 200), pairs=10, queries=4, texts=3, seed=1)
    assert task.tokens.shape == (3, 28) and task.length == 28
    assert task.asked.sum(1).tolist() == [4, 4, 4] and not task.asked[:, :20].any()
    for row in task.tokens:
        assert len(set(row[:20].tolist())) == 20
        values = dict(row[:20].view(10, 2).tolist())
        asked = row[20:].view(4, 2).tolist()
        assert all(values[key] == value for key, value in asked) and len(asked) == len(dict(asked))
    assert torch.equal(task.tokens, recalls(torch.arange(100, 200), 10, 4, 3, seed=1).tokens)
    assert not torch.equal(task.tokens, recalls(torch.arange(100, 200), 10, 4, 3, seed=2).tokens)
    assert recalled(Copies(), task) == [1.0] * 3
    near = recalled(Copies(reach=10), task)
    expected = []
    for row in task.tokens:  # a key is in reach where its pair stands near enough
        first = {key: 2 * i for i, key in enumerate(row[:20:2].tolist())}
        expected.append(sum(20 + 2 * i - first[key] < 10 for i, key in enumerate(row[20::2].tolist())) / 4)
    assert near == expected and max(near) < 1


@pytest.mark.parametrize(("pairs", "queries"), [(60, 4), (10, 11)])
def test_recall_that_cannot_be_made_is_refused(pairs, queries):
    with pytest.raises(ValueError, match=f"{pairs} pairs and {queries} queries need {2 * pairs} tokens"):
        recalls(torch.arange(100), pairs, queries)


def test_words_to_draw_from(stories260k):
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    words = [tokenizer.convert_ids_to_tokens(i) for i in word_tokens(tokenizer).tolist()]
    assert len(words) > 60 and all(word[0] == "▁" and word[1:].isalpha() for word in words)


def test_repetition_by_hand():
    assert repetition_rate([1, 2, 3, 4, 5, 6]) == 0
    assert repetition_rate([1, 2, 1, 2, 1, 2], n=2) == pytest.approx(1 - 2 / 5)
    assert repetition_rate([7] * 10) == pytest.approx(6 / 7)
    assert repetition_rate([1, 2, 3]) == 0


def test_a_model_agrees_with_itself():
    prompts = tokens(12, batch=3)
    original = continuations(tiny(), prompts, 8)
    assert original.shape == (3, 8)
    found = agreement(tiny(), prompts, original)
    assert (found.same, found.prefix, found.told) == ([1.0] * 3, [8] * 3, [1.0] * 3)
    assert found.repetition == [repetition_rate(row) for row in original.tolist()]


def test_agreement_by_hand():
    prompts = tokens(12, batch=2)
    model = hf_attnswap.swap(tiny(), "relu")
    written, original = continuations(model, prompts, 8), continuations(tiny(), prompts, 8)
    original[0, :3], original[0, 3] = written[0, :3], (written[0, 3] + 1) % 60
    found = agreement(model, prompts, original)
    assert found.prefix[0] == 3
    assert found.same == [(a == b).double().mean().item() for a, b in zip(written, original, strict=True)]
    with torch.no_grad():
        said = model(torch.cat([prompts, original], 1)).logits.argmax(-1)[:, 11:-1]
    assert found.told == (said == original).double().mean(1).tolist() and found.told[0] >= 3 / 8


def test_greedy_words_are_those_of_step_by_step():
    prompts, model = tokens(10, batch=2), hf_attnswap.swap(tiny(), "elu")
    text = prompts
    with torch.no_grad():
        for _ in range(6):
            text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(continuations(model, prompts, 6), text[:, 10:])


@pytest.mark.parametrize("name", ("softmax", "relu_norm", "elu", "elu+window"))
def test_likelihoods_are_the_same_alone_and_in_a_padded_batch(name):
    model = hf_attnswap.swap(tiny(), name)
    rows = [tuple(tokens(n, batch=1, seed=n)[0].tolist()) for n in (3, 9, 14, 5, 9)]
    requests = [Request(row[:2], row[2:]) for row in rows]
    alone, batched = (log_likelihoods(model, requests, batch_size=size) for size in (1, 5))
    for row, one, other in zip(rows, alone, batched, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[0].log_softmax(-1)
        expected = sum(logits[i - 1, row[i]].item() for i in range(2, len(row)))
        assert one.value == pytest.approx(expected, rel=1e-4) and other.value == pytest.approx(expected, rel=1e-4)
        assert one.greedy == other.greedy == all(logits[i - 1].argmax() == row[i] for i in range(2, len(row)))


def test_pairs_are_cut_where_the_target_begins():
    assert encode_pair(Letters(), "ab ", "c") == Request((97, 98), (32, 99))
    assert encode_pair(Letters(), "", "ab") == Request((1,), (97, 98))
    assert encode_pair(Letters(), "", "\1ab") == Request((1,), (97, 98))
    with pytest.raises(ValueError, match="no tokens of its own after 'ab'"):
        encode_pair(Letters(), "ab", "")
    with pytest.raises(ValueError, match="at least one token before"):
        log_likelihoods(tiny(), [Request((), (3,))])
