// The compiled kernels, by bits, type of x, configuration, and scales of a chunk (1, 2, 4).
#pragma once

#include "qgemm/sm80/config.h"

namespace flute::sm80 {

struct KernelRow {
  const void* of_scales[3];
};

extern const KernelRow kKernels_b2_f16[kConfigCount], kKernels_b2_bf16[kConfigCount];
extern const KernelRow kKernels_b3_f16[kConfigCount], kKernels_b3_bf16[kConfigCount];
extern const KernelRow kKernels_b4_f16[kConfigCount], kKernels_b4_bf16[kConfigCount];

}  // namespace flute::sm80
