"""torch.compile takes a swapped model whole: prefill, padding, decode and training, with no graph break."""

import pytest
import torch
from attention_cases import NAMES, case_id
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import hf_attnswap

# Compiling takes some ten seconds.
USUAL = ("elu",)
RARE = [name for name in NAMES if name not in USUAL]
BOTH = {"unrotate": True, "half_life": 20}


def swapped(name: str, options: dict) -> LlamaForCausalLM:
    """One layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return hf_attnswap.swap(LlamaForCausalLM(config).eval(), name, **options)


CASES = [
    *((name, {}) for name in USUAL),
    *(pytest.param(name, {}, marks=pytest.mark.long) for name in RARE),
    *(pytest.param(name, BOTH, marks=pytest.mark.long) for name in ("elu", "hedgehog+window")),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=case_id)
def test_compile(name, options):
    model = swapped(name, options)
    ids = torch.randint(0, 64, (2, 90), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        found = compiled(ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)

        whole = model(ids).logits
        cache = DynamicCache(config=model.config)
        model(ids[:, :80], past_key_values=cache)
        torch._dynamo.reset()
        for i in range(80, 90):  # more recompilations than torch allows if each length made one
            logits = compiled(ids[:, i : i + 1], past_key_values=cache).logits[:, 0]
            torch.testing.assert_close(logits, whole[:, i], atol=1e-4, rtol=1e-4)

    torch._dynamo.reset()
    grads = []
    for run in (model, compiled):
        model.zero_grad()
        run(ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1])
    for ours, eager in zip(*grads, strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-5, rtol=1e-4)


@pytest.mark.long
def test_compile_with_inductor():
    model = swapped("hedgehog+window", {})
    ids = torch.randint(0, 64, (1, 90), generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True)(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        torch.testing.assert_close(found, model(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4)


def test_a_mask_that_compile_cannot_look_into_is_refused_with_advice():
    model = swapped("elu", {})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(NotImplementedError, match="pass attention_mask, ones where nothing is padded"), torch.no_grad():
        compiled(torch.zeros(1, 8, dtype=torch.long), use_cache=False)
