// One vector type for every processor: LANES numbers of type `real`, by the vector extensions of GCC and Clang.
//
// Each source is compiled once per instruction set and per type of number, with the flags that build.py names; what
// differs between instruction sets stands in this file and in the tiles of product.h and recurrence.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifndef REAL
#define REAL float
#endif

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 64")
#endif

typedef int64_t L;
typedef REAL real;

// REGISTERS: vector registers that the tiles may fill.
#ifndef VECTOR_BYTES
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#endif
#if defined(__AVX512F__) || defined(__aarch64__)
#define REGISTERS 32
#else
#define REGISTERS 16
#endif

// Everything has internal linkage: no function of one instruction set may stand in for that of another.
namespace {

constexpr L LANES = VECTOR_BYTES / sizeof(real);
constexpr bool DOUBLE = sizeof(real) == 8;
template <int BYTES> struct Whole;
template <> struct Whole<4> { typedef int32_t type; };
template <> struct Whole<8> { typedef int64_t type; };
typedef Whole<sizeof(real)>::type whole;
typedef real V __attribute__((vector_size(VECTOR_BYTES)));
typedef whole I __attribute__((vector_size(VECTOR_BYTES)));  // whole numbers, and masks: all bits of a lane or none

template <class T> INLINE T least(T a, T b) { return b < a ? b : a; }
template <class T> INLINE T most(T a, T b) { return a < b ? b : a; }
INLINE L up(L n, L to) { return (n + to - 1) / to * to; }

// Query heads that go together through what they share: as many as share a key, up to 4.
INLINE L heads_at_once(L group) { return group % 4 == 0 ? 4 : group % 3 == 0 ? 3 : group % 2 == 0 ? 2 : 1; }

INLINE V load(const real* p) { V x; memcpy(&x, p, sizeof x); return x; }
INLINE void store(real* p, V x) { memcpy(p, &x, sizeof x); }
INLINE V set(real x) { return x - V{}; }  // x + 0 would change -0
INLINE I seti(whole x) { return x - I{}; }
INLINE V larger(V a, V b) { return a > b ? a : b; }   // b where a is NaN
INLINE V smaller(V a, V b) { return a < b ? a : b; }  // b where a is NaN
INLINE V absolute(V x) { return x < 0 ? -x : x; }
INLINE V where(I mask, V a, V b) { return mask ? a : b; }
INLINE V kept(I mask, V x) { return (V)((I)x & mask); }  // 0 in the other lanes

// 0, 1, 2, ...
INLINE I lanes() {
  I x{};
  UNROLL for (int i = 0; i < LANES; i++) x[i] = i;
  return x;
}

INLINE bool any(I mask) {
  whole bits = 0;
  UNROLL for (int i = 0; i < LANES; i++) bits |= mask[i];
  return bits;
}
INLINE real total(V x) {
  real a[LANES];
  store(a, x);
  UNROLL for (int half = LANES / 2; half; half /= 2) UNROLL for (int i = 0; i < half; i++) a[i] += a[i + half];
  return a[0];
}
INLINE real largest(V x) {
  real a[LANES], m;
  store(a, x);
  m = a[0];
  UNROLL for (int i = 1; i < LANES; i++) m = a[i] > m ? a[i] : m;
  return m;
}

// e^x; 0 below the range of normal numbers, inf above it, NaN of NaN. x = n ln 2 + f, 2^n by the exponent's bits.
INLINE V exponential(V x) {
  const real low = DOUBLE ? -708.39 : -87.33f, high = DOUBLE ? 709.9 : 88.8f;
  const I below = x < low;
  x = below ? set(low) : x;
  x = x > high ? set(high) : x;
  // Added, it leaves the whole number in the low bits; the exponent's bias stands there too.
  const real magic = DOUBLE ? 6755399441055744.0 + 1023 : 12582912.f + 127;
  V shifted = x * (real)1.4426950408889634 + magic, n = shifted - magic;
  V power = (V)((I)shifted << (DOUBLE ? 52 : 23));
  if (DOUBLE) {
    V f = x - n * (real)6.93147180369123816490e-01;
    f = f - n * (real)1.90821492927058770002e-10;
    V p = set(1. / 6227020800.);
    const double c[] = {1. / 479001600, 1. / 39916800, 1. / 3628800, 1. / 362880, 1. / 40320, 1. / 5040, 1. / 720,
                        1. / 120, 1. / 24, 1. / 6, 1. / 2, 1, 1};
    UNROLL for (int i = 0; i < 13; i++) p = p * f + (real)c[i];
    return kept(~below, p * power);
  }
  V f = x - n * 0.693359375f;
  f = f - n * -2.12194440e-4f;
  V p = set(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1;
  return kept(~below, p * power);
}

constexpr real LOG2_E = 1.4426950408889634;

// 2^x for x <= 0, as `exponential` does it; its scores carry the factor LOG2_E.
INLINE V power_of_two(V x) {
  if (DOUBLE) return exponential(x * (real)0.6931471805599453);
  const real magic = 12582912.f + 127;
  V shifted = x + magic, f = x - (shifted - magic);
  V p = set(0.0013264727f);
  p = p * f + 0.009671513f;
  p = p * f + 0.055507336f;
  p = p * f + 0.24022242f;
  p = p * f + 0.69314700f;
  p = p * f + 1;
  return kept(~(x < -126), p * (V)((I)shifted << 23));
}

// Numbers for the time of a task, aligned by hand: aligned_alloc takes longer than a step of generation computes.
struct Buffer {
  void* memory;
  real* p;
  explicit Buffer(L n) : memory(malloc(n * sizeof(real) + 128)), p((real*)(((uintptr_t)memory + 63) & ~(uintptr_t)63)) {}
  ~Buffer() { free(memory); }
  Buffer(const Buffer&) = delete;
  operator real*() const { return p; }
  void clear(L n) { memset(p, 0, n * sizeof(real)); }
};

}  // namespace
