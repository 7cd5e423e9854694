"""Texts that ask for recall: which they are, what they are made of, and that a seed decides it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_attnswap import UsageError
from hf_attnswap.training.batches import batches
from hf_attnswap.training.passages import SHORTEST, with_passages
from hf_attnswap.training.stages.distill import Distill


@given(length=st.integers(2, 300), texts=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_second_half_is_made_of_passages_of_the_first(length, texts, seed):
    given_ = torch.arange(texts * length).view(texts, length)
    found, half = with_passages(given_, 1.0, seed), length // 2
    assert torch.equal(found, with_passages(given_, 1.0, seed)) and torch.equal(found[:, :half], given_[:, :half])
    if half < SHORTEST:
        assert torch.equal(found, given_)
        return
    for row, text in zip(found, given_, strict=True):
        assert set(row[half:].tolist()) <= set(text[:half].tolist())
        breaks = int((row[half:].diff() != 1).sum())  # between passages the numbers do not go on
        assert breaks <= (length - half) // SHORTEST


def test_the_share_is_that_of_the_texts():
    texts = torch.arange(400 * 64).view(400, 64)
    changed = (with_passages(texts, 0.25, 0) != texts).any(1).float().mean()
    assert 0.18 < changed < 0.32
    assert torch.equal(with_passages(texts, 0.0, 0), texts)


def test_a_batch_has_passages_within_each_of_its_texts():
    blocks = torch.arange(4 * 64).view(4, 64)
    plain, asked = (batches(blocks, 2, 0, (32, 64), (), share)[0] for share in (0.0, 1.0))
    assert asked.shape == plain.shape == (4, 32) and torch.equal(asked[:, :16], plain[:, :16])
    for row, text in zip(asked, plain, strict=True):
        assert set(row.tolist()) <= set(text[:16].tolist())


@pytest.mark.parametrize(
    ("given_", "words"),
    [({"recall_share": 1.5}, "recall_share is 1.5"), ({"recall_share": 0.5, "separate_documents": True}, "give one")],
)
def test_wrong_use(given_, words):
    with pytest.raises(UsageError, match=words):
        Distill(model_name_or_path="m", output_dir="o", train_file="t", max_train_steps=1, **given_)
