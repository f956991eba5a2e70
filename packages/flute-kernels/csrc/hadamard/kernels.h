// The blockwise Hadamard rotation of one instruction set.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace flute::cpu {

// out[r] = rotation of x[r] for rows [begin, end) of `columns` values; ldx, ldo in elements.
// Forward: y = H (signs * x) / sqrt(block) on every block; transposed: y = signs * (H x) / sqrt(block).
// `signs` is float [columns] or null. `block` is a power of two, at most 4096, dividing columns.
struct HadamardArgs {
  const void* x;
  int64_t ldx;
  void* out;
  int64_t ldo;
  DType dtype;
  const float* signs;
  int64_t columns, block;
  bool transpose;
};
using HadamardKernel = void (*)(const HadamardArgs&, int64_t begin, int64_t end);

}  // namespace flute::cpu
