"""The model card of a conversion: written from its config.json and its report.json, and from nothing else."""

import json
from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from .. import attentions
from ..attentions.base import KINDS
from ..config import plans_from_dict
from ..dispatch import NAME
from ..errors import UsageError
from ..report import facts, table
from ..report.facts import Arm, Report
from ..report.markdown import escape, markdown_table
from ..report.text import count, interval, listing, number, plain, times

_TASKS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForAudioClassification": "audio-classification",
    "ForCTC": "automatic-speech-recognition",
}


def render(
    config: dict[str, Any],
    repo_id: str,
    *,
    report: Report | None,
    base_model: str | None,
    licence: str | None,
    tags: Sequence[str] = (),
) -> str:
    """The whole card, as README.md.

    Args:
        config: what config.json of the conversion holds.
        repo_id: where it will stand, for the lines that load it.
        report: what report.json holds, as `report.read` returns it; None writes that nothing was measured.
        base_model, licence: Hub id and licence of the model that was converted; None leaves them out.
        tags: more of them, for the Hub's search.

    Raises:
        UsageError: `config` is not that of a conversion, or `report` did not measure this one.
    """
    groups = _groups(config)
    arm = None if report is None else _measured_arm(report, groups)
    names = list(dict.fromkeys(group["attention"] for group in groups))
    base = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a pretrained model"
    layers = sum(len(group["layers"]) for group in groups)
    parts = [
        f"# {repo_id.rpartition('/')[2]}",
        f"This is {base} with the softmax of {count(layers)} attention layers replaced by "
        f"{listing([f'`{name}`' for name in names])}, by hf_attnswap.",
        "## What was swapped",
        markdown_table(_swapped_rows(groups)),
        "All other attention layers keep softmax.",
    ]
    if report is not None and report["model"]["name"].endswith(".gguf"):
        parts.append(f"The weights are those of the quantised file {escape(report['model']['name'])}, dequantised.")
    if report is None or arm is None:
        parts += ["## Quality and speed", "Neither the quality nor the speed of this conversion was measured."]
    else:
        parts += _measured(report, arm)
    parts += ["## Limits", "\n".join(f"- {line}" for line in _limits(names))]
    parts += ["## Use", _use(config, repo_id)]
    if report is not None:
        parts += ["## How it was measured"]
        parts += ["\n".join(f"- {key}: {escape(value)}" for key, value in table.details(report))]
    data = _data(config, repo_id, [*names, *tags], report, arm, base_model, licence)
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _groups(config: dict[str, Any]) -> list[dict[str, Any]]:
    """What is swapped, from every part of the config: attention, options, kind, layers and part."""
    found: list[dict[str, Any]] = []

    def walk(part: str, entry: Any) -> None:
        if not isinstance(entry, dict):
            return
        if entry.get(NAME):
            plans_from_dict(entry[NAME])  # says what is damaged
            found.extend({"kind": "causal", "part": part} | group for group in entry[NAME]["swapped"] or ())
        for key, value in entry.items():
            if key != NAME:
                walk(f"{part} {key}".strip(), value)

    walk("", config)
    if not found:
        raise UsageError("config.json is not that of a conversion: nothing is swapped in it")
    return found


def _measured_arm(report: Report, groups: list[dict[str, Any]]) -> Arm:
    """The arm of the report that is this conversion."""
    ours = [(group["attention"], group["options"]) for group in groups]
    layers = sum(len(group["layers"]) for group in groups)
    arms = [arm for arm in report["arms"] if [(arm["attention"], arm["options"])] == ours and arm["perplexity"]]
    if len(arms) == 1 and layers == report["model"]["attention_layers"]:
        return arms[0]
    swapped = listing([f"{name} {json.dumps(options)}" for name, options in ours])
    measured = listing([arm["label"] for arm in report["arms"]])
    raise UsageError(
        f"report.json did not measure this conversion, {swapped} in {layers} layers: it has {measured} in "
        f"{report['model']['attention_layers']} layers; leave the report out, or measure this one"
    )


def _swapped_rows(groups: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["attention", "layers", "computes", "cost", "options", "source"]]
    for group in groups:
        cls = attentions.get(group["attention"])
        options = ", ".join(f"{key}={json.dumps(value)}" for key, value in group["options"].items())
        where = " ".join(word for word in (group["part"], group["kind"], _span(group["layers"])) if word)
        rows.append([cls.name, where, cls.formula, cls.cost, options or "-", cls.source])
    return rows


def _span(layers: list[int]) -> str:
    whole = len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))


def _measured(report: Report, arm: Arm) -> list[str]:
    """Training, quality and speed, beside softmax and the controls."""
    linear = arm["attention"].removesuffix("+window")
    beside = [other for other in report["arms"] if other["control"] or other["attention"] in ("softmax", linear)]
    chosen = report | {"arms": [other for other in report["arms"] if other is arm or other in beside]}
    return [
        "## Training",
        _training(report, arm),
        "## Quality",
        *_quality(report, arm),
        markdown_table(table.rows(chosen)),
        "## Speed and memory",
        *[_crossover(arm, key, what) for key, what in (("prefill_speedup", "Prefill"), ("decode_speedup", "Decoding"))],
        markdown_table(table.speed_rows(chosen)),
    ]


def _training(report: Report, arm: Arm) -> str:
    alignment = arm["alignment"]
    if not alignment:
        return "None: the weights are those of the model that was converted."
    return (
        f"Each swapped layer was aligned with the softmax output of its layer on {count(alignment['tokens'])} tokens "
        f"of {escape(plain(report['data']['text']))}; the loss went from {number(alignment['first_loss'])} to "
        f"{number(alignment['last_loss'])}. New parameters: {count(arm['new_parameters'])}."
    )


def _quality(report: Report, arm: Arm) -> list[str]:
    lines = []
    for entry in arm["perplexity"]:
        if entry["ratio"]:
            lines.append(
                f"- At context {count(entry['context'])}: perplexity {number(entry['perplexity'])}, "
                f"{interval(entry['ratio'], 'value')} that of softmax, 95 % interval in parentheses, on "
                f"{count(entry['tokens'])} tokens."
            )
    return ["\n".join(lines)] if lines else ["Its perplexity was not compared with softmax's."]


def _crossover(arm: Arm, key: str, what: str) -> str:
    measured = facts.speedups(arm, key)
    if not measured:
        return f"{what}: not measured."
    start, (longest, spread) = facts.faster_from(arm, key), measured[-1]
    said = f"{what}: {times(spread['median'])} the speed of softmax at {count(longest)} tokens, the longest measured"
    if start is None:
        return f"{said}; no length was found from which on it is faster in every run."
    return f"{said}; faster in every run from {count(start)} tokens on."


def _limits(names: Sequence[str]) -> list[str]:
    """What the variants cannot do, as their classes say it."""
    lines = ["It needs hf_attnswap; without it transformers refuses to load it."]
    for name in names:
        cls = attentions.get(name)
        said = []
        if cls.control:
            said.append("is a control for comparisons, not meant for use")
        if cls.cost_class == "quadratic":
            said.append("costs time quadratic in the length, as softmax does")
        if cls.stateful:
            said.append(
                "keeps a state of constant size when it generates: what that has lost cannot be looked up again"
            )
        if not cls.any_mask:
            said.append("takes causal and bidirectional masks with padding and packed texts; any other mask raises")
        if len(cls.kinds) < len(KINDS):
            said.append(f"is for {' and '.join(cls.kinds)} attention only")
        said.append("takes no attention dropout")
        lines += [f"`{name}` {line}." for line in said]
    return lines


def _use(config: dict[str, Any], repo_id: str) -> str:
    task, architecture = _task(config), (config.get("architectures") or ["AutoModel"])[0]
    name, call = architecture, f'model = {architecture}.from_pretrained("{repo_id}")'
    if task == "text-generation":
        name = "pipeline"
        call = f'pipe = pipeline("{task}", "{repo_id}")\nprint(pipe("Once upon a time")[0]["generated_text"])'
    lines = ["import hf_attnswap  # pip install hf_attnswap", f"from transformers import {name}", "", call]
    return "\n".join(["```python", *lines, "```"])


def _task(config: dict[str, Any]) -> str | None:
    architecture = (config.get("architectures") or [""])[0]
    return next((task for suffix, task in _TASKS.items() if architecture.endswith(suffix)), None)


def _data(config, repo_id, tags, report, arm, base_model, licence) -> ModelCardData:
    """The metadata, with a model-index of the perplexities."""
    results = []
    for entry in arm["perplexity"] if arm else ():
        measured = {"perplexity": entry["perplexity"], "perplexity / softmax's": (entry["ratio"] or {}).get("value")}
        results += [
            EvalResult(
                task_type=_task(config) or "other",
                dataset_type="text",
                dataset_name=plain(report["data"]["text"]),
                metric_type="perplexity",
                metric_name=f"{name}, context {entry['context']}",
                metric_value=value,
            )
            for name, value in measured.items()
            if value is not None
        ]
    return ModelCardData(
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        library_name="transformers",
        license=licence,
        pipeline_tag=_task(config),
        tags=["hf_attnswap", "attention", *dict.fromkeys(tags)],
        model_name=repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
