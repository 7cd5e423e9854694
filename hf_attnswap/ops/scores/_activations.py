"""The activations of the kernels: weights a(s') of scores s', and their slopes da/ds'.

    relu      max(s', 0)                                exp       e^(s' - c)
    relu2     max(s', 0)^2                              power     max(s' - c + 1, 0)^p
    sigmoid   1 / (1 + e^-(s' + offset_h - log n))      unshifted (max(1 + s', 0) / max(1 + c, tiny))^p
    softplus  log(1 + e^s')                             gelu      s' Phi(s')

c is the largest score of the row, a score of -inf has no weight. The kernels hand in the products x = q.k with
s' = ks x, and one number per row, `row`. ks has the factor log2 e where a power of two is taken. Where c is subtracted,
`row` is the largest product and ks comes after: a fused multiply-add of x ks - c gives no 0 at the largest. The weights
of relu are those of x, not of s' = ks x: ks > 0 comes out of the sum. The slope of a power is a p-th of da/ds'.
"""

import triton
import triton.language as tl

from ..tiles import LN2, LOG2E

NUMBERS = {"relu": 0, "relu2": 1, "sigmoid": 2, "softplus": 3, "gelu": 4, "exp": 5, "relu_power": 6}
POWER_UNSHIFTED = 7
RELU, RELU2, SIGMOID, SOFTPLUS, GELU, EXP, POWER, UNSHIFTED = (tl.constexpr(i) for i in range(8))
_TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def scale_of_scores(ks, ACT: tl.constexpr):
    """Return the factor of the products: ks, times log2 e for the activations that are powers of two here."""
    if (ACT == SIGMOID) or (ACT == SOFTPLUS) or (ACT == EXP):
        return ks * LOG2E
    else:
        return ks


@triton.jit
def row_number(peak, ks, count, offset, ACT: tl.constexpr):
    """Return the one number that an activation needs of each row, of its largest product, the count and the offset."""
    if ACT == SIGMOID:
        return offset * LOG2E - tl.log2(count)
    elif ACT == UNSHIFTED:
        return 1.0 / tl.maximum(1.0 + peak * ks, _TINY)
    else:
        return peak


@triton.jit
def _relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _power(t, LOGP: tl.constexpr):
    for _ in tl.static_range(LOGP):
        t = t * t
    return t


@triton.jit
def _base(x, ks, row, ACT: tl.constexpr):
    """Return what is raised to a power. The 1 comes last: beside a large score it would be rounded away."""
    if ACT == POWER:
        return _relu((x - row) * ks + 1.0)
    else:
        return _relu(x * ks + 1.0) * row


@triton.jit
def _logistic(y):
    """Return 1 / (1 + 2^-y)."""
    return 1.0 / (1.0 + tl.exp2(-y))


@triton.jit
def _softplus(y):
    """Return log(1 + 2^y), exact also where 2^y is little."""
    u = tl.exp2(-tl.abs(y))
    log = tl.where(u < 0.015625, u * (1.0 - u * (0.5 - u * 0.3333333)), tl.log2(1.0 + u) * LN2)
    return _relu(y) * LN2 + log


@triton.jit
def _normal(s):
    """Return Phi(s), the distribution of normal numbers."""
    return 0.5 * (1.0 + tl.erf(s * 0.7071067811865476))


@triton.jit
def weights(x, ks, row, like, ACT: tl.constexpr, LOGP: tl.constexpr, ASM: tl.constexpr):
    """Return the weights of the products x, in the dtype of `like`; `row` broadcasts over x."""
    if ACT == RELU:
        if ASM:  # one instruction for two numbers
            return tl.inline_asm_elementwise(
                "cvt.rn.relu.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        else:
            return _relu(x).to(like.dtype)
    elif ACT == RELU2:
        t = _relu(x * ks)
        return (t * t).to(like.dtype)
    elif ACT == SIGMOID:
        return _logistic(x * ks + row).to(like.dtype)
    elif ACT == SOFTPLUS:
        return _softplus(x * ks).to(like.dtype)
    elif ACT == GELU:
        s = tl.maximum(x * ks, -100.0, propagate_nan=tl.PropagateNan.ALL)
        return (s * _normal(s)).to(like.dtype)
    elif ACT == EXP:
        return tl.exp2((x - row) * ks).to(like.dtype)
    else:
        return _power(_base(x, ks, row, ACT), LOGP).to(like.dtype)


@triton.jit
def weights_and_slopes(x, ks, row, ACT: tl.constexpr, LOGP: tl.constexpr):
    """Return the weights and the slopes of the products x, in float32."""
    if ACT == RELU:
        a = _relu(x)
        w = tl.where(x > 0, 1.0, 0.0)
    elif ACT == RELU2:
        t = _relu(x * ks)
        a = t * t
        w = 2.0 * t
    elif ACT == SIGMOID:
        a = _logistic(x * ks + row)
        w = a - a * a
    elif ACT == SOFTPLUS:
        a = _softplus(x * ks)
        w = _logistic(x * ks)
    elif ACT == GELU:
        s = tl.maximum(x * ks, -100.0, propagate_nan=tl.PropagateNan.ALL)
        phi = _normal(s)
        a = s * phi
        w = phi + s * 0.3989422804014327 * tl.exp2(s * s * (-0.5 * LOG2E))
    elif ACT == EXP:
        a = tl.exp2((x - row) * ks)
        w = a
    else:
        t = _base(x, ks, row, ACT)
        a = t
        w = tl.where(t > 0, 1.0, 0.0) if LOGP == 0 else t
        for i in tl.static_range(LOGP):
            a = a * a
            if i + 1 < LOGP:
                w = w * a
        if ACT == UNSHIFTED:
            w = w * row
    return a, w
