"""Tiny BERTs with a tokenizer of words, for tests of what predicts no next tokens."""

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast

WORDS = "the cat sat on mat dog ran far and then it went out into rain".split()
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CLS, SEP, MASK = 2, 3, 4


def words_tokenizer():
    """A tokenizer of words that puts [CLS] before and [SEP] after every text."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def bert(cls, **overrides):
    """A random BERT of a class, in eval mode."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    return cls(BertConfig(**sizes | overrides)).eval()


def sentences(count: int = 60) -> str:
    """Paragraphs of random words."""
    draw = random.Random(0)
    return "\n\n".join(" ".join(draw.choices(WORDS, k=12)) for _ in range(count))
