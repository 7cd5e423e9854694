// Tiles of scores, transposed: [keys, C], C = ROWS rows of each of up to HEADS query heads that share the keys.
//
// Maxima, sums and masks are then vertical, and keys and values are read where they lie. A column of the tile is row
// `x` of head `g`, at g * ROWS + x.
#pragma once
#include "product.h"
#include "rows.h"

namespace {

constexpr L ROWS = 16;                     // rows of a tile, whole vectors for every type and processor
constexpr L VECTORS = ROWS / LANES;        // that hold them
constexpr L KEYS = 128;                    // keys of a block of scores

// Numbers of rows n .. n + rows of `heads` heads, as [dim, heads ROWS], times `factor`; zero in the rows that are not.
void read_transposed(const Tensor& x, L b, L h, L heads, L n, L rows, L dim, real factor, real* y) {
  const L C = heads * ROWS;
  for (L g = 0; g < heads; g++) {
    const real* from = (const real*)x.p + b * x.b + (h + g) * x.h + n * x.n;
    for (L d = 0; d < dim; d++)
      for (L i = 0; i < ROWS; i++) y[d * C + g * ROWS + i] = i < rows ? from[i * x.n + d] * factor : 0;
  }
}

// [keys, C] = rows of keys, ld apart, times the transposed queries [dim, C].
INLINE void scores_of(L keys, const real* k, L ld, L dim, const real* qt, L C, real* st) {
  product<false>(keys, C, dim, k, ld, 1, qt, C, st, C);
}
// o [C, columns] += the weights of the keys times their values; columns: whole vectors.
INLINE void mix(L keys, const real* st, L C, const real* v, L ld, L columns, real* o) {
  product<true>(C, columns, keys, st, 1, C, v, ld, o, columns);
}

}  // namespace
