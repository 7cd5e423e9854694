"""Write the model card of a conversion from its config.json and its report.json, and from nothing else."""

import json
import re
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, PackageLoader

from .. import attentions
from ..attentions.base import KINDS
from ..config import NAME, known_architectures
from ..errors import UsageError
from ..plans import layers_in, plans_from_dict
from ..report.facts import swapped_layers
from ..report.table import Table, escape, markdown
from ..report.text import count, listing, plain
from ..report.types import Arm, Report
from . import classified, measured
from .origin import require_repo_id


def _words(value: object) -> str:
    """Return `value` as Markdown shows it literally, on one line."""
    return escape(plain(value))


def _fenced(code: str, language: str) -> str:
    """Return `code` as a block of Markdown that nothing inside can end, without control characters."""
    code = "".join(c for c in code if c.isprintable() or c in "\n\t")
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+|$", code)))
    return f"{fence}{language}\n{code}\n{fence}"


_TEMPLATES = Environment(loader=PackageLoader("hf_attnswap.publish"), keep_trailing_newline=True)
_TEMPLATES.filters |= {"markdown": markdown, "md": _words, "fenced": _fenced}

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
    """Return the whole card, as the text of README.md.

    Args:
        config: the content of the conversion's config.json.
        repo_id: where the conversion will stand, for the lines that load it.
        report: what was measured, of any kind; None writes that nothing was.
        base_model, licence: Hub id and licence of the model that was converted; None leaves them out.
        tags: more tags for the Hub's search.

    Raises:
        UsageError: `config` is not that of a conversion, `report` did not measure this one, or `repo_id` is no name of
            a repository.
    """
    require_repo_id(repo_id)
    groups = swapped_groups(config)
    names = list(dict.fromkeys(group["attention"] for group in groups))
    standing = {(group["part"], group["kind"], layer) for group in groups for layer in layers_in(group)}
    layers, all_layers = len(standing), _layers(config, report)
    partial = layers != all_layers or any(group.get("groups") for group in groups)
    arm = measured_arm(report, groups) if report else None
    results = _results(config, report, arm) if report and arm else []
    name = repo_id.rpartition("/")[2]
    metadata = ModelCardData(
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        library_name="transformers",
        license=licence,
        pipeline_tag=_task(config),
        tags=["hf_attnswap", "attention", *dict.fromkeys([*names, *tags])],
        model_name=name if results else None,
        eval_results=results or None,
    )
    text = _TEMPLATES.get_template("card.md.j2").render(
        metadata=metadata.to_yaml(),
        name=name,
        base=f"[{_words(base_model)}](https://huggingface.co/{base_model})" if base_model else "a pretrained model",
        layers=count(layers),
        groups=_groups(groups, config),
        names=listing([f"`{each}`" for each in names]),
        swapped=_swapped(groups),
        partial=partial,
        measured=measured.content(report, arm, _says(report).reproduce(arm)) if report and arm else None,
        limits=_limits(groups, partial),
        use=_use(config, repo_id),
    )
    return f"{text.rstrip()}\n"


def _results(config: dict[str, Any], report: Report, arm: Arm) -> list[EvalResult]:
    given = {"task_type": _task(config) or "other", "dataset_type": "text", "dataset_name": measured.data_name(report)}
    return [EvalResult(**{**given, **result}) for result in measured.results(report, arm)]


def _says(report: Report) -> ModuleType:
    """Return the module that knows how an arm of this kind of report is made again."""
    return classified if report.kind == "classification" else measured


def recipe(report: Report, config: dict[str, Any], base_model: str | None) -> dict[str, Any] | None:
    """Return the content of recipe.yaml, which makes the conversion again; None where the report holds no training.

    Raises:
        UsageError: `config` is not that of a conversion, or the report did not measure it.
    """
    return _says(report).recipe(report, measured_arm(report, swapped_groups(config)), base_model)


def swapped_groups(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is swapped, from every part of the config: attention, options, kind, layers and part of each group.

    Raises:
        UsageError: nothing is swapped.
    """
    found: list[dict[str, Any]] = []
    parts: list[tuple[str, dict[str, Any]]] = [("", config)]
    while parts:
        part, entry = parts.pop(0)
        if entry.get(NAME):
            plans_from_dict(entry[NAME])  # says what is damaged
            found.extend({"part": plain(part)} | group for group in entry[NAME]["swapped"] or ())
        inside = [(key, value) for key, value in entry.items() if key != NAME and isinstance(value, dict)]
        parts = [(f"{part} {key}".strip(), value) for key, value in inside] + parts
    if not found:
        raise UsageError("config.json is not that of a conversion: nothing is swapped in it")
    return found


def measured_arm(report: Report, groups: list[dict[str, Any]]) -> Arm:
    """Return the arm of the report that is the conversion with these groups.

    Args:
        groups: what `swapped_groups` returned.

    Raises:
        UsageError: no arm is, or several are.
    """
    ours = _plan(groups)
    arms = [arm for arm in report.arms if arm.status == "measured" and _plan_of(arm) == ours]
    arms = [arm for arm in arms if arm.conversion] or arms  # a model of its own, before one that a run made
    if len(arms) == 1:
        return arms[0]
    swapped = listing([f"{g['attention']} {json.dumps(g['options'])} in {_counted(g)}" for g in groups])
    if arms:
        same = listing([plain(arm.label) for arm in arms])
        raise UsageError(f"report.json has several arms that are this conversion, {swapped}: {same}; measure it alone")
    every = listing([f"{plain(arm.label)} in {swapped_layers(arm)} layers" for arm in report.arms])
    raise UsageError(
        f"report.json did not measure this conversion, {swapped}: it has {every}; leave the report out, or measure "
        "this one"
    )


def _plan_of(arm: Arm) -> set[tuple[str, str, str, str]]:
    return _plan([vars(group) for group in arm.swapped])


def _plan(groups: list[dict[str, Any]]) -> set[tuple[str, str, str, str]]:
    """Return which attention with which options stands where, options that were added after the save included."""
    found = set()
    for group in groups:
        options = attentions.get(group["attention"]).check_options(group["options"])
        for place in (*map(str, group["layers"]), *group.get("groups", ())):
            found.add((group.get("kind", "causal"), place, group["attention"], json.dumps(options, sort_keys=True)))
    return found


def _swapped(groups: list[dict[str, Any]]) -> Table:
    rows = []
    for group in groups:
        cls = attentions.get(group["attention"])
        options = ", ".join(f"{key}={json.dumps(value)}" for key, value in group["options"].items())
        places = [_span(group["layers"])] if group["layers"] else []
        places += [f"groups {', '.join(group['groups'])}"] if group.get("groups") else []
        where = " ".join(word for word in (group["part"], group["kind"], "; ".join(places)) if word)
        rows.append([cls.name, where, cls.formula, cls.cost, options or "-", cls.source])
    return Table("", ["attention", "layers", "computes", "cost", "options", "source"], rows, [])


def _groups(groups: list[dict[str, Any]], config: dict[str, Any]) -> str | None:
    """Return how many key/value groups are swapped, where layers are parted; None where none is."""
    if not any(group.get("groups") for group in groups):
        return None
    per_layer = next((n for key in ("num_key_value_heads", "num_attention_heads") if (n := config.get(key))), 0)
    return count(sum(len(group["layers"]) * per_layer + len(group.get("groups", ())) for group in groups))


def _counted(group: dict[str, Any]) -> str:
    """Return in how many layers, and key/value groups of others, a variant stands."""
    parts = [f"{len(group['layers'])} layers"] if group["layers"] else []
    parts += [f"{len(group['groups'])} key/value groups"] if group.get("groups") else []
    return " and ".join(parts)


def _span(layers: list[int]) -> str:
    whole = len(layers) > 2 and layers == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))


def _layers(config: dict[str, Any], report: Report | None) -> int:
    """Return how many attention layers the model has, as far as config and report say."""
    layers = report.model.attention_layers if report else config.get("num_hidden_layers")
    return layers if isinstance(layers, int) else 0


def _limits(groups: list[dict[str, Any]], partial: bool) -> list[str]:
    """Return what the variants cannot do, from their class attributes, as lines of Markdown."""
    lines = ["It needs hf_attnswap; without it transformers refuses to load it."]
    if partial:
        lines.append("What keeps softmax costs time quadratic in the length, and keeps keys and values.")
    for name in dict.fromkeys(group["attention"] for group in groups):
        cls = attentions.get(name)
        kinds = [group["kind"] for group in groups if group["attention"] == name]
        said = []
        if cls.control:
            said.append("is a control for comparisons, not meant for use")
        if cls.cost_class == "quadratic":
            said.append("costs time quadratic in the length, as softmax does")
        if cls.stateful and "causal" in kinds:
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
    task, architecture = _task(config), _architecture(config) or "AutoModel"
    name, call = architecture, f'model = {architecture}.from_pretrained("{repo_id}")'
    example = {"text-generation": '"Once upon a time"', "text-classification": '"It is a pleasure to watch."'}
    if task in example:
        name = "pipeline"
        call = f'pipe = pipeline("{task}", "{repo_id}")\nprint(pipe({example[task]}))'
    lines = ["import hf_attnswap  # pip install hf_attnswap", f"from transformers import {name}", "", call]
    return "\n".join(lines)


def _task(config: dict[str, Any]) -> str | None:
    architecture = _architecture(config) or ""
    return next((task for suffix, task in _TASKS.items() if architecture.endswith(suffix)), None)


def _architecture(config: dict[str, Any]) -> str | None:
    """Return the name of the class that a config names; None where that is no name of a class."""
    named = known_architectures(config)
    first = named[0] if named else None
    return first if isinstance(first, str) and first.isidentifier() else None
