"""Define what a variant is: its description, its definition, its parameters, and its fast form."""

import difflib
import functools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..masks import Mask
from ..ops.heads import mix

# What an attention module does: a text to its own past, a text to itself, a text to another.
KINDS = ("causal", "bidirectional", "cross")


@dataclass(frozen=True)
class Heads:
    """Describe the shape of one attention module. Query heads share key/value heads in equal groups.

    Attributes:
        num_attention_heads: H, query heads. num_key_value_heads: Hkv, of which H is a multiple.
        head_dim: D, numbers of a query or key. value_dim: Dv, numbers of a value; D by default.

    Raises:
        ValueError: H is not a multiple of Hkv.
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
    """Declare a setting of a variant, as a class attribute: `window = Option(64, "most recent keys", minimum=1)`.

    On an instance of the variant the attribute is the value that the user chose.

    Attributes:
        default: the value without a choice; its type is the type of every value.
        help: what the setting does, in words, for lists and help texts.
        minimum: the least value; None for no bound. choices: the values that there are; None for any.
    """

    default: Any
    help: str
    minimum: float | None = None
    choices: tuple | None = None

    def check(self, attention: str, name: str, value: Any) -> Any:
        """Return `value`, as a float where the default is a float.

        Raises:
            ValueError: `value` has another type than the default, is out of range, or is not finite. The error names
                the variant `attention` and the option `name`.
        """
        kind = type(self.default)
        if kind is float and type(value) is int:
            largest = sys.float_info.max
            value = float(value) if abs(value) <= largest else math.inf if value > 0 else -math.inf
        if type(value) is not kind:
            raise ValueError(
                f"{attention}: {name} is {value!r}; expected {kind.__name__}, for example {self.default!r}"
            )
        if self.choices is not None and value not in self.choices:
            raise ValueError(f"{attention}: {name} is {value!r}; expected one of {', '.join(map(str, self.choices))}")
        if self.minimum is not None and not value >= self.minimum:
            raise ValueError(f"{attention}: {name} is {value!r}; expected at least {self.minimum}")
        if kind is float and not math.isfinite(value):
            raise ValueError(f"{attention}: {name} is {value!r}; expected a finite number")
        return value


class State(dict[str, Tensor]):
    """Hold what a layer remembers while it is called: hooks that move what a module is given move it in place."""

    def to(self, device: torch.device, **how: Any) -> "State":
        """Move every tensor to `device`, and return the same object."""
        self.update({name: tensor.to(device, **how) for name, tensor in self.items()})
        return self


class Attention(nn.Module):
    """Hold the parameters of a variant on one swapped attention module; the base class of all variants.

    A variant sets the class attributes, writes `weights` (the definition) and either inherits a fast form from
    `ScoreAttention` or `LinearAttention` or writes `forward`.

    Attributes:
        name: what the user types. formula: o_i in one line. source: paper, year.
        cost: time per head. cost_class: "quadratic", "linear" or "constant" in the number of keys.
        family: what a conversion can train of the variant, which names its recipe in `hf_attnswap.training`: "plain"
            where nothing trains first, "gain" for a factor per head, "maps" for parameters that align before all else.
        control: True for what every comparison needs and nobody would deploy.
        stateful: keeps a state of constant size in place of keys and values when generating.
        kinds: the kinds of attention that the variant can stand in for, of `KINDS`.
        kind, place: of the module on which the variant stands: one of `KINDS`, and its layer in words.
        described: the variant on a module with its options, in words.
        reach: how many of the last tokens that module sees at most; None for all.
        ops: the ops of `hf_attnswap.ops` that its fast form is made of; none where the fast form is one call of torch.
        slides: honours the sliding window that a layer of a model may have; any mask has it already.
        unrotate: sees query and key without their rotation by position, which `Mask.rotation` then tells it.
        any_mask: takes any mask, and a bias, a soft cap and sinks beside the scores. The other variants take causal
            and bidirectional masks with padding, and packed texts.
        heads: shape of the module.

    Raises:
        ValueError: an unknown option, or a value that does not fit the option.
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
    slides: ClassVar[bool] = False
    unrotate: Any = False
    ops: ClassVar[tuple[str, ...]] = ()
    kind: str = "causal"
    place: str = "attention"
    described: str = ""
    reach: int | None = None
    _answer: "Answer | None" = None

    def __init__(self, heads: Heads, **options: Any):
        super().__init__()
        self.heads = heads
        for name, value in self.check_options(options).items():
            setattr(self, name, value)

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Return the options that the class and its bases declare, by name."""
        return dict(_declared(cls))

    @classmethod
    def check_options(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Return all options with their values, the default where `given` has none.

        Raises:
            ValueError: an unknown name, with a suggestion, or a value that does not fit the option.
        """
        known = cls.options()
        for name in given:
            if name not in known:
                raise ValueError(
                    f"{cls.name} has no option {name!r}.{suggestion(name, known)} "
                    f"Its options: {', '.join(known) or 'none'}"
                )
        return {n: o.check(cls.name, n, given.get(n, o.default)) for n, o in known.items()}

    def option_values(self) -> dict[str, Any]:
        """Return the value of every option of this instance, by name."""
        return {name: getattr(self, name) for name in self.options()}

    def choice(self) -> Any:
        """Return what runs here, as a plan has it: the name and all options."""
        return self.name, self.option_values()

    @property
    def linear_branch(self) -> "Attention | None":
        """Return the linear variant beside a window, which can be aligned alone; None where there is none."""
        return None

    def reset_parameters(self) -> None:
        """Set every parameter of the variant to its starting value, with `torch.nn.init` functions only.

        transformers guards those functions while it loads a checkpoint.
        """

    def weights(self, query: Tensor, key: Tensor, mask: Mask, scaling: float) -> Tensor:
        """Return the definition: row i holds what o_i takes of each value.

        Args:
            query: `[B, H, T, D]`; key: `[B, Hkv, S, D]`, both after the position encoding.
            mask: which keys each row may attend to.
            scaling: factor of the scores.

        Returns:
            `[B, H, T, S]`, in the dtype of the query; rows that may attend to nothing are zero.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no weights")

    def reference(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float) -> Tensor:
        """Return the output straight from the definition, `[B, H, T, Dv]`; O(n^2), in float64 where the inputs are.

        Arguments as in `forward`, without a state.
        """
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
        """Return the output of attention by the fast form.

        Args:
            query: `[B, H, T, D]`; key: `[B, Hkv, S, D]`; value: `[B, Hkv, S, Dv]`.
            mask: which keys each row may attend to.
            scaling: factor of the scores.
            state: for stateful variants, what is remembered of earlier tokens, batch first; empty at the start of a
                text, filled by this call. Then S = T: the keys are those of the new tokens only.

        Returns:
            `[B, H, T, Dv]` in the query's dtype.
        """
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def whole_state(self, state: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
        """Return the state of a layer in tensors whose shapes no later call changes, however many tokens come.

        Args:
            state: what `forward` filled in a layer without a sliding window.
            tokens: the most tokens that may come, for variants that keep them all.
        """
        return state

    def operations(self, rows: int, keys: int, window: int | None = None) -> float:
        """Return the floating-point operations of the matrix products for one text, two for a multiplication and a sum.

        What a form computes in vain, such as the scores of keys that a row does not see, is not counted.

        Args:
            rows: new tokens, the last of `keys`. keys: all tokens of the text.
            window: the sliding window of the layer; None where it has none.
        """
        raise NotImplementedError(f"{self.name} does not say what it costs: its class has no operations")

    @contextmanager
    def answered_by(self, answer: "Answer") -> Iterator[None]:
        """Let `answer` compute the output of this layer while the context is open; see `integration.observing`."""
        before, self._answer = self._answer, answer
        try:
            yield
        finally:
            self._answer = before

    def answer(self, query, key, value, mask, scaling, state=None) -> Tensor:
        """Return the output of the layer: that of `forward`, or of the function that `answered_by` put in its place.

        Arguments as in `forward`. A function that stands in for `forward` gets no state.
        """
        if self._answer is not None:
            return self._answer(self, query, key, value, mask, scaling)
        if state is None:
            return self(query, key, value, mask, scaling)
        kept = State(state)
        out = self(query, key, value, mask, scaling, kept)
        state.update(kept)
        return out

    def calibrate(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, scaling: float) -> None:
        """Set parameters from what the layer sees, before training. Most variants need none.

        Arguments as in `forward`, without a state.
        """

    def extra_repr(self) -> str:
        return ", ".join(f"{n}={v!r}" for n, v in self.option_values().items())


@functools.cache  # a swap asks several times per layer
def _declared(cls: type[Attention]) -> dict[str, Option]:
    return {n: o for base in reversed(cls.__mro__) for n, o in vars(base).items() if isinstance(o, Option)}


# (the variant, query, key, value, mask, scaling) -> what its layer gives, `[B, H, T, Dv]`
Answer = Callable[[Attention, Tensor, Tensor, Tensor, Mask, float], Tensor]


def suggestion(name: str, known) -> str:
    """Return " Did you mean 'x'?" with the one of `known` nearest to `name`, or "" where none is near."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
