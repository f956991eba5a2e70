// Making the CUDA layout from the checkpoint's tensors and back, and dequantizing from it.
#pragma once

#include "core/status.h"
#include "qgemm/problem.h"

namespace flute::layout {

// qweight: int32 [N, K*bits/32] on the same GPU; codes: int32 [units][tiles][32 * bits].
Status pack(const void* qweight, void* codes, int64_t n, int64_t k, int bits, const Gpu& gpu, void* stream);
Status unpack(const void* codes, void* qweight, int64_t n, int64_t k, int bits, const Gpu& gpu, void* stream);
Status dequantize(const DequantizeProblem& problem);

}  // namespace flute::layout
