"""Say before anything runs what a conversion needs: memory, time and device hours of its stages, and of serving."""

from .given import find_device, parse_tokens
from .reckoning import dtype_for, estimate
from .result import Estimate, Memory, Serving, Stage

__all__ = ["Estimate", "Memory", "Serving", "Stage", "dtype_for", "estimate", "find_device", "parse_tokens"]
