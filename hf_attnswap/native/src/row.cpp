// Attention of one row to the keys before it, by an activation on its scores: a step of generation.
#include "activations.h"
#include "kernels.h"
#include "row.h"
#include "threads.h"

namespace {

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
    row_scores<GS>(a.keys, at(a.k, b, kv, 0), a.k.n, q, wide, s, ld);
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
  void run() {
    real total[GS];
    score();
    for (L g = 0; g < GS; g++) {
      const real c = number(g);
      total[g] = weigh(g, c);
      ((real*)a.total)[b * a.heads + h + g] = total[g], ((real*)a.peak)[b * a.heads + h + g] = c;
    }
    row_mix<GS>(a.keys, s, ld, at(a.v, b, kv, 0), a.v.n, columns, out);
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
