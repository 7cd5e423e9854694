"""How far an attention module sees: sliding windows and chunks, which a state cannot follow once it has read past them.

Some variants honour a sliding window, and any does inside one window or chunk, where a text is like any other. A swap
to one that does not is refused where nobody chose such a layer and there are others; where somebody did, or all layers
are such, a warning tells how long texts may be.
"""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedConfig

from .. import attentions
from ..attentions import Attention
from ..errors import UsageError
from ..plans import Plan, choices
from .read_mask import ANY_MASK
from .sources import makes_one_mask, mentions

log = logging.getLogger(__name__)


class Reach(NamedTuple):
    """Say how far a module sees: the `sliding_window` last tokens, or its chunk of `attention_chunk_size` tokens."""

    sliding_window: int | None = None
    attention_chunk_size: int | None = None

    @property
    def tokens(self) -> int | None:
        """Return how many tokens a row may see at most; None for all."""
        return self.sliding_window or self.attention_chunk_size

    def __str__(self) -> str:
        if self.sliding_window:
            return f"the last {self.sliding_window} tokens"
        return f"its chunk of {self.attention_chunk_size} tokens" if self.attention_chunk_size else "all"


def reach_of(module: nn.Module, kind: str, whole: PreTrainedConfig) -> Reach:
    """Return how far a module sees, by its config and its attributes; cross-attention sees all.

    Args:
        whole: the config of the model that the module belongs to.
    """
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    if kind == "cross" or not isinstance(config, PreTrainedConfig):
        return Reach()
    of_config = _size(config, "sliding_window")
    own = _size(module, "sliding_window") if hasattr(module, "sliding_window") else of_config
    if makes_one_mask(type(module)):
        # Blt hands the masks of its encoder to its decoder, whose config does not know of them.
        decodes = config.model_type == "blt_local_decoder"
        return Reach(_size(whole, "local_attention_window_len") if decodes else own)
    types = getattr(config, "layer_types", None)
    if types is not None and type(layer) is int and layer < len(types):
        if "chunked" in types[layer]:
            return Reach(attention_chunk_size=_size(config, "attention_chunk_size"))
        return Reach(own or of_config if "sliding" in types[layer] else None)
    # Configs older than layer_types: the window, where there is one, is that of every layer which reads it.
    reads = hasattr(module, "sliding_window") or mentions(type(module), "sliding_window")
    return Reach(own if reads and getattr(module, "is_sliding", True) else None)


def _size(holder: Any, name: str) -> int | None:
    value = getattr(holder, name, None)
    return value if type(value) is int and value > 0 else None


def check_reach(
    model: str, groups: Mapping[tuple[str, str], Mapping[int, Any]], plans: Mapping[Any, Plan], chosen: bool
) -> None:
    """Refuse a swap, or warn, where a variant cannot honour how far the layers see on which it is to stand.

    Args:
        model: the name of its class.
        groups: the modules of each part and kind by index, as `finding.swappable` returns them.
        plans: what is to stand on which of them.
        chosen: whether the user named layers.

    Raises:
        UsageError: nobody chose layers, and there are others that see all.
    """
    for group, plan in plans.items():
        modules = groups[group]
        near = {
            index: (name, modules[index].reach)
            for index, planned in sorted(plan.items())
            for name, _ in choices(planned)
            if passes(modules[index]) and not _honours(attentions.get(name), group[1], modules[index].reach)
        }
        if not near:
            continue
        name, reach = next(iter(near.values()))
        kind = "" if group[1] == "causal" else f"{group[1]} "
        see = "layer {} sees" if len(near) == 1 else "layers {} see"
        slides = group[1] == "causal" and reach.sliding_window is not None
        says = (
            f"{model}: {kind}{see.format(_listed(list(near)))} no more than {reach}, which {name} cannot honour in "
            f"longer texts ({'window, hedgehog, other linear variants, hybrids, ' * slides}{ANY_MASK} can)"
        )
        others = [index for index, entry in modules.items() if not passes(entry)]
        if others and not chosen:
            only = f", kinds=[{group[1]!r}]" if len(groups) > 1 else ""
            raise UsageError(
                f"{says}: swap the others with layers={sorted(others)}{only}, or name all with layers='0:' for texts "
                f"of at most {reach.tokens} tokens"
            )
        log.warning(
            "%s: texts of more than %d tokens will be refused, also while they are generated%s",
            says, reach.tokens, f"; layers={sorted(others)} swaps the layers that see all" if others else "",
        )  # fmt: skip


def _honours(variant: type[Attention], kind: str, reach: Reach) -> bool:
    return variant.any_mask or variant.slides and kind == "causal" and reach.sliding_window is not None


def passes(entry: Any) -> bool:
    """Return whether a text that fits the model can be longer than what the module sees."""
    tokens, positions = entry.reach.tokens, _size(getattr(entry.module, "config", None), "max_position_embeddings")
    return tokens is not None and (positions is None or tokens < positions)


def _listed(indices: list[int]) -> str:
    """Return indices in words, in full only where they are few."""
    if len(indices) > 8:
        return f"{', '.join(map(str, indices[:4]))}, ..., {indices[-1]} ({len(indices)} layers)"
    return ", ".join(map(str, indices))
