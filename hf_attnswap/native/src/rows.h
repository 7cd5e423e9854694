// Rows of tensors into buffers and back: other types become `real` on the way, and rows are filled up to whole vectors.
#pragma once
#include "interface.h"
#include "vector.h"

namespace {

enum { AS_COMPUTED = 0, BFLOAT16 = 1 };

INLINE real from_bfloat16(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}
INLINE uint16_t to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return 0x7fc0;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// Rows n .. n + rows of one head, times `scale`, as [rows, ld]; zero from `width` to `padded`.
void read_rows(const Tensor& x, L type, L b, L h, L n, L rows, L first, L width, L padded, real scale, real* y, L ld) {
  L at = b * x.b + h * x.h + n * x.n + first;
  for (L i = 0; i < rows; i++, at += x.n, y += ld) {
    if (type == AS_COMPUTED) {
      const real* from = (const real*)x.p + at;
      if (scale == 1) memcpy(y, from, width * sizeof(real));
      else
        for (L j = 0; j < width; j++) y[j] = from[j] * scale;
    } else {
      const uint16_t* from = (const uint16_t*)x.p + at;
      for (L j = 0; j < width; j++) y[j] = from_bfloat16(from[j]) * scale;
    }
    for (L j = width; j < padded; j++) y[j] = 0;
  }
}

INLINE void write_row(const Tensor& x, L type, L b, L h, L n, L first, L width, const real* y, real factor) {
  L at = b * x.b + h * x.h + n * x.n + first;
  if (type == AS_COMPUTED) {
    real* to = (real*)x.p + at;
    L j = 0;
    for (; j + LANES <= width; j += LANES) store(to + j, load(y + j) * factor);
    for (; j < width; j++) to[j] = y[j] * factor;
  } else {
    uint16_t* to = (uint16_t*)x.p + at;
    for (L j = 0; j < width; j++) to[j] = to_bfloat16(y[j] * factor);
  }
}

}  // namespace
