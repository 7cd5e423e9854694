"""Compare arms on one model: what `attnswap tradeoff` measures, as a `Report`."""

from .arms import DEFAULT_ARMS, Arm, Settings, parse_options, share_weights, with_controls
from .machine import describe_model, machine, now, versions
from .measuring import measure
from .progress import Progress

__all__ = [
    "DEFAULT_ARMS",
    "Arm",
    "Progress",
    "Settings",
    "describe_model",
    "machine",
    "measure",
    "now",
    "parse_options",
    "share_weights",
    "versions",
    "with_controls",
]
