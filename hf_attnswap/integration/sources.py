"""What the source of transformers' classes says, where no attribute does. Each class is read once."""

import functools
import inspect
import re
import sys

from torch import nn


@functools.cache
def dispatches(cls: type[nn.Module]) -> bool:
    """Return whether a class calls its attention through transformers' interface."""
    if cls.__module__.startswith("torch."):
        return False
    bases = [base for base in cls.__mro__ if base.__module__ == cls.__module__]
    return any(re.search(r"ALL_ATTENTION_FUNCTIONS(\.get_interface|\[)", source_of(base)) for base in bases)


@functools.cache
def calls_it_causal(cls: type[nn.Module]) -> bool:
    """Return whether the forward pass of a class says `is_causal=True` to what it calls."""
    try:
        return "is_causal=True" in inspect.getsource(cls.forward)
    except (OSError, TypeError):
        return False


@functools.cache
def mentions(cls: type[nn.Module], word: str) -> bool:
    """Return whether a word stands in the source of a class."""
    return word in source_of(cls)


@functools.cache
def makes_one_mask(cls: type[nn.Module]) -> bool:
    """Return whether the models in the file of a class make one mask for all layers, sliding if the config is."""
    return "create_causal_mask if self.config.sliding_window is None else create_sliding" in _file_of(cls)


@functools.cache
def reads_mask(cls: type[nn.Module]) -> bool:
    """Return whether a class does more with a mask than hand it on."""
    if not cls.__module__.startswith("transformers.models.") and "transformers_modules" not in cls.__module__:
        return False
    # What a class adds to weights of its own making (GPT-2) is the softmax that a variant stands in for.
    source = re.sub(r"attn_weights \+ \w*mask\b", "", source_of(cls)) if dispatches(cls) else source_of(cls)
    return bool(re.search(r"mask(\[|\.[a-z]| [-+*&] )|[-+*&] \w*mask\b", source))


@functools.cache
def cuts_masks(cls: type[nn.Module]) -> bool:
    """Return whether a class cuts rows out of the masks that it has made, which must be matrices then."""
    return bool(re.search(r"\w\[:, :, \w+, :\] if .* in \w*mask\w*\.items\(\)", source_of(cls)))


def source_of(cls: type) -> str:
    """Return the source of a class, "" where there is none. `inspect.getsource` of a class parses its whole file."""
    block = re.search(rf"^class {cls.__name__}\b.*?(?=^[^\s)]|\Z)", _file_of(cls), re.M | re.S)
    return block[0] if block else ""


def _file_of(cls: type) -> str:
    """Return the source of the file of a class, "" where there is none."""
    try:
        return inspect.getsource(sys.modules[cls.__module__])
    except (KeyError, OSError, TypeError):  # made in a console, or not of Python
        return ""
