"""Adapters of peft on a swapped model: their files say what is swapped and hold its parameters, whatever the base is.

adapter_config.json names a `peft_type` that peft alone does not know, so that it refuses where this package is not
imported; here the base is swapped as it was before the adapter is put on it.
"""

import functools
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..config import GUARD, NAME
from ..errors import UsageError
from ..plans import plans_from_dict
from .loading import build_variants
from .parts import model_parts
from .swapping import describe, own_configs, swapped_modules


@contextmanager
def telling(model: nn.Module, peft_configs: Mapping[str, Any]) -> Iterator[None]:
    """Let the configs of adapters say what is swapped in their model while they are saved.

    Prompts that were learned say nothing: peft puts them on a model by another way, which knows no plan.

    Raises:
        UsageError: prompts that were learned for a model that was swapped after it was loaded.
    """
    swapped = isinstance(model, PreTrainedModel) and getattr(model.config, NAME, None)
    told = []
    for peft_config in peft_configs.values() if swapped else ():
        if not peft_config.is_prompt_learning:
            told.append(peft_config)
        elif not _is_its_source(model):
            raise UsageError(
                f"{peft_config.peft_type.value} of a model that was swapped after it was loaded cannot be saved: save "
                "the swapped model, load that, and train on it; or use an adapter such as LoRA"
            )
    for peft_config in told:
        setattr(peft_config, NAME, {part: getattr(config, NAME, None) for part, config in model_parts(model).items()})
    try:
        yield
    finally:
        for peft_config in told:
            delattr(peft_config, NAME)


def _is_its_source(model: PreTrainedModel) -> bool:
    """Return whether the model was loaded from a conversion, swapped as it is now."""
    try:
        read, _ = PreTrainedConfig.get_config_dict(model.config.name_or_path)
    except (OSError, ValueError):
        return False
    return read.get(NAME) == getattr(model.config, NAME)


def put_on(model: nn.Module, parts: Mapping[str, Any], others: Collection[str]) -> None:
    """Swap the attention of the base of an adapter as the adapter's file says, unless it is swapped so already.

    Args:
        model: the base. parts: what the file says, by part of the model.
        others: names of the adapters that the base has already.

    Raises:
        UsageError: the base is swapped in another way, or has not the modules that the file names, or is on softmax
            with other adapters, which would run on the swapped attention from then on.
    """
    if not isinstance(model, PreTrainedModel):
        raise UsageError(f"the adapter is of a swapped model, and a {type(model).__name__} cannot be swapped")
    configs = model_parts(model)
    found = {part: getattr(config, NAME, None) for part, config in configs.items()}
    if found[""] is not None:
        own, asked = (
            {part: plans_from_dict(entry) for part, entry in entries.items() if entry} for entries in (found, parts)
        )
        if own != asked:
            raise UsageError(
                f"the adapter was trained with other attention than the model has ({describe(model)}): load it on the "
                "model that it was trained on, or on its softmax"
            )
        return
    if others:
        raise UsageError(
            f"the adapter was trained with swapped attention, and the model has {', '.join(map(repr, sorted(others)))} "
            "on softmax: load it on a model of its own"
        )
    own_configs(model)
    for part, config in model_parts(model).items():
        if parts.get(part):
            setattr(config, NAME, parts[part])
            config._attn_implementation_internal = GUARD
    build_variants(model)


def with_plan(original):
    """Wrap `PeftModel.save_pretrained`: the plan of the base goes into the files."""

    @functools.wraps(original)
    def save_pretrained(self, *args, **kwargs):
        with telling(self.get_base_model(), self.peft_config):
            return original(self, *args, **kwargs)

    return save_pretrained


def with_guard(original):
    """Wrap `PeftConfigMixin.to_dict`: what `telling` has put there is written, and peft alone does not read it."""

    @functools.wraps(original)
    def to_dict(self):
        written = original(self)
        parts = vars(self).get(NAME)
        if parts is not None:
            written |= {NAME: {"peft_type": written["peft_type"], "parts": parts}, "peft_type": GUARD}
        return written

    return to_dict


def with_variants(original):
    """Wrap `get_peft_model_state_dict`: the tensors of the variants are among those of the adapter."""

    @functools.wraps(original)
    def get_peft_model_state_dict(model, state_dict=None, *args, **kwargs) -> dict[str, Tensor]:
        found = original(model, state_dict, *args, **kwargs)
        variants = tuple(f"{path}.{NAME}." for path in swapped_modules(model))
        if variants:
            every = model.state_dict() if state_dict is None else state_dict
            found |= {name: tensor for name, tensor in every.items() if name.startswith(variants)}
        return found

    return get_peft_model_state_dict


def without_guard(original):
    """Wrap `PeftConfigMixin.from_json_file`: the type that `with_guard` has put aside comes back."""

    @functools.wraps(original)
    def from_json_file(cls, *args, **kwargs):
        read = original.__func__(cls, *args, **kwargs)
        if NAME in read:
            read["peft_type"] = read[NAME]["peft_type"]
        return read

    return classmethod(from_json_file)


def keep_plan(original):
    """Wrap `PeftConfigMixin.from_peft_type`: the config of the adapter carries the plan until it is put on a model."""

    @functools.wraps(original)
    def from_peft_type(cls, **kwargs):
        told = kwargs.pop(NAME, None)
        peft_config = original.__func__(cls, **kwargs)
        if told is not None:
            setattr(peft_config, NAME, told["parts"])
        return peft_config

    return classmethod(from_peft_type)


def swap_first(original):
    """Wrap `BaseTuner.inject_adapter`: the base is swapped as it was when the adapter was saved."""

    @functools.wraps(original)
    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        parts = vars(self.peft_config[adapter_name]).pop(NAME, None)
        if parts is not None:
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            put_on(base, parts, self.peft_config.keys() - {adapter_name})
        return original(self, model, adapter_name, *args, **kwargs)

    return inject_adapter


def one_set_of_variants(original):
    """Wrap `load_adapter` of peft and of transformers: no adapter changes the variants that another one has.

    The wrapper raises UsageError where the new adapter was trained with other parameters of the variants than the model
    has, and leaves the model as it was.
    """

    @functools.wraps(original)
    def load_adapter(self, *args, **kwargs):
        name = args[1] if len(args) > 1 else kwargs.get("adapter_name") or "default"
        before = set(getattr(self, "peft_config", ()))
        others = before - {name}
        kept = {path: tensor.clone() for path, tensor in _tensors_of_variants(self).items()} if others else {}
        try:
            loaded = original(self, *args, **kwargs)
        except UsageError:
            if others:  # transformers keeps its config
                self.peft_config.pop(name, None)
            raise
        now = _tensors_of_variants(self) if others else {}  # transformers puts others in their place
        pairs = [(kept[path], now[path]) for path in kept.keys() & now.keys()]
        if any(not torch.equal(earlier, later.to(earlier.device)) for earlier, later in pairs):
            with torch.no_grad():
                for earlier, later in pairs:
                    later.copy_(earlier)
            if name not in before:
                self.delete_adapter(name)
            raise UsageError(
                f"adapter {name!r} was trained with other parameters of the swapped attention than the model has with "
                f"{', '.join(map(repr, sorted(others)))}, and a model has one set of them: load it on its own model"
            )
        return loaded

    return load_adapter


def _tensors_of_variants(model: nn.Module) -> dict[str, Tensor]:
    variants = swapped_modules(model).items()
    found = {f"{path}.{name}": tensor for path, new in variants for name, tensor in new.state_dict().items()}
    return {path: tensor for path, tensor in found.items() if not tensor.is_meta}
