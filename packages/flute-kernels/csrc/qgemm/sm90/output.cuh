// Which rows and which part of K a block has, and how results are written.
#pragma once

#include "core/convert.cuh"
#include "qgemm/common/layout.h"
#include "qgemm/common/lookup.cuh"
#include "qgemm/sm90/config.h"
#include "qgemm/sm90/ptx.cuh"

namespace flute::sm90 {

// Rows of a group: its first tile, and the first row that it owns. The last group of a table moves back until
// it is whole; rows that it shares with the one before are that one's.
struct Group {
  int table, tile, first_row;

  __device__ __forceinline__ Group(const Params& p, int group, int tiles) {
    table = group / p.groups_per_table;
    const int wanted = group % p.groups_per_table * tiles;
    tile = table * p.tiles_per_table + min(wanted, p.tiles_per_table - tiles);
    first_row = (table * p.tiles_per_table + wanted) * layout::kTile;
  }
};

// What a block does: its part of K, of `parts` that the x dimension of the grid counts. A set is a group with a
// block of columns, whose parts belong together.
struct Share {
  int part, parts, first, count;  // first, count: stages
  int64_t set;

  __device__ __forceinline__ explicit Share(int stages)
      : part(blockIdx.x),
        parts(gridDim.x),
        first(static_cast<int>(int64_t{stages} * part / parts)),
        count(static_cast<int>(int64_t{stages} * (part + 1) / parts) - first),
        set(int64_t{blockIdx.z} * gridDim.y + blockIdx.y) {}
};

// A thread's results: fragment j of slab r has rows row + 64 * r, and 8 below, and columns column + 8 * j and the next.
struct Place {
  int row, first_row, column;
};

template <class T>
__device__ __forceinline__ void write_out(const Params& p, const float (&sum)[4], const Place& place, int r,
                                          int j) {
  T* const out = reinterpret_cast<T*>(p.out);
  const int m = place.column + 8 * j;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = place.row + 64 * r + 8 * half;
    if (row < place.first_row || row >= p.n) continue;
    const float bias = p.bias ? load_float(p.bias, row, static_cast<DType>(p.bias_dtype)) : 0.f;
    if (m < p.m) out[m * p.ldo + row] = from_float<T>(sum[2 * half] + bias);
    if (m + 1 < p.m) out[(m + 1) * p.ldo + row] = from_float<T>(sum[2 * half + 1] + bias);
  }
}

// The parts of a set are a cluster: each block adds up, and writes, a share of the fragments, which it reads from
// the others' shared memory, in the order of the parts.
template <class T, int kThreads, int kSlabs, int kFragments>
__device__ __forceinline__ void join_in_cluster(const Params& p, const float (&sum)[kSlabs][kFragments][4],
                                                const Share& mine, const Place& place, uint32_t scratch) {
  constexpr int kCount = kSlabs * kFragments;
  const uint32_t at = scratch + threadIdx.x * 16;
#pragma unroll
  for (int f = 0; f < kCount; ++f)
    store_shared(at + f * (kThreads * 16), sum[f / kFragments][f % kFragments]);
  cluster_arrive();
  cluster_wait();
  const int end = kCount * (mine.part + 1) / mine.parts;
#pragma unroll 2
  for (int f = kCount * mine.part / mine.parts; f < end; ++f) {
    float v[kMostOfCluster][4], total[4] = {};
#pragma unroll
    for (int i = 0; i < kMostOfCluster; ++i) {
      if (i < mine.parts) load_of_block(v[i], at + f * (kThreads * 16), i);
    }
#pragma unroll
    for (int i = 0; i < kMostOfCluster; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) total[c] += i < mine.parts ? v[i][c] : 0.f;
    }
    write_out<T>(p, total, place, f / kFragments, f % kFragments);
  }
  cluster_arrive();
  cluster_wait();  // until nobody reads this block's shared memory
}

// The parts of a set meet in memory: true in the block that comes last, which has then added up all sums, in the
// order of the parts.
template <int kThreads, int kSlabs, int kFragments, class AllLookers>
__device__ __forceinline__ bool join_in_memory(const Params& p, float (&sum)[kSlabs][kFragments][4],
                                               const Share& mine, AllLookers all_lookers) {
  constexpr int kCount = kSlabs * kFragments;
  float4* const parts =
      static_cast<float4*>(p.parts) + mine.set * mine.parts * int64_t{kCount * kThreads} + threadIdx.x;
  const auto at = [&](int part, int fragment) { return parts + (part * kCount + fragment) * kThreads; };
#pragma unroll
  for (int f = 0; f < kCount; ++f) {
    const float (&v)[4] = sum[f / kFragments][f % kFragments];
    *at(mine.part, f) = make_float4(v[0], v[1], v[2], v[3]);
  }
  all_lookers();                                       // have written
  int* const before = reinterpret_cast<int*>(shared);  // the table makes room for a word
  if (threadIdx.x == 0) {
    __threadfence();
    *before = atomicAdd(p.arrived + mine.set, 1);
    __threadfence();
  }
  all_lookers();
  if (*before + 1 < mine.parts) return false;
#pragma unroll
  for (int f = 0; f < kCount; ++f) {
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[f / kFragments][f % kFragments][c] = 0.f;
  }
#pragma unroll 2
  for (int i = 0; i < mine.parts; ++i) {
    float4 v[kCount];
#pragma unroll
    for (int f = 0; f < kCount; ++f) v[f] = __ldcg(at(i, f));
#pragma unroll
    for (int f = 0; f < kCount; ++f) {
      float (&total)[4] = sum[f / kFragments][f % kFragments];
      total[0] += v[f].x, total[1] += v[f].y, total[2] += v[f].z, total[3] += v[f].w;
    }
  }
  return true;
}

}  // namespace flute::sm90
