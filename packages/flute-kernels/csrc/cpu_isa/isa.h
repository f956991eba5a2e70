// The instruction sets this build has kernels for, and the one in use.
//
// The best one that the processor has is chosen on first use; the environment variable FLUTE_CPU_ISA
// (scalar, avx2, avx512, avx512bf16, neon) overrides that, so that each can be tested on its own.
#pragma once

#include <string>
#include <vector>

#include "hadamard/kernels.h"
#include "qgemm/cpu/kernels.h"

namespace flute::cpu {

struct Isa {
  const char* name;
  QgemmKernels qgemm;
  HadamardKernel hadamard;
};

const Isa& isa();

// Names of all sets in this build that the processor has, best first.
std::vector<std::string> available_isas();
// Switches to the named set. Returns false, and changes nothing, if it is not available.
bool select_isa(const std::string& name);

}  // namespace flute::cpu
