// Names kernels by instruction set and type of number, which build.py gives: KERNEL(linear_forward, Linear) makes
// linear_forward_avx2_f32.
#pragma once

#define ATTNSWAP_JOINED(name, target) name##_##target
#define ATTNSWAP_WITH(name, target) ATTNSWAP_JOINED(name, target)
#define KERNEL(name, Call) \
  extern "C" __attribute__((visibility("default"))) void ATTNSWAP_WITH(name, TARGET)(const Call* call) { name(*call); }
