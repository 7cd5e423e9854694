"""Call the CPU kernels: one library of C++ behind a plain C interface, which serves every version of torch.

A kernel takes one structure of pointers, strides and sizes, as `src/interface.h` defines it. Each kernel is there once
per instruction set and type of number; the fastest set that this processor runs is taken, or the one that
HF_ATTNSWAP_CPU names (read when the library is loaded). The library is built with the package (`build.py`); without
it, `missing` says why.
"""

import ctypes
import os
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from ..errors import UsageError
from .build import LIBRARY, SOURCES, fingerprint, instruction_sets

VARIABLE = "HF_ATTNSWAP_CPU"
_REALS = {torch.float32: "f32", torch.float64: "f64"}
_C_TYPES = {"int64_t": ctypes.c_int64, "double": ctypes.c_double, "void*": ctypes.c_void_p}


@cache
def _loaded() -> ctypes.CDLL | str:
    """Return the library, or why there is none, in words."""
    if not LIBRARY.exists():
        return "the CPU kernels are not built (python -m hf_attnswap.native builds them)"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        library.attnswap_fingerprint.restype = ctypes.c_char_p
        if library.attnswap_fingerprint().decode().split()[0] != fingerprint():
            return "the CPU kernels were built from other sources (python -m hf_attnswap.native builds them again)"
    except (OSError, AttributeError) as error:
        return f"the CPU kernels cannot be loaded: {error}"
    # The threads of the OpenMP that torch has loaded, so that there is one pool.
    if pool := getattr(ctypes.CDLL(None), "GOMP_parallel", None):
        library.attnswap_use_pool(ctypes.cast(pool, ctypes.c_void_p))
    return library


@cache
def instruction_set() -> str:
    """Return the instruction set whose kernels run, such as "avx2".

    Raises:
        UsageError: HF_ATTNSWAP_CPU names one that is not built or that this processor does not have.
    """
    found = [name for name in instruction_sets() if runs(name)]
    wanted = os.environ.get(VARIABLE) or found[0]
    if wanted not in found:
        raise UsageError(f"{VARIABLE}={wanted}: there are kernels for {', '.join(found)} that this processor runs")
    return wanted


def runs(name: str) -> bool:
    """Return whether the library has kernels for an instruction set, and this processor runs them."""
    return hasattr(_loaded(), f"linear_forward_{name}_f32") and bool(_loaded().attnswap_runs(name.encode()))


def missing() -> str | None:
    """Return why the kernels cannot run on this machine, in words; None where they can."""
    loaded = _loaded()
    return loaded if isinstance(loaded, str) else None


def describe() -> str:
    """Return in words what is built and which instruction set this processor uses."""
    return missing() or f"CPU kernels for {', '.join(instruction_sets())}; this processor uses {instruction_set()}"


def _structures() -> dict[str, type[ctypes.Structure]]:
    """Return the structures of `src/interface.h` by name."""
    found: dict[str, Any] = {}
    text = re.sub(r"//.*", "", (SOURCES / "interface.h").read_text())
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", text, re.DOTALL):
        fields = [
            (field, found[kind.removeprefix("struct ")] if kind.startswith("struct ") else _C_TYPES[kind])
            for kind, field in re.findall(r"((?:struct )?[\w*]+) (\w+);", body)
        ]
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


_STRUCTURES = _structures()
Linear, Window, WindowStep, Scores, Delta = (
    _STRUCTURES[name] for name in ("Linear", "Window", "WindowStep", "Scores", "Delta")
)
_Tensor = _STRUCTURES["Tensor"]
NOTHING = _Tensor()


def strided(x: torch.Tensor | None) -> ctypes.Structure:
    """Return a tensor `[batch, head, token]` or `[batch, head, token, dimension]` as kernels take it.

    The last dimension of four must stand side by side (`rows`).
    """
    return NOTHING if x is None else _Tensor(x.data_ptr(), *x.stride()[:3])


def pointer(x: torch.Tensor | None) -> int | None:
    """Return where the numbers of a contiguous tensor stand; None for None."""
    return None if x is None else x.data_ptr()


def rows(x: torch.Tensor) -> torch.Tensor:
    """Return the tensor, copied unless its last dimension stands side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def whole_vectors(x: torch.Tensor) -> torch.Tensor:
    """Return the tensor with its last dimension filled up with zeros to a multiple of 16, side by side in memory."""
    more = -x.shape[-1] % 16
    return rows(torch.nn.functional.pad(x, (0, more)) if more else x)


@cache
def _kernel(name: str, dtype: torch.dtype) -> Callable[..., None]:
    function = getattr(_loaded(), f"{name}_{instruction_set()}_{_REALS[dtype]}")
    function.restype = None
    return function


def run(name: str, dtype: torch.dtype, call: ctypes.Structure) -> None:
    """Run the kernel `name` that computes in `dtype`, float32 or float64, on a filled structure."""
    _kernel(name, dtype)(ctypes.byref(call))


class Prepared:
    """Hold a call whose sizes are known, of which only the tensors change from one to the next: a step of generation.

    Args:
        name, dtype: as in `run`.
        call: the structure with its sizes and strides. Threads may not share it: cache it by `threading.get_ident()`.
        fields: those of the tensors, in the order in which a call gives them.
    """

    def __init__(self, name: str, dtype: torch.dtype, call: ctypes.Structure, fields: Sequence[str]):
        self.name, self.dtype, self.call = name, dtype, call
        self.numbers = (ctypes.c_int64 * (ctypes.sizeof(call) // 8)).from_buffer(call)
        self.places = [getattr(type(call), field).offset // 8 for field in fields]

    def __call__(self, *addresses: int | None) -> None:
        """Run the kernel on tensors of these sizes and strides, given by `data_ptr`; None for no tensor."""
        numbers = self.numbers
        for place, address in zip(self.places, addresses, strict=True):
            numbers[place] = address or 0
        run(self.name, self.dtype, self.call)


def side_by_side(heads: int, width: int, tokens: int = 1) -> ctypes.Structure:
    """Return the strides of a contiguous tensor `[batch, heads, tokens, width]`, for `Prepared`."""
    return _Tensor(None, heads * tokens * width, tokens * width, width)


def by_hand(*tensors: torch.Tensor | None) -> bool:
    """Return whether a kernel may be called at once, without torch's dispatcher.

    False where a gradient is wanted, where torch.compile or torch.export traces the call, and for tensors that hold no
    numbers.
    """
    if torch.compiler.is_compiling():
        return False
    wanted = torch.is_grad_enabled()
    return all(t is None or (type(t) in _PLAIN and not (wanted and t.requires_grad)) for t in tensors)


_PLAIN = (torch.Tensor, torch.nn.Parameter)
