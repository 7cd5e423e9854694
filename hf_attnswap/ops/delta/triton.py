"""Compute the delta rule on a GPU by Triton kernels, forward and backward, and one token in one launch.

What corrects the values of a chunk is made for all chunks at once (`_inverse.py`); one pass goes from chunk to chunk
(`_walk.py`); the rows and their gradients are those of the op `linear` over corrected values. The op `gated_delta` runs
here too: the delta rule with a gate. The backward pass makes the corrections and the states again and adds nothing
atomically. The kernels pass Triton's interpreter and compile for sm_80 and sm_90.
"""

import torch
from torch import Tensor

from ... import native
from .. import gpu
from ..linear._chunked import Chunked

devices = gpu.DEVICES
dtypes = gpu.DTYPES
available = gpu.missing

# Wider tiles of float32 leave a program no registers.
_WIDEST_FLOAT32 = 128


def unfit(query, key, value, beta, state, chunk):
    """Return why the kernels cannot serve the call, in words, or None."""
    if reason := gpu.unfit(query, key, value):
        return reason
    widest = max(x.shape[-1] for x in (query, key, value))
    if widest > _WIDEST_FLOAT32 and gpu.dtype_of_products(query, value) == torch.float32:
        return f"heads are {widest} wide, in float32 the kernels take {_WIDEST_FLOAT32}"
    return None


def run(query, key, value, beta, state, chunk):
    """Return what `causal_delta` returns; takes its arguments in order, `chunk` without effect."""
    return gated_or_not(query, key, value, beta, None, state)


def gated_or_not(query, key, value, beta, gate, state) -> tuple[Tensor, Tensor]:
    """Return what `causal_gated_delta` returns, and what `causal_delta` returns where the gate is None."""
    given = query.dtype
    q, k, v = gpu.for_products(query, key, value)
    state = None if state is None else state.detach().float().contiguous()
    if q.shape[2] == 1 and state is not None and not torch.is_grad_enabled():
        out, after = _step(q, k, v, beta[..., 0], None if gate is None else gate[..., 0], state)
    else:
        call = _forward if native.by_hand(q, k, v, beta, gate) else forward
        out, after = call(q, k, v, beta, gate, state)
    return out.to(given), after.detach()


def _chunk_of(dtype: torch.dtype, widest: int) -> int:
    """Return the tokens of a chunk: as many as leave room for the tiles."""
    return 16 if gpu.INTERPRETED else 32 if dtype == torch.float32 or widest > 128 else 64


class _Delta(Chunked):
    """Hold what the kernels of one call have in common.

    Args:
        q, k, v, gate: as in `Chunked`. beta: `[B, Hkv, T]`, in any dtype.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor | None):
        widest = max(gpu.width(q.shape[-1]), gpu.width(v.shape[-1]))
        super().__init__(q, k, v, None, gate, size=_chunk_of(q.dtype, widest), denominators=False)
        self.k, self.v, self.beta, self.rows = k, v, beta, self.batch * self.kv_heads
        names = "DV", "HAS_GATE", "C", "IP"
        self.own = {"D": self.width, **{name: self.constants[name] for name in names}}
        self.warps = {"num_warps": 4 if widest <= 64 and q.dtype != torch.float32 else 8, "num_stages": 1}

    def _new(self, width: int, dtype: torch.dtype) -> Tensor:
        return self.k.new_empty(self.batch, self.kv_heads, self.length, width, dtype=dtype)

    def corrections(self, first: Tensor | None, last: Tensor | None) -> tuple[Tensor, ...]:
        """Return the inverses `[B, Hkv, T, C]`, W `[B, Hkv, T, D]`, U `[B, Hkv, T, Dv]` and the states before chunks.

        Args:
            first: the state before all, `[B, Hkv, D, Dv]`, or None. last: where to write the state after all, or None.
        """
        from ._inverse import prepare  # imports triton

        inverse = self._new(self.size, torch.float32)
        w, u = (self._new(width, self.dtype) for width in (self.width, self.value_dim))
        states = self.k.new_empty(self.rows, self.count, self.width * self.value_dim, dtype=torch.float32)
        gpu.launch(
            prepare, (self.count, self.rows), self.k, self.k, self.v, self.beta, self.sums, inverse, w, u,
            *gpu.strides(self.k, self.v), *self.beta.stride(), self.kv_heads, self.length, **self.own,
            BD=min(64, max(gpu.width(self.width), gpu.width(self.value_dim))), **self.warps,
        )  # fmt: skip
        self._walk(w, self.k, u, None, states, first, last)
        return inverse, w, u, states

    def gradients_of_states(self, w: Tensor, du: Tensor, added: Tensor) -> Tensor:
        """Return the gradients of the states after each chunk; replace what the rows give of dU by dU.

        Args:
            w, du: `[B, Hkv, T, *]`. added: what the rows of each chunk give to the state before it.
        """
        states = torch.empty_like(added)
        self._walk(self.k, w, du, added, states, None, None)
        return states

    def _walk(self, x, y, u, added, states, first, last) -> None:
        from ._walk import walk  # imports triton

        # The next chunk is fetched while one is worked on, where there is room.
        warps = self.warps | {"num_stages": 2 if self.size == 64 else 1}
        columns = min(32 if self.width > 64 else 64, gpu.width(self.value_dim))
        backwards = added is not None
        gpu.launch(
            walk, (self.rows, -(-self.value_dim // columns)), x, x, y, u, added if backwards else states, states,
            self.sums, states if first is None else first, states if last is None else last, *gpu.strides(x, y),
            self.kv_heads, self.length, self.count, **self.own, BD=gpu.width(self.width), BE=columns,
            HAS_FIRST=first is not None, HAS_LAST=last is not None, BACKWARDS=backwards, **warps,
        )  # fmt: skip

    def of_corrections(self, inverse, u, du, states, dk, dv, dbeta, passed) -> None:
        """Write dv and dbeta, and add to dk what the corrections give to the keys; see the kernel."""
        from ._backward import of_corrections  # imports triton

        gpu.launch(
            of_corrections, (self.count, self.rows), u, self.k, self.v, self.beta, self.sums, inverse, u, du, states,
            dk, dv, dbeta, passed, *gpu.strides(self.k, self.v), *self.beta.stride(), *gpu.strides(dk, dv),
            self.kv_heads, self.length, self.count, **self.own, BD=gpu.width(self.width),
            BE=min(32 if self.width > 64 else 64, gpu.width(self.value_dim)), **self.warps,
        )  # fmt: skip


def _results(q, k, v) -> tuple[Tensor, Tensor]:
    """Return memory for the output and for the state."""
    batch, heads, length, dim = q.shape
    # Laid out as [B, T, H, Dv]: the model's output projection reads it without a copy.
    out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
    return out, q.new_empty(batch, k.shape[1], dim, v.shape[-1], dtype=torch.float32)


def _forward(q, k, v, beta, gate, state) -> tuple[Tensor, Tensor]:
    q, k, v = (gpu.side_by_side(t) for t in (q, k, v))
    out, after = _results(q, k, v)
    delta = _Delta(q, k, v, beta, gate)
    _, _, u, before = delta.corrections(state, after)
    delta.by_features(q, k, u, before, out, widest=q.shape[-1])
    return out, after


@torch.library.custom_op("hf_attnswap::delta_triton", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return output and last state.

    Args:
        gate: log of what is left of the state as a token comes, `[B, Hkv, T]`; None for 0. state: float32, contiguous.
    """
    return _forward(q, k, v, beta, gate, state)


@forward.register_fake
def _(q, k, v, beta, gate, state):
    return _results(q, k, v)


@torch.library.custom_op("hf_attnswap::delta_triton_backward", mutates_args=())
def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, gate: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, beta and the gate; that of no gate is empty."""
    grad, q, k, v = (gpu.side_by_side(t) for t in (grad, q, k, v))
    delta, widest = _Delta(q, k, v, beta, gate), max(q.shape[-1], v.shape[-1])
    dq, dk, dv, dbeta, dgate = _gradients(q, k, v, beta, gate)
    inverse, w, u, before = delta.corrections(state, None)
    du = torch.empty_like(u)
    delta.by_features(k, q, grad, None, du, widest=widest, backwards=True)
    after = delta.gradients_of_states(w, du, delta.added(q, grad, backwards=True))
    of_queries = delta.by_values(grad, u, k, None, q, before, dq)
    of_keys = delta.by_values(u, grad, q, None, k, after, dk, backwards=True)
    delta.of_corrections(inverse, u, du, before, dk, dv, dbeta, of_keys)
    if gate is not None:
        dgate = delta.of_gates(of_queries, of_keys, before, after)
    return dq, dk, dv, dbeta, dgate


def _gradients(q, k, v, beta, gate) -> tuple[Tensor, ...]:
    """Return memory for the gradients, those of rows laid out as [B, T, H, D]; without elements for no gate."""
    rows = (t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in (q, k, v))
    return *rows, *(q.new_empty(0 if t is None else t.shape, dtype=torch.float32) for t in (beta, gate))


@backward.register_fake
def _(grad, q, k, v, beta, gate, state):
    return _gradients(q, k, v, beta, gate)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _grad_state):
    q, k, v, beta, gate, state = ctx.saved_tensors  # which gradient checkpointing hands out once
    if grad is None:
        return (None,) * 6
    dq, dk, dv, dbeta, dgate = backward(grad, q, k, v, beta, gate, state)
    return dq, dk, dv, dbeta.to(beta.dtype), None if gate is None else dgate.to(gate.dtype), None


forward.register_autograd(_backward, setup_context=_keep)


def _step(q, k, v, beta, gate, state) -> tuple[Tensor, Tensor]:
    """Return output and state after one token: one launch, and no memory beside the results."""
    from ._step import step  # imports triton

    q, k, v = (gpu.side_by_side(t) for t in (q, k, v))
    batch, heads, _, dim = q.shape
    kv_heads, value_dim, columns = k.shape[1], v.shape[-1], 32
    out, after = q.new_empty(batch, heads, 1, value_dim), torch.empty_like(state)
    gpu.launch(
        step, (batch * kv_heads, -(-value_dim // columns)), q, q, k, v, beta, beta if gate is None else gate, state,
        after, out, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *beta.stride(),
        *((0, 0) if gate is None else gate.stride()), kv_heads, heads // kv_heads, D=dim, DV=value_dim,
        BD=gpu.width(dim), BE=columns, HAS_GATE=gate is not None, num_warps=4,
    )  # fmt: skip
    return out, after
