"""Replace the softmax attention of pretrained transformers models, and measure what it costs.

import hf_attnswap
model = hf_attnswap.swap(model, "hedgehog+window", window=64, sinks=4)
"""

from . import building as _building
from . import cache as _cache
from . import dispatch as _dispatch
from .attentions import get as _get
from .attentions import names as _names
from .config import SwapConfig
from .errors import UsageError
from .finding import AttentionModule, inspect
from .patching import restore, swap
from .publish import portable as _portable
from .publish import push as _push
from .version import __version__

__all__ = ["AttentionModule", "SwapConfig", "UsageError", "__version__", "available", "inspect", "restore", "swap"]


def available() -> list[type]:
    """The variants, as classes: `name`, `formula`, `cost`, `source`, `control`, `options()`."""
    return [_get(name) for name in _names()]


_dispatch.register()
_cache.make_state_layers_up_front()
_building.hook_into_transformers()
_portable.hook_into_transformers()
_push.hook_into_transformers()
