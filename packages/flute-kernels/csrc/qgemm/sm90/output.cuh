// How results are written: out is y, so that neighbours there are rows of weights. A warp has 16 of them, 32 bytes.
//
// The sums of a whole set change places in shared memory, so that they are written in lines of 128 bytes: of a slab, the 64
// rows of a warpgroup. There is room beside the table, of whose 256 bytes an entry the second half is free: a line for each
// column. What several blocks share, each writes as it has it, 32 bytes a column.
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

// Columns whose results a warpgroup has in shared memory at the same time.
FLUTE_BOTH constexpr int columns_at_once(int columns, int warpgroups) {
  const int lines = 256 / warpgroups;
  int parts = (columns + lines - 1) / lines;
  while (columns % (16 * parts) != 0) ++parts;
  return columns / parts;
}

// 16 bytes, if so. A predicate, since branches would keep the stores of many columns from being under way together.
__device__ __forceinline__ void store_16_bytes_if(void* to, const uint32_t (&v)[4], bool on) {
  asm volatile(
      "{.reg .pred on; setp.ne.b32 on, %5, 0;\n@on st.global.v4.b32 [%0], {%1, %2, %3, %4};}" ::"l"(to),
      "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(int{on})
      : "memory");
}

// A whole set, by all warps that multiply.
template <class T, int kWarpgroups, int kSlabs, int kFragments>
__device__ __forceinline__ void write_set(const Params& p, const float (&sum)[kSlabs][kFragments][4],
                                          const Place& place, uint32_t table) {
  constexpr int kColumns = columns_at_once(8 * kFragments, kWarpgroups), kLine = 256;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, warpgroup = threadIdx.x / 128;
  const uint32_t lines = table + 128 + warpgroup * (kColumns * kLine);
  // Four 8 x 8 matrices are 16 rows of 16 columns. Pieces of 16 bytes lie in another order in each of eight lines, so that
  // what a warp writes or reads of them is in all banks.
  const int r = lane % 8, piece = 2 * warp + lane / 8 % 2;
  const uint32_t to = lines + (lane / 16 * 8 + r) * kLine + 16 * (piece ^ r);
  // Back come whole lines, eight threads each.
  const int thread = threadIdx.x % 128, column = thread / 8;
  const uint32_t from = lines + column * kLine + 16 * (thread % 8 ^ column % 8);
#pragma unroll
  for (int s = 0; s < kSlabs; ++s) {
    const float2 bias = load_bias(p, place, s);
    const int row = place.row - 16 * warp + 64 * s + 8 * (thread % 8);
    const int count = row < place.first_row ? 0 : min(p.n - row, 8);
    const bool is_whole = p.stores_eights && count == 8;  // all at once, and at a multiple of 16 bytes
#pragma unroll
    for (int first = 0; first < 8 * kFragments; first += kColumns) {
      wait_at_warpgroup(warpgroup);  // all have read what was there
#pragma unroll
      for (int c = 0; c < kColumns; c += 16) {
        const float (&a)[4] = sum[s][(first + c) / 8], (&b)[4] = sum[s][(first + c) / 8 + 1];
        store_transposed(to + c * kLine, pack_two<T>(a[0] + bias.x, a[1] + bias.x),
                         pack_two<T>(a[2] + bias.y, a[3] + bias.y), pack_two<T>(b[0] + bias.x, b[1] + bias.x),
                         pack_two<T>(b[2] + bias.y, b[3] + bias.y));
      }
      wait_at_warpgroup(warpgroup);
      const int left = count > 0 ? place.end - (place.column + first + column) : 0;
      uint16_t* at = p.out + (place.column + first + column) * p.ldo + row;
      if (is_whole) {
#pragma unroll
        for (int c = 0; c < kColumns; c += 16, at += 16 * p.ldo) {
          uint32_t v[4];
          load_shared(v, from + c * kLine);
          store_16_bytes_if(at, v, c < left);
        }
      } else {
#pragma unroll 1
        for (int c = 0; c < left && c < kColumns; c += 16, at += 16 * p.ldo) {
          uint32_t v[4];
          load_shared(v, from + c * kLine);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            if (i < count) at[i] = static_cast<uint16_t>(v[i / 2] >> 16 * (i % 2));
          }
        }
      }
    }
  }
}

// A fragment. Lane 4g + t has rows g and g + 8 of columns 2t and 2t + 1. Transposed, it has rows 2t and 2t + 1, and 8
// further, of column g; then neighbours exchange what makes four rows in a run: 8 bytes, and of four lanes a sector of 32.
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

}  // namespace flute::sm90
