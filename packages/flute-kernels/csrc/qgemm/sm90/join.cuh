// How the pieces of a set, of which several blocks have a part of K each, are added up: in the order of K.
#pragma once

#include "qgemm/sm90/config.h"
#include "qgemm/sm90/output.cuh"
#include "qgemm/sm90/ptx.cuh"

namespace flute::sm90 {

// The pieces are those of a cluster: each block adds up, and writes, a share of the fragments, which it reads from the
// others' shared memory.
template <class T, int kThreads, int kSlabs, int kFragments>
__device__ __forceinline__ void join_in_cluster(const Params& p, const float (&sum)[kSlabs][kFragments][4],
                                                int part, const Place& place, uint32_t scratch) {
  constexpr int kCount = kSlabs * kFragments;
  const int parts = p.parts;
  const uint32_t at = scratch + threadIdx.x * 16;
#pragma unroll
  for (int f = 0; f < kCount; ++f)
    store_shared(at + f * (kThreads * 16), sum[f / kFragments][f % kFragments]);
  cluster_arrive();
  cluster_wait();
  const int end = kCount * (part + 1) / parts;
#pragma unroll 2
  for (int f = kCount * part / parts; f < end; ++f) {
    float v[kMostOfCluster][4], total[4] = {};
#pragma unroll
    for (int i = 0; i < kMostOfCluster; ++i) {
      if (i < parts) load_of_block(v[i], at + f * (kThreads * 16), i);
    }
#pragma unroll
    for (int i = 0; i < kMostOfCluster; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) total[c] += i < parts ? v[i][c] : 0.f;
    }
    write_out<T>(p, total, load_bias(p, place, f / kFragments), place, f / kFragments, f % kFragments);
  }
  cluster_arrive();
  cluster_wait();  // until nobody reads this block's shared memory
}

// Pieces that meet in memory. A block writes at most one. Warps of the same place in their blocks hand them over to each
// other.
template <int kThreads, int kSlabs, int kFragments>
class Pieces {
 public:
  using Sums = float[kSlabs][kFragments][4];

  __device__ __forceinline__ explicit Pieces(const Params& p) : p_(p) {}

  __device__ __forceinline__ void write(const Sums& sum, int block) const {
#pragma unroll
    for (int f = 0; f < kCount; ++f) {
      const float (&v)[4] = sum[f / kFragments][f % kFragments];
      *at(block, f) = make_float4(v[0], v[1], v[2], v[3]);
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) publish(written(block));
  }

  // The piece, or, where there is none to begin with, zeros. All at once, into the registers where they stay.
  __device__ __forceinline__ void begin_with(Sums& sum, bool has_piece, int block) const {
    if (has_piece) wait(block);
#pragma unroll
    for (int f = 0; f < kCount; ++f)
      load_or_zero(sum[f / kFragments][f % kFragments], at(block, f), has_piece);
  }

  // Those of blocks first to last, in this order.
  __device__ __forceinline__ void add(Sums& sum, int first, int last) const {
    constexpr int kAtOnce = kCount % 8 == 0   ? 8
                            : kCount % 6 == 0 ? 6
                                              : 4;  // loads under way, as registers allow
    static_assert(kCount % kAtOnce == 0);
#pragma unroll 1
    for (int block = first; block <= last; ++block) {
      wait(block);
#pragma unroll
      for (int begin = 0; begin < kCount; begin += kAtOnce) {
        float4 v[kAtOnce];
#pragma unroll
        for (int f = 0; f < kAtOnce; ++f) v[f] = __ldcg(at(block, begin + f));
#pragma unroll
        for (int f = 0; f < kAtOnce; ++f) {
          float (&to)[4] = sum[(begin + f) / kFragments][(begin + f) % kFragments];
          to[0] += v[f].x, to[1] += v[f].y, to[2] += v[f].z, to[3] += v[f].w;
        }
      }
    }
  }

 private:
  static constexpr int kCount = kSlabs * kFragments;

  __device__ __forceinline__ float4* at(int block, int fragment) const {
    return static_cast<float4*>(p_.pieces) + (int64_t{block} * kCount + fragment) * kThreads + threadIdx.x;
  }
  __device__ __forceinline__ int* written(int block) const {
    return p_.written + block * (kThreads / 32) + threadIdx.x / 32;
  }
  __device__ __forceinline__ void wait(int block) const {
    while (!__all_sync(0xffffffff, is_published(written(block)))) {
    }
  }

  const Params& p_;
};

}  // namespace flute::sm90
