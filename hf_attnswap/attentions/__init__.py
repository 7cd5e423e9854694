"""One file per variant. To add one, write one: see CONTRIBUTING.md."""

from .base import Attention, Heads, Option
from .linear import LinearAttention
from .registry import get, names, register
from .scores import ScoreAttention

__all__ = ["Attention", "Heads", "LinearAttention", "Option", "ScoreAttention", "get", "names", "register"]
