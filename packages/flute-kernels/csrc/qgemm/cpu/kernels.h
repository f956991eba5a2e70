// What one instruction set offers: a table of functions, filled by one translation unit that is
// compiled with that set's flags. The room (room.cpp) splits the work over threads and calls these.
#pragma once

#include <cstdint>

#include "qgemm/problem.h"

namespace flute::cpu {

// Where finished rows go: sums in float32, plus bias, rounded once to the output's type.
struct Output {
  void* out;
  int64_t ldo;
  DType dtype;
  const void* bias;
  DType bias_dtype;
};

// x repacked for the tiled product: for every register tile of rows, K columns of its rows side by side.
// With bfloat16 dot products an element is a pair of neighbours in K.
struct PackedX {
  const void* data;
  int64_t m;
};

struct QgemmKernels {
  // Matrix-vector products: y for rows [block_begin, block_end) * 16 of W and m <= max_mr rows of x.
  // x is float32 [k][m], as pack_columns makes it.
  void (*gemv)(const QWeight&, const float* x, int64_t m, const Output&, int64_t block_begin,
               int64_t block_end);
  int max_mr;

  // Tiled product: one panel of `panel_rows` output rows against all packed rows of x.
  // scratch: panel_scratch(m) bytes, aligned to 64.
  void (*panel)(const QWeight&, const PackedX&, const Output&, int64_t panel, void* scratch, bool bf16);
  int64_t (*panel_scratch)(int64_t m);
  int panel_rows;

  // Packs rows [row_begin, row_end) of x; row_begin and row_end (but the last) are multiples of gemm_mr.
  void (*pack_x)(const void* x, DType, int64_t ldx, int64_t k, int64_t row_begin, int64_t row_end,
                 void* packed, bool bf16);
  int gemm_mr;
  bool bf16_dot;

  // m <= max_mr rows of x as float32, column by column: [k][m].
  void (*pack_columns)(const void* x, DType, int64_t ldx, int64_t m, int64_t k, float* out);

  // W_hat of rows [block_begin, block_end) * 16.
  void (*dequantize)(const QWeight&, void* out, DType, int64_t block_begin, int64_t block_end);
};

}  // namespace flute::cpu
