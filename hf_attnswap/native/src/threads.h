// One parallel region per call: tasks are taken in order by as many threads as the caller allows.
#pragma once
#include <stdint.h>

extern "C" void attnswap_parallel(int64_t threads, int64_t tasks, void (*run)(void*, int64_t), void* data);

namespace {
template <class F>
void parallel(int64_t threads, int64_t tasks, F f) {
  attnswap_parallel(threads, tasks, [](void* data, int64_t task) { (*(F*)data)(task); }, &f);
}
}  // namespace
