// Whether kernels may start before the one before them has ended (programmatic dependent launch).
#pragma once

#include <atomic>

namespace flute {

// On unless a benchmark turns it off, which measures calls one by one.
inline std::atomic<bool>& launch_early() {
  static std::atomic<bool> early{true};
  return early;
}

}  // namespace flute
