"""Gradient checkpointing: the same gradients in eval mode, from less that is kept."""

import pytest
import torch
from tiny_models import randomise, tiny, tokens

from hf_attnswap import UsageError, swap
from hf_attnswap.training.loop import next_token_loss
from hf_attnswap.training.recompute import recompute_layers


@pytest.mark.parametrize("family, attention", [("llama", "hedgehog+window"), ("gpt2", "relu_norm"), ("llama", None)])
def test_gradients_are_the_same_and_less_is_kept(family, attention):
    """GPT-2 would have dropout in train mode, where transformers' own switch works."""
    model = tiny(family, **({"resid_pdrop": 0.5} if family == "gpt2" else {}))
    if attention:
        swap(model, attention, **({"window": 4, "sinks": 1} if "window" in attention else {}))
    randomise(model)

    def measure():
        kept = []
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            loss = next_token_loss(model, tokens(48))
        loss.backward()
        return loss, sum(kept), [p.grad for p in model.parameters()]

    loss, kept, grads = measure()
    recompute_layers(model)
    again, less, grads_again = measure()
    assert torch.equal(loss, again) and less < 0.3 * kept
    assert not model.training and all(torch.equal(a, b) for a, b in zip(grads, grads_again, strict=True))


def test_a_model_without_such_layers():
    with pytest.raises(UsageError, match="Linear has no layers that transformers can checkpoint"):
        recompute_layers(torch.nn.Linear(2, 2))
