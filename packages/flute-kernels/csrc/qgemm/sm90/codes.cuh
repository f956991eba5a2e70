// What a warp reads of the stages: its codes and scales, and what it looks up.
#pragma once

#include "qgemm/common/lookup.cuh"
#include "qgemm/sm90/config.h"
#include "qgemm/sm90/ptx.cuh"

namespace flute::sm90 {

template <int kBits, int kGroup, int kSlabs>
struct Codes {
  static constexpr int kScales = layout::scales_per_unit(kGroup);  // of a slab's unit

  uint32_t bank, codes_at, scales_at;  // the latter from the beginning of a stage
  uint32_t words[kSlabs][4];

  // `shared_base`: an address that names the block in its cluster. `warp_tile`: of the warp's first slab.
  __device__ __forceinline__ Codes(const Stage& stage, uint32_t shared_base, int warp_tile, int lane)
      : bank(kept((shared_base & 0xff000000) + (kBits == 2 ? lane % 16 * 8 : lane * 4))),
        codes_at(kept(stage.x + warp_tile * (128 * kBits) + lane * (kBits == 4 ? 16 : 8))),
        scales_at(kept(stage.x + stage.codes() + (warp_tile * 8 + lane / 4) * (4 * kScales))),
        third_word_(256 - lane * 4) {}

  // The words of all slabs, of unit u of the stage at `data`.
  __device__ __forceinline__ void load(const Stage& stage, uint32_t data, int u) {
#pragma unroll
    for (int r = 0; r < kSlabs; ++r) {
      const uint32_t at = data + codes_at + u * stage.unit_codes + r * (4 * 128 * kBits);
      if constexpr (kBits == 4) {
        load_shared(words[r], at);
      } else {
        load_shared(words[r][0], words[r][1], at);
        if constexpr (kBits == 3) load_shared(words[r][2], at + third_word_);
      }
    }
  }

  // Scale s of slab r, of line u of the stage at `data`: those of rows g and g + 8.
  __device__ __forceinline__ void load_scale(uint32_t& to, const Stage& stage, uint32_t data, int u, int r,
                                             int s) const {
    load_shared(to, data + scales_at + (stage.scale_lines > 1 ? u * stage.scale_line : 0) +
                        r * (4 * 32 * kScales) + 4 * s);
  }

  // Half h of slab r.
  __device__ __forceinline__ void look_up(uint32_t (&a)[2][4], int r, int h) {
    if (kBits == 3 && h == 0) words[r][3] = fourth_word(words[r]);
    flute::look_up<kBits>(a, words[r], h, bank);
  }

 private:
  uint32_t third_word_;
};

}  // namespace flute::sm90
