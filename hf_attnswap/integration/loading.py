"""A saved conversion comes back whole: variants are built from config.json, and weights that do not fit are refused."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, modeling_utils

from ..attentions import Attention
from ..config import GUARD, NAME, select
from ..errors import UsageError
from ..plans import Plan, plans_from_dict, plans_to_dict
from .finding import AttentionModule, Group, counted, inspect
from .parts import model_parts, parts_of
from .sharing import check_shared_keys
from .swapping import attach, build_variant, detach, mark_swapped, swapped_modules


def build_variants(model: PreTrainedModel) -> None:
    """Put the variants that a loaded config asks for on a model that is being built.

    Parts are built first, and the model around them may count their modules otherwise: the outermost is right.
    """
    configs = model_parts(model)
    saved = {part: getattr(config, NAME, None) for part, config in configs.items()}
    if saved[""] is None and model.config._attn_implementation not in (NAME, GUARD):
        return
    if not saved[""]:
        raise UsageError(
            f"attn_implementation is 'attnswap', but the config of {model.config.name_or_path or type(model).__name__} "
            f"says {saved['']!r} of what is swapped. A trainer that loads a reference model by the name of one "
            "swapped in memory (trl's DPOTrainer) needs ref_model=copy.deepcopy(model), or the swapped model "
            "saved and loaded from its folder. Else leave attn_implementation out, and call hf_attnswap.swap"
        )
    saved = {part: entry for part, entry in saved.items() if entry}
    plans = {(part, kind): plan for part, entry in saved.items() for kind, plan in plans_from_dict(entry).items()}
    for part, _ in plans:
        if configs[part]._attn_implementation not in (NAME, GUARD):
            raise UsageError(
                f"the checkpoint is a conversion by hf_attnswap, and attn_implementation="
                f"{configs[part]._attn_implementation!r} would run softmax: leave attn_implementation out"
            )
    groups: dict[Group, dict[int, AttentionModule]] = {}
    variants: dict[int, Attention] = {}
    modules = inspect(model)
    for entry in modules:
        groups.setdefault((entry.part, entry.kind), {})[entry.layer] = entry
    for group, entries in groups.items():
        plan = plans.get(group, {})
        numbered = counted([entry.module for entry in entries.values()])
        if numbered and set(plan) - set(entries):
            select(sorted(plan), sorted(entries))  # says which layer is not there
        for index, entry in entries.items():
            detach(entry.module)
            if index in plan:
                if entry.reason:
                    raise UsageError(f"config.json says that {entry.name} is swapped, but {entry.reason}")
                variants[id(entry.module)] = build_variant(model, entry, group[1], plan[index])
                attach(entry, variants[id(entry.module)])
    check_shared_keys(modules, variants)
    mark_swapped(model, saved, modules)


@contextmanager
def variants_aside(model: PreTrainedModel) -> Iterator[None]:
    """Keep the variants out of the modules of a model while the context is open."""
    held = [(module, module._modules.pop(NAME)) for module in list(model.modules()) if NAME in module._modules]
    try:
        yield
    finally:
        for module, variant in held:
            module._modules[NAME] = variant


@contextmanager
def telling_what_stands(model: PreTrainedModel) -> Iterator[None]:
    """Let the config tell what stands in the model while it is saved: layers may have been taken out since the swap.

    Raises:
        UsageError: a model that is built from its config has other layers, so that it could not be loaded.
    """
    configs = model_parts(model)
    saved = {part: entry for part, config in configs.items() if (entry := getattr(config, NAME, None))}
    plans = {part: plans_from_dict(entry) for part, entry in saved.items()}
    variants = swapped_modules(model)
    if len(variants) == sum(len(plan) for kinds in plans.values() for plan in kinds.values()):
        places = [(variant.layer, model.get_submodule(path)) for path, variant in variants.items()]
        if all(getattr(module, "layer_idx", None) in (layer, None, -1) for layer, module in places):
            yield
            return
    entries = inspect(model)
    standing: dict[str, dict[str, Plan]] = {part: {} for part in saved}
    for entry in entries:
        if entry.name in variants:
            variant = variants[entry.name]
            plan = standing[entry.part].setdefault(entry.kind, {})
            plan[entry.layer] = variant.choice()
    told = {part: saved[part] | plans_to_dict(found, saved[part]["kept"]) for part, found in standing.items()}
    config = copy.deepcopy(model.config)
    for part, part_config in parts_of(config).items():
        if part in told:
            setattr(part_config, NAME, told[part])
    try:
        with torch.device("meta"):
            built = {entry.name: entry.swapped for entry in inspect(type(model)(config))}
    except Exception:  # what a model says of a config that does not fit it
        built = {}
    if built != {entry.name: entry.swapped for entry in entries}:
        raise UsageError(
            f"layers were taken out of the {type(model).__name__} after its swap, and its config tells of others: set "
            "the number of layers in the config, and layer_idx of each attention module to its place, then save"
        )
    for part, entry in told.items():
        setattr(configs[part], NAME, entry)
    try:
        yield
    finally:
        for part, entry in saved.items():
            setattr(configs[part], NAME, entry)


def check_variants(model: PreTrainedModel, load_config: modeling_utils.LoadStateDictConfig, info: Any) -> None:
    """Raise UsageError where the weights of a checkpoint and its config.json disagree on what is swapped."""
    inside = f".{NAME}."
    wrong = {key: "is not among the weights" for key in info.missing_keys if inside in key}
    for key, found, expected in info.mismatched_keys:
        if inside in key:
            wrong[key] = f"has shape {tuple(found)} in the weights, and config.json makes it {tuple(expected)}"
    modules = {name for name, _ in model.named_modules()}
    for key in info.unexpected_keys:
        owner, found, _ = key.partition(inside)  # absent where only a part of the model was asked for
        if found and not modules.isdisjoint((owner, owner.removeprefix(f"{model.base_model_prefix}."))):
            wrong[key] = "is among the weights, and config.json does not ask for it"
    _refuse(load_config, wrong)


def check_nothing_missing(model: PreTrainedModel, load_config: modeling_utils.LoadStateDictConfig, info: Any) -> None:
    """Raise UsageError where a conversion, loaded as the class that it was saved with, would have random weights."""
    if swapped_modules(model) and type(model).__name__ in (model.config.architectures or ()):
        _refuse(load_config, {key: "is not among the weights" for key in info.missing_keys})


def _refuse(load_config: modeling_utils.LoadStateDictConfig, wrong: dict[str, str]) -> None:
    if wrong:
        key = min(wrong)
        others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UsageError(
            f"{load_config.pretrained_model_name_or_path}: config.json and weights do not belong together: {key} "
            f"{wrong[key]}{others}; take both from one save"
        )
