// Mixtures of experts: what there is to multiply. Sets of an expert are neighbours, then those of a group. A box of x that
// goes on into the next expert's rows does no harm: what comes of them is not written.
#pragma once

#include <cstdint>

#include "qgemm/common/experts.cuh"
#include "qgemm/sm90/config.h"
#include "qgemm/sm90/ptx.cuh"
#include "qgemm/sm90/schedule.cuh"

namespace flute::sm90 {

// In shared memory.
template <int kColumns>
class Experts {
 public:
  __device__ __forceinline__ Experts(const Params& p, unsigned char* memory)
      : p_(p), rows_(reinterpret_cast<int*>(memory)), blocks_(rows_ + kMostExperts + 1) {}

  // By one warp.
  __device__ __forceinline__ void read_counts() const {
    const Rows all = for_each_expert(p_.counts, p_.experts, p_.m, kColumns, [&](const Rows& of) {
      rows_[of.expert] = of.begin, blocks_[of.expert] = of.first_block;
    });
    if (threadIdx.x % 32 == 0) rows_[p_.experts] = all.end, blocks_[p_.experts] = all.end_block;
  }

  __device__ __forceinline__ int rows() const { return rows_[p_.experts]; }

  __device__ __forceinline__ Division divide(int stages) const {
    const int blocks = gridDim.x, sets = same_of_warp(blocks_[p_.experts]) * groups();
    return division(sets, stages, blocks, 1, waves_of(sets, blocks));
  }

  __device__ __forceinline__ Set find(int number) const {
    // The last expert whose sets begin at this one or before, which is one that has some. Without branches, as the
    // compiler does not see that a warp's threads would take the same.
    int low = 0;
#pragma unroll
    for (int step = (kMostExperts + 1) / 2; step > 0; step /= 2) {
      const int next = min(low + step, p_.experts - 1);
      low = blocks_[next] * groups() <= number ? next : low;
    }
    const int column_blocks = blocks_[low + 1] - blocks_[low], own = number - blocks_[low] * groups();
    const int group = own / column_blocks;
    return {low * groups() + group, rows_[low] + (own - group * column_blocks) * kColumns, rows_[low + 1]};
  }

 private:
  __device__ __forceinline__ int groups() const {
    return p_.groups_per_segment.divisor * p_.segments_per_expert;
  }

  const Params& p_;
  int* const rows_;    // before each expert, and of all
  int* const blocks_;  // of columns, likewise
};

}  // namespace flute::sm90
