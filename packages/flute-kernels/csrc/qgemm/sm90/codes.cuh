// What a warp reads of the stages: its codes and scales, and what it looks up.
#pragma once

#include "qgemm/common/lookup.cuh"
#include "qgemm/sm90/config.h"
#include "qgemm/sm90/ptx.cuh"

namespace flute::sm90 {

// Lane 4g + t takes pair t of each of the four runs of row g (common/layout.h), so that products read x as it lies in
// memory. Of run i, words[i] has that pair for all halves of rows and of K: four bytes at 4 bits, two at 2 bits. At 3
// bits the lane's own words have them, with run i in byte i.
template <int kBits, int kGroup, int kSlabs>
class Codes {
 public:
  static constexpr int kScales = layout::scales_per_unit(kGroup);  // of a slab's unit

  // `shared_base`: an address that names the block in its cluster. `warp_tile`: of the warp's first slab.
  __device__ __forceinline__ Codes(const Stage& stage, uint32_t shared_base, int warp_tile, int lane)
      : bank_(kept((shared_base & 0xff000000) + (kBits == 2 ? lane % 16 * 8 : lane * 4))),
        scales_at_(kept(stage.x + stage.codes() + (warp_tile * 8 + lane / 4) * (4 * kScales))) {
    const int codes = stage.x + warp_tile * (128 * kBits), g = lane / 4, t = lane % 4;
    if constexpr (kBits == 3) {
      at_[0] = kept(codes + 8 * lane);
      at_[1] = kept(codes + 256 + 4 * lane);
    } else {
#pragma unroll
      for (int i = 0; i < kAddresses; ++i) {
        // 4 bits: lane 8i + g says where run i of row g is.
        const int run = kBits == 4 ? 4 * (lane % 8) + lane / 8 : 4 * g + i;
        at_[i] = kept(codes + layout::place_of_run(kBits, run) * (4 * kBits) + (kBits == 2 ? 2 * t : 0));
      }
    }
  }

  // What all slabs need of unit u of the stage at `data`.
  __device__ __forceinline__ void load(const Stage& stage, uint32_t data, int u) {
#pragma unroll
    for (int r = 0; r < kSlabs; ++r) {
      const uint32_t unit = data + u * stage.unit_codes + r * (4 * 128 * kBits);
      if constexpr (kBits == 3) {
        load_shared(words_[r][0], words_[r][1], unit + at_[0]);
        load_shared(words_[r][2], unit + at_[1]);
      } else {
        if constexpr (kBits == 4) {
          load_matrices(words_[r], unit + at_[0]);
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) load_shared_half(words_[r][i], unit + at_[i]);
        }
      }
    }
  }

  // Scale s of slab r, of line u of the stage at `data`: those of rows g and g + 8.
  __device__ __forceinline__ void load_scale(uint32_t& to, const Stage& stage, uint32_t data, int u, int r,
                                             int s) const {
    load_shared(to, data + scales_at_ + (stage.scale_lines > 1 ? u * stage.scale_line : 0) +
                        r * (4 * 32 * kScales) + 4 * s);
  }

  // Half h of slab r.
  __device__ __forceinline__ void look_up(uint32_t (&a)[2][4], int r, int h) {
    if (kBits == 3 && h == 0) words_[r][3] = fourth_word(words_[r]);
    if (h == 0) {
      look_up_half<0>(a, words_[r]);
    } else {
      look_up_half<1>(a, words_[r]);
    }
  }

 private:
  template <int h>
  __device__ __forceinline__ void look_up_half(uint32_t (&a)[2][4], const uint32_t (&words)[4]) const {
    if constexpr (kBits == 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        load_entry(a[i / 2][i % 2 * 2], a[i / 2][i % 2 * 2 + 1], table_address<h>(words[i], bank_));
    } else {
      flute::look_up<kBits, h>(a, words, bank_);
    }
  }

  static constexpr int kAddresses = kBits == 2 ? 4 : kBits == 3 ? 2 : 1;
  uint32_t bank_, scales_at_, at_[kAddresses];  // scales and codes: from the beginning of a stage
  uint32_t words_[kSlabs][4];
};

}  // namespace flute::sm90
