// What the CUDA side knows of a GPU. No CUDA header, so that plans are made and tested without one.
#pragma once

#include "core/status.h"

namespace flute {

struct Gpu {
  int device;      // index
  int capability;  // 10 * major + minor
  int multiprocessors;
  int shared_bytes;  // of a multiprocessor
};

// The GPU with this index, asked once per process. A build without CUDA refuses.
Status find_gpu(int device, Gpu* gpu);

// Empty if this build has code for the GPU, else one sentence that says what it has.
Status check_gpu(int device);

}  // namespace flute
