// Attention of one row to the keys before it, by an activation on its scores: a step of generation.
//
// Scores of a query head stand side by side, so that keys and values are read once, in their order, for all heads that
// share them.
#include "activations.h"
#include "kernels.h"
#include "rows.h"
#include "threads.h"

namespace {

constexpr L BLOCK = 128;  // keys whose values stay in the first-level cache

// GS query heads from h of text b, which share key/value head kv.
template <int A, int GS>
struct Row {
  const Scores& a;
  L b, kv, h, wide, columns, ld;  // dim, value_dim and keys up to whole vectors
  const uint8_t* valid;
  Buffer q, s, out;

  Row(const Scores& a, L b, L kv, L h)
      : a(a), b(b), kv(kv), h(h), wide(up(a.dim, LANES)), columns(up(a.value_dim, LANES)), ld(up(a.keys, LANES)),
        valid(a.mask ? (const uint8_t*)a.mask + b * a.keys : nullptr), q(GS * wide), s(GS * ld), out(GS * columns) {}

  static const real* at(const Tensor& x, L b, L h, L n) { return (const real*)x.p + b * x.b + h * x.h + n * x.n; }

  // The lanes of keys j .. that the row sees.
  I sees(L j) const {
    I seen = lanes() < seti((whole)(a.keys - j));
    if (valid)
      for (L i = 0; i < least(LANES, a.keys - j); i++) seen[i] &= -(whole)(valid[j + i] != 0);
    return seen;
  }
  bool all_seen(L j) const { return !valid && j + LANES <= a.keys; }

  void score() {
    for (L g = 0; g < GS; g++) read_rows(a.q, AS_COMPUTED, b, h + g, 0, 1, 0, a.dim, wide, scale_of<A>(a), q + g * wide, wide);
    for (L j = 0; j < a.keys; j++) {
      const real* k = at(a.k, b, kv, j);
      V sum[GS] = {};
      for (L e = 0; e < wide; e += LANES) {
        V x = load(k + e);
        UNROLL for (int g = 0; g < GS; g++) sum[g] = sum[g] + x * load(q + g * wide + e);
      }
      UNROLL for (int g = 0; g < GS; g++) s[g * ld + j] = ::total(sum[g]);
    }
    for (L g = 0; g < GS; g++)
      for (L j = a.keys; j < ld; j++) s[g * ld + j] = 0;
  }
  // The number of a head's row that the activation needs.
  real number(L g) const {
    if (A == SIGMOID) return ((const real*)a.offset)[h + g] - std::log(count_of(a, b, 0));
    if (A != EXP && !peak_comes_first(A)) return 0;
    V p = set(-INFINITY);
    for (L j = 0; j < ld; j += LANES) {
      V x = load(s + g * ld + j);
      p = larger(all_seen(j) ? x : where(sees(j), x, set(-INFINITY)), p);
    }
    return of_peak<A>(set(largest(p)))[0];
  }
  // Weights in place of the scores, where the row's number is c; returns their sum.
  real weigh(L g, real number) {
    V c = set(number), sum{};
    for (L j = 0; j < ld; j += LANES) {
      V w = activate<A>(load(s + g * ld + j), c, a.squarings);
      if (!all_seen(j)) w = kept(sees(j), w);
      sum = sum + w;
      store(s + g * ld + j, w);
    }
    return ::total(sum);
  }
  // Columns e .. of the weighted sums, for keys j ..
  template <int NR>
  void mix(L j, L keys, L e) {
    V sum[GS][NR];
    UNROLL for (int g = 0; g < GS; g++) UNROLL for (int r = 0; r < NR; r++) sum[g][r] = load(out + g * columns + e + r * LANES);
    const real* v = at(a.v, b, kv, j) + e;
    for (L i = 0; i < keys; i++, v += a.v.n) {
      V x[NR];
      UNROLL for (int r = 0; r < NR; r++) x[r] = load(v + r * LANES);
      UNROLL for (int g = 0; g < GS; g++) {
        V w = set(s[g * ld + j + i]);
        UNROLL for (int r = 0; r < NR; r++) sum[g][r] = sum[g][r] + w * x[r];
      }
    }
    UNROLL for (int g = 0; g < GS; g++) UNROLL for (int r = 0; r < NR; r++) store(out + g * columns + e + r * LANES, sum[g][r]);
  }
  void run() {
    constexpr int NR = GS == 4 ? 2 : 4;
    real total[GS];
    score();
    for (L g = 0; g < GS; g++) {
      const real c = number(g);
      total[g] = weigh(g, c);
      ((real*)a.total)[b * a.heads + h + g] = total[g], ((real*)a.peak)[b * a.heads + h + g] = c;
    }
    out.clear(GS * columns);
    for (L j = 0; j < a.keys; j += BLOCK) {
      const L keys = least(BLOCK, a.keys - j);
      L e = 0;
      for (; e + NR * LANES <= columns; e += NR * LANES) mix<NR>(j, keys, e);
      for (; e < columns; e += LANES) mix<1>(j, keys, e);
    }
    for (L g = 0; g < GS; g++)
      write_row(a.out, AS_COMPUTED, b, h + g, 0, 0, a.value_dim, out + g * columns, 1 / denominator(a, b, 0, total[g]));
  }
};

template <int A>
void score_row(const Scores& a) {
  const L group = a.heads / a.kv_heads, heads = heads_at_once(group), sets = group / heads;
  parallel(a.threads, a.batch * a.kv_heads * sets, [&](L task) {
    L b = task / sets / a.kv_heads, kv = task / sets % a.kv_heads, h = kv * group + task % sets * heads;
    if (heads == 1) Row<A, 1>(a, b, kv, h).run();
    else if (heads == 2) Row<A, 2>(a, b, kv, h).run();
    else if (heads == 3) Row<A, 3>(a, b, kv, h).run();
    else Row<A, 4>(a, b, kv, h).run();
  });
}

void scores_row(const Scores& a) { BY_ACTIVATION(score_row) }

}  // namespace

KERNEL(scores_row, Scores)
