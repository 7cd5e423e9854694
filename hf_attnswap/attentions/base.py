"""What a variant is: its description, its definition, its parameters, and its fast form."""

import difflib
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..masks import Mask
from ..ops.backends import Op, in_large_kernels
from ..ops.heads import compute_dtype, mix, scores
from ..ops.linear import causal_linear, full_linear
from ..ops.rows import Tile, by_rows, rows_per_tile
from ..ops.scores import WORTH_IT, blocked_scores

# What an attention module does: a text to its own past, a text to itself, a text to another.
KINDS = ("causal", "bidirectional", "cross")

_scores = Op("scores")


@dataclass(frozen=True)
class Heads:
    """The shape of one attention module. Query heads share key/value heads in equal groups.

    `value_dim`, the width of a value, is that of a key where it is not given.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    value_dim: int = 0

    def __post_init__(self):
        if not self.value_dim:
            object.__setattr__(self, "value_dim", self.head_dim)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )


@dataclass(frozen=True)
class Option:
    """A setting of a variant, declared as a class attribute: `window = Option(64, "most recent keys", minimum=1)`."""

    default: Any
    help: str
    minimum: float | None = None
    choices: tuple | None = None

    def check(self, attention: str, name: str, value: Any) -> Any:
        """The value, with an int taken for a float; ValueError where it is not of the default's type or range."""
        kind = type(self.default)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(
                f"{attention}: {name} is {value!r}; expected {kind.__name__}, for example {self.default!r}"
            )
        if self.choices is not None and value not in self.choices:
            raise ValueError(f"{attention}: {name} is {value!r}; expected one of {', '.join(map(str, self.choices))}")
        if self.minimum is not None and not value >= self.minimum:
            raise ValueError(f"{attention}: {name} is {value!r}; expected at least {self.minimum}")
        if value == math.inf:
            raise ValueError(f"{attention}: {name} is {value!r}; expected a finite number")
        return value


class Attention(nn.Module):
    """Base of all variants. One instance stands on each swapped attention module and holds its parameters.

    A variant sets the class attributes, writes `weights` (the definition) and either inherits a fast form from
    `ScoreAttention` or `LinearAttention` or writes `forward`.

    Attributes:
        name: what the user types. formula: o_i in one line. source: paper, year.
        cost: time per head. cost_class: "quadratic", "linear" or "constant" in the number of keys.
        control: True for what every comparison needs and nobody would deploy.
        stateful: keeps a state of constant size in place of keys and values when generating.
        kinds: the kinds of attention that it can stand in for, of `KINDS`.
        kind, place: of the module it stands on: one of `KINDS`, and its layer in words.
        ops: the ops of `hf_attnswap.ops.backends` that its fast form is made of; none where it is one call of torch.
        any_mask: takes any mask, and a bias, a soft cap and sinks beside the scores. The others take causal and
            bidirectional masks with padding, and packed texts.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    cost: ClassVar[str]
    cost_class: ClassVar[str]
    source: ClassVar[str]
    control: ClassVar[bool] = False
    stateful: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = KINDS
    any_mask: ClassVar[bool] = False
    ops: ClassVar[tuple[str, ...]] = ()
    kind: str = "causal"
    place: str = "attention"

    def __init__(self, heads: Heads, **options: Any):
        super().__init__()
        self.heads = heads
        for name, value in self.check_options(options).items():
            setattr(self, name, value)

    @classmethod
    def options(cls) -> dict[str, Option]:
        """The options declared by the class and its bases, by name."""
        return {n: o for base in reversed(cls.__mro__) for n, o in vars(base).items() if isinstance(o, Option)}

    @classmethod
    def check_options(cls, given: dict[str, Any]) -> dict[str, Any]:
        """All options with their values; ValueError, with a suggestion, for an unknown name or an unfit value."""
        known = cls.options()
        for name in given:
            if name not in known:
                raise ValueError(
                    f"{cls.name} has no option {name!r}.{suggestion(name, known)} "
                    f"Its options: {', '.join(known) or 'none'}"
                )
        return {n: o.check(cls.name, n, given.get(n, o.default)) for n, o in known.items()}

    def option_values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.options()}

    def reset_parameters(self) -> None:
        """Initialise own parameters, with `torch.nn.init` functions only (transformers guards those while loading)."""

    def weights(self, query: Tensor, key: Tensor, mask: Mask, scaling: float) -> Tensor:
        """The definition: row i of the result holds what o_i takes of each value.

        Args:
            query: `[B, H, T, D]`; key: `[B, Hkv, S, D]`, both after the position encoding.
            mask: which keys each row may attend to.
            scaling: factor of the scores.

        Returns:
            `[B, H, T, S]`, in the dtype of the query; rows that may attend to nothing are zero.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no weights")

    def reference(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float) -> Tensor:
        """O(n^2) result straight from the definition, `[B, H, T, Dv]`; in float64 where the inputs are."""
        return mix(self.weights(query, key, mask, scaling), value)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask,
        scaling: float,
        state: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The fast form.

        Args:
            query: `[B, H, T, D]`; key: `[B, Hkv, S, D]`; value: `[B, Hkv, S, Dv]`.
            mask: who may attend to whom.
            scaling: factor of the scores.
            state: for stateful variants, what is remembered of earlier tokens, batch first; empty at the start of a
                text, filled by this call. Then S = T: the keys are those of the new tokens only.

        Returns:
            `[B, H, T, Dv]` in the query's dtype.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def calibrate(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float) -> None:
        """Set parameters from what the layer sees, before training; shapes as in `forward`. Most variants need none."""

    def extra_repr(self) -> str:
        return ", ".join(f"{n}={v!r}" for n, v in self.option_values().items())


def suggestion(name: str, known) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def by_definition(attention: Attention, query, key, value, mask, scaling, state=None) -> Tensor:
    """The `reference` form of a whole variant."""
    dtype = compute_dtype(query.dtype)
    return attention.reference(*(t.to(dtype) for t in (query, key, value)), mask, scaling).to(query.dtype)


def needs_state(attention: Attention, query, key, value, mask, scaling, state=None) -> str | None:
    """Why `by_definition` cannot serve a call."""
    return None if state is None else "the definition keeps no state for generation"


class ScoreAttention(Attention):
    """Variants that act on the scores s_ij: O(n^2 d) time, and O(n d) memory by tiles of rows.

    o_i = sum_j a_ij v_j / d_i. A variant of this family writes `activate` (the a_ij) and `denominator` (the d_i).

    Attributes:
        needs_peak: `activate` wants the largest score of each row.
        needs_total: `denominator` wants the sum of the a_ij.
    """

    cost = "O(n^2 d)"
    cost_class = "quadratic"
    any_mask = True
    ops = ("scores",)
    needs_peak: ClassVar[bool] = False
    needs_total: ClassVar[bool] = False

    def activate(self, scores: Tensor, count: Tensor, peak: Tensor | None, heads: slice) -> Tensor:
        """The a_ij, one by one from the scores times `score_factor`, which it may overwrite.

        Args:
            scores: `[..., h, t, s]`, -inf where the row may not attend to the key; the result must be 0 there.
            count: how many keys each row may attend to, at least 1; broadcastable to `[..., h, t, 1]`.
            peak: the largest score of each row, -inf where it may attend to nothing; None unless `needs_peak`.
            heads: which query heads these are.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no activate")

    def denominator(self, total: Tensor | None, count: Tensor) -> Tensor | None:
        """The d_i, `[B, H, T, 1]` or 1 in places, from the sum of the a_ij (None unless `needs_total`); None for 1."""
        return None

    def score_factor(self) -> float | Tensor:
        """A factor of all scores, a number or `[H, 1, 1]`: cheaper on the queries than in `activate`."""
        return 1.0

    def finish(self, out: Tensor) -> Tensor:
        """What is left to do with `sum_j w_ij v_j`, `[B, H, t, Dv]`."""
        return out

    def weights(self, query, key, mask, scaling):
        everything = Tile(slice(0, mask.query_length), slice(0, mask.key_length), mask.matrix(query.device))
        weights, denominator = self._parts(query, key, everything, mask, mask.bias, scaling)
        weights = weights if denominator is None else weights / denominator
        return weights if mask.sinks is None else weights[..., :-1]

    def reference(self, query, key, value, mask, scaling):
        return self.finish(super().reference(query, key, value, mask, scaling))

    def _parts(self, query, key, tile: Tile, mask: Mask, bias, scaling) -> tuple[Tensor, Tensor | None]:
        """The a_ij (with those of the sinks as last column) and the d_i of a tile."""
        factor = self.score_factor()
        if torch.is_tensor(factor):
            factor = factor.to(query.dtype)
        if bias is None and mask.softcap is None and mask.sinks is None:
            s = scores(query * (scaling * factor), key)
        else:
            s = scores(query * scaling, key)
            if mask.softcap is not None:
                s = mask.softcap * torch.tanh(s / mask.softcap)
            if bias is not None:
                s = s + bias
            s = s * factor
        s = forbid(s, tile)
        count = tile.count()
        if mask.sinks is not None:
            sinks = (mask.sinks.to(s.dtype)[:, None, None] * factor).expand(*s.shape[:-1], 1)
            s, count = torch.cat([s, sinks], dim=-1), count + 1
        peak = s.amax(-1, keepdim=True) if self.needs_peak else None
        weights = self.activate(s, count, peak, slice(None))
        total = weights.sum(-1, keepdim=True) if self.needs_total else None
        return weights, self.denominator(total, count.to(weights.dtype))

    def forward(self, query, key, value, mask, scaling, state=None):
        return _scores(self, query, key, value, mask, scaling)

    def _attend(self, query, key, value, bias, tile: Tile, mask: Mask, scaling: float) -> Tensor:
        """The rows of one tile."""
        dtype = compute_dtype(query.dtype)
        bias = None if bias is None else bias.to(dtype)
        weights, denominator = self._parts(query.to(dtype), key.to(dtype), tile, mask, bias, scaling)
        out = mix(weights if mask.sinks is None else weights[..., :-1], value.to(dtype))
        out = out if denominator is None else out / denominator
        return self.finish(out).to(query.dtype)

    def _by_tiles(self, query, key, value, mask: Mask, scaling: float) -> Tensor:
        def attend(query, key, value, bias, tile: Tile, carry):
            return (self._attend(query, key, value, bias, tile, mask, scaling),), carry

        size = rows_per_tile(query.shape[0], query.shape[1], key.shape[2])
        parameters = [*self.parameters(), *([] if mask.sinks is None else [mask.sinks])]
        (out,), _ = by_rows(attend, query, key, value, mask.tiles(size, query.device), parameters, mask.bias)
        return out

    def _one_row(self, query, key, value, mask: Mask, scaling: float) -> Tensor:
        tile = Tile(slice(None), slice(None), mask.matrix(query.device))
        return self._attend(query, key, value, mask.bias, tile, mask, scaling)

    def _fits_blocks(self, query, key, mask: Mask) -> bool:
        """Whether blocks of scores in a CPU's cache serve the call, and are worth it."""
        scores_per_head = query.shape[2] * key.shape[2] * query.shape[1] // key.shape[1]
        simple = mask.plain and mask.valid is None and not (torch.is_grad_enabled() and self.needs_peak)
        return simple and scores_per_head >= WORTH_IT and not in_large_kernels(query)

    def _blocked(self, query, key, value, mask: Mask, scaling: float) -> Tensor:
        dtype, group = compute_dtype(query.dtype), query.shape[1] // key.shape[1]

        def activate(kv_head: int, scores: Tensor, count: Tensor, peak: Tensor | None) -> Tensor:
            return self.activate(scores, count, peak, slice(kv_head * group, (kv_head + 1) * group))

        out, total = blocked_scores(
            query.to(dtype) * (scaling * self.score_factor()),
            key,
            value,
            activate,
            causal=mask.causal,
            needs_peak=self.needs_peak,
            needs_total=self.needs_total,
            parameters=tuple(self.parameters()),
        )
        rows = torch.arange(query.shape[2], device=query.device) + mask.offset + 1
        count = rows[:, None] if mask.causal else torch.full_like(rows, key.shape[2])[:, None]
        denominator = self.denominator(total, count.to(dtype))
        out = out if denominator is None else out / denominator
        return self.finish(out).to(query.dtype)


@_scores.form("torch")
def _scores_torch(attention: ScoreAttention, query, key, value, mask, scaling):
    if query.shape[2] == 1:
        form = attention._one_row
    else:
        form = attention._blocked if attention._fits_blocks(query, key, mask) else attention._by_tiles
    return form(query, key, value, mask, scaling)


_scores.form("reference")(by_definition)


def forbid(scores: Tensor, tile: Tile) -> Tensor:
    """-inf where the tile does not allow; in place where no gradient is wanted."""
    if torch.is_grad_enabled():
        allowed = F.pad(tile.allowed, (tile.free, 0), value=True) if tile.free else tile.allowed
        return scores.masked_fill(~allowed, float("-inf"))
    scores[..., tile.free :].masked_fill_(~tile.allowed, float("-inf"))
    return scores


class LinearAttention(Attention):
    """Variants with `phi(q) . phi(k)` in place of `exp(s)`: the product re-associates, O(n) in time and memory.

    o_i = sum_j phi(q_i).phi(k_j) v_j / (sum_j phi(q_i).phi(k_j) + eps), or / n_i where `divide_by_count`.
    The maps see query and key as they are, or times sqrt(scaling) where `scaled`. With `hybrid` there is an `X+window`.
    """

    cost_class = "linear"
    stateful = True
    ops = ("causal_linear", "full_linear")
    scaled: ClassVar[bool] = False
    divide_by_count: ClassVar[bool] = False
    hybrid: ClassVar[bool] = True
    eps: ClassVar[float] = 1e-6

    def map_query(self, x: Tensor) -> Tensor:
        """Feature map of the queries, `[B, H, t, D]` -> `[B, H, t, F]`."""
        return self.feature_map(x)

    def map_key(self, x: Tensor) -> Tensor:
        """Feature map of the keys, `[B, Hkv, t, D]` -> `[B, Hkv, t, F]`."""
        return self.feature_map(x)

    def feature_map(self, x: Tensor) -> Tensor:
        """The map where queries and keys share it."""
        raise NotImplementedError(f"{type(self).__name__} defines no feature map")

    def map_query_beside_softmax(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The map of the queries in `X+window`, where a factor of the row does not cancel.

        Returns:
            Features, and the log of a factor of each row that was left out of them, `[B, H, t, 1]`; None for 0. Any
            number that keeps the features in range will do for it, so it is a constant to the gradient.
        """
        return self.map_query(x), None

    def kernel(self, query: Tensor, key: Tensor, scaling: float) -> Tensor:
        """`phi(q_i) . phi(k_j)`, `[B, H, T, S]`: O(n^2), for the definition."""
        scale = scaling**0.5 if self.scaled else 1.0
        return scores(self.map_query(query * scale), self.map_key(key * scale))

    def weights(self, query, key, mask, scaling):
        allowed = mask.matrix(query.device)
        kernel = self.kernel(*self.prepare(query, key, mask, None), scaling).masked_fill(~allowed, 0)
        if self.divide_by_count:
            return kernel / allowed.sum(-1, keepdim=True).clamp(min=1)
        return kernel / (kernel.sum(-1, keepdim=True) + self.eps)

    def prepare(self, query: Tensor, key: Tensor, mask: Mask, state: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Query and key as the maps want them, where these need more than each token by itself."""
        return query, key

    def forward(self, query, key, value, mask, scaling, state=None):
        dtype = query.dtype
        query, key = self.prepare(query, key, mask, state)
        maps = {
            "map_query": self.map_query,
            "map_key": self.map_key,
            "scale": scaling**0.5 if self.scaled else 1.0,
            "eps": None if self.divide_by_count else self.eps,
        }
        if not mask.causal:
            out, _ = full_linear(query, key, value, **maps, key_mask=mask.valid)
            if self.divide_by_count:
                counts = key.shape[2] if mask.valid is None else mask.valid.sum(1).clamp(min=1)[:, None, None, None]
                out = out / counts
            return out.to(dtype)
        valid = mask.new_tokens()
        out, _, after = causal_linear(
            query,
            key,
            value,
            **maps,
            parameters=tuple(self.parameters()) if torch.is_grad_enabled() else (),
            key_mask=valid,
            state=None if state is None else state.get("S"),
        )
        if self.divide_by_count:
            out, counts = self._divide(out, query, valid, state)
            if state is not None:
                state["count"] = counts
        if state is not None:
            state["S"] = after
        return out.to(dtype)

    @staticmethod
    def _divide(numerator, query, valid, state):
        """By the number of keys seen so far, `n_i`; also that number after the last token, `[B]`."""
        counts = positions(query, valid, state) + 1
        after = counts[:, -1].clone()  # not a view of all counts
        return numerator / counts.clamp(min=1)[:, None, :, None].to(numerator.dtype), after


def positions(query: Tensor, valid: Tensor | None, state: dict[str, Tensor] | None) -> Tensor:
    """How many valid tokens stand before each of the new ones, those in `state["count"]` included: int `[B, T]`.

    Padding has the position of the valid token before it (-1 where there is none).
    """
    batch, _, length, _ = query.shape
    if valid is None:
        valid = torch.ones(batch, length, dtype=torch.long, device=query.device)
    before = 0 if state is None or "count" not in state else state["count"][:, None]
    return valid.long().cumsum(1) - 1 + before
