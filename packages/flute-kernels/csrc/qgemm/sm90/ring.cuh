// The ring of stages in shared memory, and the thread that keeps it filled.
#pragma once

#include <cstdint>

#include "core/early.cuh"
#include "qgemm/sm90/config.h"
#include "qgemm/sm90/ptx.cuh"

namespace flute::sm90 {

// A stage is read once `full` says that its copies have arrived, and written anew once `empty` says that every
// warp that multiplies has left it.
template <int kStageBytes, int kStages>
class Ring {
 public:
  __device__ __forceinline__ explicit Ring(uint32_t shared_address)
      : full_(shared_address), data_(shared_address + kBarrierBytes), end_(data_ + kStages * kStageBytes) {}

  __device__ __forceinline__ void init(int readers) const {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full_ + 16 * i, 1);
      barrier_init(full_ + 16 * i + 8, readers);
    }
    barriers_are_initialized();
  }
  // Addresses of the stage whose turn it is.
  __device__ __forceinline__ uint32_t data() const { return data_; }
  __device__ __forceinline__ uint32_t full() const { return full_; }
  __device__ __forceinline__ uint32_t empty() const { return full_ + 8; }

  __device__ __forceinline__ void wait_full() const { barrier_wait(full(), parity_); }
  __device__ __forceinline__ void wait_empty() const { barrier_wait(empty(), parity_ ^ 1); }
  __device__ __forceinline__ void advance() {
    full_ += 16, data_ += kStageBytes;
    if (data_ == end_) parity_ ^= 1, full_ -= 16 * kStages, data_ -= kStageBytes * kStages;
  }

 private:
  uint32_t full_, data_, end_;
  int parity_ = 0;
};

// By one thread: units first ... first + count - 1 of a block's tiles and columns. Codes and scales of the stages
// that are free at the beginning do not wait for the kernel before, whose work the image is.
template <int kBits, int kScales, int kStages, class Ring>
__device__ __forceinline__ void fill(Ring ring, const Params& p, const Stage stage, int tile,
                                     int column_block, int first, int count) {
  const int64_t unit_bytes = int64_t{p.tiles} * (128 * kBits), line_bytes = int64_t{p.tiles} * (32 * kScales);
  const char* codes =
      reinterpret_cast<const char*>(p.codes) + first * unit_bytes + int64_t{tile} * (128 * kBits);
  const char* scales = reinterpret_cast<const char*>(p.scales) + int64_t{tile} * (32 * kScales);
  const char* x = static_cast<const char*>(p.image) + (int64_t{column_block} * p.units + first) * stage.x;
  const auto copy_weights = [&](int i) {
    barrier_expect(ring.full(), stage.used());
    copy(ring.data() + stage.x, codes, stage.codes, ring.full());
    copy(ring.data() + stage.x + stage.codes, scales + ((first + i) >> p.group_shift) * line_bytes,
         stage.scales, ring.full());
    codes += unit_bytes;
  };
  const auto copy_x = [&](Ring& ring) {
    copy(ring.data(), x, stage.x, ring.full());
    x += stage.x;
  };
  Ring ring_of_x = ring;
  const int free = min(count, kStages);
  for (int i = 0; i < free; ++i, ring.advance()) copy_weights(i);
  wait_for_predecessor();
  copies_see_writes();
  for (int i = 0; i < free; ++i, ring_of_x.advance()) copy_x(ring_of_x);
  for (int i = free; i < count; ++i, ring.advance()) {
    ring.wait_empty();
    copy_weights(i);
    copy_x(ring);
  }
}

}  // namespace flute::sm90
