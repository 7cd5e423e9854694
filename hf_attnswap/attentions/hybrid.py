"""Compute softmax inside a window and a linear variant over all that lies before it, under one denominator: `X+window`.

The formula stands in `ops/hybrid`. Zhang et al., "LoLCATs", 2024.
"""

from dataclasses import replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from ..masks import Mask
from ..ops.heads import scores
from ..ops.hybrid import hybrid_attention
from ..ops.hybrid.reference import hybrid_weights, log_terms
from ..ops.sliding import HybridState, whole
from .base import Attention
from .counting import pairs
from .linear import LinearAttention
from .registry import derive
from .window import SINKS, WINDOW, read_state
from .within import within_window


class Hybrid(Attention):
    """Hold the linear variant X and the mix per head of `X+window`; `hybrid_of` makes the class for each X.

    In a layer with a sliding window W both sums go over the keys i - W + 1 to i: X stands for those that have left the
    window of the hybrid and not that of the layer, and sinks count as long as they are among them (`within.py`).

    Attributes:
        linear_class: the class of X. linear: an instance of X, with its feature maps.
        log_mix: log of the factor of the linear branch, `[H]`, 0 at the start.
    """

    cost_class = "linear"
    family = "maps"
    stateful = True
    kinds = ("causal",)
    slides = True
    ops = ("hybrid",)
    window = WINDOW
    sinks = SINKS
    linear_class: type[LinearAttention]

    def __init__(self, heads, **options):
        super().__init__(heads, **options)
        names = self.linear_class.options()
        self.linear = self.linear_class(heads, **{n: v for n, v in self.option_values().items() if n in names})
        self.log_mix = nn.Parameter(torch.empty(heads.num_attention_heads))
        self.reset_parameters()

    @property
    def linear_branch(self):
        return self.linear

    def reset_parameters(self):
        nn.init.zeros_(self.log_mix)

    def __reduce__(self):
        # Its class has no name in a module by which pickle could find it.
        return bare_hybrid, (self.linear_class,), self.__dict__

    def maps_and_mix(self):
        """Return the feature maps of queries and of keys, and the log of the mix per head."""
        return self.linear.feature_map_of_queries(), self.linear.feature_map_of_keys(), self.log_mix

    def seen_by_maps(self, mask: Mask) -> Mask:
        """Return the mask with the rotation only where the maps do not see it."""
        return mask if self.unrotate else replace(mask, rotation=None)

    def weights(self, query, key, mask, scaling):
        mask, where = self.seen_by_maps(mask), (scaling, self.window, self.sinks)
        return hybrid_weights(query, key, mask, *self.maps_and_mix(), *where, self.linear.log_decay())

    @torch.no_grad()
    def calibrate(self, query, key, value, mask, scaling):
        """Set the mix so that the linear term has, over all rows, the mass that softmax has outside the window."""
        query, key, mask = query.float(), key.float(), self.seen_by_maps(mask)
        allowed = mask.matrix(query.device)
        where = scaling, self.window, self.sinks
        logs, window = log_terms(query, key, mask, *self.maps_and_mix(), *where, self.linear.log_decay())
        s = (scores(query, key) * scaling).masked_fill(~allowed, float("-inf"))
        total = s.logsumexp(-1, keepdim=True)
        softmax, linear = ((t - total).exp().nan_to_num(0.0).masked_fill(window, 0).sum((0, 2, 3)) for t in (s, logs))
        # A head with nothing outside the window tells nothing.
        seen = (softmax > 0) & (linear > 0)
        self.log_mix += torch.where(seen, softmax / linear, 1).log().to(self.log_mix.dtype)

    def operations(self, rows, keys, window=None):
        near = pairs(rows, keys, window=min(self.window + self.sinks, window or keys))
        of_window = 2 * near * self.heads.num_attention_heads * (self.heads.head_dim + self.heads.value_dim)
        return of_window + self.linear.operations(rows, keys, window)

    def whole_state(self, state, tokens):
        slots = whole(read_state(state), self.window, self.sinks)
        turns = {name: F.pad(t, (0, 0, self.window - t.shape[2], 0)) for name, t in state.items() if name == "turns"}
        return state | vars(slots) | turns

    def forward(self, query, key, value, mask, scaling, state=None):
        if mask.window is not None:
            return within_window(self, query, key, value, mask, scaling, state)
        rotation = self.seen_by_maps(mask).rotation
        out, after = hybrid_attention(
            query,
            key,
            value,
            *self.maps_and_mix(),
            scaling,
            window=self.window,
            sinks=self.sinks,
            valid=mask.new_tokens(),
            state=HybridState(read_state(state), state["S"], state.get("turns")) if state else None,
            keep_state=state is not None,
            rotation=rotation,
            log_decay=self.linear.log_decay(),
        )
        if state is not None:
            state.update(vars(after.window), S=after.linear)
            if rotation is not None:
                state["turns"] = after.turns
        return out


@cache
def hybrid_of(linear: type[LinearAttention]) -> type[Hybrid]:
    """Return the class of `X+window`: the options of X and of the window, the parameters of X and a mix per head."""
    return type(
        f"{linear.__name__}Window",
        (Hybrid,),
        {
            **linear.options(),
            "__doc__": f"{linear.name} outside a softmax window.",
            "name": f"{linear.name}+window",
            "linear_class": linear,
            "formula": (
                f"softmax over window and sinks, {linear.name} outside (fading from there with half_life), "
                "one denominator, a learned mix per head"
            ),
            "cost": f"O(n (w d) + {linear.cost[2:-1]})",
            "source": f"Zhang 2024 (LoLCATs); {linear.source}",
        },
    )


def bare_hybrid(linear: type[LinearAttention]) -> Hybrid:
    """Return an `X+window` without its content, which pickle and copy fill in."""
    cls = hybrid_of(linear)
    return cls.__new__(cls)


derive("+window", lambda cls: hybrid_of(cls) if issubclass(cls, LinearAttention) and cls.hybrid else None)
