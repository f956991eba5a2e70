// A warp's x on its way from memory to the B fragments of its products. There are two ways.
//
// At 4 and 2 bits lane t's codes are run t of eight values of K (common/layout.h), and so is what it multiplies of x: 16
// bytes, which it loads into registers a unit ahead.
//
// At 3 bits they are pair t of each run. Four bytes at a time would be four times the requests, so x comes in pieces of
// 16 bytes, by asynchronous copies into a ring in shared memory that each warp has for itself, and ldmatrix gives every
// lane its words of four pieces. That also takes x out of registers, and out of the counter that ptxas has all other
// loads of the loop share, for whose last a warp waits: at 16 rows it is the faster way, at one row the slower.
#pragma once

#include <cstdint>

#include "qgemm/common/loads.cuh"
#include "qgemm/sm80/config.h"

namespace flute::sm80 {

// Of eight rows j and half h of a unit's K: [j][h].
template <int kFragments>
using Fragments = uint4[kFragments][2];

// Both: the warp's units are `unit`, unit + step, ... below `units`. Rows that there are not stay zero.
template <int kFragments>
class XInRegisters {
 public:
  __device__ __forceinline__ XInRegisters(uint32_t, int units, int step) : units_(units), step_(step) {}

  // Row 8j + g, for lanes 4g to 4g + 3, from the first unit on.
  __device__ __forceinline__ void set_row(int j, const uint16_t* row, bool has_row) {
    from_[j] = row + 8 * (threadIdx.x % 4);
    has_row_[j] = has_row;
#pragma unroll
    for (int i = 0; i < 4; ++i) sets_[i / 2][j][i % 2] = make_uint4(0, 0, 0, 0);
  }

  __device__ __forceinline__ void begin(int unit) { load(0, unit < units_); }

  // A unit's fragments. `turn` counts units, modulo 2.
  __device__ __forceinline__ const Fragments<kFragments>& take(int turn, int unit) {
    load(1 - turn, unit + step_ < units_);
    return sets_[turn];
  }

 private:
  __device__ __forceinline__ void load(int set, bool on) {
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) load_x(sets_[set][j][h], from_[j] + 32 * h, has_row_[j] && on);
      from_[j] += step_ * layout::kUnit;
    }
  }

  int units_, step_;
  const uint16_t* from_[kFragments];
  bool has_row_[kFragments];
  Fragments<kFragments> sets_[2];
};

// A row's unit is a line of 128 bytes, in pieces of 16. Piece c of row g lies at place c ^ s(g), where s(g) is g with its
// lowest bit made the highest: so eight lanes that copy pieces of two rows, or that read one piece of each of eight, want
// 32 different banks. Lines lie where the table leaves half of each of its own free (lookup.cuh), which is room for both
// stages of all warps, or for one; then the other one is behind the table, with two rows where else the table has an entry.
template <int kFragments, int kWarps>
class XThroughRing {
 public:
  __device__ __forceinline__ XThroughRing(uint32_t table, int units, int step) : units_(units), step_(step) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t ring = table + kLineBytes + warp * (8 * kFragments * layout::kEntryBytes);
    copied_ = ring + place(lane / 4, lane % 4);
    read_ = ring + place(lane % 8, lane / 8);
    second_ = layout::kTableBytes - kLineBytes - warp * (8 * kFragments * kLineBytes);
  }

  __device__ __forceinline__ void set_row(int j, const uint16_t* row, bool has_row) {
    from_[j] = row + 8 * (threadIdx.x % 4);
    has_row_[j] = has_row;
    if (has_row) return;
#pragma unroll
    for (int i = 0; i < 2 * kRingStages; ++i) {
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(at(copied_, i / 2, j, i % 2)), "r"(0)
                   : "memory");
    }
  }

  __device__ __forceinline__ void begin(int unit) {
#pragma unroll
    for (int stage = 0; stage < kRingStages; ++stage) copy(stage, unit + stage * step_ < units_);
  }

  __device__ __forceinline__ const Fragments<kFragments>& take(int stage, int unit) {
    asm volatile("cp.async.wait_group %0;" ::"n"(kRingStages - 1) : "memory");
    __syncwarp();
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint4& v = now_[j][h];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(at(read_, stage, j, h))
                     : "memory");
      }
    }
    __syncwarp();  // all lanes have read what comes to be overwritten
    copy(stage, unit + kRingStages * step_ < units_);
    return now_;
  }

 private:
  __device__ __forceinline__ void copy(int stage, bool on) {
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) copy_x(at(copied_, stage, j, h), from_[j] + 32 * h, has_row_[j] && on);
      from_[j] += step_ * layout::kUnit;
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  static constexpr int kStage = kWarps * 8 * kFragments;  // lines
  static_assert(kRingStages == 2 && kStage <= kFreeLines);

  __device__ __forceinline__ static int place(int g, int piece) {
    return g * layout::kEntryBytes + (piece ^ (g % 2 * 4 + g / 2)) * 16;
  }
  __device__ __forceinline__ uint32_t at(uint32_t address, int stage, int j, int h) const {
    address ^= h * 64;
    if (stage == 0) return address + j * (8 * layout::kEntryBytes);
    return kRingStages * kStage > kFreeLines ? address + second_ + j * kLineBytes
                                             : address + (kStage + j * 8) * layout::kEntryBytes;
  }

  int units_, step_;
  uint32_t copied_, read_, second_;  // the last one: from a line of the first stage to that of the second
  const uint16_t* from_[kFragments];
  bool has_row_[kFragments];
  Fragments<kFragments> now_;
};

}  // namespace flute::sm80
