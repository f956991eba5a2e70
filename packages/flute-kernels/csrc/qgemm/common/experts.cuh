// Mixtures of experts: which rows of x are whose. How many an expert has, only the GPU knows, so each block works it out.
#pragma once

#include <cstdint>

namespace flute {

// Rows of x, in blocks of so many columns of a product; each expert's rows have blocks of their own.
struct Rows {
  int expert, begin, end, first_block, end_block;
};

// Calls visit(Rows) for every expert, by one warp, each lane for another expert; returns what all have. Counts that
// cannot be are cut down to the rows that there are.
template <class Visit>
__device__ __forceinline__ Rows for_each_expert(const int32_t* counts, int experts, int m, int columns,
                                                const Visit& visit) {
  const int lane = threadIdx.x % 32;
  Rows all{experts, 0, 0, 0, 0};
  for (int first = 0; first < experts; first += 32) {
    const int expert = first + lane;
    // The kernel before has made them, so they do not come through the read-only path.
    int64_t rows = expert < experts ? max(__ldcg(counts + expert), 0) : 0;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int64_t lower = __shfl_up_sync(0xffffffff, rows, d);
      rows += lane >= d ? lower : 0;
    }
    const int end = static_cast<int>(min(all.end + rows, static_cast<int64_t>(m)));
    const int before = __shfl_up_sync(0xffffffff, end, 1), begin = lane == 0 ? all.end : before;
    const int own = (end - begin + columns - 1) / columns;
    int blocks = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int lower = __shfl_up_sync(0xffffffff, blocks, d);
      blocks += lane >= d ? lower : 0;
    }
    if (expert < experts)
      visit(Rows{expert, begin, end, all.end_block + blocks - own, all.end_block + blocks});
    all.end = __shfl_sync(0xffffffff, end, 31);
    all.end_block += __shfl_sync(0xffffffff, blocks, 31);
  }
  return all;
}

}  // namespace flute
