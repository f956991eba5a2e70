#include "simd/avx512.h"

#include "cpu_isa/isa.h"
#include "hadamard/kernels.inl"
#include "qgemm/cpu/kernels.inl"

namespace flute::cpu {

extern const Isa kAvx512;
const Isa kAvx512 = {"avx512", kQgemmKernels, kHadamardKernel};

}  // namespace flute::cpu
