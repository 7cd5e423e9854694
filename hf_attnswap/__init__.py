"""Replace the softmax attention of pretrained transformers models, and measure what it costs.

import hf_attnswap
model = hf_attnswap.swap(model, "hedgehog+window", window=64, sinks=4)
"""

from .attentions import get as _get
from .attentions import names as _names
from .config import SwapConfig
from .errors import UsageError
from .integration import hooks as _hooks
from .integration.finding import AttentionModule, inspect
from .integration.swapping import restore, swap
from .planning import plan
from .publish import portable as _portable
from .publish import push as _push
from .sources.plans import read_plan

__all__ = [
    "AttentionModule", "SwapConfig", "UsageError", "__version__", "available", "inspect", "plan", "read_plan",
    "restore", "swap",
]  # fmt: skip
__version__ = "0.1.0"


def available() -> list[type]:
    """Return the variants, as classes: `name`, `formula`, `cost`, `source`, `control`, `options()`."""
    return [_get(name) for name in _names()]


_hooks.install(_portable.with_portable, _push.with_card)
