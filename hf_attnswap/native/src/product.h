// Products of matrices: C[M, N] (+)= sum_k A[m, k] B[k, :], A read number by number from any layout, C in registers.
#pragma once
#include "vector.h"

namespace {

template <int MR, int NR, bool ADD>
INLINE void product_tile(L K, const real* A, L am, L ak, const real* B, L ldb, real* C, L ldc) {
  V c[MR][NR];
  UNROLL for (int m = 0; m < MR; m++) UNROLL for (int j = 0; j < NR; j++) c[m][j] = ADD ? load(C + m * ldc + j * LANES) : V{};
  for (L k = 0; k < K; k++) {
    V b[NR];
    UNROLL for (int j = 0; j < NR; j++) b[j] = load(B + k * ldb + j * LANES);
    UNROLL for (int m = 0; m < MR; m++) {
      V a = set(A[m * am + k * ak]);
      UNROLL for (int j = 0; j < NR; j++) c[m][j] = c[m][j] + a * b[j];
    }
  }
  UNROLL for (int m = 0; m < MR; m++) UNROLL for (int j = 0; j < NR; j++) store(C + m * ldc + j * LANES, c[m][j]);
}

template <int MR, int NR, bool ADD>
void product_columns(L M, L K, const real* A, L am, L ak, const real* B, L ldb, real* C, L ldc) {
  L m = 0;
  for (; m + MR <= M; m += MR) product_tile<MR, NR, ADD>(K, A + m * am, am, ak, B, ldb, C + m * ldc, ldc);
  for (; m < M; m++) product_tile<1, NR, ADD>(K, A + m * am, am, ak, B, ldb, C + m * ldc, ldc);
}

// N is a multiple of LANES; C may not overlap A or B.
template <bool ADD>
void product(L M, L N, L K, const real* A, L am, L ak, const real* B, L ldb, real* C, L ldc) {
  constexpr int MR = REGISTERS == 32 ? 8 : 4, NR = 3;
  L n = 0, left = N / LANES;
  for (; left >= NR && left != NR + 1; left -= NR, n += NR * LANES)
    product_columns<MR, NR, ADD>(M, K, A, am, ak, B + n, ldb, C + n, ldc);
  for (; left >= 2; left -= 2, n += 2 * LANES)
    product_columns<MR + MR / 2, 2, ADD>(M, K, A, am, ak, B + n, ldb, C + n, ldc);
  if (left) product_columns<2 * MR, 1, ADD>(M, K, A, am, ak, B + n, ldb, C + n, ldc);
}

}  // namespace
