"""Compute attention by the delta rule: a token overwrites the value that the state holds for its key.

Linear attention only adds to the state. S_i = S_{i-1} (I - beta_i k_i k_i^T) + beta_i v_i k_i^T, o_i = S_i q_i, with q
and k the silu of the layer's, brought to norm 1, and beta_i = sigmoid(w . k_i + b) per key/value head, 0.5 at the
start. Schlag et al., "Linear transformers are secretly fast weight programmers", 2021; silu and the norm as in Yang et
al., "Parallelizing linear transformers with the delta rule over sequence length", 2024. O(n d^2).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.delta import causal_delta
from ..ops.heads import compute_dtype
from .base import Attention
from .gated import GateLogit
from .linear import UNROTATE, unrotated
from .registry import register


@register
class Delta(Attention):
    """Overwrite the value of a key that comes again; weights are signed and do not sum to one."""

    name = "delta"
    formula = "S_i q_i, S_i = S_{i-1} (I - beta_i k_i k_i^T) + beta_i v_i k_i^T, q, k = silu(x) / |silu(x)|"
    cost = "O(n d^2)"
    cost_class = "linear"
    family = "maps"
    source = "Schlag 2021, Yang 2024 (DeltaNet)"
    stateful = True
    kinds = ("causal",)
    ops = ("delta",)
    unrotate = UNROTATE

    def __init__(self, heads, **options):
        super().__init__(heads, **options)
        self.gate = GateLogit(heads.num_key_value_heads, heads.head_dim)

    def feature_map(self, x: Tensor) -> Tensor:
        """Return silu(x) divided by its norm, in the shape of x; the norm is less than 1 where silu(x) is nearly 0."""
        y = F.silu(x)
        return y * (y.square().sum(-1, keepdim=True) + 1e-6).rsqrt()

    def beta(self, key: Tensor) -> Tensor:
        """Return how far each token overwrites, `[B, Hkv, T]` in (0, 1), from its key `[B, Hkv, T, D]`."""
        return torch.sigmoid(self.gate(key))

    def log_gate(self, key: Tensor) -> Tensor | None:
        """Return the log of what each token leaves of the state, `[B, Hkv, T]`; None: all of it."""
        return None

    def weights(self, query, key, mask, scaling):
        query, key = unrotated(self, query, key, mask)
        allowed = mask.matrix(query.device)
        group = query.shape[1] // key.shape[1]
        beta = self.beta(key).repeat_interleave(group, dim=1)
        k = self.feature_map(key).repeat_interleave(group, dim=1)
        log_gate = self.log_gate(key)
        gate = torch.ones_like(beta) if log_gate is None else log_gate.exp().repeat_interleave(group, dim=1)
        # From the last key back to the first: what the row takes of a key, and the query that those before it are left.
        left, taken = self.feature_map(query), []
        for j in reversed(range(key.shape[2])):
            k_j = k[:, :, j, :, None]
            w = (left @ k_j) * beta[:, :, j, None, None] * allowed[..., j, None]
            left = left - w * k_j.transpose(-1, -2)
            left = torch.where(allowed[..., j, None], left * gate[:, :, j, None, None], left)
            taken.append(w)
        return torch.cat(taken[::-1], dim=-1)

    def operations(self, rows, keys, window=None):
        """Return the operations of the gates, of reading and overwriting a key's value, and of the queries."""
        heads = self.heads
        gates = 2.0 * rows * heads.num_key_value_heads * heads.head_dim
        per_state = 2 * heads.num_key_value_heads + heads.num_attention_heads
        return gates + 2.0 * rows * per_state * heads.head_dim * heads.value_dim

    def forward(self, query, key, value, mask, scaling, state=None):
        given, dtype, valid = query.dtype, compute_dtype(query.dtype), mask.new_tokens()
        query, key = unrotated(self, query, key, mask)
        beta = self.beta(key.to(dtype))
        if valid is not None:
            beta = beta * valid[:, None].to(dtype)
        out, after = causal_delta(
            self.feature_map(query.to(dtype)),
            self.feature_map(key.to(dtype)),
            value,
            beta,
            state=state["S"] if state else None,
        )
        if state is not None:
            state["S"] = after
        return out.to(given)
