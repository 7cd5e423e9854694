"""What is counted from shapes: operations of a model and of its variants, bytes of caches, memory of a step."""

from types import SimpleNamespace

import pytest
import torch
from attention_cases import NAMES
from tiny_models import tiny, tiny_encoder, tokens
from torch.utils.flop_counter import FlopCounterMode

import hf_attnswap
from hf_attnswap.attentions import Attention, Heads, get
from hf_attnswap.attentions.counting import pairs
from hf_attnswap.benchmark.generation import filled_cache
from hf_attnswap.estimate import steps
from hf_attnswap.estimate.layers import as_softmax, cache_bytes, layers_of
from hf_attnswap.estimate.trace import Product, trace
from hf_attnswap.integration.cache import cache_nbytes
from hf_attnswap.masks import Mask
from hf_attnswap.training.loop import next_token_loss

PLAN = {"0": "elu", "1.0": {"attention": "window", "window": 8, "sinks": 2}, "2": "hedgehog+window"}


def swapped(model, attention="softmax", **options):
    return hf_attnswap.swap(model, attention, **options).to("meta")


def test_products_of_a_call():
    a, b = torch.empty(5, 3, device="meta"), torch.empty(3, 7, device="meta")
    found = trace(lambda: (a @ b, torch.addmm(b[0], a, b), torch.stack([a, a]) @ torch.stack([b, b])))
    assert found.products == {Product(5, 3, 7): 4}
    assert found.operations == 4 * 2 * 5 * 3 * 7


def test_memory_is_that_of_the_largest_moment():
    x = torch.empty(1000, device="meta")

    def call():
        y = x * 2
        z = y + 1
        del y
        return z * z

    found = trace(call)
    assert found.peak == 2 * 4000
    assert sum(found.moved.values()) == 4000 * (2 + 2 + 3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_operations_of_reading_and_training_are_those_that_torch_counts(family):
    model, text = tiny(family), tokens(24, batch=2)
    with torch.no_grad(), FlopCounterMode(display=False) as reading:
        model(input_ids=text, use_cache=False, logits_to_keep=1)
    with FlopCounterMode(display=False) as training:
        next_token_loss(model, text).backward()
    counted = swapped(tiny(family))
    assert steps.reading(counted, 2, 24).operations == all_but_attention(reading)
    assert steps.finetuning(counted, 2, 24).step.operations == all_but_attention(training)


def all_but_attention(counted):
    found = counted.get_flop_counts()["Global"]
    return sum(flops for op, flops in found.items() if "scaled_dot_product" not in str(op))


def test_an_encoder_is_counted():
    found = steps.reading(swapped(tiny_encoder()), 2, 16)
    assert found.operations > 0
    assert steps.aligning_step(swapped(tiny_encoder()), 2, 16).trained > 0


@pytest.mark.parametrize("window", [None, 1, 5, 40])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 9), (9, 9), (4, 20)])
def test_pairs_are_those_of_the_mask(rows, keys, window):
    assert pairs(rows, keys, window=window) == Mask(rows, keys, window=window).matrix("cpu").sum()
    assert pairs(rows, keys, causal=False) == rows * keys


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_says_what_it_costs(name):
    attention = get(name)(Heads(4, 2, 8))
    short, long = (attention.operations(n, n) for n in (512, 1024))
    step = attention.operations(1, 1024)
    if name == "none":
        assert short == long == step == 0
    elif attention.cost_class == "quadratic":
        assert long == pytest.approx(4 * short, rel=0.01)
        assert step == 2 * 1024 * 4 * 16
    else:
        assert long == pytest.approx(2 * short, rel=0.1)
        assert step == pytest.approx(long / 1024, rel=0.1)


def test_the_window_costs_the_weights_that_it_has():
    attention = get("window")(Heads(4, 2, 8), window=6, sinks=2)
    q, k, _ = torch.randn(1, 4, 32, 8), torch.randn(1, 2, 32, 8), None
    weights = (attention.weights(q, k, Mask(32, 32), 1.0) > 0).sum()
    assert attention.operations(32, 32) == 2 * weights * 16


@pytest.mark.parametrize("name", ["elu", "hedgehog", "cosformer", "taylor", "performer"])
def test_a_linear_variant_costs_its_recurrence(name):
    attention = get(name)(Heads(4, 2, 8))
    _, of_queries, features = _features(attention, 4)
    _, of_keys, _ = _features(attention, 2)
    # phi(k) [v, 1]^T is added to the state of each key/value head, and phi(q) read from it by each query head.
    assert attention.operations(10, 10) == 10 * (of_queries + of_keys + 2 * features * 9 * (4 + 2))


def _features(attention, heads):
    x = torch.randn(1, heads, 1, 8)
    x, _ = attention.prepare(x, x, Mask(1, 1), None)
    feature_map = attention.feature_map_of_queries() if heads == 4 else attention.feature_map_of_keys()
    with FlopCounterMode(display=False) as counted:
        out = feature_map(x)
    return out, counted.get_total_flops(), out.shape[-1]


@pytest.mark.parametrize("length", [4, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cache_holds_as_many_bytes_as_a_real_one(length, dtype):
    real = hf_attnswap.swap(tiny(), layers=PLAN).to(dtype)
    counted = layers_of(hf_attnswap.swap(tiny(), layers=PLAN).to("meta", dtype))
    assert cache_bytes(counted, length, dtype) == cache_nbytes(filled_cache(real, length))
    assert cache_bytes(as_softmax(counted), length, dtype) == cache_nbytes(filled_cache(tiny(dtype=dtype), length))


def test_layers_that_cost_the_same_are_counted_once():
    model = swapped(tiny(), "elu", keep=["0.1", "1.1"])
    found = {layer.attention.name: count for layer, count in layers_of(model)}
    assert found == {"elu in group 0 and softmax in group 1": 2, "elu": 1}
    assert [count for _, count in as_softmax(layers_of(model))] == [3]


def test_what_the_stages_train_and_keep():
    model = swapped(tiny(), "hedgehog")
    weights = steps.weight_bytes(model)
    of_maps = sum(p.numel() * 4 for name, p in model.named_parameters() if ".attnswap." in name)
    align, distill, finetune = (f(model, 2, 16) for f in (steps.aligning_step, steps.distilling, steps.finetuning))
    assert (align.trained, distill.trained, finetune.trained) == (of_maps, weights, weights)
    assert (align.weights, distill.weights, finetune.weights) == (weights, 2 * weights, weights)
    assert finetune.optimiser == 2 * weights
    assert all(stage.step.peak >= stage.trained for stage in (align, distill, finetune))
    assert all(p.grad is None for p in model.parameters())  # the model itself was not trained
    attention = swapped(tiny(), "relu_norm")
    projections = sum(p.numel() * 4 for name, p in attention.named_parameters() if ".self_attn." in name)
    assert steps.aligning_step(attention, 2, 16).trained == projections


def test_recomputed_layers_need_less_memory_and_more_operations():
    model = swapped(tiny(), "elu")
    plain, again = steps.finetuning(model, 4, 64), steps.finetuning(model, 4, 64, recompute=True)
    assert again.step.peak < plain.step.peak
    assert plain.step.operations < again.step.operations < 4 / 3 * plain.step.operations
    assert (plain.forwards, again.forwards) == (1, 2)


def test_the_model_is_as_it_was_after_it_was_counted(llama):
    hf_attnswap.swap(llama, "softmax")
    text = tokens(8)
    before = llama(text).logits
    steps.reading(hf_attnswap.swap(tiny(), "softmax").to("meta"), 1, 8)
    assert torch.equal(llama(text).logits, before)


def test_a_variant_that_does_not_say_what_it_costs_is_named():
    with pytest.raises(NotImplementedError, match="mine does not say what it costs"):
        Attention.operations(SimpleNamespace(name="mine"), 4, 4, None)
