"""Find the attention modules of a model, and say of each whether it can be swapped, and why not."""

import functools
import inspect as python_inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..attentions import Attention, Heads
from ..config import NAME
from ..errors import UsageError


@dataclass(frozen=True)
class AttentionModule:
    """What `inspect` says of one attention module.

    Attributes:
        name: its path in the model. class_name: its class. kind: "causal", "bidirectional" or "cross".
        layer: its index among the modules of its kind in its part of the model.
        part: the sub-config that describes it, such as "vision_config"; "" for the model's own.
        swapped: name of the variant that it runs, None for softmax.
        reason: why no variant can stand in for its softmax; None where one can.
    """

    name: str
    class_name: str
    kind: str
    layer: int
    part: str
    swapped: str | None
    reason: str | None


def inspect(model: PreTrainedModel) -> list[AttentionModule]:
    """Every attention module of a model: what it runs, and whether (or why not) it can be swapped."""
    found = []
    parts = model_parts(model)
    for name, module in attention_modules(model):
        reason, part = _refusal(module), None
        if reason is None:
            part = part_of(model, name, module, parts)
            if part is None:
                reason = "its config belongs to no part of the model's config"
        found.append((name, module, part or "", _kind(model, name, module), reason))
    indices = _indices([(part, kind, module) for _, module, part, kind, _ in found])
    return [
        AttentionModule(
            name=name,
            class_name=type(module).__name__,
            kind=kind,
            layer=index,
            part=part,
            swapped=getattr(getattr(module, NAME, None), "name", None),
            reason=reason,
        )
        for (name, module, part, kind, reason), index in zip(found, indices, strict=True)
    ]


def head_shape(model: PreTrainedModel, found: list[AttentionModule]) -> Heads:
    """The head shape of the first module of `inspect(model)` that can be swapped; UsageError where none can."""
    for entry in found:
        heads = None if entry.reason else heads_of(model.get_submodule(entry.name))
        if heads is not None:
            return heads
    reason = found[0].reason if found else "it has no attention module"
    raise UsageError(f"{type(model).__name__} cannot be swapped: {reason}")


def attention_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that dispatch their attention; else the innermost ones whose class says attention and owns weights."""
    named = {
        name: m
        for name, m in model.named_modules()
        if (re.search("attention|attn", type(m).__name__, re.I) or _dispatches(m.__class__))
        and not isinstance(m, Attention)
        and f".{NAME}" not in name
    }
    dispatching = [f"{name}." for name, m in named.items() if _dispatches(m.__class__)]
    return [
        (name, m)
        for name, m in named.items()
        if _dispatches(m.__class__)
        or not any(name.startswith(outer) for outer in dispatching)
        and not any(other.startswith(f"{name}.") for other in named)
        and next(m.parameters(), None) is not None
    ]


@functools.cache
def _dispatches(cls: type[nn.Module]) -> bool:
    """Whether the class calls its attention through transformers' interface."""
    if cls.__module__.startswith("torch."):
        return False
    try:
        sources = [python_inspect.getsource(base) for base in cls.__mro__ if base.__module__ == cls.__module__]
    except (OSError, TypeError):
        return False
    return any(re.search(r"ALL_ATTENTION_FUNCTIONS(\.get_interface|\[)", source) for source in sources)


_CROSS_NAMES = ("encoder_attn", "encoder_attention", "src_attn", "x_attn")


def _kind(model: nn.Module, name: str, module: nn.Module) -> str:
    """What it attends to; where a mask leaves that open, SDPA goes by `is_causal` as well."""
    if isinstance(module, nn.MultiheadAttention):
        return "cross"  # in transformers, always that of learned queries that pool a text or image
    own_name = name.rpartition(".")[2]
    around = ".".join(name.split(".")[-2:])  # some wrap it: crossattention.attention
    if (
        re.search("cross|encdec|encoder_decoder_att", f"{around} {type(module).__name__}", re.I)
        or own_name in _CROSS_NAMES
    ):
        return "cross"
    causal = getattr(module, "is_causal", None)
    if causal is None:
        causal = getattr(getattr(module, "config", None), "model_type", None) in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not causal:  # some decoders go by their mask alone; the text model of CLIP says it with every call
        causal = getattr(module, "is_decoder", False) or _calls_it_causal(_owner(model, name).__class__)
    return "causal" if causal else "bidirectional"


def _owner(model: nn.Module, name: str) -> nn.Module:
    """The innermost transformers model around a module."""
    while name:
        name = name.rpartition(".")[0]
        owner = model.get_submodule(name)
        if isinstance(owner, PreTrainedModel):
            return owner
    return model


@functools.cache
def _calls_it_causal(cls: type[nn.Module]) -> bool:
    try:
        return "is_causal=True" in python_inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return False


@functools.cache
def reads_mask(cls: type[nn.Module]) -> bool:
    """Whether the class does more with a mask than to hand it on."""
    if not cls.__module__.startswith("transformers.models.") and "transformers_modules" not in cls.__module__:
        return False
    try:
        source = python_inspect.getsource(cls)
    except (OSError, TypeError):
        return True
    return bool(re.search(r"mask(\[|\.[a-z]| [-+*&] )|[-+*&] \w*mask\b", source))


def _refusal(module: nn.Module) -> str | None:
    if not _dispatches(module.__class__):
        return "its attention is written out in the model's own file, not dispatched through AttentionInterface"
    if not isinstance(getattr(module, "config", None), PreTrainedConfig):
        return "it has no config to read its attention implementation from"
    if hasattr(module, "sink_proj"):
        return "its sinks are scores of each token, which no variant honours"
    if hasattr(module, "indexer"):
        return "it chooses the keys of each row (sparse attention), which no variant honours"
    return None


def model_parts(model: PreTrainedModel) -> dict[str, PreTrainedConfig]:
    """The model's config ("") and, by their path in it, the configs of its parts."""
    found = {"": model.config}

    def walk(prefix: str, config: PreTrainedConfig) -> None:
        for name in config.sub_configs:
            sub = getattr(config, name, None)
            if isinstance(sub, PreTrainedConfig) and not any(sub is known for known in found.values()):
                found[f"{prefix}{name}"] = sub
                walk(f"{prefix}{name}.", sub)

    walk("", model.config)
    return found


def part_of(model: PreTrainedModel, name: str, module: nn.Module, parts: dict[str, PreTrainedConfig]) -> str | None:
    """Models copy their configs as they build their parts, so the object alone does not tell."""
    path, owner = name, module
    while True:
        config = getattr(owner, "config", None)
        for part, known in parts.items():
            if config is known and (part or len(parts) == 1 or type(config) is type(module.config)):
                return part
        if not path:
            break
        path = path.rpartition(".")[0]
        owner = model.get_submodule(path)
    same = [part for part, known in parts.items() if type(known) is type(module.config)]
    return same[0] if len(same) == 1 else None


def counted(modules: Sequence[nn.Module]) -> bool:
    """Whether their `layer_idx` tell them apart."""
    own = [getattr(module, "layer_idx", None) for module in modules]
    return all(type(index) is int for index in own) and len(set(own)) == len(own)


def _indices(found: list[tuple[str, str, nn.Module]]) -> list[int]:
    """For each module its `layer_idx`, where these tell the modules of one part and kind apart; else its rank there."""
    groups: dict[tuple[str, str], list[nn.Module]] = {}
    for part, kind, module in found:
        groups.setdefault((part, kind), []).append(module)
    indices: dict[int, int] = {}
    for modules in groups.values():
        ranks = range(len(modules))
        own = [module.layer_idx for module in modules] if counted(modules) else ranks
        indices.update((id(module), index) for module, index in zip(modules, own, strict=True))
    return [indices[id(module)] for _, _, module in found]


_HEADS = "num_heads num_attention_heads n_heads n_head num_query_heads encoder_attention_heads".split()
_HEAD_DIM = "qk_head_dim head_dim attention_head_size key_value_proj_dim head_size".split()


def heads_of(module: nn.Module) -> Heads | None:
    """Read from the module, else from its config; None where that fails. The first call checks it."""
    config = module.config

    def read(names: Sequence[str], *holders: Any) -> int | None:
        for holder in holders:
            for name in names:
                try:
                    value = getattr(holder, name, None)
                except Exception:  # configs whose layers differ raise kinds of their own
                    continue
                if type(value) is int and value > 0:
                    return value
        return None

    heads = read(_HEADS, module, config)
    if heads is None:
        return None
    kv_heads = read(["num_key_value_heads", "num_kv_heads"], module)
    if kv_heads is None:
        groups = read(["num_key_value_groups"], module)
        kv_heads = heads // groups if groups else read(["num_key_value_heads"], config) or heads
    head_dim = (
        read(_HEAD_DIM, module, config) or (read(["embed_dim", "hidden_size", "d_model"], module, config) or 0) // heads
    )
    for name, count in (("q_proj", heads), ("k_proj", kv_heads)):
        projection = getattr(module, name, None)
        if isinstance(projection, nn.Linear) and projection.out_features != count * head_dim:
            return None
    if not head_dim or heads % kv_heads:
        return None
    return Heads(heads, kv_heads, head_dim, read(["v_head_dim"], module) or head_dim)


Group = tuple[str, str]  # part of the model, kind of attention


def swappable(model: PreTrainedModel, kinds: Sequence[str]) -> dict[Group, dict[int, AttentionModule]]:
    """The attention modules of these kinds by part, kind and index, if all of them can be swapped."""
    found = inspect(model)
    if not found:
        raise UsageError(f"{type(model).__name__} has no attention module that could be swapped")
    groups: dict[Group, dict[int, AttentionModule]] = {}
    for entry in found:
        if entry.kind not in kinds:
            continue
        if entry.reason:
            others = sorted({e.kind for e in found if not e.reason} - {e.kind for e in found if e.reason})
            advice = f"; swap the others with kinds={others}" if others else ""
            raise UsageError(
                f"{type(model).__name__} cannot be swapped: {entry.name} ({entry.class_name}): {entry.reason}{advice}"
            )
        groups.setdefault((entry.part, entry.kind), {})[entry.layer] = entry
    if not groups:
        raise UsageError(
            f"{type(model).__name__} has no {' or '.join(kinds)} attention, only "
            f"{' and '.join(sorted({entry.kind for entry in found}))}"
        )
    return groups
