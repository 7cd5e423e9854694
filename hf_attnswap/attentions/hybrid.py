"""Softmax inside a window, a linear variant for all that lies before it, one shared denominator.

W_i: the last `window` keys and the first `sinks`. With phi the linear variant's map and g_h a learned mix per head,

o_i = (sum_{j in W_i} e^{s_ij} v_j + g_h sum_{j not in W_i} phi(q_i).phi(k_j) v_j) / (the same sums without v_j).

Zhang et al., "LoLCATs", 2024. There the row maximum is subtracted inside the window only, which gives the linear branch
another scale in every row; here it is subtracted from both, so it changes nothing but the range of the numbers. For the
same reason a map that normalises its queries (hedgehog) leaves that out here: beside a softmax it would not cancel.
"""

from functools import cache

import torch
from torch import nn

from ..ops.heads import scores
from ..ops.linear import causal_linear
from ..ops.window import context
from .base import Attention, LinearAttention
from .window import Window, near, read_state


class Hybrid(Attention):
    """`X+window` for a linear variant X, made by `hybrid_of`."""

    cost_class = "linear"
    stateful = True
    kinds = ("causal",)
    window, sinks = (Window.options()[name] for name in ("window", "sinks"))
    linear_class: type[LinearAttention]

    def __init__(self, heads, **options):
        super().__init__(heads, **options)
        own = self.linear_class.options()
        self.linear = self.linear_class(heads, **{n: v for n, v in self.option_values().items() if n in own})
        self.log_mix = nn.Parameter(torch.empty(heads.num_attention_heads))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.zeros_(self.log_mix)

    def weights(self, query, key, mask, scaling):
        logs, _ = self._log_weights(query, key, mask.matrix(query.device), scaling)
        return torch.softmax(logs, dim=-1).nan_to_num(0.0)

    def _log_weights(self, query, key, allowed, scaling):
        """Logs of the terms of both sums, `[B, H, T, S]`, and which of them stand in the window. O(n^2)."""
        window = near(allowed, self.window, self.sinks)
        kernel = scores(self.linear.map_query_beside_softmax(query), self.linear.map_key(key))
        outside = self._log_scale(query) + _log(kernel)
        logs = torch.where(window, scores(query, key) * scaling, outside)
        return logs.masked_fill(~allowed | (~window & (kernel <= _NO_MASS)), float("-inf")), window

    def _log_scale(self, query):
        """Log of the factor of the linear term in each row, `[B, H, T, 1]`."""
        mix = self.log_mix.to(query.dtype)[:, None, None]
        scale = self.linear.query_log_scale(query)
        return mix.expand(*query.shape[:3], 1) if scale is None else mix + scale

    @torch.no_grad()
    def calibrate(self, query, key, value, mask, scaling):
        """Set the mix so that the linear term has, over all rows, the mass that softmax has outside the window."""
        query, key = query.float(), key.float()
        allowed = mask.matrix(query.device)
        logs, window = self._log_weights(query, key, allowed, scaling)
        s = (scores(query, key) * scaling).masked_fill(~allowed, float("-inf"))
        total = s.logsumexp(-1, keepdim=True)
        softmax, ours = ((t - total).exp().nan_to_num(0.0).masked_fill(window, 0).sum((0, 2, 3)) for t in (s, logs))
        # A head of which nothing lies outside tells nothing.
        seen = (softmax > 0) & (ours > 0)
        self.log_mix += torch.where(seen, softmax / ours, 1).log().to(self.log_mix.dtype)

    def forward(self, query, key, value, mask, scaling, state=None):
        at = context(query, key, value, mask.new_tokens(), self.window, self.sinks, read_state(state))
        numerator, denominator, c = at.softmax_parts(scaling)
        leaving_key, leaving_value, leaving = at.leaving()
        linear_numerator, linear_denominator, after = causal_linear(
            at.query,
            leaving_key,
            leaving_value,
            self.linear.map_query_beside_softmax,
            self.linear.map_key,
            parameters=tuple(self.linear.parameters()),
            key_mask=leaving.expand(query.shape[0], -1),
            state=state["S"] if state else None,
            eps=None,
        )
        # Each branch is a mean with the log of its mass; their softmax weighs them, and nothing can overflow.
        nothing = torch.finfo(c.dtype).min
        linear_denominator = linear_denominator[..., None]
        window_mass = c + _log(denominator)
        linear_mass = self._log_scale(at.query.to(c.dtype)) + _log(linear_denominator)
        linear_mass = linear_mass.masked_fill(linear_denominator <= _NO_MASS, nothing)
        share = torch.softmax(torch.cat([window_mass, linear_mass], dim=-1), dim=-1)
        out = numerator * (share[..., :1] / _one_for_zero(denominator))
        out = out + linear_numerator * (share[..., 1:] / _one_for_zero(linear_denominator))
        if state is not None:
            state.update(vars(at.state()), S=after)
        return at.unalign(out).to(query.dtype)


# Less mass than this counts as none: its reciprocal would overflow in the gradient.
_NO_MASS = 1e-30


def _one_for_zero(x):
    return torch.where(x > _NO_MASS, x, 1)


def _log(x):
    """log(x), and 0 where x is 0: there is nothing to weigh, and no gradient to spoil."""
    return _one_for_zero(x).log()


@cache
def hybrid_of(linear: type[LinearAttention]) -> type[Hybrid]:
    """The class of `X+window`: the options of X and of the window, the parameters of X and a mix per head."""
    return type(
        f"{linear.__name__}Window",
        (Hybrid,),
        {
            **linear.options(),
            "__doc__": f"{linear.name} outside a softmax window.",
            "name": f"{linear.name}+window",
            "linear_class": linear,
            "formula": f"softmax over window and sinks, {linear.name} outside, one denominator, a learned mix per head",
            "cost": f"O(n (w d) + {linear.cost[2:-1]})",
            "source": f"Zhang 2024 (LoLCATs); {linear.source}",
        },
    )
