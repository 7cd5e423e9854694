"""What a variant is: its description, its definition, its parameters, and its fast form."""

import difflib
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..masks import Mask
from ..ops.heads import compute_dtype, mix, scores
from ..ops.linear import causal_linear
from ..ops.rows import Tile, by_rows, rows_per_tile


@dataclass(frozen=True)
class Heads:
    """The shape of one attention module. Query heads share key/value heads in equal groups."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int

    def __post_init__(self):
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
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    cost: ClassVar[str]
    cost_class: ClassVar[str]
    source: ClassVar[str]
    control: ClassVar[bool] = False
    stateful: ClassVar[bool] = False
    dense_masks: ClassVar[bool] = False

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

    def weights(self, query: Tensor, key: Tensor, allowed: Tensor, scaling: float) -> Tensor:
        """The definition: row i of the result holds what o_i takes of each value.

        Args:
            query: `[B, H, T, D]`; key: `[B, Hkv, S, D]`, both after the position encoding.
            allowed: bool, broadcastable to `[B, H, T, S]`.
            scaling: factor of the scores.

        Returns:
            `[B, H, T, S]`, in the dtype of the query; rows that may attend to nothing are zero.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no weights")

    def reference(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float) -> Tensor:
        """O(n^2) result straight from the definition, `[B, H, T, Dv]`; in float64 where the inputs are."""
        return mix(self.weights(query, key, mask.matrix(query.device), scaling), value)

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


class ScoreAttention(Attention):
    """Variants that act on the scores s_ij: O(n^2 d) time, and O(n d) memory by tiles of rows.

    Their tiles run the definition itself, so a variant of this family writes `weights` and is done.
    """

    cost = "O(n^2 d)"
    cost_class = "quadratic"
    dense_masks = True

    def forward(self, query, key, value, mask, scaling, state=None):
        dtype = compute_dtype(query.dtype)

        def attend(query: Tensor, key: Tensor, value: Tensor, tile: Tile) -> tuple[Tensor]:
            out = mix(self.weights(query.to(dtype), key.to(dtype), tile.allowed, scaling), value.to(dtype))
            return (out.to(query.dtype),)

        size = rows_per_tile(query.shape[0], query.shape[1], key.shape[2])
        return by_rows(attend, query, key, value, mask.tiles(size, query.device), tuple(self.parameters()))[0]


class LinearAttention(Attention):
    """Variants with `phi(q) . phi(k)` in place of `exp(s)`: the product re-associates, O(n) in time and memory.

    o_i = sum_j phi(q_i).phi(k_j) v_j / (sum_j phi(q_i).phi(k_j) + eps), or / n_i where `divide_by_count`.
    The maps see query and key as they are, or times sqrt(scaling) where `scaled`.
    """

    cost_class = "linear"
    stateful = True
    scaled: ClassVar[bool] = False
    divide_by_count: ClassVar[bool] = False
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

    def map_query_beside_softmax(self, x: Tensor) -> Tensor:
        """The map of the queries in `X+window`, where a factor of the row does not cancel (`query_log_scale`)."""
        return self.map_query(x)

    def query_log_scale(self, x: Tensor) -> Tensor | None:
        """Log of the row factor that `map_query_beside_softmax` leaves out, `[B, H, t, 1]`; None for 0.

        Any number that keeps the features in range will do, so it is a constant to the gradient.
        """
        return None

    def kernel(self, query: Tensor, key: Tensor, scaling: float) -> Tensor:
        """`phi(q_i) . phi(k_j)`, `[B, H, T, S]`: O(n^2), for the definition."""
        scale = scaling**0.5 if self.scaled else 1.0
        return scores(self.map_query(query * scale), self.map_key(key * scale))

    def weights(self, query, key, allowed, scaling):
        kernel = self.kernel(query, key, scaling).masked_fill(~allowed, 0)
        if self.divide_by_count:
            return kernel / allowed.sum(-1, keepdim=True).clamp(min=1)
        return kernel / (kernel.sum(-1, keepdim=True) + self.eps)

    def forward(self, query, key, value, mask, scaling, state=None):
        valid = mask.new_tokens()
        out, _, after = causal_linear(
            query,
            key,
            value,
            self.map_query,
            self.map_key,
            scale=scaling**0.5 if self.scaled else 1.0,
            parameters=tuple(self.parameters()),
            key_mask=valid,
            state=state["S"] if state else None,
            eps=None if self.divide_by_count else self.eps,
        )
        if self.divide_by_count:
            out, counts = self._divide(out, query, valid, state)
            if state is not None:
                state["count"] = counts
        if state is not None:
            state["S"] = after
        return out.to(query.dtype)

    @staticmethod
    def _divide(numerator, query, valid, state):
        """By the number of keys seen so far, `n_i`; also that number after the last token, `[B]`."""
        batch, _, length, _ = query.shape
        ones = query.new_ones(batch, length, dtype=torch.long) if valid is None else valid.long()
        counts = ones.cumsum(1) + (state["count"][:, None] if state else 0)
        return numerator / counts.clamp(min=1)[:, None, :, None].to(numerator.dtype), counts[
            :, -1
        ].clone()  # not a view of all counts
