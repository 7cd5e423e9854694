"""Read what a user says of an estimate: numbers of tokens, and devices by name."""

import re

from ..attentions.base import suggestion
from ..errors import UsageError, shown
from ..sources.models import find_device as find_torch_device
from .devices import GPUS, Device
from .measured import Measured

_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_tokens(text: str) -> int:
    """Return the number that a text such as "100M", "2.5B" or "4096" stands for.

    Raises:
        UsageError: something else, or less than one token.
    """
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMBT]?)", text.strip(), re.I)
    tokens = round(float(found[1]) * _FACTORS[found[2].upper()]) if found else 0
    if tokens < 1:
        raise UsageError(f"--tokens is {shown(text)}; expected a number above 0 such as 500000, 100M or 2.5B")
    return tokens


def find_device(name: str | None) -> Device:
    """Return the GPU of that name, or a device that is at hand, which is measured: CUDA where there is one, or the CPU.

    Raises:
        UsageError: neither known nor at hand.
    """
    if name in GPUS:
        return GPUS[name]
    if name is None or name == "cpu" or name.startswith("cuda"):
        return Measured(find_torch_device(name))
    raise UsageError(
        f"device {shown(name)} is not known.{suggestion(name, GPUS)} Known are {', '.join(GPUS)}; cpu and cuda are "
        "measured where they are at hand"
    )
