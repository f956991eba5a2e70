// Mixtures of experts: which rows of x are whose. How many an expert has, only the GPU knows, so each block works it out.
#pragma once

#include <cstdint>

namespace flute {

// Rows of x, in blocks of so many columns of a product; each expert's rows have blocks of their own.
struct Rows {
  int expert, begin, end, first_block, end_block;
};

// Calls visit(Rows) for every expert, by one warp; returns what all have. Counts that cannot be are cut down to the rows
// that there are. All of a call's weights wait for this, so it is short: a lane has neighbouring experts, whose counts
// it asks for at once, and there are two sums over lanes for 256 experts.
template <class Visit>
__device__ __forceinline__ Rows for_each_expert(const int32_t* counts, int experts, int m, int columns,
                                                const Visit& visit) {
  constexpr int kPer = 8;
  const int lane = threadIdx.x % 32;
  const auto add = [m](int a, int b) {  // rows, of which there are m at most
    return static_cast<int>(
        min(static_cast<unsigned>(a) + static_cast<unsigned>(b), static_cast<unsigned>(m)));
  };
  // The sum of this and all lower lanes' values.
  const auto scan = [lane](int value, const auto& plus) {
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int lower = __shfl_up_sync(0xffffffff, value, d);
      value = lane >= d ? plus(value, lower) : value;
    }
    return value;
  };
  Rows all{experts, 0, 0, 0, 0};
  for (int first = 0; first < experts; first += 32 * kPer) {
    const int here = min(experts - first, 32 * kPer), per = (here + 31) / 32;
    int rows[kPer], own = 0;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const int expert = lane * per + i;
      // The kernel before has made them, so they do not come through the read-only path.
      const bool has = i < per && expert < here;
      rows[i] = has ? min(max(__ldcg(counts + first + expert), 0), m) : 0;
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) own = add(own, rows[i]);
    const int end = add(all.end, scan(own, add));
    const int lower = __shfl_up_sync(0xffffffff, end, 1), begin = lane == 0 ? all.end : lower;
    int blocks = 0;
#pragma unroll
    for (int i = 0, from = begin; i < kPer; ++i) {
      const int to = add(from, rows[i]);
      blocks += (to - from + columns - 1) / columns, from = to;
    }
    const int end_block = all.end_block + scan(blocks, [](int a, int b) { return a + b; });
#pragma unroll
    for (int i = 0, from = begin, block = end_block - blocks; i < kPer; ++i) {
      const int expert = lane * per + i, to = add(from, rows[i]);
      const int next = block + (to - from + columns - 1) / columns;
      if (i < per && expert < here) visit(Rows{first + expert, from, to, block, next});
      from = to, block = next;
    }
    all.end = __shfl_sync(0xffffffff, end, 31);
    all.end_block = __shfl_sync(0xffffffff, end_block, 31);
  }
  return all;
}

}  // namespace flute
