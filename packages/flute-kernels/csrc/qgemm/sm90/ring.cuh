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
  __device__ __forceinline__ Ring(uint32_t barriers, uint32_t data)
      : full_(barriers), data_(data), end_(data_ + kStages * kStageBytes) {}

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
// that multiply write the results of the one before. Where x ends, in rows or along K, the copy engine writes zeros; where
// K ends inside a stage, the last unit's codes come twice.
template <int kBits, int kGroup, int kStages, int kColumns, int kWarpgroups, int kSlabs, int kGrouped,
          class Ring, class FindSet>
class Filler {
 public:
  __device__ __forceinline__ Filler(const Ring& ring, const Params& p, const Stage& stage,
                                    const Schedule& schedule, int stages_in_all, const FindSet& find_set)
      : ring_(ring),
        p_(p),
        stage_(stage),
        schedule_(schedule),
        stages_in_all_(stages_in_all),
        find_set_(find_set) {}

  // Codes and scales of those that find room at the beginning: they do not wait for the kernel before.
  __device__ __forceinline__ void begin() {
    if (!schedule_.has_next()) return;
    next_item();
    Ring ring = ring_;
    const int room = min(left_, kStages);  // does not go around the end
    for (int i = 0; i < room; ++i, ring.advance()) copy_weights(ring, number_ + i);
  }

  // All else.
  __device__ __forceinline__ void go_on() {
    // What that kernel wrote, copies see, too. (A fence between the ways to memory would first wait for the weights.)
    wait_for_predecessor();
    for (int room = min(left_, kStages); room > 0; --room, --left_, ++number_, ring_.advance())
      copy_x(ring_, number_);
    while (true) {
      for (; left_ > 0; --left_, ++number_, ring_.advance()) {
        if (number_ == stages_in_all_) number_ = 0;
        ring_.wait_empty();
        copy_weights(ring_, number_);
        copy_x(ring_, number_);
      }
      if (!schedule_.has_next()) return;
      next_item();
    }
  }

 private:
  static constexpr int kTiles = tiles({kColumns, kWarpgroups, kSlabs, kGrouped});
  static constexpr int kBox =
      box_columns({kColumns, kWarpgroups, kSlabs, kGrouped});  // columns that a copy has
  static constexpr int kTileCodes = 128 * kBits, kTileScales = 32 * layout::scales_per_unit(kGroup);  // bytes

  __device__ __forceinline__ void next_item() {
    const Item item = schedule_.next();
    const Set set = find_set_(item.set);
    const Group group(p_, set.group, kTiles);
    codes_ = reinterpret_cast<const char*>(p_.codes) + int64_t{group.tile} * kTileCodes;
    scales_ = reinterpret_cast<const char*>(p_.scales) + int64_t{group.tile} * kTileScales;
    column_ = set.column;
    boxes_ = width_for({kColumns, kWarpgroups, kSlabs, kGrouped}, set.end - set.column) / kBox;
    number_ = item.first, left_ = item.count;
  }

  __device__ __forceinline__ void copy_weights(const Ring& ring, int number) const {
    constexpr int kBoxes = kColumns / kBox;
    barrier_expect(ring.full(), stage_.used() - stage_.units * (kBoxes - boxes_) * (kBox * 128));
    uint32_t to = ring.data() + stage_.x;
    const int unit = number * stage_.units;
#pragma unroll
    for (int u = 0; u < stage_.units; ++u, to += stage_.unit_codes)
      copy(to, codes_ + min(unit + u, p_.units - 1) * (int64_t{p_.tiles} * kTileCodes), stage_.unit_codes,
           ring.full());
#pragma unroll
    for (int u = 0; u < stage_.scale_lines; ++u, to += stage_.scale_line)
      copy(to, scales_ + (min(unit + u, p_.units - 1) >> p_.group_shift) * (int64_t{p_.tiles} * kTileScales),
           stage_.scale_line, ring.full());
  }

  __device__ __forceinline__ void copy_x(const Ring& ring, int number) const {
#pragma unroll
    for (int u = 0; u < stage_.units; ++u) {
      const int k = (number * stage_.units + u) * layout::kUnit;
#pragma unroll
      for (int i = 0; i < kColumns / kBox; ++i) {
        if (i < boxes_)
          copy_box(ring.data() + (u * kColumns + i * kBox) * 128, &p_.x, k, column_ + i * kBox, ring.full());
      }
    }
  }

  Ring ring_;
  const Params& p_;
  const Stage stage_;
  Schedule schedule_;
  const int stages_in_all_;
  const FindSet& find_set_;
  int number_ = 0, left_ = 0, column_ = 0, boxes_ = 1;  // of the item: its next stage, and how many there are
  const char *codes_ = nullptr, *scales_ = nullptr;     // of its group
};

}  // namespace flute::sm90
