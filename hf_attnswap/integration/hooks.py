"""Every change that this package makes to transformers and peft, applied once, when the package is imported.

Each entry replaces one attribute by a wrapper that calls the original. What a wrapper does stands in the room that it
serves; this file says what is wrapped and why.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel, cache_utils
from transformers.generation.continuous_batching.continuous_api import ContinuousMixin
from transformers.masking_utils import AttentionMaskInterface

from ..attentions import Attention
from ..config import ARCHITECTURE, GUARD, NAME, known_architectures
from ..errors import UsageError
from . import adapters, cache, loading
from .attention import attnswap_attention
from .late import when_imported
from .mask_function import attnswap_mask
from .static_cache import StaticStateLayer
from .swapping import swapped_modules

log = logging.getLogger(__name__)

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
        Patch(model, "get_expanded_tied_weights_keys", _tie_no_variants, "layers that share weights have own variants"),
        Patch(model, "_initialize_weights", _initialise_variants, "variants initialise their own parameters"),
        Patch(model, "_finalize_model_loading", _check_weights, "weights that do not fit config.json are refused"),
        Patch(model, "_check_and_adjust_attn_implementation", _keep_guard, "no choice keeps the conversion"),
        Patch(PreTrainedConfig, "_experts_implementation", _read_guard, "the guard in config.json is no experts' name"),
        Patch(PreTrainedConfig, "to_diff_dict", _write_architectures, "config.json has architectures of its own"),
        Patch(PreTrainedConfig, "_dict_from_json_file", _read_architectures, "which are read as transformers' classes"),
        Patch(PreTrainedConfig, "_attn_implementation", _keep_variants, "programs set eager where they want weights"),
        Patch(cache_utils, "get_layer_types_and_kwargs", cache.with_state_layers, "caches begin with state layers"),
        Patch(ContinuousMixin, "init_continuous_batching", _no_pages, "swapped layers take no paged cache"),
        Patch(model, "load_adapter", adapters.one_set_of_variants, "two adapters share the variants of their model"),
        Patch(model, "save_pretrained", _save_the_plan, "the files say what is swapped, those of an adapter as well"),
        Patch(model, "save_pretrained", save_pretrained, "the argument portable=True"),
        Patch(model, "push_to_hub", push_to_hub, "a swapped model is pushed with its card"),
    ]


def peft_patches() -> list[Patch]:
    """Return every patch of peft, which this imports."""
    import peft
    from peft.tuners.tuners_utils import BaseTuner

    config, tensors = peft.config.PeftConfigMixin, "get_peft_model_state_dict"
    why = "the files of an adapter hold the variants' tensors"
    return [
        Patch(peft.PeftModel, "save_pretrained", adapters.with_plan, "an adapter says what is swapped in its base"),
        Patch(peft.PeftModel, "load_adapter", adapters.one_set_of_variants, "two adapters share its variants"),
        Patch(config, "to_dict", adapters.with_guard, "peft alone does not load such an adapter"),
        Patch(config, "from_json_file", adapters.without_guard, "which this package lets it do"),
        Patch(config, "from_peft_type", adapters.keep_plan, "the plan of an adapter reaches its base"),
        Patch(BaseTuner, "inject_adapter", adapters.swap_first, "which is swapped before the adapter is put on it"),
        Patch(peft, tensors, adapters.with_variants, why),
        Patch(peft.peft_model, tensors, adapters.with_variants, why),
    ]


def install(save_pretrained: Wrapper, push_to_hub: Wrapper) -> None:
    """Register the attention and the mask function, and apply all patches. A second call changes nothing."""
    if NAME in AttentionInterface().valid_keys():
        return
    for name in (NAME, GUARD):
        AttentionInterface.register(name, attnswap_attention)
        AttentionMaskInterface.register(name, attnswap_mask)
    cache_utils.STATIC_LAYER_TYPE_MAPPING[cache.StateLayer._layer_type] = StaticStateLayer
    for mapping in (cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, cache_utils.STATIC_LAYER_TYPE_MAPPING):
        mapping[cache.GROWS] = cache.StateLayer
    _apply(patches(save_pretrained, push_to_hub))
    when_imported("peft", lambda: _apply(peft_patches()))


def _apply(chosen: list[Patch]) -> None:
    for patch in chosen:
        setattr(patch.owner, patch.attribute, patch.wrap(getattr(patch.owner, patch.attribute)))


def _build_variants(original):
    @functools.wraps(original)
    def post_init(self):
        loading.build_variants(self)
        original(self)

    return post_init


def _tie_no_variants(original):
    @functools.wraps(original)
    def get_expanded_tied_weights_keys(self, *args, **kwargs):
        with loading.variants_aside(self):
            return original(self, *args, **kwargs)

    return get_expanded_tied_weights_keys


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


def _save_the_plan(original):
    @functools.wraps(original)
    def save_pretrained(self, *args, **kwargs):
        adapted = self._hf_peft_config_loaded
        with adapters.telling(self, self.peft_config) if adapted else loading.telling_what_stands(self):
            return original(self, *args, **kwargs)

    return save_pretrained


def _write_architectures(original):
    @functools.wraps(original)
    def to_diff_dict(self):
        written = original(self)
        if written.get(NAME) is not None and written.get("architectures"):
            written["architectures"] = [f"{ARCHITECTURE}{name}" for name in written["architectures"]]
        return written

    return to_diff_dict


def _read_architectures(original):
    @functools.wraps(original)
    def dict_from_json_file(cls, json_file):
        read = original.__func__(cls, json_file)
        if isinstance(read, dict) and NAME in read and read.get("architectures"):
            read["architectures"] = known_architectures(read)
        return read

    return classmethod(dict_from_json_file)


def _no_pages(original):
    @functools.wraps(original)
    def init_continuous_batching(self, *args, **kwargs):
        if swapped_modules(self):
            raise UsageError(
                "continuous batching keeps keys and values in pages, which swapped layers do not read: call generate "
                "on the padded prompts in place of generate_batch"
            )
        return original(self, *args, **kwargs)

    return init_continuous_batching


def _keep_variants(original: property) -> property:
    def set_implementation(config, value):
        # Eager attention is what gives weights; swapped layers give theirs.
        if value == "eager" and getattr(config, "_attn_implementation_internal", None) == NAME:
            log.warning("attn_implementation='eager' leaves swapped layers as they are; they return their weights too")
        else:
            original.fset(config, value)

    return property(original.fget, set_implementation)
