"""Layers that use the keys and values of an earlier layer (Gemma 3n, Gemma 4)."""

from collections.abc import Mapping, Sequence

from torch import nn

from ..attentions import Attention
from ..errors import UsageError
from .finding import AttentionModule


def uses_keys_of_another(module: nn.Module) -> bool:
    """Return whether an attention module is called with the keys and values that an earlier layer has made."""
    return vars(module).get("is_kv_shared_layer", False)


def check_shared_keys(entries: Sequence[AttentionModule], variants: Mapping[int, Attention]) -> None:
    """Check that layers with the same keys all keep them in their cache, or none does.

    A layer with a state hands on only the keys of the new tokens, and the layers that use them have no others.

    Args:
        entries: all attention modules of a model.
        variants: what will stand on them, by the id of the module.

    Raises:
        UsageError: some of them would have a state, and others not, or the layer that makes the keys is not there.
    """
    families: dict[tuple[str, str], list[AttentionModule]] = {}
    for entry in entries:
        if uses_keys_of_another(entry.module) or vars(entry.module).get("store_full_length_kv", False):
            families.setdefault((entry.part, getattr(entry.module, "layer_type", "")), []).append(entry)
    stateful = {id(entry.module) for entry in entries if getattr(variants.get(id(entry.module)), "stateful", False)}
    parted = [family for family in families.values() if _parted(family, stateful)]
    if not parted:
        return
    shared = {entry.layer for family in parted for entry in family}
    chosen = {e.layer for e in entries if e.part == parted[0][0].part and id(e.module) in variants}
    advice = f"layers={sorted(chosen - shared)}" if chosen - shared else "other layers"
    if all(any(not uses_keys_of_another(entry.module) for entry in family) for family in parted):
        advice = f"layers={sorted(chosen | shared)} for a state on all of them, {advice} for none"
    told = " and ".join(f"layers {', '.join(str(entry.layer) for entry in family)}" for family in parted)
    name = next(v.name for v in variants.values() if v.stateful)
    raise UsageError(f"{told} share the keys of one layer, of which {name} keeps no keys in a cache: swap {advice}")


def _parted(family: list[AttentionModule], stateful: set[int]) -> bool:
    """Return whether some layers with the same keys have a state, and others, or who makes the keys, have not."""
    with_state = [entry for entry in family if id(entry.module) in stateful]
    makers = [entry for entry in family if not uses_keys_of_another(entry.module)]
    return bool(with_state) and (not makers or len(with_state) < len(family))
