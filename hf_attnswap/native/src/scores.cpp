// Attention by an activation on the scores, and its gradient, by tiles of rows: no tensor of T x S exists.
#include "activations.h"
#include "kernels.h"
#include "threads.h"
#include "tiles.h"

namespace {

constexpr L SOME = 32;  // keys whose values are passed over together where all their weights are zero

// One part of a group in one tile of rows. Scores of a softmax (EXP) are in base 2.
template <int A>
struct ScoreTile {
  const Scores& a;
  L b, kv, h, heads, C, columns, r0 = 0, rows = 0, seen = 0, free = 0;
  const uint8_t* valid;
  Buffer qt, st, out, total, c, peak;

  ScoreTile(const Scores& a, L b, L kv, L h, L heads)
      : a(a), b(b), kv(kv), h(h), heads(heads), C(heads * ROWS), columns(up(a.value_dim, LANES)),
        valid(a.mask ? (const uint8_t*)a.mask + b * a.keys : nullptr), qt(a.dim * C), st((peak_comes_first(A) ? a.keys : KEYS) * C),
        out(C * columns), total(C), c(C), peak(C) {}

  const real* key(L j) const { return (const real*)a.k.p + b * a.k.b + kv * a.k.h + j * a.k.n; }
  const real* value(L j) const { return (const real*)a.v.p + b * a.v.b + kv * a.v.h + j * a.v.n; }
  L row(L column) const { return (b * a.heads + h + column / ROWS) * a.length + r0 + column % ROWS; }
  bool is_row(L column) const { return column % ROWS < rows; }

  // Rows start .. : all see the keys before `free`, none those from `seen` on.
  void at(L start) {
    r0 = start, rows = least(ROWS, a.length - start);
    L offset = a.keys - a.length;
    seen = a.causal ? offset + r0 + rows : a.keys;
    free = a.causal ? offset + r0 + 1 : a.keys;
    read_transposed(a.q, b, h, heads, r0, rows, a.dim, scale_of<A>(a), qt);
  }
  // Which rows of a vector of columns see key j.
  I sees(L j, L column) const {
    if (valid && !valid[j]) return I{};
    if (j < free) return ~I{};
    return lanes() + (whole)(column % ROWS) >= seti((whole)(j - free + 1));
  }
  bool whole_block(L j, L keys) const { return !valid && j + keys <= free; }

  void score(L j, L keys, real* to) { scores_of(keys, key(j), a.k.n, a.dim, qt, C, to); }

  // Raise the peak of each row to the largest of its scores of keys j ..; a NaN shows in the weights.
  void raise(L j, L keys, const real* s) {
    const bool all = whole_block(j, keys);
    for (L x = 0; x < C; x += LANES) {
      V p = load(peak + x);
      if (all)
        for (L i = 0; i < keys; i++) p = larger(load(s + i * C + x), p);
      else
        for (L i = 0; i < keys; i++) p = larger(where(sees(j + i, x), load(s + i * C + x), set(-INFINITY)), p);
      store(peak + x, p);
    }
  }
  // Fill c: the numbers of the rows that the activation needs; where the peak comes first, all scores into st.
  void prepare() {
    for (L x = 0; x < C; x++) peak[x] = -INFINITY;
    if (A == SIGMOID)
      for (L x = 0; x < C; x++) {
        real count = is_row(x) ? count_of(a, b, r0 + x % ROWS) : 1;
        c[x] = ((const real*)a.offset)[h + x / ROWS] - std::log(count);
      }
    if (!peak_comes_first(A)) return;
    for (L j = 0; j < seen; j += KEYS) {
      const L keys = least(KEYS, seen - j);
      score(j, keys, st + j * C), raise(j, keys, st + j * C);
    }
    for (L x = 0; x < C; x += LANES) store(c + x, of_peak<A>(load(peak + x)));
  }
  // Softmax: raise the peak, from which weights are counted, and bring what is summed so far to it.
  void shift(L j, L keys, const real* s) {
    real before[4 * ROWS];
    memcpy(before, peak, C * sizeof(real));
    raise(j, keys, s);
    for (L x = 0; x < C; x += LANES) {
      V old = load(before + x), now = load(peak + x);
      if (!any(old != now)) continue;
      I none = now == -INFINITY;
      V factor = where(none, set(1), power_of_two(old - now));
      store(c + x, kept(~none, now)), store(before + x, factor), store(total + x, load(total + x) * factor);
      UNROLL for (L i = x; i < x + LANES; i++)
        for (L e = 0; e < columns; e += LANES) store(out + i * columns + e, load(out + i * columns + e) * before[i]);
    }
  }

  // Weights of keys j .. in place of their scores; their sums are added to `total`.
  void weigh(L j, L keys, real* s) {
    const bool all = whole_block(j, keys);
    for (L x = 0; x < C; x += LANES) {
      V sum = load(total + x), cx = load(c + x);
      for (L i = 0; i < keys; i++) {
        V w = activate<A>(load(s + i * C + x), cx, a.squarings);
        if (!all) w = kept(sees(j + i, x), w);
        sum = sum + w;
        store(s + i * C + x, w);
      }
      store(total + x, sum);
    }
  }
  // Whether any weight of these keys is not zero.
  bool counts(L keys, const real* w) const {
    if (A == SIGMOID || A == SOFTPLUS || A == EXP) return true;
    I found{};
    for (L x = 0; x < keys * C; x += LANES) found |= load(w + x) != 0;
    return any(found);
  }
  real divisor(L column) const { return denominator(a, b, r0 + column % ROWS, total[column]); }

  void forward() {
    prepare();
    memset(out, 0, C * columns * sizeof(real));
    memset(total, 0, C * sizeof(real));
    if (A == EXP) memset(c, 0, C * sizeof(real));
    for (L j = 0; j < seen; j += KEYS) {
      L keys = least(KEYS, seen - j);
      real* s = peak_comes_first(A) ? st + j * C : (real*)st;
      if (!peak_comes_first(A)) score(j, keys, s);
      if (A == EXP) shift(j, keys, s);
      weigh(j, keys, s);
      for (L i = 0; i < keys;) {  // runs of keys that count
        L stop = i;
        while (stop < keys && counts(least(SOME, keys - stop), s + stop * C)) stop = least(keys, stop + SOME);
        if (stop > i) mix(stop - i, s + i * C, C, value(j + i), a.v.n, columns, out);
        i = stop + SOME;
      }
    }
    for (L x = 0; x < C; x++) {
      if (!is_row(x)) continue;
      real d = divisor(x);
      ((real*)a.total)[row(x)] = total[x], ((real*)a.peak)[row(x)] = c[x];
      write_row(a.out, AS_COMPUTED, b, h + x / ROWS, r0 + x % ROWS, 0, a.value_dim, out + x * columns, 1 / d);
    }
  }
};

// With dn = go / d the gradient of the sum of weighted values and dl that of the sum of weights, per pair of row and key
//   ds = a'(s) (dn . v + dl),  dq = sum_j ds k_j,  dk = sum_i ds q_i,  dv = sum_i a dn_i,
// and where the largest score of a row is subtracted, its keys get what all others have together, with the other sign.
template <int A>
struct ScoreGradient : ScoreTile<A> {
  typedef ScoreTile<A> Tile;
  using Tile::a, Tile::b, Tile::kv, Tile::h, Tile::heads, Tile::C, Tile::columns, Tile::st, Tile::c, Tile::total, Tile::seen, Tile::rows, Tile::r0;
  static constexpr bool PEAK = A == POWER;
  L part, wide;
  Buffer ds, dn, dnt, dl, q, dq, peaks;
  real offset[4] = {};

  ScoreGradient(const Scores& a, L b, L kv, L h, L heads, L part)
      : Tile(a, b, kv, h, heads), part(part), wide(up(a.dim, LANES)), ds((PEAK ? a.keys : KEYS) * C), dn(C * columns), dnt(columns * C), dl(C),
        q(C * wide), dq(C * wide), peaks(2 * C) {}

  real* into(const Tensor& x, L j) const { return (real*)x.p + ((part * a.batch + b) * a.kv_heads + kv) * x.h + j * x.n; }

  void read() {
    for (L x = 0; x < C; x++) {
      real* row = dn + x * columns;
      dl[x] = total[x] = 0;
      if (A == EXP) c[x] = 0;
      memset(row, 0, columns * sizeof(real));
      memset(q + x * wide, 0, wide * sizeof(real));
      if (!Tile::is_row(x)) continue;
      L head = h + x / ROWS, n = r0 + x % ROWS;
      read_rows(a.q, AS_COMPUTED, b, head, n, 1, 0, a.dim, wide, (real)a.scale, q + x * wide, wide);
      read_rows(a.go, AS_COMPUTED, b, head, n, 1, 0, a.value_dim, columns, 1, row, columns);
      total[x] = ((const real*)a.total)[Tile::row(x)];
      if (A == EXP) c[x] = ((const real*)a.peak)[Tile::row(x)];
      const real* out = (const real*)a.out.p + b * a.out.b + head * a.out.h + n * a.out.n;
      real r = 1 / Tile::divisor(x), d = 0;
      for (L e = 0; e < a.value_dim; e++) row[e] *= r, d += row[e] * out[e];
      if (a.denominator == 2 && (a.eps || total[x] != 0)) dl[x] = -d;
    }
    for (L e = 0; e < columns; e++)
      for (L x = 0; x < C; x++) dnt[e * C + x] = dn[x * columns + e];
  }

  // From the scores s and products dn . v in d of keys j ..: weights into s, gradients of the scores into d.
  void differentiate(L j, L keys, real* s, real* d) {
    const bool all = Tile::whole_block(j, keys);
    for (L x = 0; x < C; x += LANES) {
      V cx = load(c + x), l = load(dl + x), sum = load(peaks + x), ties = load(peaks + C + x);
      for (L i = 0; i < keys; i++) {
        V slope, w = activate<A>(load(s + i * C + x), cx, a.squarings, slope);
        V g = slope * (load(d + i * C + x) + l);
        if (!all) {
          I seen = Tile::sees(j + i, x);
          w = kept(seen, w), g = kept(seen, g);
        }
        sum = sum + g;
        if (PEAK) ties = ties + kept(w == 1, set(1));
        store(s + i * C + x, w), store(d + i * C + x, g);
      }
      store(peaks + x, sum), store(peaks + C + x, ties);
    }
  }
  void from_peak(L keys, const real* w, real* d) {
    for (L x = 0; x < C; x += LANES) {
      V share = load(peaks + x) / larger(load(peaks + C + x), set(1));
      for (L i = 0; i < keys; i++) {
        real* at = d + i * C + x;
        store(at, load(at) - kept(load(w + i * C + x) == 1, share));
      }
    }
  }
  void add(L j, L keys, const real* w, const real* d) {
    mix(keys, d, C, Tile::key(j), a.k.n, wide, dq);
    product<true>(keys, wide, C, d, C, 1, q, wide, into(a.dk, j), a.dk.n);
    product<true>(keys, columns, C, w, C, 1, dn, columns, into(a.dv, j), a.dv.n);
  }

  void backward() {
    Tile::prepare();
    read();
    memset(dq, 0, C * wide * sizeof(real));
    memset(peaks, 0, 2 * C * sizeof(real));
    for (L j = 0; j < seen; j += KEYS) {
      L keys = least(KEYS, seen - j);
      real *s = peak_comes_first(A) ? st + j * C : (real*)st, *d = PEAK ? ds + j * C : (real*)ds;
      if (!peak_comes_first(A)) Tile::score(j, keys, s);
      scores_of(keys, Tile::value(j), a.v.n, columns, dnt, C, d);
      differentiate(j, keys, s, d);
      if (!PEAK) add(j, keys, s, d);
    }
    if (PEAK)
      for (L j = 0; j < seen; j += KEYS) {
        L keys = least(KEYS, seen - j);
        from_peak(keys, st + j * C, ds + j * C);
        add(j, keys, st + j * C, ds + j * C);
      }
    for (L x = 0; x < C; x++) {
      if (!Tile::is_row(x)) continue;
      write_row(a.dq, AS_COMPUTED, b, h + x / ROWS, r0 + x % ROWS, 0, a.dim, dq + x * wide, (real)a.scale);
      offset[x / ROWS] += peaks[x];
    }
  }
};

template <int A>
void score_forward(const Scores& a) {
  const L group = a.heads / a.kv_heads, heads = heads_at_once(group), sets = group / heads, tiles = (a.length + ROWS - 1) / ROWS;
  const L most = 8, runs = (tiles + most - 1) / most;
  parallel(a.threads, a.batch * a.kv_heads * sets * runs, [&](L task) {
    L set = task % (a.batch * a.kv_heads * sets), run = runs - 1 - task / (a.batch * a.kv_heads * sets);  // the longest rows first
    L b = set / sets / a.kv_heads, kv = set / sets % a.kv_heads;
    ScoreTile<A> tile(a, b, kv, kv * group + set % sets * heads, heads);
    for (L i = run * most; i < least(tiles, (run + 1) * most); i++) tile.at(i * ROWS), tile.forward();
  });
}

// Part p of the rows has its own sums for dk and dv; their first dimension is that of the parts.
template <int A>
void score_backward(const Scores& a) {
  const L group = a.heads / a.kv_heads, heads = heads_at_once(group), tiles = (a.length + ROWS - 1) / ROWS;
  parallel(a.threads, a.batch * a.kv_heads * a.parts, [&](L task) {
    L pair = task / a.parts, part = task % a.parts, b = pair / a.kv_heads, kv = pair % a.kv_heads;
    for (L g = 0; g < group; g += heads) {
      ScoreGradient<A> tile(a, b, kv, kv * group + g, heads, part);
      for (L i = part; i < tiles; i += a.parts) tile.at(i * ROWS), tile.backward();
      if (a.doffset)
        for (L x = 0; x < heads; x++) ((real*)a.doffset)[(part * a.batch + b) * a.heads + kv * group + g + x] = tile.offset[x];
    }
  });
}

void scores_forward(const Scores& a) { BY_ACTIVATION(score_forward) }
void scores_backward(const Scores& a) { BY_ACTIVATION(score_backward) }

}  // namespace

KERNEL(scores_forward, Scores)
KERNEL(scores_backward, Scores)
