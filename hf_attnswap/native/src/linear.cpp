// Linear attention and its gradient by the recurrence: features, sums and division in one pass over the tokens.
#include "kernels.h"
#include "maps.h"
#include "recurrence.h"
#include "rows.h"
#include "threads.h"

namespace {

constexpr L BLOCK = 32;  // tokens whose features are made at once
INLINE L block_of(L length) { return least(BLOCK, most<L>(1, length)); }

// A state to which one token after another is added takes up their rounding errors. Where a text is longer than LONG,
// what each block adds is summed by itself, and joined to the state every JOINED tokens; a gate forgets the errors too.
constexpr L LONG = 2048, JOINED = 8 * BLOCK;

// What the tasks of a call share: sizes, and how queries and keys become features.
struct LinearCall {
  const Linear& a;
  L group, features, padded, wide, columns;  // padded: dim, wide: features, columns: value_dim, up to whole vectors
  bool gated;

  explicit LinearCall(const Linear& a)
      : a(a), group(a.heads / a.kv_heads), features(features_of(a.map, a.dim)), padded(up(a.dim, LANES)),
        wide(up(features, LANES)), columns(up(a.value_dim, LANES)), gated(a.gate.p != nullptr) {}

  L state_at(L b, L h) const { return (b * a.kv_heads + h) * features * (a.value_dim + 1); }

  // Features of a head's tokens i .. i + t: keys, where W is that of the key; `x` is left as the rows, times the scale.
  void keys(L b, L h, L i, L t, const real* W, real* x, real* room, real* f) const {
    read_rows(a.k, a.type, b, h, i, t, 0, a.dim, padded, a.scale, x, padded);
    mapped(a.map, t, a.dim, padded, x, W, room, f, wide);
    if (a.mask) {
      const uint8_t* valid = (const uint8_t*)a.mask + b * a.length + i;
      for (L n = 0; n < t; n++)
        if (!valid[n]) memset(f + n * wide, 0, wide * sizeof(real));
    }
  }
  void queries(L b, L h, L g, L i, L t, const real* W, real* x, real* room, real* f, real* left = nullptr) const {
    read_rows(a.q, a.type, b, h * group + g, i, t, 0, a.dim, padded, a.scale, x, padded);
    mapped(a.map, t, a.dim, padded, x, W, room, f + g * wide, group * wide, a.beside, left + (left ? g : 0), group);
  }
  // The gates of tokens i .. i + t; 1 behind the text.
  const real* gates(L b, L h, L i, L t, real* y) const {
    const real* from = gated ? (const real*)a.gate.p + b * a.gate.b + h * a.gate.h : nullptr;
    for (L n = 0; n < t; n++) y[n] = from && i + n < a.length ? from[(i + n) * a.gate.n] : 1;
    return y;
  }
  void sums_in(L b, L h, real* z) const {
    const real* state = (const real*)a.state;
    for (L e = 0; e < wide; e++)
      z[e] = state && e < features ? state[state_at(b, h) + e * (a.value_dim + 1) + a.value_dim] : 0;
  }
  real* denominator(L b, L h) const { return (real*)a.den + (b * a.heads + h) * a.length; }

  // The matrices of the map for one key/value head.
  Matrices of_key(L h, bool transposed = false) const { return {at((const real*)a.wk, h), 1, a.dim, transposed}; }
  Matrices of_queries(L h, bool transposed = false) const {
    return {at((const real*)a.wq, h * group), group, a.dim, transposed};
  }
  const real* at(const real* W, L n) const { return W ? W + n * a.dim * a.dim : nullptr; }
};

// Less mass than this counts as none: its reciprocal would overflow.
constexpr real NO_MASS = 1e-30;

// A row of the linear branch joined with that of the softmax, which stands in `out`: each is a mean, weighed by a sigmoid
// of the difference of their log masses.
INLINE void join(const Linear& a, L b, L head, L n, L first, L width, const real* o, real den, real left) {
  if (den <= NO_MASS) return;
  real mass = std::log(den) + left + ((const real*)a.log_mix)[head];
  real lead = ((const real*)a.lse)[(b * a.heads + head) * a.length + n] - mass;
  real here = 1 / (1 + std::exp(lead)), there = 1 / (1 + std::exp(-lead)), factor = here / den;
  real* out = (real*)a.out.p + b * a.out.b + head * a.out.h + n * a.out.n + first;
  for (L j = 0; j < width; j++) out[j] = out[j] * there + o[j] * factor;
}

// Columns first .. first + width of the values, for one key/value head.
void linear_columns(const LinearCall& c, L b, L h, L first, L width) {
  const Linear& a = c.a;
  const L G = c.group, F = c.features, wide = c.wide, columns = up(width, LANES), ld = a.value_dim + 1;
  const real *before = (const real*)a.state;
  real* after = (real*)a.after;
  if (before) before += c.state_at(b, h);
  if (after) after += c.state_at(b, h);
  // One token goes from state to state in one pass.
  const bool step = a.length == 1 && before && after && width % LANES == 0;
  const L block = block_of(a.length);
  const bool exact = a.length > LONG && !c.gated;
  Buffer sum(exact ? F * columns : 1), added(exact ? F * columns : 1);
  Buffer S(step ? 1 : F * columns), z(wide), lost(wide), x(block * c.padded), room(block * c.padded), fk(block * wide), fq(block * G * wide),
      v(block * columns), o(block * G * columns), den(block * G), gate(block), left(block * G);
  left.clear(block * G);
  Matrices wk = c.of_key(h), wq = c.of_queries(h);
  c.sums_in(b, h, z), lost.clear(wide);
  if (!step) state_in(before, ld, F, first, width, columns, S);
  if (exact) memcpy(sum, S, F * columns * sizeof(real)), added.clear(F * columns);
  Recur recur = recurrence(G, c.gated);
  for (L i = 0; i < a.length; i += block) {
    L t = least(block, a.length - i);
    c.keys(b, h, i, t, wk[0], x, room, fk);
    for (L g = 0; g < G; g++) c.queries(b, h, g, i, t, wq[g], x, room, fq, left);
    const real* gates = c.gates(b, h, i, t, gate);
    denominators(t, wide, G, fk, fq, gates, z, lost, den);
    read_rows(a.v, a.type, b, h, i, t, first, width, columns, 1, v, columns);
    if (step) one_step(G, c.gated)(F, G, columns, fk, v, fq, wide, gates, before + first, after + first, ld, o, columns);
    else recur(t, F, G, columns, fk, wide, v, columns, fq, wide, gates, S, o, columns);
    if (exact) {
      for (L x = 0; x < columns; x += COLUMNS) {
        L wide_x = least(COLUMNS, columns - x);
        product<true>(F, wide_x, t, fk, 1, wide, v + x, columns, added + x * F, wide_x);
      }
      if ((i + t) % JOINED == 0 || i + t == a.length) {
        for (L x = 0; x < F * columns; x += LANES) {
          V y = load(sum + x) + load(added + x);
          store(sum + x, y), store(S + x, y);
        }
        added.clear(F * columns);
      }
    }
    for (L g = 0; g < G; g++) {
      real* dens = c.denominator(b, h * G + g) + i;
      for (L n = 0; n < t; n++) {
        L at = n * G + g;
        if (!first) dens[n] = den[at];
        if (!first && a.left) ((real*)a.left)[(b * a.heads + h * G + g) * a.length + i + n] = left[at];
        if (a.lse) join(a, b, h * G + g, i + n, first, width, o + at * columns, den[at], left[at]);
        else write_row(a.out, a.undivided ? (L)AS_COMPUTED : a.type, b, h * G + g, i + n, first, width, o + at * columns,
                  a.undivided ? 1 : 1 / (den[at] + (real)a.eps));
      }
    }
  }
  if (!after) return;
  if (!step) state_out(S, ld, F, first, width, columns, after);
  if (!first)
    for (L e = 0; e < F; e++) after[e * ld + a.value_dim] = z[e];
}

void linear_forward(const Linear& a) {
  LinearCall c(a);
  L pairs = a.batch * a.kv_heads, parts = parts_of(c.columns, pairs, a.threads), each = up(c.columns / parts, LANES);
  parallel(a.threads, pairs * parts, [&](L task) {
    L pair = task / parts, first = task % parts * each, width = least(each, a.value_dim - first);
    if (width > 0) linear_columns(c, pair / a.kv_heads, pair % a.kv_heads, first, width);
  });
}

// ---------------------------------------------------------------------------------------------------------- gradient
// With dn = go / (den + eps) and dd = gden - dn . out the gradients of numerator and denominator (go and gden where
// undivided), and decays as the gates say:
//   dphi(q)_t = sum_{j <= t} (dn_t . v_j + dd_t) phi(k_j)        the recurrence with values and features exchanged
//   dphi(k)_t = sum_{i >= t} (dn_i . v_t + dd_i) phi(q_i)        backwards in time
//   dv_t      = sum_{i >= t} (phi(q_i) . phi(k_t)) dn_i          backwards in time
// gate_q and gate_k get phi(q) . dphi(q) summed over the group and phi(k) . dphi(k): what passes through gate t is the
// sum of their difference over the tokens from t on.
struct Gradients {
  const LinearCall& c;
  L b, h, block;
  Buffer x, room, fk, fq, v, dn, dd, gate, out_row;
  Matrices wk, wq, wk_t, wq_t;

  Gradients(const LinearCall& c, L b, L h)
      : c(c), b(b), h(h), block(block_of(c.a.length)), x(block * c.padded), room(block * c.padded), fk(block * c.wide),
        fq(block * c.group * c.wide), v(block * c.columns), dn(block * c.group * c.columns), dd(block * c.group), gate(block + 1),
        out_row(c.columns), wk(c.of_key(h)), wq(c.of_queries(h)), wk_t(c.of_key(h, true)), wq_t(c.of_queries(h, true)) {}

  // Features, values and gradients of tokens i .. i + t.
  void read(L i, L t) {
    const Linear& a = c.a;
    const L G = c.group;
    c.keys(b, h, i, t, wk[0], x, room, fk);
    for (L g = 0; g < G; g++) c.queries(b, h, g, i, t, wq[g], x, room, fq);
    read_rows(a.v, a.type, b, h, i, t, 0, a.value_dim, c.columns, 1, v, c.columns);
    for (L g = 0; g < G; g++) {
      L head = h * G + g;
      read_rows(a.go, AS_COMPUTED, b, head, i, t, 0, a.value_dim, c.columns, 1, dn + g * c.columns, G * c.columns);
      const real *dens = c.denominator(b, head) + i, *gden = (const real*)a.gden;
      for (L n = 0; n < t; n++) {
        L at = n * G + g;
        real d = gden ? gden[(b * a.heads + head) * a.length + i + n] : 0;
        if (!a.undivided) {
          real* row = dn + at * c.columns;
          const real r = 1 / (dens[n] + (real)a.eps);
          V s{};
          read_rows(a.out, a.type, b, head, i + n, 1, 0, a.value_dim, c.columns, 1, out_row, c.columns);
          for (L e = 0; e < c.columns; e += LANES) {
            V w = load(row + e) * r;
            store(row + e, w);
            s = s + w * load(out_row + e);
          }
          d -= total(s);
        }
        dd[at] = d;
      }
    }
  }
};

// A row of gradients in memory [B, heads, T, dim], as computed.
INLINE void write_gradient(const Tensor& x, L b, L h, L n, L width, const real* y, real factor) {
  write_row(x, AS_COMPUTED, b, h, n, 0, width, y, factor);
}

// dW += x^T dy for rows [t, padded]; W: [dim, padded].
INLINE void add_outer(L t, L dim, L padded, const real* x, const real* dy, real* dW) {
  product<true>(dim, padded, t, x, 1, padded, dy, padded, dW, padded);
}
INLINE void write_matrix(const real* from, L dim, L padded, void* to, L at) {
  for (L i = 0; i < dim; i++) memcpy((real*)to + (at * dim + i) * dim, from + i * padded, dim * sizeof(real));
}

void gradient_of_queries(const LinearCall& c, L b, L h) {
  const Linear& a = c.a;
  const L G = c.group, wide = c.wide, each = a.map == HEDGEHOG ? a.dim * c.padded : 0;
  Gradients now(c, b, h);
  Buffer S(a.value_dim * wide), z(wide), df(now.block * G * wide), dx(now.block * c.padded), dW(G * each);
  dW.clear(G * each);
  c.sums_in(b, h, z);
  // The state with values and features exchanged.
  const real* state = a.state ? (const real*)a.state + c.state_at(b, h) : nullptr;
  for (L f = 0; f < wide; f += COLUMNS) {
    L width = least(COLUMNS, wide - f);
    for (L e = 0; e < a.value_dim; e++)
      for (L j = 0; j < width; j++) S[f * a.value_dim + e * width + j] = state && f + j < c.features ? state[(f + j) * (a.value_dim + 1) + e] : 0;
  }
  Recur recur = recurrence(G, c.gated);
  for (L i = 0; i < a.length; i += now.block) {
    L t = least(now.block, a.length - i);
    now.read(i, t);
    const real* gates = c.gates(b, h, i, t, now.gate);
    recur(t, a.value_dim, G, wide, now.v, c.columns, now.fk, wide, now.dn, c.columns, gates, S, df, wide);
    for (L n = 0; n < t; n++) {
      real passed = 0;
      V g0 = set(gates[n]);
      for (L e = 0; e < wide; e += LANES) store(z + e, load(z + e) * g0 + load(now.fk + n * wide + e));
      for (L g = 0; g < G; g++) {
        L at = (n * G + g) * wide;
        V s{};
        for (L e = 0; e < wide; e += LANES) {
          V d = load(df + at + e) + load(z + e) * now.dd[n * G + g];
          store(df + at + e, d);
          s = s + d * load(now.fq + at + e);
        }
        passed += total(s);
      }
      if (a.gate_q) ((real*)a.gate_q)[(b * a.kv_heads + h) * a.length + i + n] = passed;
    }
    for (L g = 0; g < G; g++) {
      map_gradient(a.map, t, a.dim, c.padded, now.fq + g * wide, G * wide, df + g * wide, now.wq_t[g], now.room, dx, a.beside);
      for (L n = 0; n < t; n++) write_gradient(a.dq, b, h * G + g, i + n, a.dim, dx + n * c.padded, a.scale);
      if (a.map == HEDGEHOG) {
        read_rows(a.q, a.type, b, h * G + g, i, t, 0, a.dim, c.padded, a.scale, now.x, c.padded);
        add_outer(t, a.dim, c.padded, now.x, now.room, dW + g * each);
      }
    }
  }
  if (a.map == HEDGEHOG)
    for (L g = 0; g < G; g++) write_matrix(dW + g * each, a.dim, c.padded, a.dwq, b * a.heads + h * G + g);
}

void gradient_of_keys(const LinearCall& c, L b, L h, bool values) {
  const Linear& a = c.a;
  const L G = c.group, wide = c.wide, parts = G / heads_at_once(G), each = a.map == HEDGEHOG ? a.dim * c.padded : 0;
  const L F = values ? c.features : a.value_dim, columns = values ? c.columns : wide;
  Gradients now(c, b, h);
  Buffer S(parts * F * columns), z(wide), df(now.block * columns), dx(now.block * c.padded), dW(each);
  S.clear(parts * F * columns), z.clear(wide), dW.clear(each);
  RecurBack recur = recurrence_back(G, c.gated);
  for (L i = (a.length - 1) / now.block * now.block; i >= 0; i -= now.block) {
    L t = least(now.block, a.length - i);
    now.read(i, t);
    const real* later = c.gates(b, h, i, t + 1, now.gate) + 1;
    df.clear(t * columns);
    if (values) {
      recur(t, F, G, columns, now.fq, wide, now.dn, c.columns, now.fk, wide, later, S, df, columns);
      for (L n = 0; n < t; n++) write_gradient(a.dv, b, h, i + n, a.value_dim, df + n * columns, 1);
      continue;
    }
    recur(t, F, G, columns, now.dn, c.columns, now.fq, wide, now.v, c.columns, later, S, df, columns);
    for (L n = t - 1; n >= 0; n--) {
      V g0 = set(later[n]), s{};
      for (L e = 0; e < wide; e += LANES) {
        V y = load(z + e) * g0;
        for (L g = 0; g < G; g++) y = y + load(now.fq + (n * G + g) * wide + e) * now.dd[n * G + g];
        store(z + e, y);
        V d = load(df + n * wide + e) + y;
        store(df + n * wide + e, d);
        s = s + d * load(now.fk + n * wide + e);
      }
      if (a.gate_k) ((real*)a.gate_k)[(b * a.kv_heads + h) * a.length + i + n] = total(s);
      if (a.mask && !((const uint8_t*)a.mask)[b * a.length + i + n]) memset(df + n * wide, 0, wide * sizeof(real));
    }
    map_gradient(a.map, t, a.dim, c.padded, now.fk, wide, df, now.wk_t[0], now.room, dx);
    for (L n = 0; n < t; n++) write_gradient(a.dk, b, h, i + n, a.dim, dx + n * c.padded, a.scale);
    if (a.map == HEDGEHOG) {
      read_rows(a.k, a.type, b, h, i, t, 0, a.dim, c.padded, a.scale, now.x, c.padded);
      add_outer(t, a.dim, c.padded, now.x, now.room, dW);
    }
  }
  if (a.map == HEDGEHOG && !values) write_matrix(dW, a.dim, c.padded, a.dwk, b * a.kv_heads + h);
}

void linear_backward(const Linear& a) {
  LinearCall c(a);
  L pairs = a.batch * a.kv_heads;
  parallel(a.threads, pairs * 3, [&](L task) {
    L b = task / 3 / a.kv_heads, h = task / 3 % a.kv_heads;
    if (task % 3 == 0) gradient_of_queries(c, b, h);
    else gradient_of_keys(c, b, h, task % 3 == 2);
  });
}

}  // namespace

KERNEL(linear_forward, Linear)
KERNEL(linear_backward, Linear)
