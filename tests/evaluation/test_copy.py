"""The loss on what is written twice, by hand and on models that copy and that do not."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny, tokens
from torch import nn

from hf_attnswap import UsageError
from hf_attnswap.evaluation.likelihood import last_logits
from hf_attnswap.evaluation.tasks import RETRIEVAL_LENGTHS, TaskInputs, retrieval_lengths
from hf_attnswap.evaluation.tasks.copy import copy_losses
from hf_attnswap.evaluation.tasks.registry import get


class Begins:
    """A tokenizer that begins every text with token 1."""

    def __call__(self, text, add_special_tokens=True):
        return SimpleNamespace(input_ids=[1, 7] if add_special_tokens else [7])


class Echo(nn.Module):
    """Says the token that stood `distance` places before the next one; uniform over 64 where there is none."""

    def __init__(self, distance):
        super().__init__()
        self.distance, self.anchor = distance, nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, 64)
        for at in range(self.distance - 1, input_ids.shape[1]):
            logits[0, at, input_ids[0, at + 1 - self.distance]] = 50.0
        return SimpleNamespace(logits=logits)


def test_a_model_that_copies_loses_nothing_and_one_that_does_not_everything():
    halves = torch.arange(2, 42).view(4, 10)
    assert copy_losses(Echo(10), halves, [1]) == pytest.approx([0.0] * 4)
    assert copy_losses(Echo(100), halves, [1]) == pytest.approx([torch.tensor(64.0).log().item()] * 4)


def test_the_loss_is_that_of_all_logits_on_the_second_writing_but_its_first_token():
    halves, model = tokens(12, batch=2), tiny()
    found = copy_losses(model, halves, [1])
    for half, loss in zip(halves, found, strict=True):
        text = torch.cat([torch.tensor([1]), half, half])
        with torch.no_grad():
            told = model(text[None]).logits[0].log_softmax(-1)
        assert loss == pytest.approx(-sum(told[at - 1, text[at]].item() for at in range(14, 25)) / 11, rel=1e-5)


def test_both_writings_and_what_begins_the_text_have_the_length():
    seen = []

    class Counts(Echo):
        def forward(self, input_ids, use_cache):
            seen.append(input_ids.shape[1])
            return super().forward(input_ids, use_cache)

    inputs = TaskInputs(lengths=(21, 22), tokens=torch.arange(2, 62), limit=5)
    found = get("copy").run(Counts(10), Begins(), inputs)
    assert [(result.task, result.metric, len(result.scores)) for result in found] == [
        ("copy at 21", "loss", 5), ("copy at 22", "loss", 5),
    ]  # fmt: skip
    assert set(seen) == {21} and not found[0].higher_is_better  # two equal writings and one token have an odd length


def test_without_text_for_one_writing_it_is_refused():
    for length, said in ((200, "2 to 99 tokens"), (3, "2 to 2 tokens")):
        with pytest.raises(UsageError, match=f"task 'copy' at {length} tokens needs a text of {said}"):
            get("copy").run(tiny(), Begins(), TaskInputs(lengths=(length,), tokens=torch.arange(20)))


def test_the_last_logits_are_those_of_all():
    model, given = tiny(), tokens(9, batch=2)
    with torch.no_grad():
        torch.testing.assert_close(last_logits(model, 3, input_ids=given), model(given).logits[:, -3:])


def test_retrieval_is_measured_as_far_as_the_positions_and_the_comparison_go():
    model = tiny()
    model.config.max_position_embeddings = 3000
    assert retrieval_lengths(model) == (512, 1024, 2048)
    assert retrieval_lengths(model, 1536) == (512, 1024) and retrieval_lengths(model, 100) == ()
    model.config.max_position_embeddings = 10**6
    assert retrieval_lengths(model) == RETRIEVAL_LENGTHS
