// What a caller fills in: native/__init__.py reads these structures from here, so that they stand in one place.
// Every field takes eight bytes.
#pragma once
#include <stdint.h>

// A tensor [batch, head, token, dimension]: its first number, and the strides of the first three, in numbers; those of
// the dimension stand side by side.
struct Tensor {
  void* p;
  int64_t b;
  int64_t h;
  int64_t n;
};

// Linear attention: of features that a map makes of q and k, or of q and k as they are.
//
// type: of q, k, v: 0 as the kernel computes (float32 or float64), 1 bfloat16. out: as q, or as computed where
// `undivided`. map: 0 identity, 1 elu + 1, 2 relu, 3 hedgehog, whose matrices are wq [H, D, D] and wk [Hkv, D, D].
// mask: bytes [B, T] or null, 0 for keys that leave no trace. gate: [B, Hkv, T] or null, what is left of the state as a
// token comes. state, after: [B, Hkv, F, Dv + 1], the sums of features times values and of features; either may be
// null. den: [B, H, T].
// In a hybrid, `lse` is not null: [B, H, T], the log of the mass of a softmax whose result stands in `out`; queries then
// keep their scale (hedgehog), log_mix [H] is the log of the factor of this branch, and `out` becomes the joined result.
// `left` [B, H, T], or null, gets the log of the factor that the features of queries leave out, where `beside` is 1.
// go, gden: gradients of out and den (gden may be null), go as computed.
struct Linear {
  int64_t threads;
  int64_t batch;
  int64_t heads;
  int64_t kv_heads;
  int64_t length;
  int64_t dim;
  int64_t value_dim;
  int64_t type;
  int64_t map;
  int64_t undivided;
  int64_t beside;
  double scale;
  double eps;
  struct Tensor q;
  struct Tensor k;
  struct Tensor v;
  struct Tensor out;
  struct Tensor gate;
  struct Tensor go;
  struct Tensor dq;
  struct Tensor dk;
  struct Tensor dv;
  void* mask;
  void* wq;
  void* wk;
  void* state;
  void* after;
  void* den;
  void* gden;
  void* dwq;
  void* dwk;
  void* gate_q;
  void* gate_k;
  void* lse;
  void* log_mix;
  void* left;
};

// Softmax over the last `window` keys and the first `sinks`, all as computed. The token of row r stands in slot
// `ahead` + r of k and v, and count[b] + r is its position (count: int64 [B], or null for 0); sink_k and sink_v hold
// positions 0 to `sinks` - 1. lse: [B, H, T], the log of the mass of each row. Dimensions are whole vectors
// (multiples of 16). Gradients: go of out, glse of lse; dk, dv and those of the sinks, [parts B, Hkv, *, *], to which the
// parts of the rows add.
struct Window {
  int64_t threads;
  int64_t batch;
  int64_t heads;
  int64_t kv_heads;
  int64_t length;
  int64_t dim;
  int64_t value_dim;
  int64_t window;
  int64_t sinks;
  int64_t ahead;
  int64_t parts;
  double scaling;
  struct Tensor q;
  struct Tensor k;
  struct Tensor v;
  struct Tensor sink_k;
  struct Tensor sink_v;
  struct Tensor out;
  struct Tensor go;
  struct Tensor dq;
  struct Tensor dk;
  struct Tensor dv;
  struct Tensor dsink_k;
  struct Tensor dsink_v;
  void* count;
  void* lse;
  void* glse;
};

// Attention by an activation on the scores, scale q . k, all as computed; queries are the last T of the keys where
// `causal`. activation: as in activations.h; squarings: log2 of its power. denominator: 0 none, 1 the count to the power
// alpha, 2 the sum of the weights plus eps. mask: bytes [B, S] or null, 0 for keys that no row sees. count: keys that each
// row sees, [1 or B, T], and the stride of its texts; null where neither a sigmoid nor the denominator asks. offset: [H],
// added to the scores of a sigmoid. total, peak: [B, H, T], the sums of the weights, and what a softmax subtracts from the
// scores, in base 2. Dimensions are whole vectors (multiples of 16).
// Gradients: go of out; dk, dv [parts B, Hkv, S, *], to which the parts of the rows add, and doffset [parts, B, H] or null.
struct Scores {
  int64_t threads;
  int64_t batch;
  int64_t heads;
  int64_t kv_heads;
  int64_t length;
  int64_t keys;
  int64_t dim;
  int64_t value_dim;
  int64_t causal;
  int64_t activation;
  int64_t squarings;
  int64_t denominator;
  int64_t count_stride;
  int64_t parts;
  double scale;
  double alpha;
  double eps;
  struct Tensor q;
  struct Tensor k;
  struct Tensor v;
  struct Tensor out;
  struct Tensor go;
  struct Tensor dq;
  struct Tensor dk;
  struct Tensor dv;
  void* mask;
  void* count;
  void* offset;
  void* total;
  void* peak;
  void* doffset;
};

// The delta rule. type: as in Linear. beta: [B, Hkv, T], as computed. state, after: [B, Hkv, D, Dv]; either may be null.
struct Delta {
  int64_t threads;
  int64_t batch;
  int64_t heads;
  int64_t kv_heads;
  int64_t length;
  int64_t dim;
  int64_t value_dim;
  int64_t type;
  struct Tensor q;
  struct Tensor k;
  struct Tensor v;
  struct Tensor beta;
  struct Tensor out;
  void* state;
  void* after;
};

// One token after a state, all as computed: old_k and old_v hold `slots` slots, the `sinks` first ones among them, new_k
// and new_v get one more while there are fewer than sinks + window. count: int64 [B], the position of the token.
// next: int64 [B], becomes count + 1; leaves: bytes [B] or null, become 1 where the oldest token beside the sinks leaves.
// lse: [B, H] or null. Dimensions are whole vectors.
struct WindowStep {
  int64_t threads;
  int64_t batch;
  int64_t heads;
  int64_t kv_heads;
  int64_t dim;
  int64_t value_dim;
  int64_t window;
  int64_t sinks;
  int64_t slots;
  double scaling;
  struct Tensor q;
  struct Tensor k;
  struct Tensor v;
  struct Tensor old_k;
  struct Tensor old_v;
  struct Tensor new_k;
  struct Tensor new_v;
  struct Tensor out;
  void* count;
  void* next;
  void* leaves;
  void* lse;
};
