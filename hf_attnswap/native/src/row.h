// One row of scores for GS query heads that share their keys and values, which are read once, in their order.
#pragma once
#include "rows.h"

namespace {

// Scores of rows q [GS, dim] with the keys, into rows of s, ld apart; zero behind them.
template <int GS>
void row_scores(L keys, const real* k, L ldk, const real* q, L dim, real* s, L ld) {
  for (L j = 0; j < keys; j++, k += ldk) {
    V sum[GS] = {};
    for (L e = 0; e < dim; e += LANES) {
      V x = load(k + e);
      UNROLL for (int g = 0; g < GS; g++) sum[g] = sum[g] + x * load(q + g * dim + e);
    }
    UNROLL for (int g = 0; g < GS; g++) s[g * ld + j] = total(sum[g]);
  }
  for (L g = 0; g < GS; g++)
    for (L j = keys; j < ld; j++) s[g * ld + j] = 0;
}

template <int GS, int NR>
void row_mix_columns(L keys, const real* s, L ld, const real* v, L ldv, real* out, L columns) {
  V sum[GS][NR];
  UNROLL for (int g = 0; g < GS; g++) UNROLL for (int r = 0; r < NR; r++) sum[g][r] = load(out + g * columns + r * LANES);
  for (L j = 0; j < keys; j++, v += ldv) {
    V x[NR];
    UNROLL for (int r = 0; r < NR; r++) x[r] = load(v + r * LANES);
    UNROLL for (int g = 0; g < GS; g++) {
      V w = set(s[g * ld + j]);
      UNROLL for (int r = 0; r < NR; r++) sum[g][r] = sum[g][r] + w * x[r];
    }
  }
  UNROLL for (int g = 0; g < GS; g++) UNROLL for (int r = 0; r < NR; r++) store(out + g * columns + r * LANES, sum[g][r]);
}

// out [GS, columns] = the weights s times the values, by blocks of keys whose values stay in the first-level cache.
template <int GS>
void row_mix(L keys, const real* s, L ld, const real* v, L ldv, L columns, real* out) {
  constexpr int NR = GS == 4 ? 2 : 4;
  constexpr L BLOCK = 128;
  memset(out, 0, GS * columns * sizeof(real));
  for (L j = 0; j < keys; j += BLOCK) {
    const L some = least(BLOCK, keys - j);
    L e = 0;
    for (; e + NR * LANES <= columns; e += NR * LANES) row_mix_columns<GS, NR>(some, s + j, ld, v + j * ldv + e, ldv, out + e, columns);
    for (; e < columns; e += LANES) row_mix_columns<GS, 1>(some, s + j, ld, v + j * ldv + e, ldv, out + e, columns);
  }
}

}  // namespace
