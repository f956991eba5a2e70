// Fork-join over CPU threads, sharing the OpenMP pool that torch already runs.
//
// A second pool beside torch's would fight it: an idle OpenMP worker spins for a while before it
// sleeps, and with all cores spinning for torch our own workers would wait for a time slice. So the
// OpenMP runtime is looked up in the process (torch brings one), never linked; where there is none,
// threads of our own are started for the call.
#pragma once

#include <cstdint>

namespace flute {

// Runs body(context, thread, threads) on `threads` threads at most, the caller being one of them, and
// returns when all have ended. `threads` as seen by the body is the number that really run.
void parallel_run(int threads, void (*body)(void* context, int thread, int threads), void* context);

template <class Body>
void parallel(int threads, Body&& body) {
  parallel_run(
      threads, [](void* context, int thread, int count) { (*static_cast<Body*>(context))(thread, count); },
      &body);
}

// The half-open part of [0, total) that belongs to `thread`.
struct Range {
  int64_t begin, end;
};
inline Range share(int64_t total, int thread, int threads) {
  return {total * thread / threads, total * (thread + 1) / threads};
}

}  // namespace flute
