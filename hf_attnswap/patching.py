"""Find the attention modules of a model, put variants on them, take them off again, and say why not."""

import functools
import inspect as python_inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from . import attentions
from .attentions import Attention, Heads
from .cache import state_layer
from .config import SwapConfig
from .dispatch import NAME
from .errors import UsageError


@dataclass(frozen=True)
class AttentionModule:
    """What `inspect` says of one attention module.

    Attributes:
        name: its path in the model. class_name: its class. layer: its index in the model, None where it has none.
        kind: "causal", or None where the module cannot be swapped.
        swapped: name of the variant that it runs, None for softmax.
        reason: why it cannot be swapped; None where it can.
    """

    name: str
    class_name: str
    layer: int | None
    kind: str | None
    swapped: str | None
    reason: str | None


def inspect(model: PreTrainedModel) -> list[AttentionModule]:
    """Every attention module of a model: what it runs, and whether (or why not) it can be swapped."""
    refusal = _model_refusal(model)
    found = []
    for name, module in _attention_modules(model):
        reason = refusal or _module_refusal(module)
        swapped = getattr(module, NAME, None)
        found.append(
            AttentionModule(
                name=name,
                class_name=type(module).__name__,
                layer=getattr(module, "layer_idx", None),
                kind=None if reason else "causal",
                swapped=None if swapped is None else swapped.name,
                reason=reason,
            )
        )
    return found


def swap(
    model: PreTrainedModel,
    attention: str | SwapConfig | Mapping[int | str, Any] | None = None,
    layers: Any = None,
    **options: Any,
) -> PreTrainedModel:
    """Replace the softmax attention of a model, in place.

    Args:
        model: a decoder-only language model of transformers.
        attention: name of a variant (see `available()`), or a complete `SwapConfig`.
        layers: None (all), a list of indices, a slice string ("1::2"), or a dict from index or slice to an attention.
        options: options of the variant, such as `window=64`.

    Returns:
        The same model. Its new parameters, if any, stand at `...attnswap...` and want training.

    Raises:
        UsageError: an unknown variant, option or layer; a model already swapped; a model that cannot be swapped, with
            the reason. The model is then as it was.
    """
    if isinstance(attention, SwapConfig):
        if layers is not None or options:
            raise UsageError("swap takes either a SwapConfig or a name with layers and options, not both")
        config = attention
    elif attention is None and not isinstance(layers, Mapping):
        raise UsageError("swap needs the name of an attention, for example swap(model, 'hedgehog+window')")
    else:
        config = SwapConfig(SwapConfig.attention if attention is None else attention, layers, options)
    if not isinstance(model, PreTrainedModel):
        raise UsageError(f"a {type(model).__name__} cannot be swapped: it is not a transformers model")
    if getattr(model.config, NAME, None):
        raise UsageError(f"the model is already swapped ({describe(model)}): call hf_attnswap.restore(model) first")
    modules = _swappable(model)
    plan = config.plan(sorted(modules))
    kept = model.config._attn_implementation
    if kept not in ("sdpa", "eager") and len(plan) < len(modules):
        raise UsageError(
            f"the layers that are not swapped run {kept!r}, which cannot stand beside swapped ones: "
            "load the model with attn_implementation='sdpa'"
        )
    built = {index: _build(modules[index], *plan[index]) for index in plan}
    for index, new in built.items():
        _attach(modules[index], new)
    _mark(model, SwapConfig.plan_to_dict(plan, kept if kept in ("sdpa", "eager") else "sdpa"))
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Softmax again: take every variant off, in place, and give back the model that was.

    Raises:
        UsageError: the model is not swapped.
    """
    saved = getattr(model.config, NAME, None)
    if not saved:
        raise UsageError("the model is not swapped, there is nothing to restore")
    for _, module in _attention_modules(model):
        if hasattr(module, NAME):
            module._attnswap_hook.remove()
            del module._attnswap_hook
            delattr(module, NAME)
    for config in _configs(model):
        for key in (NAME, "attn_implementation"):
            config.__dict__.pop(key, None)
    model.set_attn_implementation(saved["kept"])
    return model


def head_shape(model: PreTrainedModel, found: list[AttentionModule]) -> Heads:
    """The head shape of the first module of `inspect(model)` that can be swapped; UsageError where none can."""
    for entry in found:
        if entry.reason is None:
            return _heads(model.get_submodule(entry.name))
    reason = found[0].reason if found else "it has no attention module"
    raise UsageError(f"{type(model).__name__} cannot be swapped: {reason}")


def describe(model: PreTrainedModel) -> str:
    """One line: which attention in how many layers, such as "hedgehog+window in 30 layers"."""
    groups = (getattr(model.config, NAME, None) or {}).get("swapped", ())
    return ", ".join(f"{g['attention']} in {len(g['layers'])} layers" for g in groups) or "softmax"


def swapped_modules(model: nn.Module) -> dict[int, Attention]:
    """The variants of a swapped model by layer."""
    return {m.layer_idx: getattr(m, NAME) for m in model.modules() if isinstance(getattr(m, NAME, None), Attention)}


def _attention_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Innermost modules whose class says attention and that own weights."""
    named = [
        (name, m)
        for name, m in model.named_modules()
        if re.search("attention|attn", type(m).__name__, re.I)
        and not isinstance(m, Attention)
        and ".attnswap" not in name
    ]
    return [
        (name, m)
        for name, m in named
        if any(True for p in m.parameters()) and not any(other.startswith(f"{name}.") for other, _ in named)
    ]


@functools.cache
def _dispatches(cls: type[nn.Module]) -> bool:
    """Whether the class calls its attention through transformers' interface."""
    try:
        return "ALL_ATTENTION_FUNCTIONS" in python_inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return False


def _model_refusal(model: PreTrainedModel) -> str | None:
    if not isinstance(model, PreTrainedModel):
        return f"{type(model).__name__} is not a transformers model"
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        return "encoder-decoder models are not supported"
    if config.get_text_config() is not config or getattr(config, "vision_config", None) is not None:
        return "models of several modalities are not supported"
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"model type {config.model_type!r} is not a decoder-only language model"
    return None


def _module_refusal(module: nn.Module) -> str | None:
    if not _dispatches(type(module)):
        return "its attention is written out in the model's own file, not dispatched through AttentionInterface"
    if getattr(module, "is_causal", None) is not True:
        return "it is not causal"
    if getattr(module, "layer_idx", None) is None:
        return "it has no layer_idx"
    if getattr(module, "sinks", None) is not None:
        return "it has learned sinks in its softmax, which no variant honours"
    if getattr(module, "attn_logit_softcapping", None) is not None:
        return "it caps its scores (softcap), which no variant honours"
    if _heads(module) is None:
        return "its numbers of heads cannot be read from its config"
    return None


def _heads(module: nn.Module) -> Heads | None:
    config = getattr(module, "config", None)
    try:
        heads = getattr(config, "num_attention_heads", None)
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
    except Exception:  # configs whose layers differ raise kinds of their own
        return None
    if not isinstance(heads, int):
        return None
    # Multi-head latent attention has another width for keys than for values.
    head_dim = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None)
    head_dim = head_dim or getattr(config, "head_dim", None) or config.hidden_size // heads
    for name, count in (("q_proj", heads), ("k_proj", kv_heads)):
        projection = getattr(module, name, None)
        if isinstance(projection, nn.Linear) and projection.out_features != count * head_dim:
            return None
    return Heads(heads, kv_heads, head_dim)


def _swappable(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The attention modules by layer, if all of them can be swapped."""
    found = inspect(model)
    if not found:
        raise UsageError(f"{type(model).__name__} has no attention module that could be swapped")
    for entry in found:
        if entry.reason:
            where = "" if entry.reason == _model_refusal(model) else f" {entry.name} ({entry.class_name}):"
            raise UsageError(f"{type(model).__name__} cannot be swapped:{where} {entry.reason}")
    modules = {entry.layer: model.get_submodule(entry.name) for entry in found}
    if len(modules) < len(found):
        raise UsageError(f"{type(model).__name__} cannot be swapped: several attention modules share one layer_idx")
    return modules


def _build(module: nn.Module, name: str, options: dict[str, Any]) -> Attention:
    new = attentions.get(name)(_heads(module), **options)
    own = next(p for p in module.parameters() if p.is_floating_point())
    return new.to(device=own.device, dtype=own.dtype).train(module.training)


def _attach(module: nn.Module, new: Attention) -> None:
    module.add_module(NAME, new)
    module._attnswap_hook = module.register_forward_pre_hook(_before_forward, with_kwargs=True)


def _before_forward(module: nn.Module, args: tuple, kwargs: dict[str, Any]):
    """Hand the layer's state to the attention function, which transformers does not pass the cache."""
    if module.config._attn_implementation != NAME:
        raise RuntimeError(
            f"layer {module.layer_idx} is swapped, but attn_implementation is {module.config._attn_implementation!r}, "
            "which would run softmax: call hf_attnswap.restore(model) for softmax, or set it to 'attnswap'"
        )
    if getattr(module, NAME).stateful:
        # Its name differs between models: past_key_values, layer_past, ...
        cache = next((given for given in (*args, *kwargs.values()) if isinstance(given, Cache)), None)
        if cache is not None:
            kwargs = {**kwargs, "attnswap_state": state_layer(cache, module.layer_idx)}
    return args, kwargs


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The config objects in use: usually one, shared by all modules."""
    configs = {
        id(m.config): m.config for m in model.modules() if isinstance(getattr(m, "config", None), PreTrainedConfig)
    }
    return list({id(model.config): model.config, **configs}.values())


def _mark(model: PreTrainedModel, saved: dict[str, Any]) -> None:
    """Say in the config that the model is swapped. `attn_implementation` is written to config.json, where it makes
    transformers refuse to load the checkpoint without this package."""
    for config in _configs(model):
        setattr(config, NAME, saved)
        config.attn_implementation = NAME
        config._attn_implementation_internal = NAME


def _inject(model: PreTrainedModel) -> None:
    """Put the variants that a loaded config asks for on a model that is being built."""
    saved = getattr(model.config, NAME, None)
    if saved is None and model.config._attn_implementation != NAME:
        return
    if not saved:
        raise UsageError(
            f"attn_implementation is 'attnswap', but the config says {saved!r} of what is swapped: load the model "
            "without it and call hf_attnswap.swap, or repair config.json"
        )
    if model.config._attn_implementation != NAME:
        raise UsageError(
            f"the checkpoint is a conversion by hf_attnswap, and attn_implementation="
            f"{model.config._attn_implementation!r} would run softmax: leave attn_implementation out"
        )
    # Sub-models are built first and share their modules with the model around them.
    if not swapped_modules(model):
        modules = _swappable(model)
        plan = SwapConfig.from_dict(saved).plan(sorted(modules))
        for index, (name, options) in plan.items():
            _attach(modules[index], _build(modules[index], name, options))
    _mark(model, saved)


def hook_into_transformers() -> None:
    """Make `from_pretrained` build conversions whole; done once, when the package is imported."""
    post_init, initialize = PreTrainedModel.post_init, PreTrainedModel._initialize_weights
    if hasattr(post_init, "__wrapped__"):
        return

    @functools.wraps(post_init)
    def post_init_with_variants(self):
        _inject(self)
        post_init(self)

    @functools.wraps(initialize)
    def initialize_with_variants(self, module, *args, **kwargs):
        if type(module).__module__.startswith(f"{__package__}.") and not getattr(module, "_is_hf_initialized", False):
            if hasattr(module, "reset_parameters"):
                with torch.no_grad():
                    module.reset_parameters()
            module._is_hf_initialized = True
            return
        initialize(self, module, *args, **kwargs)

    PreTrainedModel.post_init = post_init_with_variants
    PreTrainedModel._initialize_weights = initialize_with_variants
