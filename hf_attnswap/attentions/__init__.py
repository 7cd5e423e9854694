"""Define every variant of attention, one per file. docs/guide/add_a_variant.md says how to add one."""

from ..ops.spec import Activation, FeatureMap, by_count, by_total
from .base import Attention, Heads, Option
from .linear import LinearAttention
from .registry import get, names, register
from .scores import ScoreAttention

__all__ = [
    "Activation",
    "Attention",
    "FeatureMap",
    "Heads",
    "LinearAttention",
    "Option",
    "ScoreAttention",
    "by_count",
    "by_total",
    "get",
    "names",
    "register",
]
