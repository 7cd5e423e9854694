"""Find the attention modules of a model, put variants on them, take them off again, and say why not."""

import functools
import inspect as python_inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from . import attentions
from .attentions import Attention, Heads
from .cache import state_layer
from .config import SwapConfig, plans_to_dict
from .dispatch import ANY_MASK, GUARD, GUARDED, NAME
from .errors import UsageError


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
    for name, module in _attention_modules(model):
        reason, part = _refusal(module), None
        if reason is None:
            part = _part_of(model, name, module, parts)
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


def swap(
    model: PreTrainedModel,
    attention: str | SwapConfig | None = None,
    layers: Any = None,
    kinds: Sequence[str] = SwapConfig.kinds,
    **options: Any,
) -> PreTrainedModel:
    """Replace the softmax attention of a model, in place.

    Args:
        model: a model of transformers.
        attention: name of a variant (see `available()`), or a complete `SwapConfig`.
        layers: None (all), a list of indices, a slice string ("1::2"), or a dict from index or slice to an attention.
            Layers are counted in each part of the model (encoder, decoder, vision tower) by itself.
        kinds: which attention: "causal" and "bidirectional" (all self-attention) unless you say so; "cross" is that of
            decoders to their encoder.
        options: options of the variant, such as `window=64`.

    Returns:
        The same model. Its new parameters, if any, stand at `...attnswap...` and want training.

    Raises:
        UsageError: an unknown variant, option, layer or kind; a model already swapped; attention that cannot be
            swapped, with the reason. The model is then as it was.
    """
    if isinstance(attention, SwapConfig):
        if layers is not None or options or kinds is not SwapConfig.kinds:
            raise UsageError("swap takes either a SwapConfig or a name with layers, kinds and options, not both")
        config = attention
    elif attention is None and not isinstance(layers, Mapping):
        raise UsageError("swap needs the name of an attention, for example swap(model, 'hedgehog+window')")
    else:
        config = SwapConfig(SwapConfig.attention if attention is None else attention, layers, options, kinds)
    if not isinstance(model, PreTrainedModel):
        raise UsageError(f"a {type(model).__name__} cannot be swapped: it is not a transformers model")
    if getattr(model.config, NAME, None):
        raise UsageError(f"the model is already swapped ({describe(model)}): call hf_attnswap.restore(model) first")
    if getattr(model.config, "output_attentions", False):
        raise UsageError(
            "the config has output_attentions=True, which transformers allows with 'eager' alone: unset it, and pass "
            "output_attentions=True with the call instead"
        )
    groups = _swappable(model, config.kinds)
    plans = {group: config.plan(sorted(modules)) for group, modules in groups.items()}
    built = [
        (groups[group][index], index, group, build_variant(model, groups[group][index], group[1], *choice))
        for group, plan in plans.items()
        for index, choice in plan.items()
    ]
    for entry, index, (_, kind), new in built:
        attach(model.get_submodule(entry.name), new, kind, index)
    # A model where other modules read the masks too goes on making those that they know.
    others_read_masks = any(
        _reads_mask(m.__class__) for m in model.modules() if not isinstance(m, PreTrainedModel | Attention)
    )
    saved = {}
    for part, part_config in model_parts(model).items():
        own = {kind: plan for (of, kind), plan in plans.items() if of == part}
        saved[part] = plans_to_dict(own, part_config._attn_implementation or "sdpa")
        if others_read_masks:
            saved[part]["matrix_masks"] = True
    origin = model.config.name_or_path
    if origin and not Path(origin).exists():
        saved[""]["base"] = origin
    mark_swapped(model, saved)
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Softmax again: take every variant off, in place, and give back the model that was.

    Raises:
        UsageError: the model is not swapped.
    """
    if not getattr(model.config, NAME, None):
        raise UsageError("the model is not swapped, there is nothing to restore")
    for _, module in _attention_modules(model):
        detach(module)
    holders = {
        id(m.config): m.config for m in model.modules() if isinstance(getattr(m, "config", None), PreTrainedConfig)
    }
    for config in (holders | {id(config): config for config in model_parts(model).values()}).values():
        saved = config.__dict__.pop(NAME, None)
        for guarded in GUARDED:
            config.__dict__.pop(guarded, None)
        if saved is not None:
            config._attn_implementation_internal = saved["kept"]
    return model


def head_shape(model: PreTrainedModel, found: list[AttentionModule]) -> Heads:
    """The head shape of the first module of `inspect(model)` that can be swapped; UsageError where none can."""
    for entry in found:
        heads = None if entry.reason else _heads(model.get_submodule(entry.name))
        if heads is not None:
            return heads
    reason = found[0].reason if found else "it has no attention module"
    raise UsageError(f"{type(model).__name__} cannot be swapped: {reason}")


def describe(model: PreTrainedModel) -> str:
    """One line: which attention in how many layers, such as "hedgehog+window in 30 layers"."""
    counts: dict[str, int] = {}
    for attention in swapped_modules(model).values():
        kind = "" if attention.kind == "causal" else f"{attention.kind} "
        counts[f"{attention.name} in {{}} {kind}layers"] = counts.get(f"{attention.name} in {{}} {kind}layers", 0) + 1
    return ", ".join(text.format(n) for text, n in counts.items()) or "softmax"


def swapped_modules(model: nn.Module) -> dict[str, Attention]:
    """The variants of a swapped model, by the path of the module they stand on."""
    return {
        name: getattr(m, NAME) for name, m in model.named_modules() if isinstance(getattr(m, NAME, None), Attention)
    }


def _attention_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
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
def _reads_mask(cls: type[nn.Module]) -> bool:
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


def _part_of(model: PreTrainedModel, name: str, module: nn.Module, parts: dict[str, PreTrainedConfig]) -> str | None:
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


def _heads(module: nn.Module) -> Heads | None:
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


def _swappable(model: PreTrainedModel, kinds: Sequence[str]) -> dict[Group, dict[int, AttentionModule]]:
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


def build_variant(model: nn.Module, entry: AttentionModule, kind: str, name: str, options: dict[str, Any]) -> Attention:
    """The variant for a module; UsageError where it cannot do what the module needs."""
    cls, module = attentions.get(name), model.get_submodule(entry.name)
    where = f"{type(model).__name__} cannot be swapped: {entry.name} ({entry.class_name})"
    if kind not in cls.kinds:
        raise UsageError(f"{where} is {kind} attention, and {name} is for {' and '.join(cls.kinds)} attention only")
    if not cls.any_mask:
        for attribute, what in _SCORE_TERMS.items():
            value = getattr(module, attribute, None)
            if value is not None and value is not False:
                raise UsageError(f"{where} has {what}, which {name} cannot honour: {ANY_MASK} can")
    heads = _heads(module)
    new = cls(heads or Heads(1, 1, 1), **options)
    if heads is None and new.state_dict():
        raise UsageError(f"{where} has numbers of heads that cannot be read, and {name} has parameters for each head")
    own = next((p for p in module.parameters() if p.is_floating_point()), None)
    return (
        new.train(module.training) if own is None else new.to(device=own.device, dtype=own.dtype).train(module.training)
    )


# Attributes of attention modules that change the scores, which only variants on the scores can take in.
_SCORE_TERMS = {
    "sinks": "learned sinks in its softmax",
    "attn_logit_softcapping": "a soft cap on its scores",
    "has_relative_attention_bias": "a bias on its scores",
}


def attach(module: nn.Module, new: Attention, kind: str, index: int) -> None:
    new.kind, new.place = kind, f"layer {index}" if kind == "causal" else f"{kind} layer {index}"
    new.layer = index
    module.add_module(NAME, new)
    module._attnswap_hook = module.register_forward_pre_hook(_before_forward, with_kwargs=True)


def detach(module: nn.Module) -> None:
    module.__dict__.pop("_attnswap_kept", None)
    if hasattr(module, NAME):
        module._attnswap_hook.remove()
        del module._attnswap_hook
        delattr(module, NAME)


def _before_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]):
    """Hand the layer's state to the attention function, which transformers does not pass the cache."""
    attention = getattr(module, NAME)
    if module.config._attn_implementation != NAME:
        raise RuntimeError(
            f"{attention.place} is swapped, but attn_implementation is {module.config._attn_implementation!r}, "
            "which would run softmax: call hf_attnswap.restore(model) for softmax, or set it to 'attnswap'"
        )
    if attention.stateful and attention.kind == "causal":
        # Its name differs between models: past_key_values, layer_past, ...
        cache = next((given for given in (*args, *kwargs.values()) if isinstance(given, Cache)), None)
        if cache is not None:
            kwargs = {**kwargs, "attnswap_state": state_layer(cache, module.layer_idx)}
    return args, kwargs


def mark_swapped(model: PreTrainedModel, saved: dict[str, dict[str, Any]]) -> None:
    """Say in the config of every part what is swapped there, and route its attention here where anything is.

    The guard is written to config.json, where it makes transformers refuse to load the checkpoint without this package,
    in an error that quotes it.
    """
    parts = model_parts(model)
    configs: list[tuple[str | None, PreTrainedConfig]] = list(parts.items())
    for name, module in model.named_modules():  # some hold copies
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            configs.append((_part_of(model, name, module, parts), module.config))
    for part, config in configs:
        if part not in saved:
            continue
        setattr(config, NAME, saved[part])
        config._attn_implementation_internal = NAME if saved[part]["swapped"] else saved[part]["kept"]
    for guarded in GUARDED:
        setattr(model.config, guarded, GUARD)
    for _, module in _attention_modules(model):
        if not hasattr(module, NAME):
            module._attnswap_kept = True
