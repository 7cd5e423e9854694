"""Softmax over the last `window` keys and the first `sinks`: the control that every hybrid must beat.

Beltagy et al., "Longformer", 2020; Xiao et al., "Efficient streaming language models with attention sinks", 2023.
"""

import torch

from ..ops.backends import Op
from ..ops.chunks import from_chunks
from ..ops.heads import scores
from ..ops.rows import by_rows
from ..ops.window import Step, WindowState, context
from .base import Attention, Option, by_definition, needs_state
from .registry import register

_window = Op("window")
WINDOW_STATE = WindowState.__dataclass_fields__


def near(allowed: torch.Tensor, window: int, sinks: int) -> torch.Tensor:
    """Of the keys each row may attend to, the last `window` and the first `sinks`. O(n^2), for definitions."""
    rank = allowed.long().cumsum(-1)
    count = rank[..., -1:]
    return allowed & ((rank > count - window) | (rank <= sinks))


def read_state(state: dict | None) -> WindowState | None:
    return WindowState(**{name: state[name] for name in WINDOW_STATE}) if state else None


@register
class Window(Attention):
    """Forgets all else: what a hybrid gains over this is what its linear branch does."""

    name = "window"
    formula = "softmax over the last w keys and the first m"
    cost = "O(n (w + m) d)"
    cost_class = "linear"
    source = "Beltagy 2020, Xiao 2023"
    control = True
    stateful = True
    kinds = ("causal",)
    ops = ("window",)
    window = Option(64, "most recent keys attended to, the token itself included", minimum=1)
    sinks = Option(4, "first tokens of the text always attended to", minimum=0)

    def weights(self, query, key, mask, scaling):
        s = scores(query * scaling, key)
        s = s.masked_fill(~near(mask.matrix(query.device), self.window, self.sinks), float("-inf"))
        return torch.softmax(s, dim=-1).nan_to_num(0.0)

    def forward(self, query, key, value, mask, scaling, state=None):
        return _window(self, query, key, value, mask, scaling, state)

    def _fast(self, query, key, value, mask, scaling, state):
        at = context(query, key, value, mask.new_tokens(), self.window, self.sinks, read_state(state))
        if isinstance(at, Step):
            numerator, denominator, _ = at.softmax_parts(scaling)
            out = numerator / denominator
        else:

            def attend(query, key, value, bias, tile, carry):
                numerator, denominator, _ = at.softmax_parts(query, key, value, tile, scaling)
                # Every valid row sees itself, so its denominator is at least 1.
                out = numerator / denominator.clamp(min=1)
                return (from_chunks(out, query.shape[0], at.chunk_of(query)),), carry

            (out,), _ = by_rows(attend, at.query, at.key, at.value, at.tiles(), (at.sink_key, at.sink_value))
            out = at.unalign(out)
        if state is not None:
            state.update(vars(at.state()))
        return out.to(query.dtype)


_window.form("torch")(Window._fast)
_window.form("reference", needs_state)(by_definition)
