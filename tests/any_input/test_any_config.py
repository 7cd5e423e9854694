"""Swaps and config.json: whatever they hold is read, or refused in one sentence."""

import pytest
import torch
from drawn import changed, damaged, json_bytes, texts, values
from hypothesis import strategies as st
from refusals import EXAMPLES, answered, every
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_attnswap import SwapConfig, inspect
from hf_attnswap.config import GUARD, parse_options
from hf_attnswap.plans import FORMAT_VERSION, plans_from_dict
from hf_attnswap.publish import card
from hf_attnswap.publish.origin import read_config
from hf_attnswap.sources.conversions import find

GROUPS = [
    {"attention": "hedgehog+window", "options": {"window": 8}, "kind": "causal", "layers": [0]},
    {"attention": "relu_power", "options": {"p": 8, "gain": True}, "kind": "causal", "layers": [1]},
]
ENTRY = {"format_version": FORMAT_VERSION, "kept": "sdpa", "swapped": GROUPS, "base": "org/base"}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "attnswap": ENTRY,
    "text_config": {"attnswap": {"format_version": FORMAT_VERSION, "kept": "eager", "swapped": None}},
}  # fmt: skip
SWAPS = (
    {"attention": "window", "layers": "1::2", "options": {"window": 8, "sinks": 2}, "kinds": ("causal",)},
    {"attention": "relu_power", "layers": [0, -1], "options": {"p": 4}},
    {"layers": {0: "elu", "1:": {"attention": "window", "window": 4}}},
)


def plan(given):
    return SwapConfig(**given).plan(range(3))


def build(entry):
    """A model as from_pretrained makes it before it reads the weights."""
    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=2)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, attnswap=entry, attn_implementation=GUARD))


def card_of(folder):
    return card.render(read_config(folder), "user/name", report=None, base_model=None, licence=None)


@pytest.mark.drawn
@EXAMPLES
def test_swaps_and_configs(examples, tmp_path):
    def check(drawn):
        kind, given = drawn
        if kind == "swap" and isinstance(given, dict):
            answered(plan, {key: value for key, value in given.items() if key in SwapConfig.__dataclass_fields__})
        elif kind == "options":
            answered(parse_options, given)
        elif kind == "entry":
            plans = answered(plans_from_dict, given)
            model = answered(build, given)
            if plans and model:
                swapped = {m.layer: m.swapped for m in inspect(model) if m.swapped}
                assert swapped == {index: name for index, (name, _) in plans["causal"].items()}
        elif kind == "file":
            (tmp_path / "config.json").write_bytes(given)
            answered(find, tmp_path)
            answered(card_of, tmp_path)

    drawn = st.one_of(
        st.tuples(st.just("swap"), st.one_of([changed(swap) for swap in SWAPS])),
        st.tuples(st.just("options"), st.lists(texts.map("window={}".format) | texts, max_size=3)),
        st.tuples(st.just("entry"), changed(ENTRY) | values),
        st.tuples(st.just("file"), changed(CONFIG).map(json_bytes) | values.map(json_bytes) | damaged),
    )
    every(examples, drawn, check)
