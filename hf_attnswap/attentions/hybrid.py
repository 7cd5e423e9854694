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

from ..ops.backends import Op
from ..ops.chunks import from_chunks, to_chunks
from ..ops.heads import compute_dtype, scores
from ..ops.linear import linear_block, linear_step, values_with_ones
from ..ops.rows import by_rows
from ..ops.window import Step, context
from .base import Attention, by_definition, needs_state
from .linear import LinearAttention
from .window import Window, near, read_state

_hybrid = Op("hybrid")


class Hybrid(Attention):
    """`X+window` for a linear variant X, made by `hybrid_of`."""

    cost_class = "linear"
    family = "maps"
    stateful = True
    kinds = ("causal",)
    ops = ("hybrid",)
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
        features, left_out = self.linear.map_query_beside_softmax(query)
        kernel = scores(features, self.linear.map_key(key))
        outside = self._log_scale(query, left_out) + _log(kernel)
        logs = torch.where(window, scores(query, key) * scaling, outside)
        return logs.masked_fill(~allowed | (~window & (kernel <= _NO_MASS)), float("-inf")), window

    def _log_scale(self, query, left_out):
        """Log of the factor of the linear term in each row, `[B, H, T, 1]`."""
        mix = self.log_mix.to(query.dtype)[:, None, None].expand(*query.shape[:3], 1)
        return mix if left_out is None else mix + left_out

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
        return _hybrid(self, query, key, value, mask, scaling, state)

    def _fast(self, query, key, value, mask, scaling, state):
        at = context(query, key, value, mask.new_tokens(), self.window, self.sinks, read_state(state))
        dtype = compute_dtype(query.dtype)
        if state:
            S = state["S"].to(dtype)
        else:
            features = self.linear.map_key(key[:, :, :1].to(dtype)).shape[-1]
            S = key.new_zeros(*key.shape[:2], features, value.shape[-1] + 1, dtype=dtype)
        if isinstance(at, Step):
            leaving_key, leaving_value, leaving = at.leaving()
            x = query.to(dtype)
            features, left_out = self.linear.map_query_beside_softmax(x)
            k = self.linear.map_key(leaving_key.to(dtype))
            k = k if leaving is None else k * leaving[:, None, :, None].to(dtype)
            linear, S = linear_step(features, k, leaving_value, S)
            out = _joined(*at.softmax_parts(scaling), linear, self._log_scale(x, left_out))
        else:
            leaving = at.leaving()

            def attend(query, key, value, bias, tile, S):
                size, kv_heads, new = at.chunk_of(query), key.shape[1], slice(0, query.shape[2])
                x = query.to(dtype)
                features, left_out = self.linear.map_query_beside_softmax(x)
                k = self.linear.map_key(key[:, :, new].to(dtype)) * leaving[:, None, tile.rows, None].to(dtype)
                q, k, log_scale = (to_chunks(t, kv_heads, size) for t in (features, k, self._log_scale(x, left_out)))
                linear, S = linear_block(q, k, values_with_ones(value[:, :, new], size, dtype), S)
                out = _joined(*at.softmax_parts(query, key, value, tile, scaling), linear, log_scale)
                return (from_chunks(out, query.shape[0], size),), S

            parameters = (at.sink_key, at.sink_value, *self.parameters())
            (out,), S = by_rows(attend, at.query, at.key, at.value, at.tiles(), parameters, carry=S.flatten(0, 1))
            out, S = at.unalign(out), S.unflatten(0, key.shape[:2])
        if state is not None:
            state.update(vars(at.state()), S=S)
        return out.to(query.dtype)


_hybrid.form("torch")(Hybrid._fast)
_hybrid.form("reference", needs_state)(by_definition)


def _joined(numerator, denominator, c, linear, log_scale):
    """The result of rows, from the parts of both branches `[..., Dv]`, `[..., 1]`, `[..., 1]` and `[..., Dv + 1]`.

    Each branch is a mean with the log of its mass; a sigmoid of the difference weighs them, and nothing can overflow.
    """
    linear_numerator, linear_denominator = linear[..., :-1], linear[..., -1:]
    linear_mass = log_scale + _log(linear_denominator)
    linear_mass = linear_mass.masked_fill(linear_denominator <= _NO_MASS, torch.finfo(c.dtype).min)
    lead = (c + _log(denominator)).sub(linear_mass)
    out = numerator * (torch.sigmoid(lead) / _one_for_zero(denominator))
    return torch.addcmul(out, linear_numerator, torch.sigmoid(-lead) / _one_for_zero(linear_denominator))


# Less mass than this counts as none: its reciprocal would overflow in the gradient.
_NO_MASS = 1e-30


def _one_for_zero(x):
    return x.masked_fill(x <= _NO_MASS, 1)


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
