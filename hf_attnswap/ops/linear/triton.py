"""Compute causal linear attention on a GPU by Triton kernels, forward and backward, and one token in one launch.

Chunks of tokens go in parallel: the state that each adds, the running sums of the states, then all rows at once
(`_states.py`, `_products.py`). The maps identity, elu and relu are made where a tile is read, hedgehog's features once
(`_maps.py`), those of any other map by torch. States are float32. The backward pass makes the states again and adds
nothing atomically. They pass Triton's interpreter and compile for sm_80 and sm_90; they have not run on a GPU yet.
"""

import torch
from torch import Tensor

from ... import native
from .. import gpu
from . import _hedgehog
from ._features import mapped, scaled

devices = gpu.DEVICES
dtypes = gpu.DTYPES
available = gpu.missing

_NUMBERS = {"identity": 0, "elu": 1, "relu": 2, "hedgehog": 3}
_IDENTITY, _HEDGEHOG = 0, 3


def unfit(query, key, value, map_query, map_key, scale, key_mask, state, eps, chunk, causal, log_decay):
    """Return why the kernels cannot serve the call, in words, or None."""
    if not causal:
        return "attention to all keys is two products, which torch has"
    if log_decay is not None:
        return "the kernels have no decay"
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
        return _step(query, key, value, deltas, mask, state, number, float(scale), eps)
    if number is None or number == _HEDGEHOG or (number == _IDENTITY and scale != 1):
        query, key = (_features(x, m, number, float(scale)) for x, m in ((query, map_query), (key, map_key)))
        number, scale = _IDENTITY, 1.0
    return on_features(query, key, value, mask, state, number, float(scale), eps)


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


def beside_softmax(q, k, v, mask, state, out, lse, mass) -> Tensor:
    """Join the linear branch to the output of a softmax, written over `out`; return the state after. No gradient.

    Args:
        q, k: features. out: `[B, H, T, Dv]`. lse, mass: `[B, H, T]`, float32, contiguous: the log of the mass of the
            softmax, and of the factor of the linear branch.
    """
    return _forward(q, k, v, mask, state, _IDENTITY, 1.0, None, False, (out, lse, mass))[2]


def on_features(query, key, value, mask, state, number, scale, eps) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `causal_linear` returns, over features or, where `number` says so, with an element-wise map.

    Args:
        mask: uint8 `[B, T]`, or None. state: float32, contiguous, or None. number: of the map.
    """
    learning = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    arguments = (query, key, value, mask, state, number, scale, eps, learning)
    call = _forward if native.by_hand(query, key, value) else forward
    out, den, after = call(*arguments)
    return out if eps is None else out.to(query.dtype), den, after.detach()


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
    """Return how many columns of the output a program makes."""
    return min(64, gpu.width(size))


def states(x, v, ones, mask, first, last, kv_heads, number, scale, chunk, backwards=False) -> Tensor:
    """Return the states before each chunk (after it, `backwards`), `[B Hkv, chunks, F Dv + F]`.

    Args:
        x: `[B, heads, T, F]` before the map; v: `[B, heads, T, Dv]`; ones: `[B, heads, T]`, None for 1.
        first: the state before all, `[B, Hkv, F, Dv + 1]`, or None. last: where to write the state after all, or None.
    """
    from . import _states as kernels  # imports triton

    batch, heads, length, width = x.shape
    value_dim, chunks, rows = v.shape[-1], -(-length // chunk), batch * kv_heads
    made = x.new_empty(rows, chunks, width * value_dim + width, dtype=torch.float32)
    columns = _columns(value_dim)
    sizes = {"F": width, "DV": value_dim}
    gpu.launch(
        kernels.of_chunks, (chunks, rows, -(-value_dim // columns)), x, x, v, v if ones is None else ones,
        x if mask is None else mask, made, *gpu.strides(x, v), kv_heads, heads // kv_heads, length, chunks, scale,
        **sizes, BF=gpu.width(width), BE=columns, MAP=number, HAS_MASK=mask is not None, HAS_ONES=ones is not None,
        C=chunk, IP=gpu.precision(x.dtype), **blocks("states", x.dtype, gpu.width(width)),
    )  # fmt: skip
    gpu.launch(
        kernels.running, (-(-made.shape[-1] // 128), rows), x, made, made if first is None else first,
        made if last is None else last, chunks, **sizes, HAS_FIRST=first is not None, HAS_LAST=last is not None,
        BACKWARDS=backwards, BC=16, BE=128,
    )  # fmt: skip
    return made


def _results(q, k, v, eps, learning) -> tuple[Tensor, Tensor, Tensor]:
    """Return memory for output (float32 where a gradient or a caller needs it exact), denominators and last state."""
    batch, heads, length, width = q.shape
    dtype = torch.float32 if learning or eps is None else q.dtype
    # Laid out as [B, T, H, Dv]: the model's output projection reads it without a copy.
    out = q.new_empty(batch, length, heads, v.shape[-1], dtype=dtype).transpose(1, 2)
    den = q.new_empty(batch, heads, length, dtype=torch.float32)
    return out, den, q.new_empty(batch, k.shape[1], width, v.shape[-1] + 1, dtype=torch.float32)


def _forward(q, k, v, mask, state, number, scale, eps, learning, near=None) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels. `near`: out, lse and mass as `beside_softmax` takes them."""
    from ._products import by_features  # imports triton

    q, k, v = (gpu.side_by_side(t) for t in (q, k, v))
    batch, heads, length, width = q.shape
    kv_heads, value_dim = k.shape[1], v.shape[-1]
    out, den, after = _results(q, k, v, eps, learning)
    out, lse, mass = (out, den, den) if near is None else near
    chunk, columns = chunk_of(length, batch * kv_heads), _columns(value_dim)
    before = states(k, v, None, mask, state, after, kv_heads, number, scale, chunk)
    sizes = blocks("products", q.dtype, gpu.width(width))
    beside = q if mask is None else mask
    gpu.launch(
        by_features, (-(-length // sizes["BM"]), batch * heads, -(-value_dim // columns)), q, q, k, v, beside, beside,
        before, out, den, lse, mass, *gpu.strides(q, k, v, out), heads, heads // kv_heads, length, before.shape[1],
        scale, eps or 0.0, F=width, DV=value_dim, BF=gpu.width(width), BE=columns, XMAP=number, YMAP=number,
        X_MASKED=False, Y_MASKED=mask is not None, C=chunk, BACKWARDS=False, DIVIDED=eps is not None,
        JOINED=near is not None, IP=gpu.precision(q.dtype), **sizes,
    )  # fmt: skip
    return out, den, after


@torch.library.custom_op("hf_attnswap::linear_triton", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    state: Tensor | None,
    number: int,
    scale: float,
    eps: float | None,
    learning: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, denominators and last state; arguments as in `on_features`."""
    return _forward(q, k, v, mask, state, number, scale, eps, learning)


@forward.register_fake
def _(q, k, v, mask, state, number, scale, eps, learning):
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
    state: Tensor | None,
    number: int,
    scale: float,
    eps: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    from . import _products as kernels  # imports triton

    grad, q, k, v = (gpu.side_by_side(t) for t in (grad, q, k, v))
    batch, heads, length, width = q.shape
    kv_heads, value_dim = k.shape[1], v.shape[-1]
    group, chunk = heads // kv_heads, chunk_of(length, batch * kv_heads)
    u = q.new_empty(batch, heads, length, value_dim)
    w = q.new_empty(batch, heads, length, dtype=torch.float32)
    gpu.launch(
        kernels.prepare, (-(-length // 32), batch * heads), q, out, den, grad, grad_den.contiguous(), u, w,
        *gpu.strides(out, grad), heads, length, eps or 0.0, DV=value_dim, BE=gpu.width(value_dim),
        DIVIDED=eps is not None, BM=32,
    )  # fmt: skip
    shared = (kv_heads, number, scale, chunk)
    before = states(k, v, None, mask, state, None, *shared)
    after = states(q, u, w, None, None, None, *shared, backwards=True)
    dq, dk, dv = _gradients(q, k, v)
    beside, masked = q if mask is None else mask, mask is not None
    sizes = blocks("products", q.dtype, max(gpu.width(width), gpu.width(value_dim)))
    tiles, common = -(-length // sizes["BM"]), {"F": width, "DV": value_dim, "C": chunk, "IP": gpu.precision(q.dtype)}
    numbers = (heads, group, length, before.shape[1], scale)
    columns, of_features = _columns(value_dim), _columns(width)
    gpu.launch(
        kernels.by_values, (tiles, batch * heads, -(-width // of_features)), q, u, v, k, w, q, beside, beside, before,
        dq, *gpu.strides(u, v, k, q, dq), *numbers, **common, BE=gpu.width(value_dim), BF=of_features, KMAP=number,
        PMAP=number, K_MASKED=masked, P_MASKED=False, BACKWARDS=False, **sizes,
    )  # fmt: skip
    gpu.launch(
        kernels.by_values, (tiles, batch * kv_heads, -(-width // of_features)), q, v, u, q, w, k, beside, beside, after,
        dk, *gpu.strides(v, u, q, k, dk), *numbers, **common, BE=gpu.width(value_dim), BF=of_features, KMAP=number,
        PMAP=number, K_MASKED=False, P_MASKED=masked, BACKWARDS=True, **sizes,
    )  # fmt: skip
    gpu.launch(
        kernels.by_features, (tiles, batch * kv_heads, -(-value_dim // columns)), q, k, q, u, beside, beside, after, dv,
        w, w, w, *gpu.strides(k, q, u, dv), *numbers, 0.0, **common, BF=gpu.width(width), BE=columns, XMAP=number,
        YMAP=number, X_MASKED=masked, Y_MASKED=False, BACKWARDS=True, DIVIDED=False, JOINED=False, **sizes,
    )  # fmt: skip
    return dq, dk, dv


def _gradients(q, k, v) -> tuple[Tensor, ...]:
    """Return memory for the gradients, laid out as [B, T, H, D]."""
    return tuple(t.new_empty(t.shape[0], t.shape[2], t.shape[1], t.shape[3]).transpose(1, 2) for t in (q, k, v))


@backward.register_fake
def _(grad, grad_den, out, den, q, k, v, *rest):
    return _gradients(q, k, v)


def _keep(ctx, inputs, output):
    *tensors, number, scale, eps, _ = inputs
    ctx.numbers = number, scale, eps
    ctx.save_for_backward(*output[:2], *tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_den, _grad_state):
    out, den, *tensors = ctx.saved_tensors  # which gradient checkpointing hands out once
    grad = torch.zeros_like(out) if grad is None else grad
    grad_den = torch.zeros_like(den) if grad_den is None else grad_den
    return *backward(grad, grad_den, out, den, *tensors, *ctx.numbers), *[None] * 6


forward.register_autograd(_backward, setup_context=_keep)


def _step(query, key, value, deltas, mask, state, number, scale, eps) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, denominator and state after one token: one launch, and no memory beside the results."""
    from ._step import step  # imports triton

    q, k, v = (gpu.side_by_side(t) for t in (query, key, value))
    batch, heads, _, dim = q.shape
    kv_heads, value_dim = k.shape[1], v.shape[-1]
    out = q.new_empty(batch, heads, 1, value_dim, dtype=q.dtype if eps is not None else torch.float32)
    den = q.new_empty(batch, heads, 1, dtype=torch.float32)
    after = torch.empty_like(state)
    delta_q, delta_k = (q if d is None else d.contiguous() for d in deltas)
    columns = 32
    gpu.launch(
        step, (batch * kv_heads, -(-(value_dim + 1) // columns)), q, q, k, v, delta_q, delta_k,
        q if mask is None else mask, state, after, out, den, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        kv_heads, heads // kv_heads, scale, eps or 0.0, D=dim, DV=value_dim, BD=gpu.width(dim), BE=columns, MAP=number,
        HAS_MASK=mask is not None, DIVIDED=eps is not None, num_warps=4,
    )  # fmt: skip
    return out, den, after
