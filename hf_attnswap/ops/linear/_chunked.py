"""Launch the kernels that go by chunks of tokens: states, rows and their gradients, and the gates; imports no triton.

Chunks go in parallel: the state that each adds, the running sums of the states, then all rows at once.
"""

import torch
from torch import Tensor

from .. import gpu


def chunk_of(length: int, rows: int) -> int:
    """Return the tokens of a chunk: few states for long texts, enough programs for short ones.

    Args:
        length: tokens of a text. rows: texts times key/value heads.
    """
    if gpu.INTERPRETED:
        return 32
    return 256 if rows * length >= 1 << 16 else 128


def blocks(stage: str, dtype: torch.dtype, widest: int) -> dict[str, int]:
    """Return the rows (BM) and columns (BN) of a tile, the warps and the stages of a program.

    Args:
        stage: "states" or "products".
        dtype: of the query.
        widest: columns of the widest tile.
    """
    if gpu.INTERPRETED:
        return {"BN": 16} if stage == "states" else {"BM": 16, "BN": 16}
    small = 32 if dtype == torch.float32 or widest > 128 else 64
    warps = 4 if widest <= 64 and dtype != torch.float32 else 8
    if stage == "states":
        return {"BN": small, "num_warps": warps, "num_stages": 2 if widest <= 128 else 1}
    return {"BM": small, "BN": small, "num_warps": warps, "num_stages": 2 if widest <= 128 else 1}


def _columns(size: int) -> int:
    """Return how many columns of a result a program makes."""
    return min(64, gpu.width(size))


class Chunked:
    """Hold what the kernels of one call have in common.

    Args:
        q, k, v: query, key and value, `[B, heads, T, *]`; of q and k the sizes count, and the dtype of q.
        mask: uint8 `[B, T]`, contiguous, of the keys; None where all count.
        gate: log of what each token leaves of the state, `[B, Hkv, T]`, in any dtype; None for 0.
        number: of the map. scale: factor of query and key before it.
        size: tokens of a chunk; None for as many as suit the text.
        denominators: whether a column of ones stands beside the values.

    Attributes:
        size: tokens of a chunk. count: chunks of a text.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, gate: Tensor | None, number: int = 0,
        scale: float = 1.0, size: int | None = None, denominators: bool = True,
    ):  # fmt: skip
        self.batch, self.heads, self.length, self.width = q.shape
        self.kv_heads, self.value_dim = k.shape[1], v.shape[-1]
        self.group = self.heads // self.kv_heads
        self.size = size or chunk_of(self.length, self.batch * self.kv_heads)
        self.count = -(-self.length // self.size)
        self.dtype, self.scale = q.dtype, scale
        self.mask, self.sums = (q if mask is None else mask), (q if gate is None else self._sums(gate))
        self.constants = {
            "F": self.width, "DV": self.value_dim, "MAP": number, "HAS_MASK": mask is not None,
            "HAS_GATE": gate is not None, "DENOMINATORS": denominators, "C": self.size, "IP": gpu.precision(q.dtype),
        }  # fmt: skip

    def _tiles(self, widest: int) -> dict[str, int]:
        """Return what `blocks` says of products; no tile reaches beyond its chunk."""
        sizes = blocks("products", self.dtype, gpu.width(widest))
        return sizes | {name: min(sizes[name], self.size) for name in ("BM", "BN")}

    def _sums(self, gate: Tensor) -> Tensor:
        """Return the running sums of the logs of the gates, as the kernels take them, `[B, Hkv, T]`."""
        from ._gates import sum_logs  # imports triton

        sums = gate.new_empty(gate.shape, dtype=torch.float64)
        rows = self.batch * self.kv_heads
        gpu.launch(sum_logs, (rows,), gate, gate, sums, *gate.stride(), self.kv_heads, self.length, BN=1024)
        return sums

    def added(self, x: Tensor, v: Tensor, ones: Tensor | None = None, backwards: bool = False) -> Tensor:
        """Return what the tokens of each chunk add to the state; takes and returns what `states` does."""
        from ._states import of_chunks  # imports triton

        rows, columns = self.batch * self.kv_heads, _columns(self.value_dim)
        size = self.width * (self.value_dim + self.constants["DENOMINATORS"])
        made = x.new_empty(rows, self.count, size, dtype=torch.float32)
        constants = self.constants | {"HAS_MASK": self.constants["HAS_MASK"] and not backwards}
        gpu.launch(
            of_chunks, (self.count, rows, -(-self.value_dim // columns)), x, x, v, v if ones is None else ones,
            self.mask, self.sums, made, *gpu.strides(x, v), self.kv_heads, x.shape[1] // self.kv_heads, self.length,
            self.count, self.scale, **constants, BF=gpu.width(self.width), BE=columns, HAS_ONES=ones is not None,
            BACKWARDS=backwards, **blocks("states", self.dtype, gpu.width(self.width)),
        )  # fmt: skip
        return made

    def states(
        self, x: Tensor, v: Tensor, ones: Tensor | None = None, first: Tensor | None = None, last: Tensor | None = None,
        backwards: bool = False,
    ) -> Tensor:  # fmt: skip
        """Return the states before each chunk (after it, `backwards`), `[B Hkv, chunks, F Dv + F]`, or without F.

        Args:
            x: keys before the map; `backwards` queries. v: `[B, heads, T, Dv]`; ones: `[B, heads, T]`, None for 1.
            first: the state before all, `[B, Hkv, F, Dv + 1]`, or None. last: where to write the state after all.
        """
        from ._states import running  # imports triton

        made = self.added(x, v, ones, backwards)
        constants = {name: self.constants[name] for name in ("F", "DV", "HAS_GATE", "C")}
        gpu.launch(
            running, (-(-made.shape[-1] // 128), len(made)), x, made, self.sums, made if first is None else first,
            made if last is None else last, self.count, self.length, **constants, HAS_FIRST=first is not None,
            HAS_LAST=last is not None, BACKWARDS=backwards, BC=16, BE=128,
        )  # fmt: skip
        return made

    def by_features(
        self, x: Tensor, y: Tensor, v: Tensor, states: Tensor | None, out: Tensor, den: Tensor | None = None, *,
        widest: int, eps: float | None = None, near: tuple[Tensor, Tensor] | None = None, backwards: bool = False,
    ) -> None:  # fmt: skip
        """Write rows to `out` and, where it is asked for, the denominators to `den`; see the kernel.

        Args:
            x, y: queries and keys, `backwards` keys and queries; v: what is summed, of the heads of y.
            states: before each chunk, `backwards` after it; None for what the chunks alone give.
            widest: columns of the widest tile of the pass. eps: None where the rows are not divided.
            near: log of the mass of another branch, whose rows `out` holds, and log of the factor of this one.
        """
        from ._products import by_features  # imports triton

        columns, sizes = _columns(self.value_dim), self._tiles(widest)
        grid = (-(-self.length // sizes["BM"]), self.batch * x.shape[1], -(-self.value_dim // columns))
        gpu.launch(
            by_features, grid, x, x, y, v, self.mask, self.sums, out if states is None else states, out,
            out if den is None else den, *(near or (out, out)), *gpu.strides(x, y, v, out), self.heads, self.group,
            self.length, self.count, self.scale, eps or 0.0, **self.constants, BF=gpu.width(self.width), BE=columns,
            BACKWARDS=backwards, DIVIDED=eps is not None, JOINED=near is not None, HAS_STATES=states is not None,
            **sizes,
        )  # fmt: skip

    def by_values(
        self, x: Tensor, y: Tensor, k: Tensor, w: Tensor | None, place: Tensor, states: Tensor, out: Tensor,
        backwards: bool = False,
    ) -> Tensor:  # fmt: skip
        """Write the gradient of `place` to `out`; return what passes through the gates, for `of_gates`.

        Args:
            x, y, k, w, place, states, out: as the kernel takes them; w None for 0.
        """
        from ._products import by_values  # imports triton

        columns = _columns(self.width)
        grid = (self.batch * x.shape[1], -(-self.width // columns))
        shape = (grid[1], self.batch, x.shape[1], self.length if self.constants["HAS_GATE"] else 0)
        passed = x.new_empty(shape, dtype=torch.float32)
        sizes = self._tiles(max(self.width, self.value_dim))
        gpu.launch(
            by_values, (-(-self.length // sizes["BM"]), *grid), x, x, y, k, x if w is None else w, place, self.mask,
            self.sums, states, out, passed, *gpu.strides(x, y, k, place, out), self.heads, self.group, self.length,
            self.count, self.scale, **self.constants, BE=gpu.width(self.value_dim), BF=columns, BACKWARDS=backwards,
            **sizes,
        )  # fmt: skip
        return passed

    def of_gates(self, queries: Tensor, keys: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Return the gradients of the logs of the gates, `[B, Hkv, T]`, float32.

        Args:
            queries, keys: what `by_values` returned for both, `[parts, B, heads, T]`.
            before, after: the states before each chunk, and their gradients after it.
        """
        from ._gates import gradients  # imports triton

        out = keys.new_empty(self.batch, self.kv_heads, self.length)
        gpu.launch(
            gradients, (self.count, self.batch * self.kv_heads), keys, queries, keys, before, after, out, self.group,
            self.count, self.length, len(queries), len(keys), SIZE=before.shape[-1], C=self.size, BS=1024,
        )  # fmt: skip
        return out
