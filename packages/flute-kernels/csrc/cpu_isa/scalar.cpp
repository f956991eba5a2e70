#include "simd/scalar.h"

#include "cpu_isa/isa.h"
#include "hadamard/kernels.inl"
#include "qgemm/cpu/kernels.inl"

namespace flute::cpu {

extern const Isa kScalar;
const Isa kScalar = {"scalar", kQgemmKernels, kHadamardKernel};

}  // namespace flute::cpu
