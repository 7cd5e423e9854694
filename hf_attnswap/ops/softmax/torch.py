"""Compute softmax by torch's scaled_dot_product_attention, on any device."""

import torch.nn.functional as F


def run(query, key, value, mask, scaling, dropout):
    """Return what `softmax_attention` returns; takes its arguments in order."""
    free = mask.plain and mask.valid is None
    # torch's is_causal aligns the diagonal to the upper left: right only where there is no past.
    causal = free and mask.causal and mask.query_length > 1 and mask.offset == 0
    everything = free and (mask.query_length == 1 or not mask.causal)
    allowed = None if causal or everything else mask.matrix(query.device)
    if mask.bias is not None:
        allowed = mask.bias.to(query.dtype).masked_fill(~allowed, float("-inf"))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=allowed,
        dropout_p=dropout,
        is_causal=causal,
        scale=scaling,
        enable_gqa=bool(query.shape[1] != key.shape[1]),  # under torch.jit.trace sizes are tensors
    )
