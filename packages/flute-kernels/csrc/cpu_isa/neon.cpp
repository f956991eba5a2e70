#include "simd/neon.h"

#include "cpu_isa/isa.h"
#include "hadamard/kernels.inl"
#include "qgemm/cpu/kernels.inl"

namespace flute::cpu {

extern const Isa kNeon;
const Isa kNeon = {"neon", kQgemmKernels, kHadamardKernel};

}  // namespace flute::cpu
