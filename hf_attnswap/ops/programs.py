"""Say what torch makes of a call: a program for many sizes, or a transformed function.

Both want a fixed number of torch's own operations. A loop over blocks of tokens would make the number of its rounds
part of the program, and torch.func cannot look into a backward pass that is written by hand.
"""

import torch
from torch import Tensor


def sizes_are_open(*tensors: Tensor) -> bool:
    """Return whether one program is made for any number of texts or tokens of these `[B, heads, T, D]`.

    So it is under torch.export with dynamic shapes and under torch.compile(dynamic=True).
    """
    sizes = [size for x in tensors for size in (x.shape[0], x.shape[2])]
    if torch.compiler.is_compiling():
        return not all(torch.fx.experimental.symbolic_shapes.has_static_value(size) for size in sizes)
    return any(isinstance(size, torch.SymInt) for size in sizes)


def transformed() -> bool:
    """Return whether torch.func transforms the call (grad, vmap, jacrev, ...)."""
    return torch._C._are_functorch_transforms_active()


def in_one_piece(*tensors: Tensor) -> bool:
    """Return whether a call on these `[B, heads, T, D]` has to go without loops over tokens and without a Function."""
    return transformed() or sizes_are_open(*tensors)


def whole_chunks(length: int, chunk: int) -> int:
    """Return a number of chunks that holds `length` tokens, where that is open: at least two.

    Of a single one torch would make a special case.
    """
    return (length + chunk - 1) // chunk + 1
