"""The comparison of arms on one model: what `attnswap tradeoff` measures, as the JSON that `report` draws."""

from .arms import DEFAULT_ARMS, Arm, Settings, parse_options, share_weights, with_controls
from .machine import describe_model, machine, versions
from .measuring import measure

__all__ = [
    "DEFAULT_ARMS",
    "Arm",
    "Settings",
    "describe_model",
    "machine",
    "measure",
    "parse_options",
    "share_weights",
    "versions",
    "with_controls",
]
