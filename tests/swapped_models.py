"""Swapped tiny models and what to ask of them, for the tests of models and of generation."""

import pytest
import torch
from attention_cases import NAMES, crossed, named, small_options
from tiny_models import FAMILIES, randomise, tiny, tokens

import hf_attnswap

STATEFUL = named(lambda cls: cls.stateful)
DENSE = named(lambda cls: cls.any_mask)
SPARSE = [name for name in NAMES if name not in DENSE]
LENGTH, PADDED = 24, 7
# Models compute in float64, so that what is equal but for the order of its sums stays so on any processor. Norms of
# transformers round to float32 on their way, so that a few last bits of those may differ.
CLOSE = dict(rtol=1e-5, atol=1e-5)

every_pair = pytest.mark.parametrize(("family", "name"), crossed(FAMILIES, NAMES))
every_name = pytest.mark.parametrize("name", NAMES)


def plain(family: str = "llama", **overrides):
    """A tiny model in float64 that is not swapped."""
    return tiny(family, torch.float64, **overrides)


def swapped(name: str, family: str = "llama", layers=None, **overrides):
    """A tiny model in float64 with one variant, its window shorter than the texts, its parameters off their start."""
    model = plain(family, **overrides)
    return randomise(hf_attnswap.swap(model, name, layers=layers, **small_options(name)))


def positions(attention_mask):
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def left_padded():
    """Two rows, the second with padding before it."""
    ids, mask = tokens(LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    ids[1, :PADDED], mask[1, :PADDED] = 0, 0
    return ids, mask


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


def greedy(model, ids, mask=None, new=10, **kwargs):
    """`generate`, with the logits of every step `[steps, rows, vocabulary]`."""
    mask = torch.ones_like(ids) if mask is None else mask
    settings = dict(max_new_tokens=new, do_sample=False, return_dict_in_generate=True, output_logits=True)
    result = model.generate(ids, attention_mask=mask, **settings | kwargs)
    result.logits = torch.stack(result.logits).double()  # which transformers rounds to float32
    return result
