#include "simd/avx512.h"

#include "cpu_isa/isa.h"
#include "hadamard/kernels.inl"
#include "qgemm/cpu/kernels.inl"

namespace flute::cpu {

extern const Isa kAvx512Bf16;
const Isa kAvx512Bf16 = {"avx512bf16", kQgemmKernels, kHadamardKernel};

}  // namespace flute::cpu
