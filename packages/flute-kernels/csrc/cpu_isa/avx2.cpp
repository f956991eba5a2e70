#include "simd/avx2.h"

#include "cpu_isa/isa.h"
#include "hadamard/kernels.inl"
#include "qgemm/cpu/kernels.inl"

namespace flute::cpu {

extern const Isa kAvx2;
const Isa kAvx2 = {"avx2", kQgemmKernels, kHadamardKernel};

}  // namespace flute::cpu
