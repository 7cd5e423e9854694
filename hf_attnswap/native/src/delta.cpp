// The delta rule, gated or not: what a token adds is corrected by what the state holds for its key. A few tokens at a
// time, a small triangular system gives the corrected values; with these it is the recurrence of linear attention.
#include "delta.h"

#include "kernels.h"
#include "threads.h"

namespace {

constexpr L BLOCK = 32;    // tokens that are read at once
constexpr L TOGETHER = 8;  // tokens of a triangular system

void delta_columns(const Delta& a, L b, L h, L first, L width) {
  const L G = a.heads / a.kv_heads, F = a.dim, wide = up(F, LANES), columns = up(width, LANES);
  const L at = (b * a.kv_heads + h) * F * a.value_dim;
  Buffer S(F * columns), k(BLOCK * wide), q(BLOCK * G * wide), v(BLOCK * columns), held(TOGETHER * columns), o(BLOCK * G * columns),
      beta(BLOCK), gate(BLOCK);
  state_in(a.state ? (const real*)a.state + at : nullptr, a.value_dim, F, first, width, columns, S);
  Recur recur = recurrence(G, a.gate.p != nullptr);
  for (L i = 0; i < a.length; i += BLOCK) {
    L t = least(BLOCK, a.length - i);
    read_rows(a.k, a.type, b, h, i, t, 0, F, wide, 1, k, wide);
    for (L g = 0; g < G; g++) read_rows(a.q, a.type, b, h * G + g, i, t, 0, F, wide, 1, q + g * wide, G * wide);
    read_rows(a.v, a.type, b, h, i, t, first, width, columns, 1, v, columns);
    read_numbers(a.beta, b, h, i, t, beta);
    read_numbers(a.gate, b, h, i, t, gate);
    for (L n = 0; n < t; n += TOGETHER) {
      L some = least(TOGETHER, t - n);
      correct(some, F, wide, columns, k + n * wide, beta + n, gate + n, S, v + n * columns, held);
      recur(some, F, G, columns, k + n * wide, wide, v + n * columns, columns, q + n * G * wide, wide, gate + n, S, o + n * G * columns, columns);
    }
    for (L x = 0; x < t * G; x++) write_row(a.out, a.type, b, h * G + x % G, i + x / G, first, width, o + x * columns, 1);
  }
  if (a.after) state_out(S, a.value_dim, F, first, width, columns, (real*)a.after + at);
}

void delta_forward(const Delta& a) {
  L columns = up(a.value_dim, LANES), pairs = a.batch * a.kv_heads;
  L parts = parts_of(columns, pairs, a.threads), each = up(columns / parts, LANES);
  parallel(a.threads, pairs * parts, [&](L task) {
    L pair = task / parts, first = task % parts * each, width = least(each, a.value_dim - first);
    if (width > 0) delta_columns(a, pair / a.kv_heads, pair % a.kv_heads, first, width);
  });
}

void delta_backward(const Delta& a) {
  if (!a.length) return;
  parallel(a.threads, a.batch * a.kv_heads, [&](L task) {
    DeltaGradient gradient(a, task / a.kv_heads, task % a.kv_heads);
    gradient.errors();
    gradient.backwards();
    gradient.forwards();
  });
}

}  // namespace

KERNEL(delta_forward, Delta)
KERNEL(delta_backward, Delta)
