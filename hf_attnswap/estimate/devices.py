"""How fast devices are: the few GPUs that are known by name, and what a device must tell to be reckoned with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..attentions import Attention
from ..attentions.groups import Groups
from ..attentions.scores import ScoreAttention
from ..errors import UsageError
from .layers import Layer, kept_bytes
from .trace import Product, Trace


class Device(Protocol):
    """Say how long a device takes, in seconds, for the parts of which a step is made.

    Attributes:
        name: of the device. memory: its bytes.
        link: bytes per second to and from other devices of its kind; None where that is not known.
        queues: whether calls are queued while the device computes, so that the longer of both counts.
        call: seconds that the program needs for each operation that it calls.
    """

    name: str
    memory: int
    link: float | None
    queues: bool
    call: float

    def product(self, product: Product, dtype: torch.dtype) -> float:
        """Return the seconds of a matrix product."""
        ...

    def moving(self, bits: int) -> float:
        """Return the seconds per byte of passes over tensors, of calls that move up to 2^bits bytes."""
        ...

    def attention(
        self, attention: Attention, batch: int, length: int, window: int | None, dtype: torch.dtype, backward: bool
    ) -> float:
        """Return the seconds of the attention of a layer over whole texts, forward, or backward alone."""
        ...

    def step(self, attention: Attention, batch: int, length: int, window: int | None, dtype: torch.dtype) -> float:
        """Return the seconds of the attention of a layer for one token more after `length` tokens of each text."""
        ...


def seconds(trace: Trace, device: Device, dtype: torch.dtype) -> float:
    """Return how long a device takes for what was counted."""
    computing = sum(device.product(product, dtype) * count for product, count in trace.products.items())
    computing += sum(device.moving(bits) * size for bits, size in trace.moved.items())
    calling = device.call * trace.calls
    return max(computing, calling) if device.queues else computing + calling


@dataclass(frozen=True)
class Gpu:
    """Describe a GPU by the figures of its data sheet, times the shares of them that were measured on an H100.

    Attributes:
        peak: floating-point operations per second of dense products, by dtype.
        bandwidth: bytes per second of its memory.
        source: where these figures stand.
    """

    name: str
    memory: int
    peak: Mapping[torch.dtype, float]
    bandwidth: float
    link: float | None
    source: str
    queues: bool = field(default=True, init=False)
    # Of a program in Python that calls torch's operations, views included.
    call: float = field(default=4e-6, init=False)

    def product(self, product, dtype):
        moved = product.rows * product.inner + product.inner * product.columns + product.rows * product.columns
        computing = product.operations / (PRODUCT_SHARE * self._peak(dtype))
        return max(computing, moved * dtype.itemsize / (MEMORY_SHARE * self.bandwidth))

    def moving(self, bits):
        return 1 / (MEMORY_SHARE * self.bandwidth)

    def attention(self, attention, batch, length, window, dtype, backward):
        parts = list(attention.parts) if isinstance(attention, Groups) else [attention]
        passes = BACKWARD if backward else 1.0
        return passes * sum(self._kernel(part, batch, length, window, dtype) for part in parts)

    def _kernel(self, attention, batch, length, window, dtype):
        heads = attention.heads
        numbers = heads.num_attention_heads * (heads.head_dim + heads.value_dim)
        numbers += heads.num_key_value_heads * (heads.head_dim + heads.value_dim)
        moving = batch * length * numbers * dtype.itemsize / (LINEAR_MEMORY_SHARE * self.bandwidth)
        if isinstance(attention, ScoreAttention):
            share = SCORES_SHARE.get(attention.name, SCORES_SHARE["softmax"]) * length / (length + HALF_SPEED)
        else:
            share = LINEAR_SHARE if attention.ops == ("linear",) else WINDOW_SHARE
        operations = batch * attention.operations(length, length, window)
        return max(operations / (share * self._peak(dtype)), moving)

    def step(self, attention, batch, length, window, dtype):
        # Here every kernel waits for memory; keys and values are read, and copied for the new token.
        passes = 3 if not attention.stateful else 2
        return passes * batch * kept_bytes(Layer(attention, window), length, dtype) / (MEMORY_SHARE * self.bandwidth)

    def _peak(self, dtype):
        if dtype not in self.peak:
            known = ", ".join(str(d).removeprefix("torch.") for d in self.peak)
            raise UsageError(f"dtype is {str(dtype).removeprefix('torch.')!r}; {self.name} is known for {known}")
        return self.peak[dtype]


# Shares of the data sheet's figures, from runs on one H100 (80 GB, SXM, torch 2.11, triton 3.6, bfloat16).
PRODUCT_SHARE = 0.65
MEMORY_SHARE = 0.75
# Attention on scores, of long texts; it has half of that at HALF_SPEED tokens.
SCORES_SHARE = {
    "softmax": 0.33, "relu": 0.69, "relu2": 0.69, "relu_norm": 0.58, "sigmoid": 0.38, "relu_power": 0.32,
}  # fmt: skip
HALF_SPEED = 900
# Variants whose many small products no tile of a GPU fills: linear ones, and windows, alone and in hybrids.
LINEAR_SHARE = 0.06
WINDOW_SHARE = 0.053
LINEAR_MEMORY_SHARE = 0.35
BACKWARD = 2.5  # products of the backward pass of attention for one of the forward pass: 5 for 2

GB = 1_000_000_000
_ADA = "NVIDIA Ada GPU architecture white paper, 2022"


def _gpu(name: str, memory: float, half: float, single: float, bandwidth: float, link: float, source: str) -> Gpu:
    """Return a GPU; memory in GB, products in Tera operations per second, the rest in GB per second, one direction."""
    peak = {torch.bfloat16: half * 1e12, torch.float16: half * 1e12, torch.float32: single * 1e12}
    return Gpu(name, int(memory * GB), peak, bandwidth * GB, link * GB, source)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100", 40, 312, 19.5, 1555, 300, "NVIDIA A100 data sheet (SXM, 40 GB), 2020"),
        _gpu("a100-80gb", 80, 312, 19.5, 2039, 300, "NVIDIA A100 data sheet (SXM, 80 GB), 2021"),
        _gpu("h100", 80, 989, 67, 3350, 450, "NVIDIA H100 data sheet (SXM), 2023; products without sparsity"),
        _gpu("h200", 141, 989, 67, 4800, 450, "NVIDIA H200 data sheet (SXM), 2024; products without sparsity"),
        _gpu("l4", 24, 121, 30.3, 300, 32, "NVIDIA L4 data sheet, 2023; products without sparsity"),
        _gpu("l40s", 48, 362, 91.6, 864, 32, "NVIDIA L40S data sheet, 2023; products without sparsity"),
        _gpu("rtx4090", 24, 165, 82.6, 1008, 32, _ADA),
    )
}
