// The main loop of narrow blocks: sums of a scale's weights as they are, then times the scale. That is exact, and for
// few columns less work than to scale the weights.
//
// A step is the products of one slab and scale. It looks its weights up while the step before multiplies, waits for
// that, adds to the totals what is whole, and starts its own products. kColumns: those of a stage, of which
// kFragments times eight are multiplied.
#pragma once

#include "qgemm/sm90/codes.cuh"

namespace flute::sm90 {

// `meanwhile`: to do while the last products run.
template <class T, class S, int kBits, int kGroup, int kColumns, int kSlabs, int kFragments, class Ring,
          class Meanwhile>
__device__ __forceinline__ void multiply_and_scale_sums(float (&sum)[kSlabs][kFragments][4], Ring& ring,
                                                        Codes<kBits, kGroup, kSlabs>& codes,
                                                        const Stage stage, int group_shift, int first,
                                                        int count, bool leader, const Meanwhile& meanwhile) {
  constexpr int kUnits = stage_units({kColumns, 0, 0, 0});
  constexpr int kSteps = Codes<kBits, kGroup, kSlabs>::kScales, kHalves = 2 / kSteps;
  float part[kSlabs][kFragments][4];
  uint32_t a[2][kHalves][2][4];
  uint32_t scale[2] = {};  // of the products that run, and of the next
  const auto add = [&](int r) {
    const float2 s = two_floats<S>(scale[0]);
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[r][j][c] = fmaf(c < 2 ? s.x : s.y, part[r][j][c], sum[r][j][c]);
    }
    hold(sum[r]);
  };

  // Sums of groups of 128 and more begin and end with stages, every one or every few of them.
  const int stages_per_scale =
      static_cast<int>(kept(group_shift >= 31 ? 0x7fffffff : 1 << group_shift)) / kUnits;
  int until_scale = kGroup < 128 ? 1 : stages_per_scale - first % stages_per_scale;
  bool fresh = true;           // this stage's products begin sums
  bool ended = false;          // those of the stage before ended them
  uint32_t running_empty = 0;  // barrier of the stage before, whose last products run
  int left = count;
  ring.wait_full();
  codes.load(stage, ring.data(), 0);
  while (left > 0) {
    --left, --until_scale;
    const uint32_t data = ring.data(), empty = ring.empty();
    const uint64_t x = descriptor(data);
    const bool ends = kGroup < 128 || until_scale == 0 || left == 0;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
#pragma unroll
      for (int r = 0; r < kSlabs; ++r) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const bool last_of_unit = r + 1 == kSlabs && s + 1 == kSteps;
          uint32_t (&now)[kHalves][2][4] = a[((u * kSlabs + r) * kSteps + s) % 2];
#pragma unroll
          for (int h = 0; h < kHalves; ++h) codes.look_up(now[h], r, s * kHalves + h);
          if (kGroup < 128 || (u + 1 == kUnits && ends)) codes.load_scale(scale[1], stage, data, u, r, s);
          if (last_of_unit && u + 1 < kUnits) codes.load(stage, data, u + 1);
          if (last_of_unit && u + 1 == kUnits && left > 0) {
            ring.advance();
            ring.wait_full();
            codes.load(stage, ring.data(), 0);
          }
          // The products before these: of which slab, and whether they are the last of their sums.
          const bool first_of_unit = r == 0 && s == 0;
          const int before = s > 0 ? r : r > 0 ? r - 1 : kSlabs - 1;
          products_wait();
          hold(part[before]);
          if (first_of_unit && u == 0) {
            if (ended) add(before);
            if (running_empty != 0) ring.leave(running_empty, leader);
          } else if (kGroup < 128 || (!first_of_unit && u + 1 == kUnits)) {
            if (ends) add(before);
          }
          scale[0] = scale[1];
          hold(part[r]);
          products_begin();
#pragma unroll
          for (int h = 0; h < kHalves; ++h) {
#pragma unroll
            for (int q = 0; q < 2; ++q) {
              const bool begins = h == 0 && q == 0 && (kGroup < 128 || (u == 0 && fresh));
              Product<T, 8 * kFragments>::run(part[r], now[h][q],
                                              x + u * (kColumns * 128 / 16) + 2 * (2 * (s * kHalves + h) + q),
                                              !begins);
            }
          }
          products_end();
        }
      }
    }
    fresh = ended = ends;
    if (until_scale == 0) until_scale = stages_per_scale;
    running_empty = empty;
  }
  meanwhile();
  products_wait();
  hold(part[kSlabs - 1]);
  add(kSlabs - 1);
  ring.leave(running_empty, leader);  // now that the last scale, too, has been read
  ring.advance();
}

}  // namespace flute::sm90
