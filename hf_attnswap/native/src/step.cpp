// One token after a state: the slots of the sinks and of the last tokens, with the new token at the end.
#include "kernels.h"
#include "row.h"
#include "threads.h"

namespace {

// Slots with the new row: among the sinks where its position is one of theirs, and last; the oldest recent one is
// dropped unless the slots grow.
void push(const Tensor& old, const Tensor& row, const Tensor& to, L b, L h, L slots, L now, L sinks, L count, L dim) {
  const real *from = (const real*)old.p + b * old.b + h * old.h, *x = (const real*)row.p + b * row.b + h * row.h;
  real* y = (real*)to.p + b * to.b + h * to.h;
  const size_t bytes = dim * sizeof(real);
  for (L j = 0; j < now; j++) {
    const real* source = j == now - 1 || (j < sinks && j == count) ? x : from + (j < sinks ? j : j + slots + 1 - now) * old.n;
    memcpy(y + j * to.n, source, bytes);
  }
}

// GS query heads from h of text b, which see the new slots.
template <int GS>
void step_of(const WindowStep& a, L b, L kv, L h, L now, L count) {
  const L ld = up(now, LANES);
  Buffer q(GS * a.dim), s(GS * ld), out(GS * a.value_dim);
  real sums[GS];
  // A slot of a sink holds it from its own position on; a recent one counts where it holds no sink.
  auto sees = [&](L j) {
    I slot = lanes() + (whole)j, sink = slot < seti((whole)a.sinks);
    I seen = (sink & (slot <= seti((whole)count))) | (~sink & (slot >= seti((whole)(now - 1 + a.sinks - count))));
    return seen & (slot < seti((whole)now));
  };
  for (L g = 0; g < GS; g++) read_rows(a.q, AS_COMPUTED, b, h + g, 0, 1, 0, a.dim, a.dim, (real)a.scaling * LOG2_E, q + g * a.dim, a.dim);
  row_scores<GS>(now, (const real*)a.new_k.p + b * a.new_k.b + kv * a.new_k.h, a.new_k.n, q, a.dim, s, ld);
  for (L g = 0; g < GS; g++) {
    V p = set(-INFINITY), sum{};
    for (L j = 0; j < ld; j += LANES) p = larger(where(sees(j), load(s + g * ld + j), set(-INFINITY)), p);
    const real peak = largest(p);
    for (L j = 0; j < ld; j += LANES) {
      V w = kept(sees(j), power_of_two(load(s + g * ld + j) - peak));
      sum = sum + w;
      store(s + g * ld + j, w);
    }
    sums[g] = total(sum);
    if (a.lse) ((real*)a.lse)[b * a.heads + h + g] = peak / LOG2_E + std::log(sums[g]);
  }
  row_mix<GS>(now, s, ld, (const real*)a.new_v.p + b * a.new_v.b + kv * a.new_v.h, a.new_v.n, a.value_dim, out);
  for (L g = 0; g < GS; g++) write_row(a.out, AS_COMPUTED, b, h + g, 0, 0, a.value_dim, out + g * a.value_dim, 1 / sums[g]);
}

void window_step(const WindowStep& a) {
  for (L b = 0; b < a.batch; b++) {
    const int64_t count = ((const int64_t*)a.count)[b];
    ((int64_t*)a.next)[b] = count + 1;
    if (a.leaves) ((uint8_t*)a.leaves)[b] = a.slots == a.sinks + a.window && count >= a.slots;
  }
  const L group = a.heads / a.kv_heads, heads = heads_at_once(group), now = a.slots + (a.slots < a.sinks + a.window);
  parallel(a.threads, a.batch * a.kv_heads, [&](L task) {
    const L b = task / a.kv_heads, kv = task % a.kv_heads, count = ((const int64_t*)a.count)[b];
    push(a.old_k, a.k, a.new_k, b, kv, a.slots, now, a.sinks, count, a.dim);
    push(a.old_v, a.v, a.new_v, b, kv, a.slots, now, a.sinks, count, a.value_dim);
    for (L h = kv * group; h < (kv + 1) * group; h += heads) {
      if (heads == 1) step_of<1>(a, b, kv, h, now, count);
      else if (heads == 2) step_of<2>(a, b, kv, h, now, count);
      else if (heads == 3) step_of<3>(a, b, kv, h, now, count);
      else step_of<4>(a, b, kv, h, now, count);
    }
  });
}

}  // namespace

KERNEL(window_step, WindowStep)
