// Which rows and which part of K a block has, and how results are written.
#pragma once

#include "core/convert.cuh"
#include "qgemm/common/layout.h"
#include "qgemm/sm90/config.h"

namespace flute::sm90 {

// Rows of a group: its first tile, and the first row that it owns. The last group of a table moves back until
// it is whole; rows that it shares with the one before are that one's.
struct Group {
  int table, tile, first_row;

  __device__ __forceinline__ Group(const Params& p, int group, int tiles) {
    table = group / p.groups_per_table;
    const int wanted = group % p.groups_per_table * tiles;
    tile = table * p.tiles_per_table + min(wanted, p.tiles_per_table - tiles);
    first_row = (table * p.tiles_per_table + wanted) * layout::kTile;
  }
};

// What a block does: its part of K, of `parts` that the x dimension of the grid counts. A set is a group with a
// block of columns, whose parts belong together.
struct Share {
  int part, parts, first, count;  // first, count: units
  int64_t set;

  __device__ __forceinline__ explicit Share(int units)
      : part(blockIdx.x),
        parts(gridDim.x),
        first(static_cast<int>(int64_t{units} * part / parts)),
        count(static_cast<int>(int64_t{units} * (part + 1) / parts) - first),
        set(int64_t{blockIdx.z} * gridDim.y + blockIdx.y) {}
};

// Writes sums of rows n, n + 8 and columns m, m + 1.
template <class T>
__device__ __forceinline__ void write_out(const Params& p, const float (&sum)[4], int m, int n,
                                          int first_row) {
  T* const out = reinterpret_cast<T*>(p.out);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = n + 8 * half;
    if (row < first_row || row >= p.n) continue;
    const float bias = p.bias ? load_float(p.bias, row, static_cast<DType>(p.bias_dtype)) : 0.f;
    if (m < p.m) out[m * p.ldo + row] = from_float<T>(sum[2 * half] + bias);
    if (m + 1 < p.m) out[(m + 1) * p.ldo + row] = from_float<T>(sum[2 * half + 1] + bias);
  }
}

}  // namespace flute::sm90
