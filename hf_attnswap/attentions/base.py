"""What a variant is: its description, its definition, its parameters, and its fast form."""

import difflib
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..masks import Mask
from ..ops.heads import compute_dtype, mix

# What an attention module does: a text to its own past, a text to itself, a text to another.
KINDS = ("causal", "bidirectional", "cross")


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
        family: what a conversion can train of the variant, which names its recipe in `hf_attnswap.training`: "plain"
            for nothing of its own, "gain" for a factor per head, "maps" for parameters that align before all else.
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
    family: ClassVar[str] = "plain"
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
