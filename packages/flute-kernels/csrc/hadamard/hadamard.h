// Blockwise Hadamard rotation on the CPU, over threads.
#pragma once

#include "hadamard/kernels.h"

namespace flute::cpu {

void rotate(const HadamardArgs& args, int64_t rows, int threads);

}  // namespace flute::cpu
