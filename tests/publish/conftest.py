"""A conversion with a tokenizer and a report, and a Hub to push it to."""

from pathlib import Path

import pytest
import torch
from local_hub import Hub
from tiny_models import randomise, tiny, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_attnswap

WORDS = "the cat sat on a mat and it was on the hat of one man".split()


@pytest.fixture(scope="session")
def conversion(tmp_path_factory) -> Path:
    """A folder as `attnswap convert` and training leave it, its weights in many shards; logits.pt beside it."""
    folder = tmp_path_factory.mktemp("conversion") / "converted"
    model = randomise(hf_attnswap.swap(tiny(), "hedgehog+window", window=8, sinks=2))
    model.save_pretrained(folder, max_shard_size="20KB")
    vocabulary = {"<pad>": 0, "<s>": 1, "<unk>": 2, **{word: i + 3 for i, word in enumerate(dict.fromkeys(WORDS))}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    with torch.no_grad():
        torch.save((tokens(20), model(tokens(20)).logits), folder.parent / "logits.pt")
    return folder


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture
def here(hub, monkeypatch, tmp_path):
    """The client of this process speaks to the double, as someone who may write."""
    from huggingface_hub import constants

    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it keeps the address of an earlier test
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    return hub
