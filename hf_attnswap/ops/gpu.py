"""Say when the Triton forms of the ops can run, and launch their kernels; imports no triton itself.

The forms run on GPUs. Where TRITON_INTERPRET=1 stood in the environment when the package was imported, Triton's
interpreter runs the kernels on the CPU as well, slowly: for tests. The kernels are imported by the first call that they
serve.
"""

import importlib.util
import os
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .programs import transformed

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Columns of the widest tile that kernels hold.
WIDEST = 256
# GPUs of these capabilities have 160 kB of shared memory per block or more, others about 100.
_ROOMY = ((8, 0), (9, 0), (10, 0), (10, 3), (11, 0))


def missing() -> str | None:
    """Return why no Triton kernel can run on this machine, in words; None where triton is installed."""
    return None if importlib.util.find_spec("triton") else "triton is not installed"


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def roomy(x: Tensor) -> bool:
    """Return whether blocks of threads have 160 kB of shared memory on the device of `x`."""
    return x.device.type == "cpu" or _capability(x.device.index) in _ROOMY


def unfit(*tensors: Tensor) -> str | None:
    """Return why no kernel takes query, key and value `[B, heads, T, D]`, in words; None where kernels can."""
    query = tensors[0]
    if transformed() or torch.jit.is_tracing():
        return "torch.func and torch.jit.trace take torch's own operations only"
    if query.device.type == "cuda" and torch.version.hip is None and _capability(query.device.index) < (8, 0):
        major, minor = _capability(query.device.index)
        return f"the kernels need compute capability 8.0, this GPU has {major}.{minor}"
    if not torch.compiler.is_compiling() and not all(x.numel() for x in tensors):
        return "there is nothing to compute"
    widest = max(x.shape[-1] for x in tensors)
    return f"heads are {widest} wide, the kernels take {WIDEST}" if widest > WIDEST else None


def width(size: int) -> int:
    """Return the columns of a tile that holds `size` numbers per token: a power of two, 16 at least."""
    return max(16, 1 << (size - 1).bit_length())


def precision(dtype: torch.dtype) -> str:
    """Return how products are made: those of float32 numbers by three products of TF32, nearly as exact as IEEE's."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def alike(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value in the dtype of the query: products take one; under autocast there may be two."""
    return query, key.to(query.dtype), value.to(query.dtype)


def dtype_of_products(query: Tensor, value: Tensor) -> torch.dtype:
    """Return the dtype of products of features, which come in float32 in any model, with values.

    bfloat16 where the values are, in which features stay in range; else that of the query.
    """
    return torch.bfloat16 if value.dtype == torch.bfloat16 else query.dtype


def for_products(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return features of queries and keys, and values, in the dtype of their products."""
    dtype = dtype_of_products(query, value)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def side_by_side(x: Tensor) -> Tensor:
    """Return the tensor, copied unless the numbers of a token stand side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(*tensors: Tensor) -> list[int]:
    """Return the strides of batch, head and token of each tensor `[B, heads, T, D]`."""
    return [stride for x in tensors for stride in x.stride()[:3]]


# Compiled kernels, with the values of their constants in order, by what Triton compiles them for.
_compiled: dict[tuple, tuple[Any, tuple]] = {}


def launch(kernel, grid: tuple[int, ...], like: Tensor, *arguments, **constants) -> None:
    """Run a kernel on the device of `like`; `num_warps` and `num_stages` stand among the constants.

    Triton finds a compiled kernel by a walk over all arguments in Python, which takes longer than many kernels run. So
    that walk is made once for arguments of the same kinds, and the compiled kernel is launched from then on.
    """
    if like.device.type != "cuda":  # the interpreter
        kernel[grid](*arguments, **constants)
        return
    index = like.device.index
    with nullcontext() if torch.cuda.current_device() == index else torch.cuda.device(index):
        key = (kernel, index, *constants.items(), *map(_kind, arguments))
        ready = _compiled.get(key)
        if ready is None:
            compiled = kernel[grid](*arguments, **constants)
            _compiled[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        else:
            compiled, values = ready
            compiled[(*grid, 1, 1)[:3]](*arguments, *values)


def _kind(argument):
    """Return what Triton compiles a kernel anew for: dtype and alignment, or what is known of an integer."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument.bit_length() < 32
    return type(argument)
