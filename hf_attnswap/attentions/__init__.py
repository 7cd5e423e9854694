"""One file per variant. To add one, write one: see CONTRIBUTING.md."""

from .base import Attention, Heads, LinearAttention, Option, ScoreAttention
from .registry import get, names, register

__all__ = ["Attention", "Heads", "LinearAttention", "Option", "ScoreAttention", "get", "names", "register"]
