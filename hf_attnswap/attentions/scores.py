"""Define the family of variants that act on the scores: O(n^2), as softmax, whatever the activation."""

from torch import Tensor

from ..ops.scores import score_attention
from ..ops.scores.reference import score_weights, with_gain
from ..ops.spec import Activation
from .base import Attention
from .counting import pairs


class ScoreAttention(Attention):
    """Compute weights from the scores s_ij, `o_i = g_h sum_j a_ij v_j / d_i`: O(n^2 d) time, O(n d) memory.

    A variant of this family writes `activation`, which says what the a_ij and the d_i are; `head_gain` is 1 unless the
    variant says otherwise.
    """

    cost = "O(n^2 d)"
    cost_class = "quadratic"
    any_mask = True
    ops = ("scores",)

    def activation(self) -> Activation:
        """Return the weights and the denominator, with the parameters that both need."""
        raise NotImplementedError(f"{type(self).__name__} defines no activation")

    def head_gain(self) -> Tensor | None:
        """Return the factor of the output of each query head, `[H]`; None for 1."""
        return None

    def weights(self, query, key, mask, scaling):
        return score_weights(query, key, mask, scaling, self.activation())

    def reference(self, query, key, value, mask, scaling):
        return with_gain(super().reference(query, key, value, mask, scaling), self.head_gain())

    def operations(self, rows, keys, window=None):
        seen = pairs(rows, keys, self.kind == "causal", window)
        return 2 * seen * self.heads.num_attention_heads * (self.heads.head_dim + self.heads.value_dim)

    def forward(self, query, key, value, mask, scaling, state=None):
        return score_attention(query, key, value, mask, scaling, self.activation(), gain=self.head_gain())
