// The recurrence of linear attention: several tokens per pass over the state, which stays in the first-level cache.
//
// Columns of the state are independent of each other, so it is kept by blocks of COLUMNS of them, [F, COLUMNS] each
// (the last block may be narrower), and one block is taken through all tokens at hand before the next.
#pragma once
#include "vector.h"

namespace {

constexpr L COLUMNS = 2 * LANES;

// Tokens per pass: what the registers hold of sums, beside the rows of state and values.
template <int GS> constexpr int tokens_per_pass() {
  return REGISTERS == 32 ? (GS == 1 ? 6 : GS == 4 ? 3 : 4) : (GS == 1 ? 3 : GS == 4 ? 1 : 2);
}

// s = gate_t s + k_t[e] v_t;  o_tg = sum_e q_tg[e] s. q: rows of ldq, the G heads of a token side by side; the pass takes
// GS of them, and the rows of o are those of q. STORE: the last pass of these tokens.
template <int T, int GS, int NR, bool GATE, bool STORE>
INLINE void pass(L F, const real* k, L ldk, const real* v, L ldv, const real* q, L ldq, L G, const real* gate, const real* from, L ldf,
                 real* to, L ldt, real* o, L ldo) {
  constexpr bool KEPT = T * NR * (GS + 1) + NR < REGISTERS;  // values in registers: the state might overlap them
  V sum[T][GS][NR], x[T][NR];
  UNROLL for (int t = 0; t < T; t++) UNROLL for (int j = 0; j < NR; j++) {
    UNROLL for (int g = 0; g < GS; g++) sum[t][g][j] = V{};
    if (KEPT) x[t][j] = load(v + t * ldv + j * LANES);
  }
  for (L e = 0; e < F; e++) {
    V s[NR];
    UNROLL for (int j = 0; j < NR; j++) s[j] = load(from + e * ldf + j * LANES);
    UNROLL for (int t = 0; t < T; t++) {
      V a = set(k[t * ldk + e]);
      UNROLL for (int j = 0; j < NR; j++) {
        if (GATE) s[j] = s[j] * gate[t];
        s[j] = s[j] + a * (KEPT ? x[t][j] : load(v + t * ldv + j * LANES));
      }
      UNROLL for (int g = 0; g < GS; g++) {
        V b = set(q[(t * G + g) * ldq + e]);
        UNROLL for (int j = 0; j < NR; j++) sum[t][g][j] = sum[t][g][j] + b * s[j];
      }
    }
    if (STORE) UNROLL for (int j = 0; j < NR; j++) store(to + e * ldt + j * LANES, s[j]);
  }
  UNROLL for (int t = 0; t < T; t++) UNROLL for (int g = 0; g < GS; g++) UNROLL for (int j = 0; j < NR; j++)
      store(o + (t * G + g) * ldo + j * LANES, sum[t][g][j]);
}

template <int T, int GS, int NR, bool GATE>
INLINE void passes(L F, const real* k, L ldk, const real* v, L ldv, const real* q, L ldq, L G, const real* gate, const real* from, L ldf,
                   real* to, L ldt, real* o, L ldo) {
  L g = 0;
  for (; g + GS < G; g += GS) pass<T, GS, NR, GATE, false>(F, k, ldk, v, ldv, q + g * ldq, ldq, G, gate, from, ldf, to, ldt, o + g * ldo, ldo);
  pass<T, GS, NR, GATE, true>(F, k, ldk, v, ldv, q + g * ldq, ldq, G, gate, from, ldf, to, ldt, o + g * ldo, ldo);
}

// t tokens: k [t, ldk], v [t, ldv], q and o [t G, ldq or ldo], gate [t]; `columns` columns of the state S.
typedef void (*Recur)(L t, L F, L G, L columns, const real* k, L ldk, const real* v, L ldv, const real* q, L ldq, const real* gate, real* S,
                      real* o, L ldo);

template <int T, int GS, int NR, bool GATE>
void recur_block(L t, L F, L G, const real* k, L ldk, const real* v, L ldv, const real* q, L ldq, const real* gate, real* S, real* o, L ldo) {
  constexpr L ld = NR * LANES;
  L i = 0;
  for (; i + T <= t; i += T)
    passes<T, GS, NR, GATE>(F, k + i * ldk, ldk, v + i * ldv, ldv, q + i * G * ldq, ldq, G, gate + i, S, ld, S, ld, o + i * G * ldo, ldo);
  if (T > 1)
    for (; i < t; i++)
      passes<1, GS, NR, GATE>(F, k + i * ldk, ldk, v + i * ldv, ldv, q + i * G * ldq, ldq, G, gate + i, S, ld, S, ld, o + i * G * ldo, ldo);
}

template <int GS, bool GATE>
void recur_by(L t, L F, L G, L columns, const real* k, L ldk, const real* v, L ldv, const real* q, L ldq, const real* gate, real* S, real* o, L ldo) {
  constexpr int T = tokens_per_pass<GS>();
  L c = 0;
  for (; c + COLUMNS <= columns; c += COLUMNS) recur_block<T, GS, 2, GATE>(t, F, G, k, ldk, v + c, ldv, q, ldq, gate, S + c * F, o + c, ldo);
  if (c < columns) recur_block<T, GS, 1, GATE>(t, F, G, k, ldk, v + c, ldv, q, ldq, gate, S + c * F, o + c, ldo);
}

INLINE Recur recurrence(L G, bool gate) {
  static const Recur found[4][2] = {{recur_by<1, false>, recur_by<1, true>},
                                    {recur_by<2, false>, recur_by<2, true>},
                                    {recur_by<3, false>, recur_by<3, true>},
                                    {recur_by<4, false>, recur_by<4, true>}};
  return found[heads_at_once(G) - 1][gate];
}

// One token, from one state to another, both [F, ld] in one piece.
template <int GS, bool GATE>
void step_by(L F, L G, L columns, const real* k, const real* v, const real* q, L ldq, const real* gate, const real* from, real* to, L ld,
             real* o, L ldo) {
  L c = 0;
  for (; c + COLUMNS <= columns; c += COLUMNS) passes<1, GS, 2, GATE>(F, k, 0, v + c, 0, q, ldq, G, gate, from + c, ld, to + c, ld, o + c, ldo);
  if (c < columns) passes<1, GS, 1, GATE>(F, k, 0, v + c, 0, q, ldq, G, gate, from + c, ld, to + c, ld, o + c, ldo);
}
typedef void (*Step)(L F, L G, L columns, const real* k, const real* v, const real* q, L ldq, const real* gate, const real* from, real* to, L ld,
                     real* o, L ldo);
INLINE Step one_step(L G, bool gate) {
  static const Step found[4][2] = {{step_by<1, false>, step_by<1, true>},
                                   {step_by<2, false>, step_by<2, true>},
                                   {step_by<3, false>, step_by<3, true>},
                                   {step_by<4, false>, step_by<4, true>}};
  return found[heads_at_once(G) - 1][gate];
}

// Backwards in time, for gradients: s = later_t s + sum_g a_tg[e] u_tg;  o_t += b_t[e] s. later_t: the gate of the token
// after t. a, u: rows of the G heads side by side, of which the call takes GS.
template <int T, int GS, int NR, bool GATE>
INLINE void pass_back(L F, const real* a, L lda, const real* u, L ldu, L G, const real* b, L ldb, const real* later, real* S, real* o, L ldo) {
  V sum[T][NR], x[T][GS][NR];
  UNROLL for (int t = 0; t < T; t++) UNROLL for (int j = 0; j < NR; j++) {
    sum[t][j] = load(o + t * ldo + j * LANES);
    UNROLL for (int g = 0; g < GS; g++) x[t][g][j] = load(u + (t * G + g) * ldu + j * LANES);
  }
  for (L e = 0; e < F; e++) {
    V s[NR];
    UNROLL for (int j = 0; j < NR; j++) s[j] = load(S + (e * NR + j) * LANES);
    UNROLL for (int t = T - 1; t >= 0; t--) {
      if (GATE) UNROLL for (int j = 0; j < NR; j++) s[j] = s[j] * later[t];
      UNROLL for (int g = 0; g < GS; g++) {
        V y = set(a[(t * G + g) * lda + e]);
        UNROLL for (int j = 0; j < NR; j++) s[j] = s[j] + y * x[t][g][j];
      }
      V y = set(b[t * ldb + e]);
      UNROLL for (int j = 0; j < NR; j++) sum[t][j] = sum[t][j] + y * s[j];
    }
    UNROLL for (int j = 0; j < NR; j++) store(S + (e * NR + j) * LANES, s[j]);
  }
  UNROLL for (int t = 0; t < T; t++) UNROLL for (int j = 0; j < NR; j++) store(o + t * ldo + j * LANES, sum[t][j]);
}

template <int GS, int NR, bool GATE>
void recur_back_block(L t, L F, L G, const real* a, L lda, const real* u, L ldu, const real* b, L ldb, const real* later, real* S, real* o, L ldo) {
  constexpr int T = REGISTERS == 32 && GS < 4 ? 2 : 1;
  L i = t;
  for (; i >= T; i -= T)
    pass_back<T, GS, NR, GATE>(F, a + (i - T) * G * lda, lda, u + (i - T) * G * ldu, ldu, G, b + (i - T) * ldb, ldb, later + i - T, S, o + (i - T) * ldo, ldo);
  if (T > 1)
    for (; i >= 1; i--) pass_back<1, GS, NR, GATE>(F, a + (i - 1) * G * lda, lda, u + (i - 1) * G * ldu, ldu, G, b + (i - 1) * ldb, ldb, later + i - 1, S, o + (i - 1) * ldo, ldo);
}

// As Recur; adds to o [t, ldo]. S: one state for each of the G / GS parts of a group, whose sum is the state.
typedef void (*RecurBack)(L t, L F, L G, L columns, const real* a, L lda, const real* u, L ldu, const real* b, L ldb, const real* later,
                          real* S, real* o, L ldo);
template <int GS, bool GATE>
void recur_back_by(L t, L F, L G, L columns, const real* a, L lda, const real* u, L ldu, const real* b, L ldb, const real* later, real* S,
                   real* o, L ldo) {
  for (L g = 0; g < G; g += GS, S += F * columns) {
    L c = 0;
    for (; c + COLUMNS <= columns; c += COLUMNS)
      recur_back_block<GS, 2, GATE>(t, F, G, a + g * lda, lda, u + g * ldu + c, ldu, b, ldb, later, S + c * F, o + c, ldo);
    if (c < columns) recur_back_block<GS, 1, GATE>(t, F, G, a + g * lda, lda, u + g * ldu + c, ldu, b, ldb, later, S + c * F, o + c, ldo);
  }
}
INLINE RecurBack recurrence_back(L G, bool gate) {
  static const RecurBack found[4][2] = {{recur_back_by<1, false>, recur_back_by<1, true>},
                                        {recur_back_by<2, false>, recur_back_by<2, true>},
                                        {recur_back_by<3, false>, recur_back_by<3, true>},
                                        {recur_back_by<4, false>, recur_back_by<4, true>}};
  return found[heads_at_once(G) - 1][gate];
}

// Denominators of t tokens: z = gate z + k_t, den_tg = q_tg . z. F is a multiple of LANES. `lost`, [F], is what rounding
// took from z so far (Kahan).
void denominators(L t, L F, L G, const real* k, const real* q, const real* gate, real* z, real* lost, real* den) {
  for (L i = 0; i < t; i++) {
    V g0 = set(gate[i]);
    for (L e = 0; e < F; e += LANES) {
      V y = load(k + i * F + e) - load(lost + e) * g0, old = load(z + e) * g0, now = old + y;
      store(lost + e, (now - old) - y), store(z + e, now);
    }
    for (L g = 0; g < G; g++) {
      V d{};
      const real* row = q + (i * G + g) * F;
      for (L e = 0; e < F; e += LANES) d = d + load(z + e) * load(row + e);
      den[i * G + g] = total(d);
    }
  }
}

// Parts that the columns of a matrix are cut into, so that all threads have something to do.
INLINE L parts_of(L columns, L tasks, L threads) {
  L parts = 1;
  while (threads > 1 && tasks * parts < 2 * threads && columns / (parts * 2) >= COLUMNS) parts *= 2;
  return parts;
}

// A state [F, ld] in memory, columns first .. first + width, into blocks and back; `padded` columns, the others zero.
void state_in(const real* x, L ld, L F, L first, L width, L padded, real* S) {
  for (L c = 0; c < padded; c += COLUMNS) {
    L wide = least(COLUMNS, padded - c);
    for (L e = 0; e < F; e++)
      for (L j = 0; j < wide; j++) S[c * F + e * wide + j] = x && c + j < width ? x[e * ld + first + c + j] : 0;
  }
}
void state_out(const real* S, L ld, L F, L first, L width, L padded, real* x) {
  for (L c = 0; c < padded; c += COLUMNS) {
    L wide = least(COLUMNS, padded - c);
    for (L e = 0; e < F; e++)
      for (L j = 0; j < wide && c + j < width; j++) x[e * ld + first + c + j] = S[c * F + e * wide + j];
  }
}

}  // namespace
