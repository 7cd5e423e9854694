"""Compute attention by the gated delta rule: a token fades the state, and overwrites what it holds for its key.

S_i = g_i S_{i-1} (I - beta_i k_i k_i^T) + beta_i v_i k_i^T, o_i = S_i q_i, with q and k the silu of the layer's,
brought to norm 1; per key/value head beta_i = sigmoid(w . k_i + b), 0.5 at the start, and g_i as in `gated`, so that
heads start with memories of about 32 to 512 tokens. Yang et al., "Gated delta networks: improving Mamba2 with delta
rule", 2024. O(n d^2).
"""

from torch import Tensor

from ..ops.gated_delta import causal_gated_delta
from ..ops.heads import compute_dtype
from .delta import Delta
from .gated import GateLogit, log_of_gate
from .linear import unrotated
from .registry import register


@register
class GatedDelta(Delta):
    """Fade the state, and overwrite the value of a key that comes again; weights are signed, do not sum to one."""

    name = "gated_delta"
    formula = "S_i q_i, S_i = g_i S_{i-1} (I - beta_i k_i k_i^T) + beta_i v_i k_i^T, q, k = silu(x) / |silu(x)|"
    source = "Yang 2024 (Gated DeltaNet)"
    ops = ("gated_delta",)

    def __init__(self, heads, **options):
        super().__init__(heads, **options)
        self.fade = GateLogit(heads.num_key_value_heads, heads.head_dim)

    def log_gate(self, key: Tensor) -> Tensor | None:
        """Return the log of what each token leaves of the state, `[B, Hkv, T]`, from its key `[B, Hkv, T, D]`."""
        return log_of_gate(self.fade(key))

    def operations(self, rows, keys, window=None):
        fade = 2.0 * rows * self.heads.num_key_value_heads * self.heads.head_dim
        return fade + super().operations(rows, keys, window)

    def forward(self, query, key, value, mask, scaling, state=None):
        given, dtype, valid = query.dtype, compute_dtype(query.dtype), mask.new_tokens()
        query, key = unrotated(self, query, key, mask)
        beta, log_gate = self.beta(key.to(dtype)), self.log_gate(key.to(dtype))
        if valid is not None:
            beta, log_gate = beta * valid[:, None].to(dtype), log_gate.masked_fill(~valid[:, None], 0)
        out, after = causal_gated_delta(
            self.feature_map(query.to(dtype)),
            self.feature_map(key.to(dtype)),
            value,
            beta,
            log_gate,
            state=state["S"] if state else None,
        )
        if state is not None:
            state["S"] = after
        return out.to(given)
