// Blockwise Hadamard rotation on the GPU, in one launch.
#pragma once

#include "core/gpu.h"
#include "hadamard/args.h"

namespace flute::cuda {

Status rotate(const HadamardArgs& args, int64_t rows, const Gpu& gpu, void* stream);

}  // namespace flute::cuda
