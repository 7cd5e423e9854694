// The threads, and which instruction sets this processor has.
#include "threads.h"

#include <pthread.h>

#define PUBLIC extern "C" __attribute__((visibility("default")))

namespace {

struct Region {
  int64_t tasks, next;
  void (*run)(void*, int64_t);
  void* data;
};

void work(void* given) {
  Region& region = *(Region*)given;
  for (;;) {
    int64_t task = __atomic_fetch_add(&region.next, 1, __ATOMIC_RELAXED);
    if (task >= region.tasks) return;
    region.run(region.data, task);
  }
}

void* work_in_thread(void* region) {
  work(region);
  return nullptr;
}

// GOMP_parallel of the OpenMP that torch has loaded: its threads wait for work already.
void (*pool)(void (*)(void*), void*, unsigned, unsigned) = nullptr;

}  // namespace

// What the library was built from.
PUBLIC const char* attnswap_fingerprint() { return FINGERPRINT; }

PUBLIC void attnswap_use_pool(void* gomp_parallel) { pool = (decltype(pool))gomp_parallel; }

extern "C" void attnswap_parallel(int64_t threads, int64_t tasks, void (*run)(void*, int64_t), void* data) {
  Region region{tasks, 0, run, data};
  if (threads > tasks) threads = tasks;
  if (threads <= 1) return work(&region);
  if (pool) return pool(work, &region, (unsigned)threads, 0);
  constexpr int MOST = 64;
  pthread_t ids[MOST];
  int started = 0;
  while (started < MOST && started < threads - 1 && !pthread_create(&ids[started], nullptr, work_in_thread, &region))
    started++;
  work(&region);
  for (int i = 0; i < started; i++) pthread_join(ids[i], nullptr);
}

// 1 where this processor runs what was compiled for `name`.
PUBLIC int64_t attnswap_runs(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_strcmp(name, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl");
  if (!__builtin_strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return !__builtin_strcmp(name, "plain");
}
