// The kernels for one instruction set and one type of number, which build.py names: NAME(linear_forward) is
// linear_forward_avx2_f32.
#include "linear.h"
#include "scores.h"
#include "window.h"

#define JOINED(name, target) name##_##target
#define WITH(name, target) JOINED(name, target)
#define KERNEL(name, Call) \
  extern "C" __attribute__((visibility("default"))) void WITH(name, TARGET)(const Call* call) { name(*call); }

KERNEL(linear_forward, Linear)
KERNEL(linear_backward, Linear)
KERNEL(window_forward, Window)
KERNEL(scores_forward, Scores)
KERNEL(scores_backward, Scores)
