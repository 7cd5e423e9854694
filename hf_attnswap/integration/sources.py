"""What the source of transformers' classes says, where no attribute does. Each class is read once."""

import functools
import inspect
import re

from torch import nn


@functools.cache
def dispatches(cls: type[nn.Module]) -> bool:
    """Return whether a class calls its attention through transformers' interface."""
    if cls.__module__.startswith("torch."):
        return False
    bases = [base for base in cls.__mro__ if base.__module__ == cls.__module__]
    return any(re.search(r"ALL_ATTENTION_FUNCTIONS(\.get_interface|\[)", _methods(base)) for base in bases)


@functools.cache
def calls_it_causal(cls: type[nn.Module]) -> bool:
    """Return whether the forward pass of a class says `is_causal=True` to what it calls."""
    return "is_causal=True" in _source(cls.forward)


@functools.cache
def reads_mask(cls: type[nn.Module]) -> bool:
    """Return whether a class does more with a mask than hand it on."""
    if not cls.__module__.startswith("transformers.models.") and "transformers_modules" not in cls.__module__:
        return False
    return bool(re.search(r"mask(\[|\.[a-z]| [-+*&] )|[-+*&] \w*mask\b", _methods(cls)))


def _methods(cls: type) -> str:
    """Return the source of the methods that a class defines. `inspect.getsource` of a class parses its whole file."""
    return "\n".join(_source(member) for member in vars(cls).values() if inspect.isfunction(member))


def _source(function) -> str:
    try:
        return inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):  # made in a console, or not of Python
        return ""
