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

    def weights(self, query, key, allowed, scaling):
        inside, outside, _ = self._terms(query, key, allowed, scaling)
        total = inside + outside
        return total / _one_for_zero(total.sum(-1, keepdim=True))

    def _terms(self, query, key, allowed, scaling):
        """The two sums term by term, `[B, H, T, S]`, both times e^{-c}, c the largest log; and c `[B, H, T, 1]`. O(n^2)."""
        window = near(allowed, self.window, self.sinks)
        s = (scores(query, key) * scaling).masked_fill(~window, float("-inf"))
        scale = self._log_scale(query)
        kernel = scores(self.linear.map_query_beside_softmax(query), self.linear.map_key(key))
        kernel = kernel.masked_fill(~(allowed & ~window), 0)
        c = _largest(s.amax(-1, keepdim=True), scale, kernel.amax(-1, keepdim=True))
        return torch.exp(s - c), kernel * (scale - c).clamp(max=_MAX_EXPONENT).exp(), c

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
        _, outside, c = self._terms(query, key, allowed, scaling)
        window = near(allowed, self.window, self.sinks)
        s = (scores(query, key) * scaling).masked_fill(~allowed, float("-inf"))
        share = torch.softmax(s, -1).nan_to_num(0.0).masked_fill(window, 0).sum((0, 2, 3))
        ours = (outside * (c - s.logsumexp(-1, keepdim=True)).exp()).nan_to_num(0.0).sum((0, 2, 3))
        # A head of which nothing lies outside tells nothing.
        seen = (share > 0) & (ours > 0)
        self.log_mix += torch.where(seen, share / ours, 1).log().to(self.log_mix.dtype)

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
        scale = self._log_scale(at.query.to(c.dtype))
        largest = _largest(c, scale, linear_denominator[..., None])
        inside, outside = (c - largest).exp(), (scale - largest).clamp(max=_MAX_EXPONENT).exp()
        numerator = inside * numerator + outside * linear_numerator
        denominator = inside * denominator + outside * linear_denominator[..., None]
        if state is not None:
            state.update(vars(at.state()), S=after)
        return at.unalign(numerator / _one_for_zero(denominator)).to(query.dtype)


# A linear term so small that its factor would need more is lost beside any other; e^80 is finite in float32.
_MAX_EXPONENT = 80.0


@torch.no_grad()
def _largest(c, scale, linear):
    """The one maximum that both terms are divided by: log of the larger of e^c and e^scale linear.

    The result does not depend on it, so it is a constant to the gradient.
    """
    largest = torch.maximum(c, scale + linear.clamp(min=0).log())
    return largest.clamp(min=torch.finfo(c.dtype).min)


def _one_for_zero(denominator):
    """Rows of padding may see nothing: 0 / 1, not 0 / 0."""
    return torch.where(denominator > 0, denominator, 1)


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
