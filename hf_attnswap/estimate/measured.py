"""Measure how fast the device at hand is, for the very shapes that a model has: a few seconds."""

import copy
import itertools
import math
import os
import statistics
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attentions import Attention
from ..benchmark.attention import Variant, forward, forward_backward, random_inputs
from ..benchmark.measure import seconds as wall_seconds
from .layers import Layer, kept_bytes, signature
from .trace import Product, trace

Clock = Callable[[Callable[[], Any], torch.device], float]

UNCACHED = 1 << 27  # bytes that no cache of a processor holds: weights come from memory, as in a model
ENOUGH_S = 0.1  # of measuring one part
LARGEST = 1 << 32  # operations of a product that is measured; a larger one is taken to be as fast
LONGEST = 1024  # tokens of attention that is measured; more cost as much as their operations say
LARGEST_CACHE = 1 << 27  # bytes of keys and values that a step is measured on
SMALLEST_PASS, LARGEST_PASS = 12, 27  # bits of the bytes that a pass moves


class Measured:
    """Be the device of this machine, as `Device` has it; each part is measured when it is first asked for."""

    link = None

    def __init__(self, device: torch.device, clock: Clock = wall_seconds):
        """Take a device into use.

        Args:
            clock: `(call, device) -> seconds` of one call.
        """
        self.device, self.clock = device, clock
        self.name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        self.memory = _memory(device)
        self.queues = device.type != "cpu"
        self.found: dict[Hashable, float] = {}
        self._weights = torch.empty(UNCACHED // 4, device=device).uniform_(-1, 1)
        self.call = self._call()

    def product(self, product, dtype):
        """Return the seconds of a product, with weights that come from memory, as those of a linear layer lie there."""
        rows, inner, columns = product
        rows = max(1, min(rows, LARGEST // (2 * inner * columns)))
        columns = max(1, min(columns, LARGEST // (2 * inner * rows)))
        measured = Product(rows, inner, columns)
        return self._once(measured, dtype, self._product) * product.operations / measured.operations

    def moving(self, bits):
        """Return the seconds per byte of passes, taken to be like those over the activations of a gated layer."""
        return self._once(min(max(bits, SMALLEST_PASS), LARGEST_PASS), torch.float32, self._moving)

    def attention(self, attention, batch, length, window, dtype, backward):
        """Return the seconds of attention, those of one text of up to `LONGEST` tokens times what is more to do."""
        measured = min(length, LONGEST)
        alone = self._once((signature(attention), measured, forward), dtype, partial(self._attention, attention))
        taken = alone
        if backward:
            both = self._once((signature(attention), measured, forward_backward), dtype,
                              partial(self._attention, attention))  # fmt: skip
            taken = max(both - alone, alone)
        done, asked = attention.operations(measured, measured), attention.operations(length, length, window)
        return taken * batch * (asked / done if done else length / measured)

    def step(self, attention, batch, length, window, dtype):
        """Return the seconds of a step; a layer that keeps keys and values copies them for the new token as well."""
        kept = partial(kept_bytes, Layer(attention, window), dtype=dtype)
        measured = batch, length
        while math.prod(measured) > 1 and measured[0] * kept(measured[1]) > LARGEST_CACHE:
            measured = (measured[0] // 2, length) if measured[0] > 1 else (1, measured[1] // 2)
        taken = self._once((signature(attention), *measured), dtype, partial(self._step, attention))
        asked, done = batch * kept(length), measured[0] * kept(measured[1])
        return taken * (asked / done if done else 1)

    def _once(self, what: Hashable, dtype: torch.dtype, measure: Callable[[Any, torch.dtype], float]) -> float:
        if (what, dtype) not in self.found:
            self.found[what, dtype] = measure(what, dtype)
        return self.found[what, dtype]

    def _median(self, call: Callable[[], Any], most: int = 100, cold: bool = False) -> float:
        """Return the seconds of a call, the median of at least 3.

        Args:
            most: calls at most.
            cold: whether the caches of the processor hold nothing of what a call needs, but weights, as between two
                layers of a model.
        """
        call()
        times: list[float] = []
        while len(times) < 3 or sum(times) < ENOUGH_S and len(times) < most:
            if cold:
                self._weights.sum()
            times.append(self.clock(call, self.device))
        return statistics.median(times)

    def _call(self) -> float:
        layers = [nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.LayerNorm(8)) for _ in range(16)]
        net, x = nn.Sequential(*layers), torch.ones(1, 8)
        calls = trace(partial(net.to("meta"), x.to("meta"))).calls
        net, x = net.to_empty(device=self.device), x.to(self.device)
        with torch.no_grad():
            return self._median(partial(net, x), most=9, cold=True) / calls

    def _product(self, product: Product, dtype: torch.dtype) -> float:
        rows, inner, columns = product
        weights = self._weights.to(dtype)
        size = inner * columns
        if size > len(weights):
            weights = weights.repeat(-(-size // len(weights)))
        places = itertools.cycle(range(0, len(weights) - size + 1, size))
        x = torch.ones(rows, inner, dtype=dtype, device=self.device)

        def call() -> Tensor:
            at = next(places)
            return x @ weights[at : at + size].view(columns, inner).T

        return self._median(call)

    def _moving(self, bits: int, dtype: torch.dtype) -> float:
        numbers = (1 << bits) // 12  # two are read for one that is written
        x = torch.full((numbers,), 0.5, device=self.device)
        moved = trace(partial(_passes, x.to("meta")))
        taken = self._median(partial(_passes, x)) - moved.calls * self.call * (not self.queues)
        return max(taken, 0.0) / sum(moved.moved.values())

    def _attention(self, attention: Attention, what: tuple, dtype: torch.dtype) -> float:
        _, length, work = what
        inputs = random_inputs(attention.heads, length, dtype=dtype, device=self.device)
        return self._median(partial(work, Variant(self._here(attention, dtype), attention.kind == "causal"), inputs))

    def _step(self, attention: Attention, what: tuple, dtype: torch.dtype) -> float:
        _, batch, length = what
        variant = Variant(self._here(attention, dtype), attention.kind == "causal")
        inputs = random_inputs(attention.heads, length, batch_size=batch, dtype=dtype, device=self.device)
        with torch.no_grad():
            step = variant.step(*inputs) if attention.stateful else _step_with_a_copy(variant, *inputs)
            return self._median(step, most=9, cold=True)

    def _here(self, attention: Attention, dtype: torch.dtype) -> Attention:
        """Return a copy of a variant on this device, untrained."""
        here = copy.deepcopy(attention).to_empty(device=self.device).to(dtype)
        for part in here.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
        return here


def _step_with_a_copy(variant: Variant, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """Return a step of attention to keys and values that the cache of a model makes anew for every token."""
    new = [t[:, :, -1:].contiguous() for t in (query, key, value)]
    mask, scaling = variant.mask(new[0], key.shape[2] + 1), query.shape[-1] ** -0.5

    def step() -> Tensor:
        keys, values = torch.cat([key, new[1]], 2), torch.cat([value, new[2]], 2)
        return variant.attention(new[0], keys, values, mask, scaling)

    return step


def _passes(x: Tensor) -> list[Tensor]:
    """Pass over numbers as the norms, rotations and activations of a decoder layer do."""
    return [x * x, x + x, F.silu(x), x * x, x + x, x * x]


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
