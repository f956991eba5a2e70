// The blockwise Hadamard rotation of one instruction set.
#pragma once

#include "hadamard/args.h"

namespace flute::cpu {

using HadamardKernel = void (*)(const HadamardArgs&, int64_t begin, int64_t end);  // rows

}  // namespace flute::cpu
