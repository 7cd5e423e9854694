"""Softmax inside a window, a linear variant for all that lies before it, one shared denominator.

W_i: the last `window` keys and the first `sinks`. With phi the linear variant's map and g_h a learned mix per head,

o_i = (sum_{j in W_i} e^{s_ij} v_j + g_h sum_{j not in W_i} phi(q_i).phi(k_j) v_j) / (the same sums without v_j).

Zhang et al., "LoLCATs", 2024. There the row maximum is subtracted inside the window only, which gives the linear branch
another scale in every row; here it is subtracted from both, so it changes nothing but the range of the numbers.
"""

from functools import cache

import torch
from torch import nn

from ..ops.heads import scores
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
        inside = near(allowed, self.window, self.sinks)
        s = (scores(query, key) * scaling).masked_fill(~inside, float("-inf"))
        c = s.amax(-1, keepdim=True).clamp(min=0)
        mix = (self.log_mix.to(s.dtype)[:, None, None] - c).exp()
        outside = mix * self.linear.kernel(query, key, scaling).masked_fill(~(allowed & ~inside), 0)
        total = torch.exp(s - c) + outside
        return total / total.sum(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)

    def forward(self, query, key, value, mask, scaling, state=None):
        at = context(query, key, value, mask.new_tokens(), self.window, self.sinks, read_state(state))
        numerator, denominator, c = at.softmax_parts(scaling)
        leaving_key, leaving_value, leaving = at.leaving()
        before = state["S"] if state else None
        linear_numerator, linear_denominator, after = self.linear.accumulate(
            at.query, leaving_key, leaving_value, scaling, leaving.expand(query.shape[0], -1), before, eps=None
        )
        # One maximum for both terms; at least 0, so that neither factor can overflow.
        largest = c.clamp(min=0)
        inside = (c - largest).exp()
        outside = (self.log_mix.to(c.dtype)[:, None, None] - largest).exp()
        numerator = inside * numerator + outside * linear_numerator
        denominator = inside * denominator + outside * linear_denominator[..., None]
        if state is not None:
            state.update(vars(at.state()), S=after)
        return at.unalign(numerator / denominator.clamp(min=torch.finfo(c.dtype).tiny)).to(query.dtype)


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
