"""Times: what was measured on an H100, the few known devices, and the one at hand."""

import pytest
import torch
from tiny_models import tiny
from transformers import AutoConfig, AutoModelForCausalLM

import hf_attnswap
from hf_attnswap import UsageError
from hf_attnswap.attentions import Heads, get
from hf_attnswap.estimate import find_device, parse_tokens, steps
from hf_attnswap.estimate.devices import GPUS, seconds
from hf_attnswap.estimate.layers import layers_of
from hf_attnswap.estimate.measured import Measured
from hf_attnswap.estimate.trace import Product

# Measured on one H100 (80 GB, SXM) with torch 2.11, triton 3.6, bfloat16, before this was written: milliseconds of a
# forward pass, causal, heads of SmolLM2 (9 query heads, 3 key/value heads of 64), batch 8, replayed as a CUDA graph
# (softmax is torch's flash attention, the others are this package's Triton kernels).
ATTENTION_MS = {
    "softmax": {2048: 0.174, 4096: 0.575, 8192: 2.08, 16384: 8.00},
    "relu": {2048: 0.080, 4096: 0.249, 8192: 0.88, 16384: 3.79},
    "relu_norm": {2048: 0.096, 4096: 0.296, 8192: 1.14, 16384: 4.34},
    "sigmoid": {2048: 0.152, 4096: 0.496, 8192: 1.82, 16384: 6.88},
    "relu_power": {2048: 0.176, 4096: 0.556, 8192: 2.10, 16384: 8.11},
    "elu": {2048: 0.058, 4096: 0.092, 16384: 0.34},
    "hedgehog": {2048: 0.096, 4096: 0.160, 8192: 0.31, 16384: 0.59},
    "hedgehog+window": {2048: 0.144, 4096: 0.253, 8192: 0.49, 16384: 0.95},
}
# How many times as fast as flash attention, heads of Llama-3-8B (32 and 8 of 128), batch 1, 16384 tokens.
WIDE_HEADS = {
    "relu": 2.05, "relu_norm": 1.81, "sigmoid": 1.32, "relu_power": 1.03, "elu": 18.0, "hedgehog": 5.6,
    "hedgehog+window": 3.8,
}  # fmt: skip
# Milliseconds in which the whole of SmolLM2-135M reads texts with softmax: (texts, tokens of each).
PREFILL_MS = {(8, 2048): 30, (4, 8192): 71}
H100 = GPUS["h100"]


@pytest.mark.parametrize("name", ATTENTION_MS)
def test_attention_takes_as_long_as_on_an_h100(name):
    attention = get(name)(Heads(9, 3, 64))
    for length, measured in ATTENTION_MS[name].items():
        found = H100.attention(attention, 8, length, None, torch.bfloat16, backward=False)
        assert found * 1e3 == pytest.approx(measured, rel=0.3)


@pytest.mark.parametrize("name", WIDE_HEADS)
def test_attention_with_wide_heads_is_as_much_faster_as_on_an_h100(name):
    flash, own = (
        H100.attention(get(one)(Heads(32, 8, 128)), 1, 16384, None, torch.bfloat16, backward=False)
        for one in ("softmax", name)
    )
    assert flash / own == pytest.approx(WIDE_HEADS[name], rel=0.3)


@pytest.fixture(scope="module")
def smollm2_135m():
    config = AutoConfig.for_model(
        "llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return hf_attnswap.swap(model, "softmax")


@pytest.mark.parametrize(("texts", "length"), PREFILL_MS)
def test_a_whole_model_reads_as_fast_as_on_an_h100(smollm2_135m, texts, length):
    found = seconds(steps.reading(smollm2_135m, texts, length), H100, torch.bfloat16)
    found += sum(
        count * H100.attention(layer.attention, texts, length, layer.window, torch.bfloat16, backward=False)
        for layer, count in layers_of(smollm2_135m)
    )
    assert found * 1e3 == pytest.approx(PREFILL_MS[texts, length], rel=0.3)


def test_known_devices_are_plausible():
    for gpu in GPUS.values():
        assert 20e9 < gpu.memory < 200e9
        assert gpu.peak[torch.bfloat16] > gpu.peak[torch.float32] > 1e13
        assert 1e11 < gpu.bandwidth < 1e13
        assert gpu.source
    with pytest.raises(UsageError, match="dtype is 'float64'; h100 is known for bfloat16"):
        H100.product(Product(1, 1, 1), torch.float64)


def test_a_device_at_hand_is_measured_once_for_each_shape():
    calls = []

    def clock(call, device):
        call()
        calls.append(device)
        return 1.0  # so long that three calls are enough

    device = Measured(torch.device("cpu"), clock)
    float32 = torch.float32
    assert device.product(Product(4, 8, 8), float32) == 1.0
    done = len(calls)
    assert device.product(Product(4, 8, 8), float32) == 1.0
    assert len(calls) == done
    # What is larger than is measured takes as long per operation.
    assert device.product(Product(1 << 20, 1 << 10, 1 << 10), float32) == pytest.approx(2**41 / 2**32)
    assert device.moving(3) == device.moving(12) > 0
    layers = layers_of(hf_attnswap.swap(tiny(), layers={"0.1": "elu", "1": "window"}))
    for layer, _ in layers:
        assert device.attention(layer.attention, 2, 64, None, float32, backward=True) == 2.0
        assert device.step(layer.attention, 2, 64, None, float32) >= 1.0
    scores = get("relu")(Heads(4, 2, 8))
    assert device.attention(scores, 1, 2048, None, float32, backward=False) == pytest.approx(4.0, rel=1e-2)


@pytest.mark.parametrize(("text", "tokens"), [("100M", 10**8), ("2.5B", 2_500_000_000), ("4096", 4096), (" 3k ", 3000)])
def test_numbers_of_tokens(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "many", "-5", "0", "1e400", "5X", "1M2", "0.0000001"])
def test_what_is_no_number_of_tokens(text):
    with pytest.raises(UsageError, match="--tokens is .*; expected a number above 0 such as"):
        parse_tokens(text)


def test_devices_by_name():
    assert find_device("h200") is GPUS["h200"]
    assert find_device("cpu").name == "cpu"
    with pytest.raises(UsageError, match="device 'h10' is not known. Did you mean 'h100'"):
        find_device("h10")
