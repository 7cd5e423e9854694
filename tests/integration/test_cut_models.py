"""Models that lose layers after the swap, or leave by an early exit: right, or refused."""

import pytest
import torch
from tiny_models import randomise, tiny, tokens
from transformers import AutoModelForCausalLM

import hf_attnswap
from hf_attnswap import UsageError

IDS = tokens(20)
MIXED = {0: "relu", 1: "elu", 2: "hedgehog"}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(IDS).logits


def cut(model, keep: slice, renumber: bool = True):
    model.model.layers = model.model.layers[keep]
    model.config.num_hidden_layers = len(model.model.layers)
    for index, layer in enumerate(model.model.layers) if renumber else ():
        layer.self_attn.layer_idx = index
    return model


@pytest.mark.parametrize("keep", (slice(0, 2), slice(1, 3), slice(0, 3, 2)), ids=str)
def test_what_is_left_is_saved_and_comes_back(keep, tmp_path):
    model = cut(randomise(hf_attnswap.swap(tiny(), layers=MIXED)), keep)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
    assert [entry.swapped for entry in hf_attnswap.inspect(again)] == list(MIXED.values())[keep]


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    model = cut(hf_attnswap.swap(tiny(), layers=MIXED), slice(1, 3), renumber=False)
    with pytest.raises(UsageError, match="layers were taken out of the LlamaForCausalLM .* layer_idx"):
        model.save_pretrained(tmp_path)
    model = hf_attnswap.swap(tiny(), "elu")
    model.model.layers = model.model.layers[:2]
    with pytest.raises(UsageError, match="layers were taken out .* the number of layers in the config"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("told", (True, False))
def test_a_cut_model_generates_as_a_model_of_that_size(told):
    model = hf_attnswap.swap(tiny(), "hedgehog+window", window=4)
    model.model.layers = model.model.layers[:2]
    if told:
        model.config.num_hidden_layers = 2
    whole = IDS[:1, :8]
    for _ in range(8):
        whole = torch.cat([whole, model(whole, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    settings = dict(max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(IDS[:1, :8], **settings), whole)
    assert torch.equal(model.generate(IDS[:1, :8], assistant_model=tiny(), **settings), whole)


@pytest.mark.parametrize("name", ("elu", "hedgehog+window", "relu"))
def test_an_early_exit_drafts(name):
    """The draft comes from the first layers of the model itself, under a config that says so for a while."""
    model = hf_attnswap.swap(tiny(), name)
    settings = dict(max_new_tokens=12, do_sample=False)
    expected = model.generate(IDS[:1, :8], **settings)
    assert torch.equal(model.generate(IDS[:1, :8], assistant_early_exit=1, **settings), expected)
    assert model.config.num_hidden_layers == 3
