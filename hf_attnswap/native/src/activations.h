// Activations on scores: the weight a(s) and its derivative, element by element. `c` is a number of the row: what is
// added to the score (sigmoid), a score near its largest (EXP, whose scores are in base 2), its largest (POWER), or 1 over the largest term (POWER_UNSHIFTED).
#pragma once
#include "interface.h"
#include "vector.h"

namespace {

enum { RELU_ = 0, RELU2 = 1, SIGMOID = 2, SOFTPLUS = 3, GELU = 4, EXP = 5, POWER = 6, POWER_UNSHIFTED = 7 };

// Whether the row's largest score must be known before its weights.
constexpr bool peak_comes_first(int64_t activation) { return activation == POWER || activation == POWER_UNSHIFTED; }

INLINE V relu(V x) { return x < 0 ? V{} : x; }
INLINE V sigmoid(V x) { return 1 / (1 + exponential(-x)); }

// log(1 + e^x) = max(x, 0) + log(1 + y), y = e^-|x|; with z = y / (2 + y), log(1 + y) = 2 (z + z^3 / 3 + z^5 / 5 ...).
INLINE V softplus(V x) {
  V y = exponential(-absolute(x)), z = y / (2 + y), w = z * z;
  constexpr int TERMS = DOUBLE ? 17 : 8;
  V p = set(real(1) / (2 * TERMS - 1));
  UNROLL for (int i = TERMS - 2; i >= 0; i--) p = p * w + real(1) / (2 * i + 1);
  return relu(x) + 2 * z * p;
}

// The normal distribution up to x, and its density. Float: Abramowitz & Stegun 7.1.26, to 1.5e-7.
INLINE V normal(V x, V& density) {
  V e = exponential(x * x * (real)-0.5), tail{};
  density = e * (real)0.3989422804014327;
  if (DOUBLE) {
    UNROLL for (int i = 0; i < LANES; i++) tail[i] = 0.5 * std::erfc(std::fabs(x[i]) * 0.7071067811865476);
  } else {
    V t = 1 / (1 + absolute(x) * (real)(0.3275911 * 0.7071067811865476));
    V p = set((real)1.061405429);
    p = p * t - (real)1.453152027;
    p = p * t + (real)1.421413741;
    p = p * t - (real)0.284496736;
    p = p * t + (real)0.254829592;
    tail = p * t * e * (real)0.5;
  }
  return x < 0 ? tail : 1 - tail;
}

// `squarings`: log2 of the power.
template <int A>
INLINE V activate(V s, V c, L squarings) {
  if (A == RELU_) return relu(s);
  if (A == RELU2) return relu(s) * relu(s);
  if (A == SIGMOID) return sigmoid(s + c);
  if (A == SOFTPLUS) return softplus(s);
  if (A == GELU) {
    V density;
    return s * normal(s, density);
  }
  if (A == EXP) return power_of_two(s - c);
  V r = A == POWER ? relu((s - c) + 1) : relu(s + 1) * c;
  for (L i = 0; i < squarings; i++) r = r * r;
  return r;
}

// The weight, and its derivative by the score while c stands still.
template <int A>
INLINE V activate(V s, V c, L squarings, V& slope) {
  if (A == RELU_) {
    slope = kept(s > 0, set(1));
    return relu(s);
  }
  if (A == RELU2) {
    slope = 2 * relu(s);
    return relu(s) * relu(s);
  }
  if (A == SIGMOID) {
    V a = sigmoid(s + c);
    slope = a * (1 - a);
    return a;
  }
  if (A == SOFTPLUS) {
    slope = sigmoid(s);
    return softplus(s);
  }
  if (A == GELU) {
    V density, phi = normal(s, density);
    slope = phi + s * density;
    return s * phi;
  }
  if (A == EXP) return slope = power_of_two(s - c);
  V r = A == POWER ? relu((s - c) + 1) : relu(s + 1) * c;
  slope = kept(r > 0, A == POWER ? set(1) : c);
  for (L i = 0; i < squarings; i++) slope = slope * 2 * r, r = r * r;  // (r^2m)' = 2 r^m (r^m)'
  return r;
}

// The factor of q . k.
template <int A>
INLINE real scale_of(const Scores& a) { return (real)a.scale * (A == EXP ? LOG2_E : 1); }

// The number of a row by its largest score, -inf where it sees nothing.
template <int A>
INLINE V of_peak(V p) {
  p = p == -INFINITY ? V{} : p;
  if (A != POWER_UNSHIFTED) return p;
  const real tiny = DOUBLE ? 2.2250738585072014e-308 : 1.17549435e-38f;
  p = 1 + p;
  return 1 / (p < tiny ? set(tiny) : p);
}

INLINE real count_of(const Scores& a, L b, L row) { return ((const real*)a.count)[b * a.count_stride + row]; }

// What the weighted sum of a row is divided by; `total`: the sum of its weights.
INLINE real denominator(const Scores& a, L b, L row, real total) {
  if (a.denominator == 1) return std::pow(count_of(a, b, row), (real)a.alpha);
  if (a.denominator == 0) return 1;
  return a.eps ? total + (real)a.eps : total > 0 || total != total ? total : 1;
}

#define BY_ACTIVATION(run)                        \
  switch (a.activation) {                         \
    case RELU_: return run<RELU_>(a);             \
    case RELU2: return run<RELU2>(a);             \
    case SIGMOID: return run<SIGMOID>(a);         \
    case SOFTPLUS: return run<SOFTPLUS>(a);       \
    case GELU: return run<GELU>(a);               \
    case EXP: return run<EXP>(a);                 \
    case POWER: return run<POWER>(a);             \
    default: return run<POWER_UNSHIFTED>(a);      \
  }

}  // namespace
