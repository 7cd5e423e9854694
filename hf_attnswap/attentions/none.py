"""Leave attention out, o_i = 0: the control that says how much the task needs attention."""

from .base import Attention
from .registry import register


@register
class NoAttention(Attention):
    """Return zero from every head; the rest of the layer still runs."""

    name = "none"
    formula = "0"
    cost = "0"
    cost_class = "constant"
    source = "control"
    control = True
    stateful = True
    any_mask = True

    def weights(self, query, key, mask, scaling):
        return query.new_zeros(*query.shape[:3], key.shape[2])

    def operations(self, rows, keys, window=None):
        return 0.0

    def forward(self, query, key, value, mask, scaling, state=None):
        batch, heads, length, _ = query.shape
        # Tied to the inputs so that a backward pass through the model finds a (zero) gradient.
        return value.new_zeros(batch, heads, length, value.shape[-1]) + 0 * value[:, :1, :1, :1]
