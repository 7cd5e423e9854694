"""Count what a call does, from shapes alone: products, numbers that are moved, calls, and memory.

The call runs on the meta device, whose tensors have shapes and no values, so that a model of any size is counted on any
machine, with its real code, backward pass included.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class Product(NamedTuple):
    """Describe a matrix product, `[rows, inner]` times `[inner, columns]`."""

    rows: int
    inner: int
    columns: int

    @property
    def operations(self) -> int:
        """Return its floating-point operations, two for a multiplication and a sum."""
        return 2 * self.rows * self.inner * self.columns


@dataclass
class Trace:
    """Hold what a call does.

    Attributes:
        products: how often each matrix product is computed.
        moved: bytes that other operations read and write, by the power of 2 to which the bytes of one call come.
        calls: operations that were called, views included.
        peak: bytes that the call needs at its peak, beside what was there before it.
    """

    products: Counter[Product] = field(default_factory=Counter)
    moved: Counter[int] = field(default_factory=Counter)
    calls: int = 0
    peak: int = 0

    @property
    def operations(self) -> int:
        """Return the floating-point operations of all products."""
        return sum(product.operations * count for product, count in self.products.items())

    def move(self, size: float) -> None:
        """Add an operation that reads and writes `size` bytes."""
        if size >= 1:
            self.moved[int(size).bit_length()] += int(size)


def trace(call: Callable[[], Any]) -> Trace:
    """Return what `call` does, which must compute on the meta device alone.

    Where it asks for a value, it is told 1: yes, all tokens of a mask are valid, and positions are those of one text.
    """
    counting = _Counting()
    with counting:
        call()
    return counting.trace


class _Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.trace, self.in_use, self.known = Trace(), 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype).item()
        out = func(*args, **(kwargs or {}))
        given, made = _tensors((args, kwargs)), _tensors(out)
        before = {_key(t) for t in given}
        new = [t for t in made if _key(t) not in before]
        for tensor in new:
            self._take(tensor)
        self.trace.calls += 1
        packet = func.overloadpacket
        if packet in _PRODUCTS:
            product, count = _PRODUCTS[packet](*args)
            self.trace.products[product] += count
        elif packet not in _NOTHING and (new or func._schema.is_mutable):
            if packet in _ROWS:  # of a large tensor, some rows are read
                given = made
            self.trace.move(sum(_size(t) for t in (*given, *(new or made[:1]))))
        return out

    def _take(self, tensor: Tensor) -> None:
        """Count the memory of a new tensor until it is freed."""
        storage, key = tensor.untyped_storage(), _key(tensor)
        size = storage.nbytes()

        def free(_):
            self.in_use -= size
            del self.known[key]

        self.known[key] = weakref.ref(storage, free)
        self.in_use += size
        self.trace.peak = max(self.trace.peak, self.in_use)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _size(tensor: Tensor) -> int:
    """Return the bytes that a pass over a tensor touches; those of an expanded one stand there once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _plain(a: Tensor, b: Tensor, *more) -> tuple[Product, int]:
    *batch, rows, inner = a.shape
    return Product(rows, inner, b.shape[-1]), batch[0] if batch else 1


def _added(_, a: Tensor, b: Tensor, *more) -> tuple[Product, int]:
    return _plain(a, b)


def _convolution(x: Tensor, weight: Tensor, *more) -> tuple[Product, int]:
    """A convolution as the product of patches and kernels; of strides equal to the kernel, as patch embeddings have."""
    inner = weight[0].numel()
    return Product(max(1, x.numel() // inner), inner, weight.shape[0]), 1


_PRODUCTS: dict[Any, Callable[..., tuple[Product, int]]] = {
    aten.mm: _plain,
    aten.bmm: _plain,
    aten.addmm: _added,
    aten.baddbmm: _added,
    aten.convolution: _convolution,
    aten._grouped_mm: _plain,
}
_NOTHING = {aten.empty, aten.new_empty, aten.empty_like, aten.empty_strided, aten.detach, aten.lift_fresh}
_ROWS = {aten.embedding, aten.index, aten.index_select, aten.gather}
