// Launches of kernels that may start before the one before them has ended (programmatic dependent launch).
#pragma once

#include <atomic>

#include "core/gpu.h"

namespace flute {

// On unless a benchmark turns it off, which measures calls one by one.
inline std::atomic<bool>& launch_early() {
  static std::atomic<bool> early{true};
  return early;
}

struct Launch {
  const void* kernel;
  unsigned blocks_x, blocks_y, blocks_z;
  int threads, shared_bytes;
  unsigned cluster = 1;  // blocks along x that run at the same time and see each other's shared memory
};

// Launches on the current device, which is `device`. Early only where the kernel's code waits for its
// predecessor: machine code for 9.0 and later, made from source for it.
Status launch(const Launch& launch, void** arguments, int device, void* stream);

}  // namespace flute
