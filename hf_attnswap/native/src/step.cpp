// One token after a state: the slots of the sinks and of the last tokens, with the new token at the end.
#include "kernels.h"
#include "threads.h"
#include "tiles.h"

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

void step_of(const WindowStep& a, L b, L kv) {
  const L group = a.heads / a.kv_heads, now = a.slots + (a.slots < a.sinks + a.window), count = ((const int64_t*)a.count)[b];
  push(a.old_k, a.k, a.new_k, b, kv, a.slots, now, a.sinks, count, a.dim);
  push(a.old_v, a.v, a.new_v, b, kv, a.slots, now, a.sinks, count, a.value_dim);
  const real *keys = (const real*)a.new_k.p + b * a.new_k.b + kv * a.new_k.h, *values = (const real*)a.new_v.p + b * a.new_v.b + kv * a.new_v.h;
  const L padded = up(now, LANES);
  Buffer weights(padded), out(a.value_dim);
  for (L g = 0; g < group; g++) {
    const L head = kv * group + g;
    const real* q = (const real*)a.q.p + b * a.q.b + head * a.q.h;
    real peak = -INFINITY;
    for (L j = 0; j < padded; j++) {
      // A slot of a sink holds it from its own position on; a recent one counts where it holds no sink.
      const bool seen = j < now && (j < a.sinks ? j <= count : count + j >= now - 1 + a.sinks);
      V d{};
      if (seen)
        for (L e = 0; e < a.dim; e += LANES) d = d + load(q + e) * load(keys + j * a.new_k.n + e);
      weights[j] = seen ? total(d) * (real)a.scaling : -INFINITY;
      peak = weights[j] <= peak ? peak : weights[j];
    }
    V sum{};
    for (L j = 0; j < padded; j += LANES) {
      V s = load(weights + j), w = exponential(s - peak);
      w = s == -INFINITY ? V{} : w;
      sum = sum + w;
      store(weights + j, w);
    }
    out.clear(a.value_dim);
    for (L j = 0; j < now; j++) {
      if (weights[j] == 0) continue;
      for (L e = 0; e < a.value_dim; e += LANES) store(out + e, load(out + e) + load(values + j * a.new_v.n + e) * weights[j]);
    }
    const real all = total(sum);
    if (a.lse) ((real*)a.lse)[b * a.heads + head] = peak + std::log(all);
    write_row(a.out, AS_COMPUTED, b, head, 0, 0, a.value_dim, out, 1 / all);
  }
}

void window_step(const WindowStep& a) {
  for (L b = 0; b < a.batch; b++) {
    const int64_t count = ((const int64_t*)a.count)[b];
    ((int64_t*)a.next)[b] = count + 1;
    if (a.leaves) ((uint8_t*)a.leaves)[b] = a.slots == a.sinks + a.window && count >= a.slots;
  }
  parallel(a.threads, a.batch * a.kv_heads, [&](L task) { step_of(a, task / a.kv_heads, task % a.kv_heads); });
}

}  // namespace

KERNEL(window_step, WindowStep)
