"""Find the attention modules of a model, and say of each whether it can be swapped, and why not."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..attentions import Attention, Heads
from ..config import NAME
from ..errors import UsageError
from .heads import heads_of
from .parts import model_parts, part_of
from .reach import Reach, reach_of
from .sources import calls_it_causal, dispatches


@dataclass(frozen=True)
class AttentionModule:
    """Describe one attention module, as `inspect` finds it.

    Attributes:
        name: its path in the model. class_name: its class. kind: "causal", "bidirectional" or "cross".
        layer: its index among the modules of its kind in its part of the model.
        part: the sub-config that describes it, such as "vision_config"; "" for the model's own.
        swapped: name of the variant that it runs, None for softmax.
        reason: why no variant can stand in for its softmax; None where one can.
        reach: how far it sees: a sliding window, a chunk, or all.
        module: the module itself.
    """

    name: str
    class_name: str
    kind: str
    layer: int
    part: str
    swapped: str | None
    reason: str | None
    reach: Reach
    module: nn.Module = field(repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Return all but the module, as plain data."""
        return {name: value for name, value in vars(self).items() if name not in ("module", "reach")} | (
            self.reach._asdict()
        )


def inspect(model: PreTrainedModel) -> list[AttentionModule]:
    """Return every attention module of a model: what it runs, and whether (or why not) it can be swapped."""
    entries = []
    parts = model_parts(model)
    for name, module in _attention_modules(model):
        reason, part = _refusal(module), None
        if reason is None:
            part = part_of(model, name, module, parts)
            if part is None:
                reason = "its config belongs to no part of the model's config"
        entries.append((name, module, part or "", _kind(model, name, module), reason))
    indices = _indices([(part, kind, module) for _, module, part, kind, _ in entries])
    return [
        AttentionModule(
            name=name,
            class_name=type(module).__name__,
            kind=kind,
            layer=index,
            part=part,
            swapped=getattr(getattr(module, NAME, None), "name", None),
            reason=reason,
            reach=reach_of(module, kind, model.config),
            module=module,
        )
        for (name, module, part, kind, reason), index in zip(entries, indices, strict=True)
    ]


def head_shape(model: PreTrainedModel, entries: list[AttentionModule]) -> Heads:
    """Return the head shape of the first of `entries` that can be swapped; UsageError where none can."""
    for entry in entries:
        heads = None if entry.reason else heads_of(entry.module)
        if heads is not None:
            return heads
    reason = entries[0].reason if entries else "it has no attention module"
    raise UsageError(f"{type(model).__name__} cannot be swapped: {reason}")


def _attention_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that dispatch their attention; else the innermost ones whose class says attention and owns weights."""
    named = {
        name: module
        for name, module in model.named_modules()
        if (re.search("attention|attn", type(module).__name__, re.I) or dispatches(module.__class__))
        and not isinstance(module, Attention)
        and f".{NAME}" not in name
    }
    dispatching = {name for name, module in named.items() if dispatches(module.__class__)}
    outer = tuple(f"{name}." for name in dispatching)
    around = {name[: match.start()] for name in named for match in re.finditer(r"\.", name)}
    return [
        (name, module)
        for name, module in named.items()
        if name in dispatching
        or not name.startswith(outer)
        and name not in around
        and next(module.parameters(), None) is not None
    ]


_CROSS_NAMES = ("encoder_attn", "encoder_attention", "src_attn", "x_attn")


def _kind(model: nn.Module, name: str, module: nn.Module) -> str:
    """Return what a module attends to; where a mask leaves that open, SDPA goes by `is_causal` as well."""
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
        causal = getattr(module, "is_decoder", False) or calls_it_causal(_owner(model, name).__class__)
    return "causal" if causal else "bidirectional"


def _owner(model: nn.Module, name: str) -> nn.Module:
    """Return the innermost transformers model around a module."""
    while name:
        name = name.rpartition(".")[0]
        owner = model.get_submodule(name)
        if isinstance(owner, PreTrainedModel):
            return owner
    return model


def _refusal(module: nn.Module) -> str | None:
    """Return why no variant can stand in for the softmax of a module; None where one can."""
    if not dispatches(module.__class__):
        return "its attention is written out in the model's own file, not dispatched through AttentionInterface"
    if not isinstance(getattr(module, "config", None), PreTrainedConfig):
        return "it has no config to read its attention implementation from"
    if hasattr(module, "sink_proj"):
        return "its sinks are scores of each token, which no variant honours"
    if hasattr(module, "indexer"):
        return "it chooses the keys of each row (sparse attention), which no variant honours"
    return None


def counted(modules: Sequence[nn.Module]) -> bool:
    """Return whether their `layer_idx` tell modules apart; it is -1 where one stands for several layers."""
    own = [getattr(module, "layer_idx", None) for module in modules]
    return all(type(index) is int and index >= 0 for index in own) and len(set(own)) == len(own)


def _indices(entries: list[tuple[str, str, nn.Module]]) -> list[int]:
    """Return for each module its `layer_idx`, where these tell those of one part and kind apart; else its rank."""
    groups: dict[tuple[str, str], list[nn.Module]] = {}
    for part, kind, module in entries:
        groups.setdefault((part, kind), []).append(module)
    indices: dict[int, int] = {}
    for modules in groups.values():
        ranks = range(len(modules))
        own = [module.layer_idx for module in modules] if counted(modules) else ranks
        indices.update((id(module), index) for module, index in zip(modules, own, strict=True))
    return [indices[id(module)] for _, _, module in entries]


Group = tuple[str, str]  # part of the model, kind of attention


def swappable(
    model: PreTrainedModel, entries: list[AttentionModule], kinds: Sequence[str]
) -> dict[Group, dict[int, AttentionModule]]:
    """Return those of `entries` that are of these kinds, by part, kind and index.

    Raises:
        UsageError: there is none, or one of them cannot be swapped.
    """
    if not entries:
        raise UsageError(f"{type(model).__name__} has no attention module that could be swapped")
    groups: dict[Group, dict[int, AttentionModule]] = {}
    for entry in entries:
        if entry.kind not in kinds:
            continue
        if entry.reason:
            others = sorted({e.kind for e in entries if not e.reason} - {e.kind for e in entries if e.reason})
            advice = f"; swap the others with kinds={others}" if others else ""
            raise UsageError(
                f"{type(model).__name__} cannot be swapped: {entry.name} ({entry.class_name}): {entry.reason}{advice}"
            )
        groups.setdefault((entry.part, entry.kind), {})[entry.layer] = entry
    if not groups:
        raise UsageError(
            f"{type(model).__name__} has no {' or '.join(kinds)} attention, only "
            f"{' and '.join(sorted({entry.kind for entry in entries}))}"
        )
    return groups
