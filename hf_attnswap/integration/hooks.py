"""Every change that this package makes to transformers: one list, applied once, when the package is imported.

Each entry replaces one attribute by a wrapper that calls the original. What a wrapper does stands in the room that it
serves; this file says what is wrapped and why.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel, cache_utils
from transformers.integrations import accelerate as accelerate_integration
from transformers.masking_utils import AttentionMaskInterface

from ..attentions import Attention
from ..config import GUARD, NAME
from . import cache, loading
from .attention import attnswap_attention
from .mask_function import attnswap_mask
from .swapping import swapped_modules

Wrapper = Callable[[Any], Any]


class Patch(NamedTuple):
    """Describe one change: `owner.attribute` becomes `wrap(owner.attribute)`, and `why` tells the reader the reason."""

    owner: Any
    attribute: str
    wrap: Wrapper
    why: str


def patches(save_pretrained: Wrapper, push_to_hub: Wrapper) -> list[Patch]:
    """Return every patch.

    Args:
        save_pretrained, push_to_hub: the wrappers of the room `publish`, which stands above this one.
    """
    model = PreTrainedModel
    return [
        Patch(model, "post_init", _build_variants, "a model whose config is that of a conversion is built with it"),
        Patch(model, "_initialize_weights", _initialise_variants, "variants initialise their own parameters"),
        Patch(model, "_finalize_model_loading", _check_weights, "weights that do not fit config.json are refused"),
        Patch(model, "_check_and_adjust_attn_implementation", _keep_guard, "no choice keeps the conversion"),
        Patch(PreTrainedConfig, "_experts_implementation", _read_guard, "the guard in config.json is no experts' name"),
        Patch(accelerate_integration, "dispatch_model", _load_whole, "offloaded weights of a variant come in together"),
        Patch(cache_utils, "get_layer_types_and_kwargs", cache.with_state_layers, "caches begin with state layers"),
        Patch(model, "save_pretrained", save_pretrained, "the argument portable=True"),
        Patch(model, "push_to_hub", push_to_hub, "a swapped model is pushed with its card"),
    ]


def install(save_pretrained: Wrapper, push_to_hub: Wrapper) -> None:
    """Register the attention and the mask function, and apply all patches. A second call changes nothing."""
    if NAME in AttentionInterface().valid_keys():
        return
    for name in (NAME, GUARD):
        AttentionInterface.register(name, attnswap_attention)
        AttentionMaskInterface.register(name, attnswap_mask)
    cache_utils.STATIC_LAYER_TYPE_MAPPING[cache.StateLayer._layer_type] = cache.in_static_cache
    for patch in patches(save_pretrained, push_to_hub):
        setattr(patch.owner, patch.attribute, patch.wrap(getattr(patch.owner, patch.attribute)))


def _build_variants(original):
    @functools.wraps(original)
    def post_init(self):
        loading.build_variants(self)
        original(self)

    return post_init


def _initialise_variants(original):
    own = f"{__name__.partition('.')[0]}."

    @functools.wraps(original)
    def initialize_weights(self, module, *args, **kwargs):
        ours = isinstance(module, Attention) or type(module).__module__.startswith(own)
        if not ours or getattr(module, "_is_hf_initialized", False):
            return original(self, module, *args, **kwargs)
        if hasattr(module, "reset_parameters"):
            with torch.no_grad():
                module.reset_parameters()
        module._is_hf_initialized = True

    return initialize_weights


def _check_weights(original):
    @functools.wraps(original)
    def finalize_model_loading(model, load_config, info):
        loading.check_variants(model, load_config, info)
        info = original(model, load_config, info)
        loading.check_nothing_missing(model, load_config, info)
        return info

    return staticmethod(finalize_model_loading)


def _keep_guard(original):
    @functools.wraps(original)
    def check_and_adjust(self, attn_implementation, *args, **kwargs):
        # None asks for nothing: some programs pass it to leave the choice to the model.
        if attn_implementation is None and getattr(self.config, NAME, None) is not None:
            attn_implementation = GUARD
        return original(self, attn_implementation, *args, **kwargs)

    return check_and_adjust


def _read_guard(original: property) -> property:
    def set_experts(config, value):
        original.fset(config, None if value == GUARD else value)

    return property(original.fget, set_experts)


def _load_whole(original):
    @functools.wraps(original)
    def dispatch_model(model, *args, preload_module_classes=None, **kwargs):
        # Offloaded weights come in with a call of their own module, and a variant calls its maps by other methods.
        own = {type(variant).__name__ for variant in swapped_modules(model).values()}
        return original(model, *args, preload_module_classes=[*(preload_module_classes or ()), *own], **kwargs)

    return dispatch_model
