"""A tiny trained conversion with a tokenizer of words, in a folder."""

from pathlib import Path

import torch
from tiny_models import randomise, tiny, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_attnswap

WORDS = "the cat sat on a mat and it was on the hat of one man".split()


def save_conversion(folder: Path) -> Path:
    """A folder as `attnswap convert` and training leave it, its weights in many shards; logits.pt beside it."""
    model = randomise(hf_attnswap.swap(tiny(), "hedgehog+window", window=8, sinks=2))
    model.save_pretrained(folder, max_shard_size="20KB")
    vocabulary = {"<pad>": 0, "<s>": 1, "<unk>": 2, **{word: i + 3 for i, word in enumerate(dict.fromkeys(WORDS))}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    with torch.no_grad():
        torch.save((tokens(20), model(tokens(20)).logits), folder.parent / "logits.pt")
    return folder
