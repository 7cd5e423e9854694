"""Tensors in safetensors files, whole or as the parts that processes hold, read back on any number of processes."""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UsageError


def save_parts(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors to a safetensors file; of those that are sharded, the part of this process and where it begins."""
    parts, begins = {}, {}
    for name, tensor in tensors.items():
        part, begin = _own_part(tensor.detach())
        parts[name] = part.contiguous()
        if any(begin):
            begins[name] = begin
    save_file(parts, path, metadata={"begins": json.dumps(begins)})


class Parts:
    """Tensors by name in the files that `save_parts` wrote, of one process or of several; a context manager.

    Raises:
        UsageError: a file is no safetensors file.
    """

    def __init__(self, paths: Iterable[Path]):
        self._opened = ExitStack()
        self._files = []
        for path in paths:
            try:
                file = self._opened.enter_context(safe_open(path, "pt"))
                begins = json.loads((file.metadata() or {}).get("begins", "{}"))
            except Exception as error:  # safetensors has kinds of its own
                raise UsageError(f"{str(path)!r} is not a file of tensors of this package: {error}") from None
            self._files.append((file, begins, set(file.keys())))

    def __enter__(self) -> "Parts":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor as a whole, by its name."""
        ends: dict[str, tuple[int, ...]] = {}
        for file, begins, names in self._files:
            for name in names:
                shape = file.get_slice(name).get_shape()
                end = tuple(at + size for at, size in zip(begins.get(name, [0] * len(shape)), shape, strict=True))
                ends[name] = tuple(map(max, ends.get(name, end), end))
        return ends

    @torch.no_grad()
    def read_into(self, name: str, tensor: Tensor) -> None:
        """Fill `tensor`, or the part of it that this process holds, with the tensor of that name."""
        own, begin = _own_part(tensor)
        for file, begins, names in self._files:
            if name not in names:
                continue
            there = file.get_slice(name)
            shape = there.get_shape()
            if not shape:
                own.copy_(file.get_tensor(name))
                continue
            at = begins.get(name, [0] * len(shape))
            low = [max(pair) for pair in zip(begin, at, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(begin, own.shape, at, shape, strict=True)]
            if all(first < last for first, last in zip(low, high, strict=True)):
                own[_box(low, high, begin)].copy_(there[_box(low, high, at)])


def _box(low: list[int], high: list[int], origin: Iterable[int]) -> tuple[slice, ...]:
    return tuple(slice(first - at, last - at) for first, last, at in zip(low, high, origin, strict=True))


def _own_part(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """Return what this process holds of a tensor, and where in the whole tensor that begins."""
    if not hasattr(tensor, "__create_chunk_list__"):  # what torch's own distributed checkpoints ask a DTensor for
        return tensor, [0] * tensor.dim()
    (chunk,) = tensor.__create_chunk_list__()
    return tensor.to_local(), list(chunk.offsets)
