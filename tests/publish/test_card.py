"""The card says what report.json and config.json hold, and no other number."""

import copy
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from card_numbers import strangers
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from hf_attnswap import UsageError, report
from hf_attnswap.publish import card
from hf_attnswap.report import Report
from hf_attnswap.report.text import number
from hf_attnswap.report.types import Arm, Group, Metric, Stage
from hf_attnswap.statistics import Spread

DEMO = Path(__file__).parent / "measured.json"  # a hybrid and others, of an earlier run of the demo
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


def config_of(attention: str, options: dict, layers: int = 30) -> dict:
    group = {"attention": attention, "kind": "causal", "layers": list(range(layers)), "options": options}
    saved = {"format_version": 3, "kept": "sdpa", "swapped": [group]}
    return {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 30, "attnswap": saved}


@pytest.fixture
def demo() -> Report:
    return report.read(DEMO)


def arms(found: Report) -> list[Arm]:
    return [arm for arm in found.arms if arm.attention != "softmax"]


def render(found: Report | None, config: dict, **changed) -> str:
    given = dict(report=found, base_model=BASE, licence="apache-2.0") | changed
    return card.render(config, "user/smollm2-swapped", **given)


def unknown(text: str, found: Report | None, config: dict) -> set[str]:
    return strangers(text, found, config, BASE, "user/smollm2-swapped")


def test_every_number_is_in_the_json(demo):
    for arm in arms(demo):
        config = config_of(arm.attention, arm.options)
        text = render(demo, config)
        assert not unknown(text, demo, config), arm.label
        for entry in arm.perplexity:
            assert number(entry.perplexity) in text and number(entry.ratio.low) in text
        for entry in arm.speed:
            assert number(entry.prefill_speedup.median) in text


def test_a_number_that_is_not_in_the_json_is_found(demo):
    config = config_of("elu", {})
    assert unknown(render(demo, config) + "It is 3.75 times as fast.", demo, config) == {"3.75"}
    changed = copy.deepcopy(demo)
    arm = next(arm for arm in changed.arms if arm.attention == "elu")
    arm.perplexity[0].perplexity *= 1.5
    assert unknown(render(demo, config), changed, config)


def test_metadata(demo):
    arm = next(arm for arm in demo.arms if arm.attention == "hedgehog+window")
    data = ModelCard(render(demo, config_of(arm.attention, arm.options), tags=["mine"])).data
    assert (data.base_model, data.base_model_relation, data.license) == (BASE, "finetune", "apache-2.0")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert set(data.tags) == {"hf_attnswap", "attention", "hedgehog+window", "mine"}
    perplexity, ratio = data.eval_results
    assert perplexity.metric_value == arm.perplexity[0].perplexity and perplexity.metric_type == "perplexity"
    assert ratio.metric_value == arm.perplexity[0].ratio.value


def test_controls_formula_machine_and_limits_are_there(demo):
    arm = next(arm for arm in demo.arms if arm.attention == "hedgehog+window")
    text = render(demo, config_of(arm.attention, arm.options))
    for said in (
        "softmax (control)", "none (control)", "window (control)", "| hedgehog |", "8,192 tokens",
        demo.machine.processor, demo.date,
        "attnswap tradeoff", "import hf_attnswap", 'pipeline("text-generation", "user/smollm2-swapped")',
        "SmolLM2-135M-Instruct.Q4_1.gguf, dequantised", "is for causal attention only", "any other mask raises",
    ):  # fmt: skip
        assert said in text, said
    assert "| relu_power" not in text
    assert not re.search("more information needed|todo|placeholder", text, re.I)


def test_few_rounds_say_nothing_of_a_length(demo):
    for entry in (entry for arm in demo.arms if arm.attention in ("elu", "none") for entry in arm.speed):
        entry.prefill_speedup = Spread(2.5, 2.25, 2.75, 1)
    assert "too few rounds to say from which length on it is faster" in render(demo, config_of("elu", {}))


def test_speed_is_said_as_it_was_measured(demo):
    for entry in (entry for arm in demo.arms if arm.attention in ("elu", "none") for entry in arm.speed):
        entry.prefill_speedup = Spread(2.5, 2.25, 2.75, 3)
    text = render(demo, config_of("elu", {}))
    assert (
        "Prefill: ×2.500 the speed of softmax at 1,024 tokens, the longest measured; faster in every run from 256"
        in text
    )


def test_without_a_report_nothing_is_claimed():
    config = config_of("sigmoid", {}, layers=3)
    text = render(None, config)
    assert "Neither the quality nor the speed of this conversion was measured." in text
    assert ModelCard(text).data.eval_results is None and not unknown(text, None, config)


def test_a_report_on_something_else_is_refused(demo):
    for config in (
        config_of("relu_power", {"p": 4, "shift": "max"}),
        config_of("elu", {}, layers=29),
        config_of("gelu", {}),
    ):
        with pytest.raises(UsageError, match="report.json did not measure this conversion"):
            render(demo, config)
    with pytest.raises(UsageError, match="is not that of a conversion"):
        render(demo, {"architectures": ["LlamaForCausalLM"]})


def test_some_layers_only(demo):
    odd = list(range(1, 30, 2))
    for arm in demo.arms:
        if arm.attention in ("elu", "none"):
            part = replace(
                arm, label=f"{arm.label}:layers=1::2", cost=f"{arm.cost}, softmax in 15 of 30 layers",
                swapped=[replace(arm.swapped[0], layers=odd)], cost_class="quadratic",
            )  # fmt: skip
            demo.arms = [*demo.arms, part]
    config = config_of("elu", {})
    config["attnswap"]["swapped"][0]["layers"] = odd
    text = render(demo, config)
    assert "the softmax of 15 attention layers replaced by `elu`" in text
    assert "All other attention layers keep softmax." in text and "What keeps softmax costs time" in text
    assert "| none:layers=1::2 (control) |" in text and "| none (control) |" not in text
    assert not unknown(text, demo, config)
    whole = render(demo, config_of("elu", {}))
    assert "keep softmax" not in whole and "| none (control) |" in whole


def test_groups_of_layers(demo):
    group = {"attention": "elu", "options": {}, "kind": "causal", "layers": [0, 1], "groups": ["2.0", "2.2", "7.1"]}
    (arm,) = (arm for arm in demo.arms if arm.attention == "elu")
    demo.arms += [replace(arm, label="elu of a plan", swapped=[Group(**group)], cost_class="quadratic")]
    config = config_of("elu", {}) | {"num_key_value_heads": 3}
    config["attnswap"]["swapped"] = [group]
    text = render(demo, config)
    assert "the softmax of 4 attention layers, in 9 of their key/value groups, replaced by `elu`" in text
    assert "causal 0, 1; groups 2.0, 2.2, 7.1" in text and "All other attention groups keep softmax." in text
    assert "| elu of a plan |" in text and "What keeps softmax costs time" in text
    config["attnswap"]["swapped"] = [group | {"groups": ["2.0", "2.2"]}]
    with pytest.raises(UsageError, match="elu {} in 2 layers and 2 key/value groups: it has"):
        render(demo, config)


def test_layers_of_several_kinds(demo):
    groups = [
        {"attention": "elu", "options": {}, "kind": "causal", "layers": [0, 3]},
        {"attention": "sigmoid", "options": {}, "kind": "causal", "layers": [1, 2]},
    ]
    (arm,) = (arm for arm in demo.arms if arm.attention == "elu")
    mixed = [Group(**group) for group in groups]
    demo.arms += [replace(arm, label="elu and sigmoid of mine", attention="mixed", swapped=mixed)]
    config = config_of("elu", {})
    config["attnswap"]["swapped"] = groups[::-1]
    text = render(demo, config)
    assert "softmax of 4 attention layers replaced by `sigmoid` and `elu`" in text
    assert "| elu and sigmoid of mine |" in text and not unknown(text, demo, config)


def trained(demo: Report) -> Report:
    """The arm of a trained conversion, beside one that the run aligned itself."""
    (arm,) = (arm for arm in demo.arms if arm.attention == "hedgehog")
    stages = [
        Stage(name, trains, "book.txt", tokens, 7, rate, first_loss=0.8125, last_loss=0.25, arguments=arguments)
        for name, trains, tokens, rate, arguments in (
            ("align", "the parameters of the variant", 204_800, 0.01,
             {"attention": "hedgehog", "train_file": "book.txt", "max_train_tokens": 204_800}),
            ("distill", "all weights", 614_400, 1e-5, {"train_file": "book.txt", "use_lora": True}),
        )
    ]  # fmt: skip
    told = {"alignment": None, "training": stages, "training_tokens": 819_200, "conversion": "mine"}
    demo.arms += [replace(arm, label="hedgehog of mine", **told)]
    return demo


def test_training_is_told_by_stage_and_can_be_repeated(demo):
    config = config_of("hedgehog", {})
    text = render(trained(demo), config)
    assert "| distill | all weights | book.txt | 614,400 | 7 | 1e-05 | 0.812 to 0.250 |" in text
    assert (
        "hf_attnswap.training --recipe recipe.yaml" in text
        and "| hedgehog of mine |" in text
        and "| hedgehog |" in text
    )
    assert not unknown(text, demo, config)
    assert card.recipe(demo, config, BASE) == {
        "model_name_or_path": "SmolLM2-135M-Instruct.Q4_1.gguf",
        "attention": "hedgehog",
        "stages": [
            {"stage": "align", "max_train_tokens": 204_800},
            {"stage": "distill", "use_lora": True},
        ],
    }
    demo.arms[-1].metrics = [Metric("needle", "accuracy", True, 0.75, 0.0625, 48)]
    first = ModelCard(render(demo, config)).data.eval_results[0]
    assert (first.dataset_name, first.metric_type, first.metric_value) == ("needle", "accuracy", 0.75)
    tuned = replace(demo.arms[0], label="softmax of tuned", conversion="tuned", training_tokens=32_768)
    against = replace(demo.arms[-1].perplexity[0].ratio, arm="softmax of tuned")
    demo.arms[-1] = replace(demo.arms[-1], perplexity=[replace(demo.arms[-1].perplexity[0], against=[against])])
    demo.arms += [tuned]
    text = render(demo, config)
    assert "against softmax of tuned, trained on 32,768 tokens: ×" in text and "| softmax of tuned (control) |" in text
    assert not unknown(text, demo, config)
    demo.arms += [replace(demo.arms[-2], label="hedgehog of others")]
    with pytest.raises(UsageError, match="several arms that are this conversion.*of mine and hedgehog of others"):
        render(demo, config)


def test_conversions_of_several_parts_and_plans():
    config = config_of("sigmoid", {}, layers=2)
    config["attnswap"]["swapped"].append({"attention": "elu", "kind": "cross", "layers": [0, 4], "options": {}})
    text = render(
        None, {"architectures": ["X"], "text_config": config, "attnswap": {**config["attnswap"], "swapped": None}}
    )
    assert "softmax of 4 attention layers replaced by `sigmoid` and `elu`" in text
    assert "| text_config cross 0, 4 |" in text and "X.from_pretrained" in text


HOSTILE = "a`b``` *c* [d](http://e) <img src=x> $f$ | g\n---\n# h\n```\n\x1b[31m"


def test_names_in_a_report_are_words_and_never_markup(demo):
    """Whatever stands in report.json, a reader of Markdown sees the headings, links and code of the template."""
    tokens = {}
    for words in ("plain", HOSTILE):
        found = trained(copy.deepcopy(demo))
        found.command = words if words == "plain" else f"attnswap {words}"
        found.model.name = f"{words}.gguf"
        found.data.training = found.data.evaluation = found.machine.processor = words
        found.arms[-1].training[0].text = found.arms[-1].training[1].trains = words
        found.arms[-1].metrics = [Metric(words, words, True, 0.75, 0.0625, 48)]
        text = render(found, config_of("hedgehog", {}), licence=words if words == "plain" else "mit")
        parsed = MarkdownIt("commonmark").enable("table").parse(text.split("---\n", 2)[2])
        inline = [each for token in parsed for each in token.children or () if each.type not in ("text", "softbreak")]
        tokens[words] = [(t.type, t.markup if t.type != "fence" else "") for t in (*parsed, *inline)]
        assert yaml.safe_load(text.split("---\n", 2)[1])["pipeline_tag"] == "text-generation"
        assert "\x1b" not in text and ModelCard(text).data.license in ("plain", "mit")
    assert tokens["plain"] == tokens[HOSTILE]


def test_names_in_a_config_are_words_and_never_code():
    config = config_of("elu", {}) | {"architectures": ['x")\n```\n<b>']}
    text = render(None, {"a\n# b <i>": config, "architectures": ['Y"); import os'], "num_hidden_layers": "x"})
    assert "import os" not in text and "AutoModel.from_pretrained(" in text
    assert "| a # b &lt;i&gt; causal 0 to 29 |" in text
    with pytest.raises(UsageError, match="is not the name of a repository"):
        card.render(config, 'x")\n```', report=None, base_model=None, licence=None)
