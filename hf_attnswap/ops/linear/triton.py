"""Compute causal linear attention on a GPU by Triton kernels, forward and backward, and one token in one launch.

Chunks of tokens go in parallel (`_chunked.py`): the state that each adds, the running sums of the states, then all rows
at once. The maps identity, elu and relu are made where a tile is read, hedgehog's features once (`_maps.py`), those of
any other map by torch. A decay is a gate that is the same for all tokens (`_gates.py`). States are float32. The
backward pass makes the states again and adds nothing atomically. The kernels pass Triton's interpreter and compile for
sm_80 and sm_90.
"""

import torch
from torch import Tensor

from ... import native
from .. import gpu
from . import _hedgehog
from ._chunked import Chunked
from ._features import mapped, scaled

devices = gpu.DEVICES
dtypes = gpu.DTYPES
available = gpu.missing

_NUMBERS = {"identity": 0, "elu": 1, "relu": 2, "hedgehog": 3}
IDENTITY, _HEDGEHOG = 0, 3


def unfit(query, key, value, map_query, map_key, scale, key_mask, state, eps, chunk, causal, log_decay):
    """Return why the kernels cannot serve the call, in words, or None."""
    if not causal:
        return "attention to all keys is two products, which torch has"
    if reason := gpu.unfit(query, key, value):
        return reason
    number = number_of(map_query, map_key)
    if number is None and query.dtype == torch.float16:
        return f"features of {map_query.name} may leave the range of float16"
    width = key.shape[-1]
    if number is None:
        width = map_key(key[:, :, :1].float()).shape[-1]
    features = 2 * width if number == _HEDGEHOG else width
    return f"there are {features} features, the kernels take {gpu.WIDEST}" if features > gpu.WIDEST else None


def run(query, key, value, map_query, map_key, scale, key_mask, state, eps, chunk, causal, log_decay):
    """Return what `causal_linear` returns; takes its arguments in order, with `causal` before the last."""
    number = number_of(map_query, map_key)
    mask = None if key_mask is None else key_mask.to(torch.uint8).contiguous()
    state = None if state is None else state.detach().float().contiguous()
    query, key, value = gpu.alike(query, key, value)
    if query.shape[2] == 1 and state is not None and not torch.is_grad_enabled() and number is not None:
        deltas = [m.tensors.get("delta") for m in (map_query, map_key)]
        gate = None if log_decay is None else log_decay.expand(len(key), -1)
        return step(query, key, value, deltas, mask, gate, state, number, float(scale), eps)
    if number is None or number == _HEDGEHOG or (number == IDENTITY and scale != 1):
        query, key = (_features(x, m, number, float(scale)) for x, m in ((query, map_query), (key, map_key)))
        number, scale = IDENTITY, 1.0
    gate = None if log_decay is None else gates(log_decay, key, key_mask)
    return on_features(query, key, value, mask, gate, state, number, float(scale), eps)


def gates(log_decay: Tensor, key: Tensor, counted: Tensor | None) -> Tensor:
    """Return a decay per head, `[Hkv]`, as the log of a gate per token, `[B, Hkv, T]`, float32.

    Args:
        key: `[B, Hkv, T, D]`, for its shape. counted: bool `[1 or B, T]`, tokens with which the state fades; None: all.
    """
    gate = log_decay.float()[:, None]
    return (gate if counted is None else gate * counted[:, None]).expand(key.shape[:3])


def number_of(map_query, map_key) -> int | None:
    """Return the kernels' number of the map, None for a map that they do not have."""
    return _NUMBERS.get(map_query.name) if map_query.name == map_key.name else None


def _features(x, feature_map, number: int | None, scale: float = 1.0) -> Tensor:
    """Return the features of x in its dtype, `[B, heads, T, F]`; by torch where the map is not the kernels'."""
    if number == _HEDGEHOG:
        return _hedgehog.features(x, feature_map.tensors["delta"], scale)[0]
    return mapped(scaled(x, torch.float32, scale), feature_map).to(x.dtype)


def features_of_keys(x, feature_map) -> Tensor:
    """Return the features of keys `[B, Hkv, T, D]`, in their dtype."""
    return _features(x, feature_map, _NUMBERS.get(feature_map.name))


def features_beside(x, feature_map) -> tuple[Tensor, Tensor | float]:
    """Return the features of queries beside a softmax, and the logs left out of them, `[B, H, T]` or 0."""
    if _NUMBERS.get(feature_map.name) == _HEDGEHOG:
        return _hedgehog.features(x, feature_map.tensors["delta"], 1.0, beside=True)
    features, left = feature_map.beside_softmax(x.float())
    return features.to(x.dtype), 0.0 if left is None else left.squeeze(-1)


def beside_softmax(q, k, v, mask, gate, state, out, lse, mass) -> Tensor:
    """Join the linear branch to the output of a softmax, written over `out`; return the state after. No gradient.

    Args:
        q, k: features. gate: as in `on_features`. out: `[B, H, T, Dv]`. lse, mass: `[B, H, T]`, float32, contiguous:
            the log of the mass of the softmax, and of the factor of the linear branch.
    """
    return _forward(q, k, v, mask, gate, state, IDENTITY, 1.0, None, False, (out, lse, mass))[2]


def on_features(query, key, value, mask, gate, state, number, scale, eps) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `causal_linear` returns, over features or, where `number` says so, with an element-wise map.

    Args:
        mask: uint8 `[B, T]`, or None. gate: log of what each token leaves of the state, `[B, Hkv, T]`, or None.
        state: float32, contiguous, or None. number: of the map.
    """
    given = (query, key, value, gate)
    learning = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    call = _forward if native.by_hand(*given) else forward
    out, den, after = call(query, key, value, mask, gate, state, number, scale, eps, learning)
    return out if eps is None else out.to(query.dtype), den, after.detach()


def _results(q, k, v, eps, learning) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for output (float32 where a gradient or a caller needs it exact), denominators and last state."""
    batch, heads, length, width = q.shape
    dtype = torch.float32 if learning or eps is None else q.dtype
    # Laid out as [B, T, H, Dv]: the model's output projection reads it without a copy.
    out = q.new_empty(batch, length, heads, v.shape[-1], dtype=dtype).transpose(1, 2)
    den = q.new_empty(batch, heads, length, dtype=torch.float32)
    return out, den, q.new_empty(batch, k.shape[1], width, v.shape[-1] + 1, dtype=torch.float32)


def _forward(q, k, v, mask, gate, state, number, scale, eps, learning, near=None) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels. `near`: out, lse and mass as `beside_softmax` takes them."""
    q, k, v = (gpu.side_by_side(t) for t in (q, k, v))
    chunked = Chunked(q, k, v, mask, gate, number, scale)
    out, den, after = _results(q, k, v, eps, learning)
    before = chunked.states(k, v, first=state, last=after)
    near, out = (None, out) if near is None else (near[1:], near[0])
    chunked.by_features(q, k, v, before, out, den, widest=q.shape[-1], eps=eps, near=near)
    return out, den, after


@torch.library.custom_op("hf_attnswap::linear_triton", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    gate: Tensor | None,
    state: Tensor | None,
    number: int,
    scale: float,
    eps: float | None,
    learning: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, denominators and last state; arguments as in `on_features`."""
    return _forward(q, k, v, mask, gate, state, number, scale, eps, learning)


@forward.register_fake
def _(q, k, v, mask, gate, state, number, scale, eps, learning):
    return _results(q, k, v, eps, learning)


@torch.library.custom_op("hf_attnswap::linear_triton_backward", mutates_args=())
def backward(
    grad: Tensor,
    grad_den: Tensor,
    out: Tensor,
    den: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    gate: Tensor | None,
    state: Tensor | None,
    number: int,
    scale: float,
    eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and the gate; that of no gate is empty."""
    from ._products import prepare  # imports triton

    grad, q, k, v = (gpu.side_by_side(t) for t in (grad, q, k, v))
    batch, heads, length, width = q.shape
    value_dim = v.shape[-1]
    u = q.new_empty(batch, heads, length, value_dim)
    w = q.new_empty(batch, heads, length, dtype=torch.float32)
    gpu.launch(
        prepare, (-(-length // 32), batch * heads), q, out, den, grad, grad_den.contiguous(), u, w,
        *gpu.strides(out, grad), heads, length, eps or 0.0, DV=value_dim, BE=gpu.width(value_dim),
        DIVIDED=eps is not None, BM=32,
    )  # fmt: skip
    chunked = Chunked(q, k, v, mask, gate, number, scale)
    before = chunked.states(k, v, first=state)
    after = chunked.states(q, u, w, backwards=True)
    dq, dk, dv, dgate = _gradients(q, k, v, gate)
    of_queries = chunked.by_values(u, v, k, w, q, before, dq)
    of_keys = chunked.by_values(v, u, q, w, k, after, dk, backwards=True)
    chunked.by_features(k, q, u, after, dv, widest=max(width, value_dim), backwards=True)
    if gate is not None:
        dgate = chunked.of_gates(of_queries, of_keys, before, after)
    return dq, dk, dv, dgate


def _gradients(q, k, v, gate) -> tuple[Tensor, ...]:
    """Return memory for the gradients, those of rows laid out as [B, T, H, D]; without elements for no gate."""
    rows = (t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in (q, k, v))
    return *rows, q.new_empty(0 if gate is None else gate.shape, dtype=torch.float32)


@backward.register_fake
def _(grad, grad_den, out, den, q, k, v, mask, gate, *rest):
    return _gradients(q, k, v, gate)


def _keep(ctx, inputs, output):
    *tensors, number, scale, eps, _ = inputs
    ctx.numbers = number, scale, eps
    ctx.save_for_backward(*output[:2], *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_den, _grad_state):
    out, den, *tensors = ctx.saved_tensors  # which gradient checkpointing hands out once
    grad = torch.zeros_like(out) if grad is None else grad
    grad_den = torch.zeros_like(den) if grad_den is None else grad_den
    dq, dk, dv, dgate = backward(grad, grad_den, out, den, *tensors, *ctx.numbers)
    gate = tensors[4]
    return dq, dk, dv, None, None if gate is None else dgate.to(gate.dtype), *[None] * 5


forward.register_autograd(_backward, setup_context=_keep)


def step(query, key, value, deltas, mask, gate, state, number, scale, eps) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, denominator and state after one token: one launch, and no memory beside the results.

    Args:
        deltas: of hedgehog's maps, else None. gate: log of what remains of the state, `[B, Hkv]`, or None.
    """
    from ._step import step as kernel  # imports triton

    q, k, v = (gpu.side_by_side(t) for t in (query, key, value))
    batch, heads, _, dim = q.shape
    kv_heads, value_dim = k.shape[1], v.shape[-1]
    out = q.new_empty(batch, heads, 1, value_dim, dtype=q.dtype if eps is not None else torch.float32)
    den = q.new_empty(batch, heads, 1, dtype=torch.float32)
    after = torch.empty_like(state)
    delta_q, delta_k = (q if d is None else d.contiguous() for d in deltas)
    columns = 32
    gpu.launch(
        kernel, (batch * kv_heads, -(-(value_dim + 1) // columns)), q, q, k, v, delta_q, delta_k,
        q if mask is None else mask, q if gate is None else gate, state, after, out, den, *q.stride()[:2],
        *k.stride()[:2], *v.stride()[:2], *((0, 0) if gate is None else gate.stride()), kv_heads, heads // kv_heads,
        scale, eps or 0.0, D=dim, DV=value_dim, BD=gpu.width(dim), BE=columns, MAP=number, HAS_MASK=mask is not None,
        HAS_GATE=gate is not None, DIVIDED=eps is not None, num_warps=4,
    )  # fmt: skip
    return out, den, after
