"""Time the attention alone, at the shape of a model, beside torch's scaled_dot_product_attention in the same rounds."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..attentions import Attention, Heads
from ..attentions.base import State
from ..masks import Mask
from ..masks.rotation import Rotation
from ..ops.backends import watch
from ..statistics import Growth, Spread, crossover, growth
from .measure import interleaved, peak_memory_mib, speedup


class Candidate(Protocol):
    """Describe what is timed: attention of query `[B, H, n, D]` to key `[B, Hkv, n, D]` and value `[B, Hkv, n, Dv]`."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor: ...

    def step(self, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Any]:
        """Return a function that computes one more token after these n tokens, and can be called repeatedly."""
        ...


@dataclass(frozen=True)
class Sdpa:
    """Run torch's scaled_dot_product_attention, the control.

    Attributes:
        causal: whether each token attends only to itself and to the tokens before.
    """

    causal: bool = True

    def __call__(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.causal, enable_gqa=_shared(query, key))

    def step(self, query, key, value):
        new = query[:, :, -1:]
        return lambda: F.scaled_dot_product_attention(new, key, value, enable_gqa=_shared(query, key))


def sdpa_kernel(inputs: Sequence[Tensor]) -> str:
    """Return the name of the kernel that torch chooses for `Sdpa` on these inputs.

    Args:
        inputs: query `[B, H, n, D]`, key `[B, Hkv, n, D]` and value `[B, Hkv, n, Dv]`.

    Returns:
        The name of the operator, such as `_scaled_dot_product_flash_attention_for_cpu`, or "math" where torch writes
        out the products and the softmax.
    """
    called: list[str] = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Note():
        Sdpa()(*inputs)
    return next((name for name in called if name.startswith("_scaled_dot_product_")), "math")


@dataclass(frozen=True)
class Variant:
    """Run the attention of a variant.

    A step reads the state after n tokens, or, for a variant without a state, the n keys and values.

    Attributes:
        causal: whether each token attends only to itself and to the tokens before.
    """

    attention: Attention
    causal: bool = True

    def __call__(self, query, key, value):
        length = query.shape[2]
        return self.attention(query, key, value, self.mask(query, length, self.causal), query.shape[-1] ** -0.5)

    def mask(self, query: Tensor, keys: int, causal: bool = True) -> Mask:
        """Return the mask of these queries, with a rotation to undo where the variant wants one: that takes its time.

        Args:
            query: `[B, H, T, D]`. keys: how many there are.
        """
        length, pairs = query.shape[2], query.shape[3] // 2
        turns = query.new_ones(query.shape[0], length, 2 * pairs) if self.attention.unrotate else None
        return Mask(length, keys, causal=causal, rotation=None if turns is None else Rotation(turns))

    def step(self, query, key, value):
        length, scaling = key.shape[2], query.shape[-1] ** -0.5
        new = [t[:, :, -1:].contiguous() for t in (query, key, value)]
        if not self.attention.stateful:
            return lambda: self.attention(new[0], key, value, Mask(1, length), scaling)
        state = self.state(query, key, value)
        return lambda: self.attention(*new, self.mask(new[0], length + 1), scaling, state)

    def state(self, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Tensor]:
        """Return what a stateful variant remembers after these n tokens."""
        state = State()
        self.attention(query, key, value, self.mask(query, key.shape[2]), query.shape[-1] ** -0.5, state)
        return state


def _shared(query: Tensor, key: Tensor) -> bool:
    return query.shape[1] != key.shape[1]


def random_inputs(
    heads: Heads,
    length: int,
    *,
    batch_size: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value of normal random numbers, equal for equal lengths, without gradients.

    Args:
        heads: numbers of heads and their dimensions.
        length: tokens n; also the seed.

    Returns:
        query `[B, H, n, D]`, key `[B, Hkv, n, D]` and value `[B, Hkv, n, Dv]`.
    """
    generator = torch.Generator(device=device).manual_seed(length)
    counts = (heads.num_attention_heads, heads.num_key_value_heads, heads.num_key_value_heads)
    dims = (heads.head_dim, heads.head_dim, heads.value_dim)
    return tuple(
        torch.randn(batch_size, count, length, dim, dtype=dtype, device=device, generator=generator)
        for count, dim in zip(counts, dims, strict=True)
    )


def forward(candidate: Candidate, inputs: Sequence[Tensor]) -> None:
    """Run the forward pass of `candidate` on query, key and value, without gradients."""
    with torch.no_grad():
        candidate(*inputs)


def forward_backward(candidate: Candidate, inputs: Sequence[Tensor]) -> None:
    """Run the forward and the backward pass of `candidate`, with new gradients of query, key and value at each call."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = candidate(*inputs)
    out.backward(torch.ones_like(out))


@dataclass(frozen=True)
class Row:
    """Hold what was measured of one variant at one length.

    Attributes:
        attention: name of the variant.
        length: tokens of query, key and value.
        forward, forward_backward: how many times faster than SDPA, forward alone and with the backward pass.
        forward_s, sdpa_forward_s: seconds of the forward pass in each round.
        peak_memory_mib, sdpa_peak_memory_mib: MiB that forward and backward pass need; None where the system does not
            report memory.
        backends: names of the backends that ran, by op; empty for a variant that is one call of torch.
    """

    attention: str
    length: int
    forward: Spread
    forward_backward: Spread
    forward_s: tuple[float, ...]
    sdpa_forward_s: tuple[float, ...]
    peak_memory_mib: float | None
    sdpa_peak_memory_mib: float | None
    backends: dict[str, list[str]] = field(default_factory=dict)


def bench(
    variants: dict[str, Attention],
    heads: Heads,
    lengths: Sequence[int],
    *,
    batch_size: int = 1,
    rounds: int = 5,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> list[Row]:
    """Measure every variant at every length on random inputs, feature maps included, with SDPA in the same rounds.

    Args:
        variants: attention modules by name.
        heads: numbers of heads and their dimensions.
        lengths: tokens n of the inputs.
        rounds: timed rounds per length, after one that does not count.
        progress: called with each length after it is measured.

    Returns:
        One row per length and variant.
    """
    rows = []
    candidates = {"sdpa": Sdpa()} | {name: Variant(attention) for name, attention in variants.items()}
    for length in lengths:
        inputs = random_inputs(heads, length, batch_size=batch_size, dtype=dtype, device=device)
        alone, both = (
            {name: partial(work, candidate, inputs) for name, candidate in candidates.items()}
            for work in (forward, forward_backward)
        )
        forwards, trained = (interleaved(runs, rounds, device) for runs in (alone, both))
        peaks, backends = {}, {}
        for name, run in both.items():
            with watch() as ran:
                alone[name]()
                peaks[name] = peak_memory_mib(run, device)
            backends[name] = {op: sorted(chosen) for op, chosen in sorted(ran.items())}
        for name in variants:
            rows.append(
                Row(
                    name,
                    length,
                    speedup(forwards["sdpa"], forwards[name]),
                    speedup(trained["sdpa"], trained[name]),
                    tuple(forwards[name]),
                    tuple(forwards["sdpa"]),
                    peaks[name],
                    peaks["sdpa"],
                    backends[name],
                )
            )
        if progress is not None:
            progress(length)
    return rows


@dataclass(frozen=True)
class Scaling:
    """Hold how the forward pass of one variant grows with the length.

    Attributes:
        attention: name of the variant, or "sdpa".
        growth: exponent of the time; None for fewer than three lengths.
        faster_from: tokens from which on the variant is faster than SDPA; None where the variant is not faster at the
            longest length, and for SDPA.
    """

    attention: str
    growth: Growth | None
    faster_from: float | None


def scaling(rows: Iterable[Row]) -> list[Scaling]:
    """Return how the time of SDPA and of each variant grows with the length, SDPA first.

    Args:
        rows: what `bench` returns, with at least one variant.
    """
    by_name: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.length):
        by_name.setdefault(row.attention, []).append(row)
    control = next(iter(by_name.values()))
    found = [Scaling("sdpa", _growth((row.length, row.sdpa_forward_s) for row in control), None)]
    for name, own in by_name.items():
        crossed = crossover([(row.length, row.forward.median) for row in own])
        found.append(Scaling(name, _growth((row.length, row.forward_s) for row in own), crossed))
    return found


def _growth(measured: Iterable[tuple[int, Sequence[float]]]) -> Growth | None:
    points = [(length, seconds) for length, rounds in measured for seconds in rounds]
    return growth(*zip(*points, strict=True))
