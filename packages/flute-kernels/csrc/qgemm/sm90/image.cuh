// x as operand B of warpgroup products: [column blocks][units][columns][128 bytes], whole stages of units.
#pragma once

#include <cstdint>

#include "core/early.cuh"

namespace flute::sm90 {

constexpr int kImageThreads = 128;

// A thread moves 32 values of a row: 64 bytes. What lies outside of x becomes zeros.
//
// A product sums 16 of K, in eights: the low and the high columns of the A fragments, which lanes t = 0..3 hold in
// pairs. A lane's pairs of a unit are, for half h of 32 and product s, k = 32h + 8t + 4s + {0, 1} and {2, 3}
// (common/layout.h); so the 16-byte piece 2s + p of a half is made of words 2s + p of the four runs of eight.
// Pieces are swizzled as the descriptor says: piece c of row r lies at c xor r % 8.
struct ImageParams {
  const uint16_t* x;
  void* image;
  int64_t ldx;
  int m, units;                          // of x
  int columns, image_rows, image_units;  // rows: whole blocks of columns; units: whole stages
  int* zeroed;                           // for the kernel that follows
  int zeros;
};

__global__ void __launch_bounds__(kImageThreads) make_image(const __grid_constant__ ImageParams p) {
  launch_dependents();
  const int id = blockIdx.x * kImageThreads + threadIdx.x;
  const int half = id % 2, unit = id / 2 % p.image_units, row = id / 2 / p.image_units;
  wait_for_predecessor();
  if (id < p.zeros) p.zeroed[id] = 0;
  if (row >= p.image_rows) return;
  uint4 runs[4] = {};
  if (row < p.m && unit < p.units) {
    const uint4* from = reinterpret_cast<const uint4*>(p.x + row * p.ldx + unit * 64 + half * 32);
#pragma unroll
    for (int t = 0; t < 4; ++t) runs[t] = from[t];
  }
  const int block = row / p.columns, r = row % p.columns;
  uint4* to = static_cast<uint4*>(p.image) + ((int64_t{block} * p.image_units + unit) * p.columns + r) * 8;
  to[(4 * half + 0) ^ (r & 7)] = make_uint4(runs[0].x, runs[1].x, runs[2].x, runs[3].x);
  to[(4 * half + 1) ^ (r & 7)] = make_uint4(runs[0].y, runs[1].y, runs[2].y, runs[3].y);
  to[(4 * half + 2) ^ (r & 7)] = make_uint4(runs[0].z, runs[1].z, runs[2].z, runs[3].z);
  to[(4 * half + 3) ^ (r & 7)] = make_uint4(runs[0].w, runs[1].w, runs[2].w, runs[3].w);
}

}  // namespace flute::sm90
