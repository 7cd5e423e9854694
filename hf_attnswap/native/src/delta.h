// The triangular system of the delta rule, and its gradient by chunks of tokens.
#pragma once
#include "product.h"
#include "recurrence.h"
#include "rows.h"

namespace {

// Numbers i .. i + t of [batch, head, token]; 1 where there is no tensor.
INLINE void read_numbers(const Tensor& x, L b, L h, L i, L t, real* y) {
  const real* from = x.p ? (const real*)x.p + b * x.b + h * x.h + i * x.n : nullptr;
  for (L j = 0; j < t; j++) y[j] = from ? from[j * x.n] : 1;
}

// The state by blocks of COLUMNS. X [M, columns] = A [M, F] S.
void times_state(L M, L F, L columns, const real* A, L lda, const real* S, real* X) {
  for (L c = 0; c < columns; c += COLUMNS) {
    L ld = least(COLUMNS, columns - c);
    product<false>(M, ld, F, A, lda, 1, S + c * F, ld, X + c, columns);
  }
}
// X [F, N] = S Y, Y [columns, N].
void state_times(L N, L F, L columns, const real* S, const real* Y, real* X) {
  memset(X, 0, F * N * sizeof(real));
  for (L c = 0; c < columns; c += COLUMNS) {
    L ld = least(COLUMNS, columns - c);
    product<true>(F, N, ld, S + c * F, ld, 1, Y + c * N, N, X, N);
  }
}
// S = kept S + A^T Y, A [M, F] and Y [M, columns].
void add_to_state(L M, L F, L columns, real kept, const real* A, L lda, const real* Y, real* S) {
  if (kept != 1)
    for (L e = 0; e < F * columns; e += LANES) store(S + e, load(S + e) * kept);
  for (L c = 0; c < columns; c += COLUMNS) {
    L ld = least(COLUMNS, columns - c);
    product<true>(F, ld, M, A, 1, lda, Y + c, columns, S + c * F, ld);
  }
}

INLINE real dot(L n, const real* x, const real* y) {
  V d{};
  for (L e = 0; e < n; e += LANES) d = d + load(x + e) * load(y + e);
  return total(d);
}

// v becomes u and `error` the difference that is its cause, for t tokens: u_i = beta_i e_i,
// e_i = v_i - S k_i g_0 .. g_i - sum_{j < i} (k_i . k_j) u_j g_{j + 1} .. g_i. Rows of k are `wide` apart.
void correct(L t, L F, L wide, L columns, const real* k, const real* beta, const real* gate, const real* S, real* v, real* error) {
  times_state(t, F, columns, k, wide, S, error);
  for (L i = 0; i < t; i++) {
    real *u = v + i * columns, *e = error + i * columns, left = 1;
    for (L j = i - 1; j >= 0; j--) {
      left *= gate[j + 1];
      real overlap = dot(wide, k + i * wide, k + j * wide) * left;
      for (L c = 0; c < columns; c += LANES) store(u + c, load(u + c) - load(v + j * columns + c) * overlap);
    }
    left *= gate[0];
    for (L c = 0; c < columns; c += LANES) {
      V x = load(u + c) - load(e + c) * left;
      store(e + c, x);
      store(u + c, x * beta[i]);
    }
  }
}

// With S_i' = g_i S_{i-1}, e_i = v_i - S_i'^T k_i, u_i = beta_i e_i, S_i = S_i' + k_i u_i^T, o_i = S_i^T q_i, and R_i the
// gradient of S_i:
//   R_i    = q_i do_i^T + g_{i+1} (R_{i+1} - k_{i+1} de_{i+1}^T)
//   de_i   = beta_i R_i^T k_i = dv_i,   dbeta_i = e_i . R_i^T k_i
//   dq_i   = S_i do_i,   dk_i = R_i u_i - S_i' de_i
//   d log g_i = sum_{j >= i} (q_j . dq_j - k_j . S_j' de_j - k_j . R_j u_j)
// Errors and states are made forwards in time, R backwards, by chunks: within one, everything is a product with what
// remains at one token of what another added.
struct DeltaGradient {
  static constexpr L CHUNK = 16;  // a multiple of LANES
  const Delta& a;
  const L b, h, G, F, wide, columns, across;
  Buffer error, S, k, kt, q, go, got, e, u, ut, de, det, beta, gate, remains, since, overlap, of_queries, of_values, of_errors, dk, dq, room;

  DeltaGradient(const Delta& a, L b, L h)
      : a(a), b(b), h(h), G(a.heads / a.kv_heads), F(a.dim), wide(up(F, LANES)), columns(up(a.value_dim, LANES)), across(CHUNK * G),
        error(a.length * columns), S(F * columns), k(CHUNK * wide), kt(wide * CHUNK), q(across * wide), go(across * columns),
        got(columns * across), e(CHUNK * columns), u(CHUNK * columns), ut(columns * CHUNK), de(CHUNK * columns), det(columns * CHUNK),
        beta(CHUNK), gate(CHUNK), remains(CHUNK * CHUNK), since(CHUNK), overlap(CHUNK * CHUNK), of_queries(across * CHUNK),
        of_values(across * CHUNK), of_errors(CHUNK * CHUNK), dk(CHUNK * wide), dq(across * wide), room(most(F, columns) * across) {}

  L tokens(L i) const { return least(CHUNK, a.length - i); }
  L at() const { return (b * a.kv_heads + h) * a.length; }
  void start() { state_in(a.state ? (const real*)a.state + (b * a.kv_heads + h) * F * a.value_dim : nullptr, a.value_dim, F, 0, a.value_dim, columns, S); }

  // y [width, ld] = x^T for x [rows, width]; zero behind the rows.
  void transpose(L rows, L width, const real* x, real* y, L ld) {
    for (L c = 0; c < width; c++)
      for (L i = 0; i < ld; i++) y[c * ld + i] = i < rows ? x[i * width + c] : 0;
  }
  // What remains at token l of what token i added, times x [rows, CHUNK] with `each` rows to a token; zero where i is not
  // before l, or, where `own`, not l either.
  void fade(L t, L each, bool own, real* x) {
    for (L n = 0; n < t * each; n++)
      for (L i = 0; i < CHUNK; i++) {
        L l = n / each;
        x[n * CHUNK + i] = i < l || (own && i == l) ? x[n * CHUNK + i] * remains[l * CHUNK + i] : 0;
      }
  }

  void read_keys(L i, L t) {
    read_rows(a.k, a.type, b, h, i, t, 0, F, wide, 1, k, wide);
    read_numbers(a.beta, b, h, i, t, beta);
    read_numbers(a.gate, b, h, i, t, gate);
    for (L l = 0; l < t; l++) {
      real left = 1;
      for (L j = l; j >= 0; j--) remains[l * CHUNK + j] = left, left *= gate[j];
      since[l] = left;
    }
  }
  // All that both directions need of a chunk.
  void read(L i, L t) {
    read_keys(i, t);
    for (L g = 0; g < G; g++) {
      read_rows(a.q, a.type, b, h * G + g, i, t, 0, F, wide, 1, q + g * wide, G * wide);
      read_rows(a.go, AS_COMPUTED, b, h * G + g, i, t, 0, a.value_dim, columns, 1, go + g * columns, G * columns);
    }
    memcpy(e, error + i * columns, t * columns * sizeof(real));
    for (L n = 0; n < t; n++)
      for (L c = 0; c < columns; c += LANES) store(u + n * columns + c, load(e + n * columns + c) * beta[n]);
    transpose(t, columns, u, ut, CHUNK);
    product<false>(t * G, CHUNK, columns, go, columns, 1, ut, CHUNK, of_values, CHUNK);
    fade(t, G, true, of_values);
  }
  void errors_times_values(L t) {
    product<false>(t, CHUNK, columns, de, columns, 1, ut, CHUNK, of_errors, CHUNK);
    fade(t, 1, false, of_errors);
  }

  // The errors of all tokens.
  void errors() {
    start();
    for (L i = 0; i < a.length; i += CHUNK) {
      const L t = tokens(i);
      read_keys(i, t);
      read_rows(a.v, a.type, b, h, i, t, 0, a.value_dim, columns, 1, u, columns);
      correct(t, F, wide, columns, k, beta, gate, S, u, error + i * columns);
      add_values(t);
    }
  }
  void add_values(L t) {
    for (L n = 0; n < t; n++)
      for (L c = 0; c < columns; c += LANES) store(u + n * columns + c, load(u + n * columns + c) * remains[(t - 1) * CHUNK + n]);
    add_to_state(t, F, columns, since[t - 1], k, wide, u, S);
  }

  // dv, dbeta, and R u, which is the first part of dk; S holds R.
  void backwards() {
    S.clear(F * columns);
    for (L i = (a.length - 1) / CHUNK * CHUNK; i >= 0; i -= CHUNK) {
      const L t = tokens(i);
      read(i, t);
      const real* end = remains + (t - 1) * CHUNK;
      transpose(t, wide, k, kt, CHUNK);
      product<false>(t, CHUNK, F, k, wide, 1, kt, CHUNK, overlap, CHUNK);
      fade(t, 1, false, overlap);
      product<false>(t * G, CHUNK, F, q, wide, 1, kt, CHUNK, of_queries, CHUNK);
      fade(t, G, true, of_queries);
      times_state(t, F, columns, k, wide, S, de);
      for (L n = 0; n < t; n++)
        for (L c = 0; c < columns; c += LANES) store(de + n * columns + c, load(de + n * columns + c) * end[n]);
      product<true>(t, columns, t * G, of_queries, 1, CHUNK, go, columns, de, columns);
      for (L n = t - 1; n >= 0; n--) {
        real* x = de + n * columns;
        for (L l = n + 1; l < t; l++)
          for (L c = 0; c < columns; c += LANES) store(x + c, load(x + c) - load(de + l * columns + c) * overlap[l * CHUNK + n]);
        ((real*)a.dbeta)[at() + i + n] = dot(columns, x, e + n * columns);
        for (L c = 0; c < columns; c += LANES) store(x + c, load(x + c) * beta[n]);
        write_row(a.dv, AS_COMPUTED, b, h, i + n, 0, a.value_dim, x, 1);
      }
      state_times(CHUNK, F, columns, S, ut, room);
      for (L n = 0; n < t; n++)
        for (L f = 0; f < wide; f++) dk[n * wide + f] = f < F ? room[f * CHUNK + n] * end[n] : 0;
      product<true>(t, wide, t * G, of_values, 1, CHUNK, q, wide, dk, wide);
      errors_times_values(t);
      for (L n = 0; n < t * CHUNK; n++) of_errors[n] = -of_errors[n];
      product<true>(t, wide, t, of_errors, 1, CHUNK, k, wide, dk, wide);
      for (L n = 0; n < t; n++) {
        if (a.gate_k) ((real*)a.gate_k)[at() + i + n] = dot(wide, k + n * wide, dk + n * wide);
        write_row(a.dk, AS_COMPUTED, b, h, i + n, 0, F, dk + n * wide, 1);
      }
      for (L n = 0; n < t; n++)
        for (L c = 0; c < columns; c += LANES) {
          for (L g = 0; g < G; g++) store(go + (n * G + g) * columns + c, load(go + (n * G + g) * columns + c) * since[n]);
          store(de + n * columns + c, load(de + n * columns + c) * -since[n]);
        }
      add_to_state(t * G, F, columns, since[t - 1], q, wide, go, S);
      add_to_state(t, F, columns, 1, k, wide, de, S);
    }
  }

  // dq, and the rest of dk.
  void forwards() {
    start();
    for (L i = 0; i < a.length; i += CHUNK) {
      const L t = tokens(i);
      read(i, t);
      read_rows(a.dv, AS_COMPUTED, b, h, i, t, 0, a.value_dim, columns, 1, de, columns);
      read_rows(a.dk, AS_COMPUTED, b, h, i, t, 0, F, wide, 1, dk, wide);
      errors_times_values(t);
      transpose(t * G, columns, go, got, across);
      state_times(across, F, columns, S, got, room);
      for (L n = 0; n < t * G; n++)
        for (L f = 0; f < wide; f++) dq[n * wide + f] = f < F ? room[f * across + n] * since[n / G] : 0;
      product<true>(t * G, wide, t, of_values, CHUNK, 1, k, wide, dq, wide);
      transpose(t, columns, de, det, CHUNK);
      state_times(CHUNK, F, columns, S, det, room);
      for (L n = 0; n < t; n++) {
        real through = 0;
        for (L g = 0; g < G; g++) {
          const real* row = dq + (n * G + g) * wide;
          through += dot(wide, q + (n * G + g) * wide, row);
          write_row(a.dq, AS_COMPUTED, b, h * G + g, i + n, 0, F, row, 1);
        }
        real *row = dk + n * wide, *x = kt;  // of one token: S' de
        for (L f = 0; f < wide; f++) x[f] = f < F ? room[f * CHUNK + n] * since[n] : 0;
        product<true>(1, wide, t, of_errors + n * CHUNK, 0, 1, k, wide, x, wide);
        if (a.gate_q) ((real*)a.gate_q)[at() + i + n] = through - dot(wide, k + n * wide, x);
        for (L f = 0; f < wide; f += LANES) store(row + f, load(row + f) - load(x + f));
        write_row(a.dk, AS_COMPUTED, b, h, i + n, 0, F, row, 1);
      }
      add_values(t);
    }
  }
};

}  // namespace
