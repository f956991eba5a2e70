// One multiplication y[M, N] = x[M, K] * W_hat[N, K]^T (+ bias) as plain pointers and numbers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/dtype.h"
#include "core/gpu.h"

namespace flute {

// A quantized weight in a room's own layout. What `codes`, `scales` and `tables` point to is the
// room's business (see the room's layout.h); every number is the format's.
struct QWeight {
  const void* codes;
  const void* scales;
  DType scale_dtype;
  const void* tables;
  const int32_t* table_of_block;  // table of each block of 16 rows; null: one table for all
  int64_t table_count;
  int64_t n, k;
  int bits;         // per weight: 2, 3, 4
  int vector_size;  // weights per code: 1, 2
  int64_t group;    // weights per scale; divides k
};

struct QgemmProblem {
  QWeight weight;
  const void* x;
  int64_t m, ldx;    // ldx: elements from one row of x to the next; neighbours in a row are adjacent
  DType dtype;       // of x and out
  const void* bias;  // [N] or null
  DType bias_dtype;
  void* out;
  int64_t ldo;
  int threads;      // CPU
  void* workspace;  // at least workspace_bytes(problem), aligned to 64
  Gpu gpu;          // CUDA, with the stream below
  void* stream;
  // A mixture of experts: the weight is theirs, one below the other, and the first counts[0] rows of x are for the
  // first of them, the next counts[1] for the second. Rows of x that are nobody's become zeros in out, [M, N/experts].
  int64_t experts = 1;
  const int32_t* counts = nullptr;  // [experts], where x is; null: all rows are for the one expert
};

struct DequantizeProblem {
  QWeight weight;
  void* out;  // [rows, K], rows adjacent
  DType dtype;
  int threads;
  int64_t first_row, rows;  // of the weight; first_row is a multiple of 16. The CPU room takes all.
  Gpu gpu;
  void* stream;
};

}  // namespace flute
