#include "core/parallel.h"

#include <dlfcn.h>

#include <thread>
#include <vector>

namespace flute {
namespace {

// The entry points that GCC's OpenMP and LLVM's compatible runtime both export.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned);
  int (*thread)();
  int (*threads)();

  OpenMp()
      : parallel(reinterpret_cast<decltype(parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"))),
        thread(reinterpret_cast<decltype(thread)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"))),
        threads(reinterpret_cast<decltype(threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"))) {}

  bool found() const { return parallel && thread && threads; }
};

const OpenMp& openmp() {
  static const OpenMp runtime;
  return runtime;
}

struct Region {
  void (*body)(void*, int, int);
  void* context;
};

}  // namespace

void parallel_run(int threads, void (*body)(void*, int, int), void* context) {
  if (threads <= 1) return body(context, 0, 1);
  if (openmp().found()) {
    Region region{body, context};
    openmp().parallel(
        [](void* pointer) {
          const auto* r = static_cast<const Region*>(pointer);
          r->body(r->context, openmp().thread(), openmp().threads());
        },
        &region, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::thread> workers;
  for (int t = 1; t < threads; ++t) workers.emplace_back(body, context, t, threads);
  body(context, 0, threads);
  for (auto& worker : workers) worker.join();
}

}  // namespace flute
