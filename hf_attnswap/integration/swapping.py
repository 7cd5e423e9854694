"""Put variants on the attention modules of a model, and take them off again."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from .. import attentions
from ..attentions import Attention, Heads
from ..attentions.groups import Groups
from ..config import GUARD, GUARDED, MARKER, NAME, SwapConfig
from ..errors import UsageError
from ..plans import LayerPlan, choices, plans_to_dict
from .cache import state_layer
from .finding import AttentionModule, inspect, swappable
from .heads import heads_of
from .parts import model_parts, part_of
from .reach import check_reach
from .read_mask import ANY_MASK
from .rotations import given_to, rotary_of
from .sharing import check_shared_keys
from .sources import cuts_masks, reads_mask

# What transformers asks a model before a text is sharded over processes, whose states would never be exchanged.
SHARDED = "_supports_context_parallel"


def swap(
    model: PreTrainedModel,
    attention: str | SwapConfig | None = None,
    layers: Any = None,
    kinds: Sequence[str] = SwapConfig.kinds,
    keep: Sequence[str] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Replace the softmax attention of a model, in place.

    In a layer with a sliding window of W tokens a row sees the last W tokens, its own included, and of these what its
    variant sees.

    Args:
        model: a model of transformers.
        attention: name of a variant (see `available()`), or a complete `SwapConfig`.
        layers: None (all), a list of indices, a slice string ("1::2"), or a dict from index, slice or place to an
            attention, as `SwapConfig` describes it. Layers are counted in each part of the model (encoder, decoder,
            vision tower) by itself.
        kinds: which attention: "causal" and "bidirectional" (all self-attention) unless you say so; "cross" is that of
            decoders to their encoder.
        keep: places that keep softmax inside swapped layers, such as `["18.2", "8.0"]`: layer and key/value group.
        options: options of the variant, such as `window=64`.

    Returns:
        The same model. Its new parameters, if any, stand at `...attnswap...` and want training.

    Raises:
        UsageError: an unknown variant, option, layer, group or kind; a model already swapped; attention that cannot be
            swapped, with the reason; layers with a sliding window or chunks that the variant cannot honour, where
            others are without and nobody chose. The model is then as it was.
    """
    if isinstance(attention, SwapConfig):
        if layers is not None or options or keep is not None or kinds is not SwapConfig.kinds:
            raise UsageError("swap takes either a SwapConfig or a name with layers, kinds, keep and options, not both")
        config = attention
    elif attention is None and not isinstance(layers, Mapping):
        raise UsageError("swap needs the name of an attention, for example swap(model, 'hedgehog+window')")
    else:
        config = SwapConfig(SwapConfig.attention if attention is None else attention, layers, options, kinds, keep)
    if not isinstance(model, PreTrainedModel):
        raise UsageError(f"a {type(model).__name__} cannot be swapped: it is not a transformers model")
    if getattr(model.config, NAME, None):
        raise UsageError(f"the model is already swapped ({describe(model)}): call hf_attnswap.restore(model) first")
    if getattr(model.config, "output_attentions", False):
        raise UsageError(
            "the config has output_attentions=True, which transformers allows with 'eager' alone: unset it, and pass "
            "output_attentions=True with the call instead"
        )
    entries = inspect(model)
    groups = swappable(model, entries, config.kinds)
    plans = {group: config.plan(key_value_groups(modules)) for group, modules in groups.items()}
    built = [
        (groups[group][index], build_variant(model, groups[group][index], group[1], planned))
        for group, plan in plans.items()
        for index, planned in plan.items()
    ]
    check_reach(type(model).__name__, groups, plans, chosen=config.layers is not None)
    check_shared_keys(entries, {id(entry.module): new for entry, new in built})
    for entry, new in built:
        attach(entry, new)
    # A model where other modules read the masks too goes on making those that they know.
    others_read_masks = any(
        cuts_masks(m.__class__) if isinstance(m, PreTrainedModel) else reads_mask(m.__class__)
        for m in model.modules()
        if not isinstance(m, Attention)
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
    own_configs(model)
    mark_swapped(model, saved, entries)
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Take every variant off, in place, and return the model with the softmax that it had.

    Raises:
        UsageError: the model is not swapped.
    """
    if not getattr(model.config, NAME, None):
        raise UsageError("the model is not swapped, there is nothing to restore")
    configs = {id(config): config for config in model_parts(model).values()}
    for module in list(model.modules()):
        detach(module)
        if isinstance(getattr(module, "config", None), PreTrainedConfig):  # some hold copies
            configs[id(module.config)] = module.config
    for config in configs.values():
        saved = config.__dict__.pop(NAME, None)
        for guarded in GUARDED:
            config.__dict__.pop(guarded, None)
        if saved is not None:
            config._attn_implementation_internal = saved["kept"]
    for module in model.modules():
        module.__dict__.pop(SHARDED, None)
    return model


def describe(model: PreTrainedModel) -> str:
    """Return in one line which attention stands in how many layers, such as "hedgehog+window in 30 layers".

    Where layers are parted, the line counts key/value groups, such as "window in 68 of 90 key/value groups".
    """
    counts: dict[str, int] = {}
    standing = swapped_modules(model).values()
    if any(isinstance(attention, Groups) for attention in standing):
        for attention in standing:
            parts = attention.each() if isinstance(attention, Groups) else [(attention, None)]
            for part, groups in parts:
                count = len(groups) if groups else attention.heads.num_key_value_heads
                counts[part.name] = counts.get(part.name, 0) + count
        kept = counts.pop("softmax", 0)
        told = " and ".join(f"{name} in {count}" for name, count in counts.items())
        return f"{told} key/value groups of {len(standing)} layers, softmax in the other {kept}"
    for attention in standing:
        kind = "" if attention.kind == "causal" else f"{attention.kind} "
        counts[f"{attention.name} in {{}} {kind}layers"] = counts.get(f"{attention.name} in {{}} {kind}layers", 0) + 1
    return ", ".join(text.format(n) for text, n in counts.items()) or "softmax"


def softmax_groups(model: PreTrainedModel) -> tuple[int, int]:
    """Return how many key/value groups run softmax, and how many there are; heads that cannot be read are not counted.

    A layer that was swapped to `softmax` runs it.
    """
    kept = total = 0
    for entry in inspect(model):
        shape = heads_of(entry.module) if entry.reason is None else None
        if shape is None:
            continue
        count, attention = shape.num_key_value_heads, getattr(entry.module, NAME, None)
        parts = attention.each() if isinstance(attention, Groups) else [(attention, range(count))]
        total += count
        kept += sum(len(groups) for part, groups in parts if part is None or part.name == "softmax")
    return kept, total


def swapped_modules(model: nn.Module) -> dict[str, Attention]:
    """Return the variants of a swapped model, by the path of the module that each stands on."""
    return {
        name: getattr(m, NAME) for name, m in model.named_modules() if isinstance(getattr(m, NAME, None), Attention)
    }


def key_value_groups(modules: Mapping[int, AttentionModule]) -> dict[int, int | None]:
    """Return the number of key/value groups of each of these layers, in order; None where it cannot be read."""
    shapes = {index: heads_of(modules[index].module) for index in sorted(modules)}
    return {index: shape.num_key_value_heads if shape else None for index, shape in shapes.items()}


@torch.inference_mode(False)  # parameters that are made inside it can never train
def build_variant(model: PreTrainedModel, entry: AttentionModule, kind: str, planned: LayerPlan) -> Attention:
    """Make what runs on a module; UsageError where a variant cannot do what the module needs."""
    module = entry.module
    where = f"{type(model).__name__} cannot be swapped: {entry.name} ({entry.class_name})"
    for name, _ in choices(planned):
        cls = attentions.get(name)
        if kind not in cls.kinds:
            raise UsageError(f"{where} is {kind} attention, and {name} is for {' and '.join(cls.kinds)} attention only")
        if not cls.any_mask:
            for attribute, what in _SCORE_TERMS.items():
                value = getattr(module, attribute, None)
                if value is not None and value is not False:
                    raise UsageError(f"{where} has {what}, which {name} cannot honour: {ANY_MASK} can")
    heads = heads_of(module)
    if isinstance(planned, dict):
        if heads is None or max(planned) >= heads.num_key_value_heads:
            found = "heads whose number cannot be read" if heads is None else f"{heads.num_key_value_heads} groups"
            raise UsageError(f"{where} has {found}, and the plan names group {max(planned)}")
        new: Attention = Groups(heads, {group: (attentions.get(name), opts) for group, (name, opts) in planned.items()})
    else:
        name, options = planned
        new = attentions.get(name)(heads or Heads(1, 1, 1), **options)
    if kind not in new.kinds:
        raise UsageError(
            f"{where} is {kind} attention, and a half-life is for {' and '.join(new.kinds)} attention only"
        )
    if new.unrotate:
        try:
            rotary_of(module, kind)
        except NotImplementedError as error:
            raise UsageError(f"{where}: {error}") from None
    if heads is None and new.state_dict():
        raise UsageError(f"{where} has numbers of heads that cannot be read, and {name} has parameters for each head")
    weights = list(module.parameters())
    # Quantised weights are integers: then the dtype is that of the rest of the model.
    dtype = next((weight.dtype for weight in weights if weight.is_floating_point()), model.dtype)
    device = _device_of(module, weights[0].device if weights else model.device)
    if device.type != "meta" and any(tensor.is_meta for tensor in new.state_dict().values()):
        new.to_empty(device=device)  # made where modules are made without weights, for a model that has some
        for part in new.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    new.register_buffer(MARKER, torch.ones(1, dtype=torch.uint8))
    return new.to(device=device, dtype=dtype).train(module.training)


def _device_of(module: nn.Module, device: torch.device) -> torch.device:
    """Return the device on which a module runs, given that of its weights: "meta" where accelerate has offloaded these,
    to bring them in for each call."""
    for part in module.modules() if device.type == "meta" else ():
        hook = getattr(part, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if getattr(one, "offload", False):
                return torch.device(getattr(one, "execution_device", device))
    return device


# Attributes of attention modules that change the scores, which only variants on the scores can take in.
_SCORE_TERMS = {
    "sinks": "learned sinks in its softmax",
    "attn_logit_softcapping": "a soft cap on its scores",
    "has_relative_attention_bias": "a bias on its scores",
    "rel_logits_proj": "a bias on its scores",
    "keep_window_size": "a bias of each token on its scores",
}


def attach(entry: AttentionModule, new: Attention) -> None:
    """Put a variant on an attention module, and see to it that every call brings the state of its layer."""
    module, kind, index = entry.module, entry.kind, entry.layer
    new.kind, new.place = kind, f"layer {index}" if kind == "causal" else f"{kind} layer {index}"
    new.layer, new.reach = index, entry.reach.sliding_window if kind == "causal" else None
    options = new.extra_repr()
    new.described = f"{new.name} with {options}" if options else new.name
    module.add_module(NAME, new)
    if new.unrotate:
        module._attnswap_rotary = rotary_of(module, kind)
    module._attnswap_hook = module.register_forward_pre_hook(_before_forward, with_kwargs=True)


def detach(module: nn.Module) -> None:
    """Take the variant off an attention module, where there is one."""
    for name in ("_attnswap_kept", "_attnswap_rotary"):
        module.__dict__.pop(name, None)
    if hasattr(module, NAME):
        module._attnswap_hook.remove()
        del module._attnswap_hook
        delattr(module, NAME)


def _before_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]):
    """Hand the attention function what transformers does not pass it: the layer's state, and the rotation."""
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
            # Where layers share their weights, the call says which one it is.
            index = kwargs.get("layer_idx", module.layer_idx)
            kwargs = {**kwargs, "attnswap_state": state_layer(cache, index, attention)}
    rotary = module.__dict__.get("_attnswap_rotary")
    if rotary is not None:
        kwargs = {**kwargs, "attnswap_rotation": given_to(rotary, args, kwargs)}
    return args, kwargs


def own_configs(model: PreTrainedModel) -> None:
    """Give a model configs of its own, which other models that were built from the same object do not share."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PreTrainedConfig):
            module.config = copy.deepcopy(module.config, copies)


def mark_swapped(model: PreTrainedModel, saved: dict[str, dict[str, Any]], entries: Sequence[AttentionModule]) -> None:
    """Say in the config of every part what is swapped there, and route its attention here where anything is.

    The guard is written to config.json, where it makes transformers refuse to load the checkpoint without this package,
    in an error that quotes it.
    """
    parts = model_parts(model)
    configs: list[tuple[str | None, PreTrainedConfig]] = list(parts.items())
    known = {id(config) for config in parts.values()}
    for name, module in model.named_modules():  # some hold copies
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and id(config) not in known:
            known.add(id(config))
            configs.append((part_of(model, name, module, parts), config))
    for part, config in configs:
        if part not in saved:
            continue
        setattr(config, NAME, saved[part])
        config._attn_implementation_internal = NAME if saved[part]["swapped"] else saved[part]["kept"]
    for guarded in GUARDED:
        setattr(model.config, guarded, GUARD)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            setattr(module, SHARDED, False)
    for entry in entries:
        if not hasattr(entry.module, NAME):
            entry.module._attnswap_kept = True
