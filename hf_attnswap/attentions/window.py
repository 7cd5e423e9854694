"""Compute softmax over the last `window` keys and the first `sinks`: the control that every hybrid must beat.

Beltagy et al., "Longformer", 2020; Xiao et al., "Efficient streaming language models with attention sinks", 2023.
"""

from ..ops.sliding import WindowState, whole
from ..ops.window import window_attention
from ..ops.window.reference import window_weights
from .base import Attention, Option
from .counting import pairs
from .registry import register

WINDOW = Option(64, "most recent keys attended to, the token itself included", minimum=1)
SINKS = Option(4, "first tokens of the text always attended to", minimum=0)


def read_state(state: dict | None) -> WindowState | None:
    """Return what the state of a layer says of the window; None at the start of a text."""
    return WindowState(**{name: state[name] for name in WindowState.__dataclass_fields__}) if state else None


@register
class Window(Attention):
    """Forget all but the window and the sinks: what a hybrid gains over this is what its linear branch does.

    In a layer with a sliding window W, a row sees nothing beyond the last W tokens: the window is min(w, W), and sinks
    count as long as they are among these.
    """

    name = "window"
    formula = "softmax over the last w keys and the first m"
    cost = "O(n (w + m) d)"
    cost_class = "linear"
    source = "Beltagy 2020, Xiao 2023"
    control = True
    stateful = True
    kinds = ("causal",)
    slides = True
    ops = ("window",)
    window = WINDOW
    sinks = SINKS

    def weights(self, query, key, mask, scaling):
        return window_weights(query, key, mask, scaling, self.window, self.sinks)

    def operations(self, rows, keys, window=None):
        seen = pairs(rows, keys, window=min(self.window + self.sinks, window or keys))
        return 2 * seen * self.heads.num_attention_heads * (self.heads.head_dim + self.heads.value_dim)

    def whole_state(self, state, tokens):
        return vars(whole(read_state(state), self.window, self.sinks))

    def forward(self, query, key, value, mask, scaling, state=None):
        window, sinks, reach = self.window, self.sinks, mask.window
        if reach is not None and reach <= window:
            window, sinks = reach, 0  # those that the layer may still see stand in its own window
        out, after = window_attention(
            query,
            key,
            value,
            scaling,
            window=window,
            sinks=sinks,
            valid=mask.new_tokens(),
            state=read_state(state),
            keep_state=state is not None,
            reach=reach if sinks else None,
        )
        if state is not None:
            state.update(vars(after))
        return out
