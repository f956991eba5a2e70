// A blockwise Hadamard rotation as plain pointers and numbers, on any device.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace flute {

// out[r] = rotation of x[r], rows of `columns` values; ldx, ldo in elements.
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

}  // namespace flute
