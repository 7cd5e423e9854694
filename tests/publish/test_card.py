"""The card says what report.json and config.json hold, and no other number."""

import copy
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_attnswap import UsageError, attentions, report
from hf_attnswap.publish import card
from hf_attnswap.report.text import count, number

DEMO = Path(__file__).parents[2] / "examples" / "results" / "demo" / "report.json"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def config_of(attention: str, options: dict, layers: int = 30) -> dict:
    group = {"attention": attention, "kind": "causal", "layers": list(range(layers)), "options": options}
    saved = {"format_version": 2, "kept": "sdpa", "swapped": [group]}
    return {"architectures": ["LlamaForCausalLM"], "attnswap": saved}


@pytest.fixture
def demo() -> dict:
    return report.read(DEMO)


def arms(found: dict) -> list[dict]:
    return [arm for arm in found["arms"] if arm["attention"] != "softmax"]


def render(found: dict | None, config: dict, **changed) -> str:
    given = dict(report=found, base_model=BASE, licence="apache-2.0") | changed
    return card.render(config, "user/smollm2-swapped", **given)


def numbers_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?", text))


def shown(value) -> set[str]:
    """Every way in which a value of the JSON may stand in the card."""
    if isinstance(value, dict):
        return set().union(*map(shown, [*value.keys(), *value.values()]), set())
    if isinstance(value, list):
        return set().union({str(len(value))}, *map(shown, value))
    if isinstance(value, str):
        return numbers_in(value)
    if isinstance(value, bool) or value is None:
        return set()
    return {str(value), number(value), number(value * 1000), *({count(value)} if isinstance(value, int) else ())}


ALWAYS = {"95", "500"}  # the level of the intervals, and how many items are few


def strangers(text: str, found: dict | None, config: dict) -> set[str]:
    """Numbers of a card that neither its JSON nor the description of its variants has."""
    described = [[c.formula, c.cost, c.source] for c in map(attentions.get, attentions.names())]
    return numbers_in(text) - shown([found, config, described, BASE, "user/smollm2-swapped", "apache-2.0"]) - ALWAYS


def test_every_number_is_in_the_json(demo):
    for arm in arms(demo):
        config = config_of(arm["attention"], arm["options"])
        text = render(demo, config)
        assert not strangers(text, demo, config), arm["label"]
        for entry in arm["perplexity"]:
            assert number(entry["perplexity"]) in text and number(entry["ratio"]["low"]) in text
        for entry in arm["speed"]:
            assert number(entry["prefill_speedup"]["median"]) in text


def test_a_number_that_is_not_in_the_json_is_found(demo):
    config = config_of("elu", {})
    assert strangers(render(demo, config) + "It is 3.75 times as fast.", demo, config) == {"3.75"}
    changed = copy.deepcopy(demo)
    arm = next(arm for arm in changed["arms"] if arm["attention"] == "elu")
    arm["perplexity"][0]["perplexity"] *= 1.5
    assert strangers(render(demo, config), changed, config)


def test_metadata(demo):
    arm = next(arm for arm in demo["arms"] if arm["attention"] == "hedgehog+window")
    data = ModelCard(render(demo, config_of(arm["attention"], arm["options"]), tags=["mine"])).data
    assert (data.base_model, data.base_model_relation, data.license) == (BASE, "finetune", "apache-2.0")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert set(data.tags) == {"hf_attnswap", "attention", "hedgehog+window", "mine"}
    perplexity, ratio = data.eval_results
    assert perplexity.metric_value == arm["perplexity"][0]["perplexity"] and perplexity.metric_type == "perplexity"
    assert ratio.metric_value == arm["perplexity"][0]["ratio"]["value"]


def test_controls_formula_machine_and_limits_are_there(demo):
    arm = next(arm for arm in demo["arms"] if arm["attention"] == "hedgehog+window")
    text = render(demo, config_of(arm["attention"], arm["options"]))
    for said in (
        "softmax (control)", "none (control)", "window (control)", "| hedgehog |", "16,384 tokens",
        "no length was found from which on it is faster in every run", demo["machine"]["processor"], demo["date"],
        "attnswap tradeoff", "import hf_attnswap", 'pipeline("text-generation", "user/smollm2-swapped")',
        "SmolLM2-135M-Instruct.Q4_1.gguf, dequantised", "is for causal attention only", "any other mask raises",
    ):  # fmt: skip
        assert said in text, said
    assert "| relu_power" not in text
    assert not re.search("more information needed|todo|placeholder", text, re.I)


def test_speed_is_said_as_it_was_measured(demo):
    for entry in (entry for arm in demo["arms"] if arm["attention"] == "elu" for entry in arm["speed"]):
        entry["prefill_speedup"] = {"median": 2.5, "low": 2.25, "high": 2.75, "runs": 2}
    text = render(demo, config_of("elu", {}))
    assert (
        "Prefill: ×2.500 the speed of softmax at 1,024 tokens, the longest measured; faster in every run from 256"
        in text
    )


def test_without_a_report_nothing_is_claimed():
    config = config_of("sigmoid", {}, layers=3)
    text = render(None, config)
    assert "Neither the quality nor the speed of this conversion was measured." in text
    assert ModelCard(text).data.eval_results is None and not strangers(text, None, config)


def test_a_report_on_something_else_is_refused(demo):
    for config in (
        config_of("relu_power", {"p": 4, "shift": "max"}),
        config_of("elu", {}, layers=29),
        config_of("sigmoid", {}),
    ):
        with pytest.raises(UsageError, match="report.json did not measure this conversion"):
            render(demo, config)
    with pytest.raises(UsageError, match="is not that of a conversion"):
        render(demo, {"architectures": ["LlamaForCausalLM"]})


def test_conversions_of_several_parts_and_plans():
    config = config_of("sigmoid", {}, layers=2)
    config["attnswap"]["swapped"].append({"attention": "elu", "kind": "cross", "layers": [0, 4], "options": {}})
    text = render(
        None, {"architectures": ["X"], "text_config": config, "attnswap": {**config["attnswap"], "swapped": None}}
    )
    assert "softmax of 4 attention layers replaced by `sigmoid` and `elu`" in text
    assert "| text_config cross 0, 4 |" in text and "X.from_pretrained" in text
