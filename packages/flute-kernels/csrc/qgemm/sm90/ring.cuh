// The ring of stages in shared memory, and the thread that keeps it filled.
#pragma once

#include <cstdint>

#include "core/early.cuh"
#include "qgemm/sm90/config.h"
#include "qgemm/sm90/ptx.cuh"
#include "qgemm/sm90/schedule.cuh"

namespace flute::sm90 {

// How many lanes say that a warp has left a stage: one, once all are in step. The sanitizer's racecheck does not see
// that order, so for it (CMake's FLUTE_RACECHECK) each lane speaks for itself.
#ifdef FLUTE_RACECHECK
constexpr int kLeavers = 32;
#else
constexpr int kLeavers = 1;
#endif

// A stage is read once `full` says that its copies have arrived, and written anew once `empty` says that every
// warp that multiplies has left it.
template <int kStageBytes, int kStages>
class Ring {
 public:
  __device__ __forceinline__ explicit Ring(uint32_t shared_address)
      : full_(shared_address), data_(shared_address + kBarrierBytes), end_(data_ + kStages * kStageBytes) {}

  __device__ __forceinline__ void init(int readers) const {  // warps
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full_ + 16 * i, 1);
      barrier_init(full_ + 16 * i + 8, readers * kLeavers);
    }
    barriers_are_initialized();
  }
  // Addresses of the stage whose turn it is.
  __device__ __forceinline__ uint32_t data() const { return data_; }
  __device__ __forceinline__ uint32_t full() const { return full_; }
  __device__ __forceinline__ uint32_t empty() const { return full_ + 8; }

  __device__ __forceinline__ void wait_full() const { barrier_wait(full(), parity_); }
  __device__ __forceinline__ void wait_empty() const { barrier_wait(empty(), parity_ ^ 1); }
  // By a warp: leaves the stage of this `empty` barrier.
  __device__ __forceinline__ static void leave(uint32_t empty, bool is_first_lane) {
    __syncwarp();
    if (kLeavers > 1 || is_first_lane) barrier_arrive(empty);
  }
  __device__ __forceinline__ void advance() {
    full_ += 16, data_ += kStageBytes;
    if (data_ == end_) parity_ ^= 1, full_ -= 16 * kStages, data_ -= kStageBytes * kStages;
  }

 private:
  uint32_t full_, data_, end_;
  int parity_ = 0;
};

// By one thread: the stages of a block's items, one after the other; so those of the next item come while the warps
// that multiply write the results of the one before. Codes and scales of those that find room at the beginning do not
// wait for the kernel before, whose work the image is. Where K ends inside a stage, the image has zeros, and the last
// unit's codes come twice.
template <int kBits, int kGroup, int kStages, int kTiles, class Ring>
__device__ __forceinline__ void fill(Ring ring, const Params& p, const Stage stage, Schedule schedule,
                                     int stages_in_all) {
  const int64_t unit_bytes = int64_t{p.tiles} * (128 * kBits);
  const int64_t line_bytes = int64_t{p.tiles} * (32 * layout::scales_per_unit(kGroup));
  bool is_first = true;
  for (int items = schedule.items(); items > 0; --items) {
    const Item item = schedule.next();
    const Group group(p, item.set / p.column_blocks, kTiles);
    const char* const codes = reinterpret_cast<const char*>(p.codes) + int64_t{group.tile} * (128 * kBits);
    const char* const scales = reinterpret_cast<const char*>(p.scales) +
                               int64_t{group.tile} * (32 * layout::scales_per_unit(kGroup));
    const char* const x =
        static_cast<const char*>(p.image) + int64_t{item.set % p.column_blocks} * stages_in_all * stage.x;
    const auto copy_weights = [&](const Ring& ring, int number) {
      barrier_expect(ring.full(), stage.used());
      uint32_t to = ring.data() + stage.x;
      const int unit = number * stage.units;
#pragma unroll
      for (int u = 0; u < stage.units; ++u, to += stage.unit_codes)
        copy(to, codes + min(unit + u, p.units - 1) * unit_bytes, stage.unit_codes, ring.full());
#pragma unroll
      for (int u = 0; u < stage.scale_lines; ++u, to += stage.scale_line)
        copy(to, scales + (min(unit + u, p.units - 1) >> p.group_shift) * line_bytes, stage.scale_line,
             ring.full());
    };
    const auto copy_x = [&](const Ring& ring, int number) {
      copy(ring.data(), x + int64_t{number} * stage.x, stage.x, ring.full());
    };
    int number = item.first, left = item.count;
    if (is_first) {  // does not go around the end
      Ring ring_of_x = ring;
      const int free = min(left, kStages);
      for (int i = 0; i < free; ++i, ring.advance()) copy_weights(ring, number + i);
      wait_for_predecessor();
      copies_see_writes();
      for (int i = 0; i < free; ++i, ring_of_x.advance()) copy_x(ring_of_x, number + i);
      number += free, left -= free;
      is_first = false;
    }
    for (; left > 0; --left, ++number, ring.advance()) {
      if (number == stages_in_all) number = 0;
      ring.wait_empty();
      copy_weights(ring, number);
      copy_x(ring, number);
    }
  }
}

}  // namespace flute::sm90
