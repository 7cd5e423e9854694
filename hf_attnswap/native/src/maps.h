// Feature maps, and what they do to gradients.
#pragma once
#include "product.h"

namespace {

enum { IDENTITY = 0, ELU = 1, RELU = 2, HEDGEHOG = 3 };

INLINE L features_of(L map, L dim) { return map == HEDGEHOG ? 2 * dim : dim; }

// y = x + x W for t rows [t, padded]; W: [dim, padded].
INLINE void mixed(L t, L dim, L padded, const real* x, const real* W, real* y) {
  memcpy(y, x, t * padded * sizeof(real));
  product<true>(t, padded, dim, x, padded, 1, W, padded, y, padded);
}

// Matrices [dim, dim] as `mixed` takes them: where they lie, or copies with rows filled up to whole vectors, transposed
// for gradients.
struct Matrices {
  const real* first;
  L each;
  Buffer copy;

  Matrices(const void* W, L count, L dim, bool transposed)
      : first((const real*)W), each(dim * up(dim, LANES)), copy(copied(W, dim, transposed) ? count * each : 1) {
    if (!copied(W, dim, transposed)) return;
    L padded = up(dim, LANES);
    for (L n = 0; n < count; n++)
      for (L i = 0; i < dim; i++)
        for (L j = 0; j < padded; j++)
          copy[n * each + i * padded + j] = j < dim ? first[n * dim * dim + (transposed ? j * dim + i : i * dim + j)] : 0;
    first = copy;
  }
  static bool copied(const void* W, L dim, bool transposed) { return W && (transposed || dim % LANES); }
  const real* operator[](L n) const { return first ? first + n * each : nullptr; }
};

// [softmax(y), softmax(-y)] of rows y [t, padded], into rows [t, ld]. `beside`: [exp(y - m), exp(-y - m)] instead, m the
// largest |y| of the row, which is written to `left`, [t] with stride ldl, or nowhere. y is overwritten.
void hedgehog(L t, L dim, L padded, real* y, real* f, L ld, bool beside, real* left, L ldl) {
  Buffer other(padded);
  I lane = lanes();
  for (L i = 0; i < t; i++, y += padded, f += ld) {
    V high = set(-INFINITY), low = set(INFINITY);
    for (L e = 0; e < padded; e += LANES) {
      I inside = lane < seti((whole)(dim - e));
      high = larger(where(inside, load(y + e), high), high);
      low = smaller(where(inside, load(y + e), low), low);
    }
    real top = largest(high), bottom = -largest(-low);
    if (beside) {
      real m = most(top, -bottom);
      if (left) left[i * ldl] = m;
      top = m, bottom = -m;
    }
    V plus{}, minus{};
    // e^(bottom - x) from e^(x - top) by a division, where neither leaves the range of numbers.
    const bool near = top - bottom < 80;
    const V both = exponential(set(bottom - top));
    for (L e = 0; e < padded; e += LANES) {
      I inside = lane < seti((whole)(dim - e));
      V x = load(y + e), p = exponential(x - top), n = near ? both / p : exponential(bottom - x);
      p = kept(inside, p), n = kept(inside, n);
      plus = plus + p, minus = minus + n;
      store(y + e, p), store(other + e, n);
    }
    V rp = set(beside ? 1 : 1 / total(plus)), rn = set(beside ? 1 : 1 / total(minus));
    for (L e = 0; e < padded; e += LANES) store(y + e, load(y + e) * rp), store(other + e, load(other + e) * rn);
    memcpy(f, y, dim * sizeof(real));
    memcpy(f + dim, other, dim * sizeof(real));
    for (L e = 2 * dim; e < ld && e < up(2 * dim, LANES); e++) f[e] = 0;
  }
}

// Features [t, ld] of rows x [t, padded], which may be overwritten; the columns behind the features are zero up to whole
// vectors. W: of `Matrices`, for HEDGEHOG; `room`: [t, padded].
void mapped(L map, L t, L dim, L padded, real* x, const real* W, real* room, real* f, L ld, bool beside = false, real* left = nullptr, L ldl = 0) {
  if (map == HEDGEHOG) {
    mixed(t, dim, padded, x, W, room);
    return hedgehog(t, dim, padded, room, f, ld, beside, left, ldl);
  }
  I lane = lanes();
  for (L i = 0; i < t; i++)
    for (L e = 0; e < padded; e += LANES) {
      V y = load(x + i * padded + e);
      if (map == ELU) {
        V z = exponential(y > 0 ? V{} : y);
        y = y > 0 ? y + 1 : z;
        if (e + LANES > dim) y = kept(lane < seti((whole)(dim - e)), y);
      } else if (map == RELU) {
        y = y < 0 ? V{} : y;
      }
      store(f + i * ld + e, y);
    }
}

// The gradient of x from that of its features: df [t, ld] -> dx [t, padded]; f as `mapped` made them. For HEDGEHOG
// W: transposed; `room`: [t, padded], in which the gradient of x + x W is left.
void map_gradient(L map, L t, L dim, L padded, const real* f, L ld, const real* df, const real* W, real* room, real* dx,
                  bool beside = false) {
  if (map == HEDGEHOG) {
    for (L i = 0; i < t; i++, f += ld, df += ld) {
      real p = 0, n = 0;
      if (!beside)
        for (L e = 0; e < dim; e++) p += f[e] * df[e], n += f[dim + e] * df[dim + e];
      for (L e = 0; e < dim; e++) room[i * padded + e] = f[e] * (df[e] - p) - f[dim + e] * (df[dim + e] - n);
      for (L e = dim; e < padded; e++) room[i * padded + e] = 0;
    }
    return mixed(t, dim, padded, room, W, dx);
  }
  for (L i = 0; i < t; i++)
    for (L e = 0; e < padded; e += LANES) {
      V y = load(f + i * ld + e), d = load(df + i * ld + e);
      if (map == ELU) d = d * smaller(y, set(1));
      if (map == RELU) d = kept(y > 0, d);
      store(dx + i * padded + e, d);
    }
}

}  // namespace
