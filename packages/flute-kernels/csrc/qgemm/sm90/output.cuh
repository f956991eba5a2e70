// How results are written: out is y, so that neighbours there are rows of weights.
#pragma once

#include "core/convert.cuh"
#include "qgemm/common/layout.h"
#include "qgemm/sm90/config.h"
#include "qgemm/sm90/ptx.cuh"

namespace flute::sm90 {

// A warp's results: fragment j of slab r has the 16 rows from row + 64 * r, and the eight columns from column + 8 * j.
struct Place {
  int row, first_row, column, end;  // end: of columns
};

// Of a slab, what is added to rows g and g + 8.
__device__ __forceinline__ float2 load_bias(const Params& p, const Place& place, int r) {
  if (p.bias == nullptr) return {};
  const int row = place.row + 64 * r + threadIdx.x % 32 / 4;
  const auto dtype = static_cast<DType>(p.bias_dtype);
  return {row < p.n ? load_float(p.bias, row, dtype) : 0.f,
          row + 8 < p.n ? load_float(p.bias, row + 8, dtype) : 0.f};
}

// Lane 4g + t has rows g and g + 8 of columns 2t and 2t + 1. Transposed, it has rows 2t and 2t + 1, and 8 further, of
// column g; then neighbours exchange what makes four rows in a run: 8 bytes, and of four lanes a sector of 32.
template <class T>
__device__ __forceinline__ void write_out(const Params& p, const float (&sum)[4], float2 bias,
                                          const Place& place, int r, int j) {
  const uint32_t low = transposed(pack_two<T>(sum[0] + bias.x, sum[1] + bias.x));
  const uint32_t high = transposed(pack_two<T>(sum[2] + bias.y, sum[3] + bias.y));
  const int lane = threadIdx.x % 32, t = lane % 4;
  const bool is_odd = t % 2 != 0;
  const uint32_t received = __shfl_xor_sync(0xffffffff, is_odd ? low : high, 1);
  const uint2 rows = is_odd ? make_uint2(received, high) : make_uint2(low, received);

  const int tile_row = place.row + 64 * r, row = tile_row + (is_odd ? 6 : 0) + 2 * t;
  const int column = place.column + 8 * j + lane / 4;
  if (column >= place.end || tile_row < place.first_row) return;
  uint16_t* const to = p.out + column * p.ldo + row;
  if (p.stores_fours && row + 3 < p.n) {
    *reinterpret_cast<uint2*>(to) = rows;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t pair = i < 2 ? rows.x : rows.y;
    if (row + i < p.n) to[i] = static_cast<uint16_t>(i % 2 ? pair >> 16 : pair);
  }
}

// Rows of x that are nobody's: zeros. `first` and `step`: of columns, a block's.
template <int kThreads>
__device__ __forceinline__ void write_zeros(const Params& p, int first, int step) {
  for (int column = first; column < p.m; column += step) {
    for (int row = threadIdx.x; row < p.n; row += kThreads) p.out[column * p.ldo + row] = 0;
  }
}

template <class T, int kSlabs, int kFragments>
__device__ __forceinline__ void write_out(const Params& p, const float (&sum)[kSlabs][kFragments][4],
                                          const Place& place) {
#pragma unroll
  for (int r = 0; r < kSlabs; ++r) {
    const float2 bias = load_bias(p, place, r);
#pragma unroll
    for (int j = 0; j < kFragments; ++j) write_out<T>(p, sum[r][j], bias, place, r, j);
  }
}

}  // namespace flute::sm90
