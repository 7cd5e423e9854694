"""Compute linear attention that forgets: S_i = g_i S_{i-1} + phi(k_i) v_i^T, phi(x) = elu(x) + 1.

The denominator forgets in the same way. g_i = sigmoid(w . k_i + b), one per key/value head, in place of the one per
channel of Yang et al., "Gated linear attention transformers", 2024. At the start w = 0 and g is the fixed decay of Sun
et al., "Retentive network", 2023: 1 - g runs from 1/32 to 1/512 over the heads, so that heads remember about 32 to 512
tokens. O(n d^2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.gated import causal_gated
from ..ops.heads import compute_dtype, scores
from .base import Attention
from .elu import elu_features
from .linear import UNROTATE, unrotated
from .registry import register


class GateLogit(nn.Module):
    """Compute `w . k + b` per key/value head, `[B, Hkv, T, D]` -> `[B, Hkv, T]`; 0 at the start."""

    def __init__(self, heads: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, head_dim))
        self.bias = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self):
        """Set weight and bias to 0."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, key: Tensor) -> Tensor:
        """Return the logits, `[B, Hkv, T, D]` -> `[B, Hkv, T]`, in the dtype of `key`."""
        return (key @ self.weight.to(key.dtype)[..., None]).squeeze(-1) + self.bias.to(key.dtype)[:, None]


def log_of_gate(logit: Tensor) -> Tensor:
    """Return `log g`, `[B, Hkv, T]`: for a logit of 0, 1 - g runs from 1/32 to 1/512 over the heads."""
    # 1 - g = 2^-x at the start; a formula rather than a parameter, so that the parameters start at zero.
    x = torch.linspace(5, 9, logit.shape[1], dtype=logit.dtype, device=logit.device)
    return F.logsigmoid(logit + (x.exp2() - 1).log()[:, None])


@register
class Gated(Attention):
    """Fade a key with every token that follows; heads start with memories of different lengths."""

    name = "gated"
    formula = "phi(q_i) S_i / (phi(q_i) z_i + eps), S_i = g_i S_{i-1} + phi(k_i) v_i^T, phi = elu(x) + 1"
    cost = "O(n d^2)"
    cost_class = "linear"
    family = "maps"
    source = "Yang 2024 (GLA), Sun 2023 (RetNet)"
    stateful = True
    kinds = ("causal",)
    ops = ("gated",)
    eps = 1e-6
    unrotate = UNROTATE
    feature_map = staticmethod(elu_features)

    def __init__(self, heads, **options):
        super().__init__(heads, **options)
        self.gate = GateLogit(heads.num_key_value_heads, heads.head_dim)

    def log_gate(self, key: Tensor) -> Tensor:
        """Return the log of the gates, `[B, Hkv, T]`, from the keys `[B, Hkv, T, D]`."""
        return log_of_gate(self.gate(key))

    def weights(self, query, key, mask, scaling):
        query, key = unrotated(self, query, key, mask)
        allowed = mask.matrix(query.device)
        log_gate = self.log_gate(key).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        # Of the keys that the row sees, those behind j fade what it takes of j.
        logs = torch.where(allowed, log_gate[:, :, None, :], 0)
        decay = (logs.flip(-1).cumsum(-1).flip(-1) - logs).exp()
        kernel = (scores(self.feature_map(query), self.feature_map(key)) * decay).masked_fill(~allowed, 0)
        return kernel / (kernel.sum(-1, keepdim=True) + self.eps)

    def operations(self, rows, keys, window=None):
        heads, sums = self.heads, self.heads.value_dim + 1
        gates = 2.0 * rows * heads.num_key_value_heads * heads.head_dim
        return gates + 2.0 * rows * (heads.num_attention_heads + heads.num_key_value_heads) * heads.head_dim * sums

    def forward(self, query, key, value, mask, scaling, state=None):
        given, dtype, valid = query.dtype, compute_dtype(query.dtype), mask.new_tokens()
        query, key = unrotated(self, query, key, mask)
        log_gate, mapped_key = self.log_gate(key.to(dtype)), self.feature_map(key.to(dtype))
        if valid is not None:
            log_gate = log_gate.masked_fill(~valid[:, None], 0)
            mapped_key = mapped_key.masked_fill(~valid[:, None, :, None], 0)
        out, _, after = causal_gated(
            self.feature_map(query.to(dtype)),
            mapped_key,
            value,
            log_gate,
            state=state["S"] if state else None,
            eps=self.eps,
        )
        if state is not None:
            state["S"] = after
        return out.to(given)
