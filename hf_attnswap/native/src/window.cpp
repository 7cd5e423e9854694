// Softmax over a window and the first tokens, by tiles of rows; what a hybrid joins with linear attention.
#include "kernels.h"
#include "threads.h"
#include "tiles.h"

namespace {

// Row r is at position count + r of its text and stands in slot `ahead` + r of the keys. It sees the last `window` slots,
// its own included, as far as they hold a position that is no sink, and the sinks up to its own position.
struct Sight {
  L window, sinks, ahead, count;

  L row_slot(L r) const { return ahead + r; }
  // First slot that row r may see; those before hold sinks, nothing, or tokens that have left the window.
  L first_slot(L r) const { return most(most<L>(0, ahead + sinks - count), row_slot(r) - window + 1); }
  // Sinks that row r sees.
  L sinks_seen(L r) const { return least(sinks, count + r + 1); }
};

// One part of a group in one tile of rows: weights of the softmax 2^{s - c}, with scores in base 2, their sums and the
// numerators.
struct SoftmaxTile {
  const Window& a;
  L heads, C, columns, most_keys;
  Buffer qt, st, out, sum, peak;

  SoftmaxTile(const Window& a, L heads)
      : a(a), heads(heads), C(heads * ROWS), columns(up(a.value_dim, LANES)), most_keys(a.sinks + least(a.window, a.ahead + a.length) + ROWS),
        qt(a.dim * C), st(most_keys * C), out(C * columns), sum(C), peak(C) {}

  // Rows r0 .. r0 + rows of heads h .. of text b; scores are left as weights in `st`: sinks, then the slots from `low`.
  void run(const Sight& s, L b, L kv, L h, L r0, L rows) {
    see(s, b, kv, h, r0, rows);
    soften(s, r0);
    memset(out, 0, C * columns * sizeof(real));
    if (first) mix(first, st, C, at(a.sink_v, b, kv, 0), a.sink_v.n, columns, out);
    if (low < high) mix(high - low, st + first * C, C, at(a.v, b, kv, low), a.v.n, columns, out);
  }
  // The scores of the keys that these rows may see.
  void see(const Sight& s, L b, L kv, L h, L r0, L rows) {
    low = s.first_slot(r0), first = s.sinks_seen(r0 + rows - 1);
    high = s.row_slot(r0 + rows - 1) + 1;
    read_transposed(a.q, b, h, heads, r0, rows, a.dim, (real)a.scaling * LOG2_E, qt);
    if (first) scores_of(first, at(a.sink_k, b, kv, 0), a.sink_k.n, a.dim, qt, C, st);
    if (low < high) scores_of(high - low, at(a.k, b, kv, low), a.k.n, a.dim, qt, C, st + first * C);
    else high = low;
    from = first + most<L>(0, s.row_slot(r0 + ROWS - 1) - s.window + 1 - low), to = first + s.row_slot(r0) + 1 - low;
  }
  // Rows (bits of lanes, vector by vector) that see key i of the tile.
  I sees(const Sight& s, L r0, L i, L vector) const {
    I row = lanes() + (whole)(r0 + vector * LANES);
    if (i < first) return row + (whole)s.count >= seti((whole)i);
    whole slot = (whole)(low + i - first - s.ahead);
    return (row >= seti(slot)) & (row < seti(slot + (whole)s.window));
  }
  static const real* at(const Tensor& x, L b, L h, L n) { return (const real*)x.p + b * x.b + h * x.h + n * x.n; }

  L low, high, first, from, to;  // of the keys `from` .. `to` of the tile every row sees every one

 private:
  void soften(const Sight& s, L r0) {
    const L keys = first + high - low;
    for (L c = 0; c < C; c += LANES) {
      const L vector = c % ROWS / LANES;
      V p = set(-INFINITY), total{};
      real* column = st + c;
      for (L i = 0; i < keys; i++) {
        V x = load(column + i * C);
        if (i < from || i >= to) x = where(sees(s, r0, i, vector), x, set(-INFINITY));
        p = larger(x, p);  // a NaN shows in the weights
      }
      p = p == -INFINITY ? V{} : p;  // rows that see nothing
      for (L i = 0; i < keys; i++) {
        V e = power_of_two(load(column + i * C) - p);
        if (i < from || i >= to) e = kept(sees(s, r0, i, vector), e);
        total = total + e;
        store(column + i * C, e);
      }
      store(sum + c, total), store(peak + c, p);
    }
  }
};

void window_forward(const Window& a) {
  const L group = a.heads / a.kv_heads, heads = heads_at_once(group), parts = group / heads, tiles = (a.length + ROWS - 1) / ROWS;
  const L run = 8, runs = (tiles + run - 1) / run;  // tiles of a task
  parallel(a.threads, a.batch * a.kv_heads * parts * runs, [&](L task) {
    L part = task / runs, b = part / parts / a.kv_heads, kv = part / parts % a.kv_heads, h = kv * group + part % parts * heads;
    SoftmaxTile tile(a, heads);
    Sight s{a.window, a.sinks, a.ahead, a.count ? ((const int64_t*)a.count)[b] : 0};
    for (L i = task % runs * run; i < least(tiles, (task % runs + 1) * run); i++) {
      L r0 = i * ROWS, rows = least(ROWS, a.length - r0);
      tile.run(s, b, kv, h, r0, rows);
      for (L g = 0; g < heads; g++)
        for (L x = 0; x < rows; x++) {
          L c = g * ROWS + x;
          real total = tile.sum[c], *lse = (real*)a.lse + (b * a.heads + h + g) * a.length + r0 + x;
          *lse = total == 0 ? -INFINITY : tile.peak[c] / LOG2_E + std::log(total);
          write_row(a.out, AS_COMPUTED, b, h + g, r0 + x, 0, a.value_dim, tile.out + c * tile.columns, total == 0 ? 0 : 1 / total);
        }
    }
  });
}

// With p the weights and d = go . out: ds = p (go . v - d + glse), dq = sum_j ds k_j, dk = sum_i ds q_i, dv = sum_i p go_i.
struct WindowGradient : SoftmaxTile {
  L wide, b, kv, part;
  Buffer ds, q, go, got, shift, bias, dq;

  WindowGradient(const Window& a, L heads, L b, L kv, L part)
      : SoftmaxTile(a, heads), wide(up(a.dim, LANES)), b(b), kv(kv), part(part), ds(most_keys * C), q(C * wide), go(C * columns), got(columns * C),
        shift(C), bias(C), dq(C * wide) {}

  // Scores are made again, and become weights; `ds` becomes their gradients.
  void run(const Sight& s, L h, L r0, L rows) {
    see(s, b, kv, h, r0, rows);
    for (L x = 0; x < C; x++) {
      real *row = go + x * columns, d = 0;
      shift[x] = INFINITY, bias[x] = 0;
      memset(row, 0, columns * sizeof(real)), memset(q + x * wide, 0, wide * sizeof(real));
      if (x % ROWS < rows) {
        L head = h + x / ROWS, n = r0 + x % ROWS, at = (b * a.heads + head) * a.length + n;
        read_rows(a.q, AS_COMPUTED, b, head, n, 1, 0, a.dim, wide, (real)a.scaling, q + x * wide, wide);
        read_rows(a.go, AS_COMPUTED, b, head, n, 1, 0, a.value_dim, columns, 1, row, columns);
        const real* out = (const real*)a.out.p + b * a.out.b + head * a.out.h + n * a.out.n;
        for (L e = 0; e < a.value_dim; e++) d += row[e] * out[e];
        if (((const real*)a.lse)[at] > -INFINITY) shift[x] = ((const real*)a.lse)[at] * LOG2_E;
        bias[x] = ((const real*)a.glse)[at] - d;
      }
      for (L e = 0; e < columns; e++) got[e * C + x] = row[e];
    }
    const L keys = first + high - low;
    if (first) scores_of(first, at(a.sink_v, b, kv, 0), a.sink_v.n, columns, got, C, ds);
    if (low < high) scores_of(high - low, at(a.v, b, kv, low), a.v.n, columns, got, C, ds + first * C);
    for (L x = 0; x < C; x += LANES) {
      V c = load(shift + x), add = load(bias + x);
      for (L i = 0; i < keys; i++) {
        real *w = st + i * C + x, *d = ds + i * C + x;
        V p = power_of_two(load(w) - c);
        if (i < from || i >= to) p = kept(sees(s, r0, i, x % ROWS / LANES), p);
        store(d, p * (load(d) + add)), store(w, p);
      }
    }
    memset(dq, 0, C * wide * sizeof(real));
    if (first) add(first, st, ds, a.sink_k, a.dsink_k, a.dsink_v, 0);
    if (low < high) add(high - low, st + first * C, ds + first * C, a.k, a.dk, a.dv, low);
    for (L x = 0; x < C; x++)
      if (x % ROWS < rows) write_row(a.dq, AS_COMPUTED, b, h + x / ROWS, r0 + x % ROWS, 0, a.dim, dq + x * wide, a.scaling);
  }

 private:
  void add(L keys, const real* w, const real* d, const Tensor& k, const Tensor& dk, const Tensor& dv, L from) {
    const L pair = (part * a.batch + b) * a.kv_heads + kv;
    mix(keys, d, C, at(k, b, kv, from), k.n, wide, dq);
    product<true>(keys, wide, C, d, C, 1, q, wide, (real*)dk.p + pair * dk.h + from * dk.n, dk.n);
    product<true>(keys, columns, C, w, C, 1, go, columns, (real*)dv.p + pair * dv.h + from * dv.n, dv.n);
  }
};

// Part p of the rows has its own sums for keys, values and sinks; their first dimension is that of the parts.
void window_backward(const Window& a) {
  const L group = a.heads / a.kv_heads, heads = heads_at_once(group), tiles = (a.length + ROWS - 1) / ROWS;
  parallel(a.threads, a.batch * a.kv_heads * a.parts, [&](L task) {
    L pair = task / a.parts, part = task % a.parts, b = pair / a.kv_heads, kv = pair % a.kv_heads;
    WindowGradient tile(a, heads, b, kv, part);
    Sight s{a.window, a.sinks, a.ahead, a.count ? ((const int64_t*)a.count)[b] : 0};
    for (L g = 0; g < group; g += heads)
      for (L i = part; i < tiles; i += a.parts) tile.run(s, kv * group + g, i * ROWS, least(ROWS, a.length - i * ROWS));
  });
}

}  // namespace

KERNEL(window_backward, Window)
KERNEL(window_forward, Window)
