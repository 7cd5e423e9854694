"""The head shape of an attention module, read from its attributes and its config."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..attentions import Heads

_HEADS = "num_heads num_attention_heads n_heads n_head num_query_heads encoder_attention_heads".split()
_HEAD_DIM = "qk_head_dim head_dim attention_head_size key_value_proj_dim head_size".split()


def heads_of(module: nn.Module) -> Heads | None:
    """Return the head shape of `module`, read from it or else from its config; None where that fails.

    The attention function compares it with the tensors of every call.
    """
    config = module.config

    def read(names: Sequence[str], *holders: Any) -> int | None:
        for holder in holders:
            for name in names:
                try:
                    value = getattr(holder, name, None)
                except Exception:  # configs whose layers differ raise kinds of their own
                    continue
                if type(value) is int and value > 0:
                    return value
        return None

    heads = read(_HEADS, module, config)
    if heads is None:
        return None
    kv_heads = read(["num_key_value_heads", "num_kv_heads"], module)
    if kv_heads is None:
        groups = read(["num_key_value_groups"], module)
        kv_heads = heads // groups if groups else read(["num_key_value_heads"], config) or heads
    head_dim = (
        read(_HEAD_DIM, module, config) or (read(["embed_dim", "hidden_size", "d_model"], module, config) or 0) // heads
    )
    for name, count in (("q_proj", heads), ("k_proj", kv_heads)):
        projection = getattr(module, name, None)
        if isinstance(projection, nn.Linear) and projection.out_features % (count * head_dim):
            return None
    if not head_dim or heads % kv_heads:
        return None
    return Heads(heads, kv_heads, head_dim, read(["v_head_dim"], module) or head_dim)
