// The main loop of wide blocks: weights times their scales, rounded once to the type of x as a dequantized weight
// would be, and nothing but products on the sums.
//
// A step is a slab's unit. It looks its weights up and scales them while the step before multiplies, waits for that,
// and starts its own products. kColumns: those of a stage, of which kFragments times eight are multiplied.
#pragma once

#include "qgemm/sm90/codes.cuh"

namespace flute::sm90 {

// Scales of rows g and g + 8, ready to multiply pairs of T. Where they are of another type, the product is rounded from
// float, so that it is rounded once there, too.
template <class T, class S>
struct RowScales {
  float2 rows;

  __device__ __forceinline__ void operator=(uint32_t bits) { rows = two_floats<S>(bits); }
  __device__ __forceinline__ uint32_t times(uint32_t pair, int row) const {
    const float2 v = two_floats<T>(pair);
    const float s = row == 0 ? rows.x : rows.y;
    return pack_two<T>(v.x * s, v.y * s);
  }
};
template <class T>
struct RowScales<T, T> {
  uint32_t rows[2];  // each twice

  __device__ __forceinline__ void operator=(uint32_t bits) {
    rows[0] = __byte_perm(bits, 0, 0x1010), rows[1] = __byte_perm(bits, 0, 0x3232);
  }
  __device__ __forceinline__ uint32_t times(uint32_t pair, int row) const {
    return multiply_pairs<T>(pair, rows[row]);
  }
};

// `begins_anew`: there is nothing in the sums yet, not even zeros. `meanwhile`: to do while the last products run.
template <class T, class S, int kBits, int kGroup, int kColumns, int kSlabs, int kFragments, class Ring,
          class Meanwhile>
__device__ __forceinline__ void multiply_scaled_weights(float (&sum)[kSlabs][kFragments][4], Ring& ring,
                                                        Codes<kBits, kGroup, kSlabs>& codes,
                                                        const Stage stage, int count, bool begins_anew,
                                                        bool leader, const Meanwhile& meanwhile) {
  constexpr int kUnits = stage_units({kColumns, 0, 0, 0}), kScales = Codes<kBits, kGroup, kSlabs>::kScales;
  constexpr int kTurn = kUnits * kSlabs % 2 ? 2 : 1;  // stages, as steps use two sets of registers in turn
  uint32_t a[2][2][2][4];
  RowScales<T, S> scale[kSlabs];
  uint32_t running_empty = 0;  // barrier of the stage before, whose last products run
  int left = count;
  bool fresh = begins_anew;
  ring.wait_full();
  codes.load(stage, ring.data(), 0);
#pragma unroll
  for (int r = 0; r < kSlabs; ++r) hold(sum[r]);
  while (left > 0) {
#pragma unroll
    for (int turn = 0; turn < kTurn; ++turn) {
      if (turn > 0 && left == 0) {
        products_wait();  // on every way out of the pipeline, or the compiler makes it none
        break;
      }
      --left;
      const uint32_t data = ring.data(), empty = ring.empty();
      const uint64_t x = descriptor(data);
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
#pragma unroll
        for (int r = 0; r < kSlabs; ++r) {
          uint32_t (&now)[2][2][4] = a[((turn * kUnits + u) * kSlabs + r) % 2];
          uint32_t bits[kScales];
          if (u < stage.scale_lines) {
#pragma unroll
            for (int s = 0; s < kScales; ++s) codes.load_scale(bits[s], stage, data, u, r, s);
          }
#pragma unroll
          for (int h = 0; h < 2; ++h) codes.look_up(now[h], r, h);
          if (r + 1 == kSlabs) {
            if (u + 1 < kUnits) {
              codes.load(stage, data, u + 1);
            } else if (left > 0) {
              ring.advance();
              ring.wait_full();
              codes.load(stage, ring.data(), 0);
            }
          }
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            if (u < stage.scale_lines && h < kScales) scale[r] = bits[h];
#pragma unroll
            for (int q = 0; q < 2; ++q) {
#pragma unroll
              for (int i = 0; i < 4; ++i) now[h][q][i] = scale[r].times(now[h][q][i], i % 2);
              hold(now[h][q]);
            }
          }
          products_wait();
          if (u == 0 && r == 0 && running_empty != 0) ring.leave(running_empty, leader);
          products_begin();
#pragma unroll
          for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int q = 0; q < 2; ++q)
              Product<T, 8 * kFragments>::run(sum[r], now[h][q],
                                              x + u * (kColumns * 128 / 16) + 2 * (2 * h + q),
                                              !(u == 0 && h == 0 && q == 0 && fresh));
          }
          products_end();
        }
      }
      running_empty = empty;
      fresh = false;
    }
  }
  meanwhile();
  products_wait();
  ring.leave(running_empty, leader);
  ring.advance();
#pragma unroll
  for (int r = 0; r < kSlabs; ++r) hold(sum[r]);
}

}  // namespace flute::sm90
