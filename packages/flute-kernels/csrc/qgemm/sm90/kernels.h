// The compiled kernels, by bits, type of x, configuration, type of the scales, and scales of a unit.
#pragma once

#include "qgemm/sm90/config.h"

namespace flute::sm90 {

struct KernelRow {
  const void* of[2][2];  // scales fp16, bf16; groups of 64 and more, of 32
};

extern const KernelRow kKernels_b2_f16[kConfigCount], kKernels_b2_bf16[kConfigCount];
extern const KernelRow kKernels_b3_f16[kConfigCount], kKernels_b3_bf16[kConfigCount];
extern const KernelRow kKernels_b4_f16[kConfigCount], kKernels_b4_bf16[kConfigCount];

// By bits - 2, and fp16 or bf16.
inline const KernelRow* const kKernels[3][2] = {{kKernels_b2_f16, kKernels_b2_bf16},
                                                {kKernels_b3_f16, kKernels_b3_bf16},
                                                {kKernels_b4_f16, kKernels_b4_bf16}};

}  // namespace flute::sm90
