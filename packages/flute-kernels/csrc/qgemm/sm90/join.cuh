// How the pieces of a set, of which several blocks have a part of K each, are added up: in the order of K.
#pragma once

#include "qgemm/sm90/config.h"
#include "qgemm/sm90/output.cuh"
#include "qgemm/sm90/ptx.cuh"

namespace flute::sm90 {

// The pieces are those of a cluster: each block adds up, and writes, a share of the fragments, which every block has
// put into its shared memory. (To read them there from another block would take longer: a way forth and back.)
template <class T, int kThreads, int kSlabs, int kFragments>
__device__ __forceinline__ void join_in_cluster(const Params& p, const float (&sum)[kSlabs][kFragments][4],
                                                int part, const Place& place, uint32_t scratch) {
  constexpr int kCount = kSlabs * kFragments, kFragment = kThreads * 16;
  const int parts = p.parts.divisor;
  const auto begin_of = [&](int of) { return p.parts.quotient(kCount * of); };
  const int most = p.parts.quotient(kCount + parts - 1);
  const uint32_t own = scratch + threadIdx.x * 16;
  cluster_arrive();
  cluster_wait();  // all have read their last stage and looked up their last weight
#pragma unroll
  for (int i = 0; i < kMostOfCluster; ++i) {
    if (i >= parts) break;
    const uint32_t there = of_block(own + part * most * kFragment, i);
    const int begin = begin_of(i), end = begin_of(i + 1);
#pragma unroll
    for (int f = 0; f < kCount; ++f)
      store_to_block(there + (f - begin) * kFragment, sum[f / kFragments][f % kFragments],
                     f >= begin && f < end);
  }
  cluster_arrive();
  cluster_wait();
  const int begin = begin_of(part), end = begin_of(part + 1);
#pragma unroll 2
  for (int f = begin; f < end; ++f) {
    float v[kMostOfCluster][4], total[4] = {};
#pragma unroll
    for (int i = 0; i < kMostOfCluster; ++i) {
      if (i < parts) load_shared(v[i], own + (i * most + f - begin) * kFragment);
    }
#pragma unroll
    for (int i = 0; i < kMostOfCluster; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) total[c] += i < parts ? v[i][c] : 0.f;
    }
    write_out<T>(p, total, load_bias(p, place, f / kFragments), place, f / kFragments, f % kFragments);
  }
}

// Pieces that meet in memory. A block writes at most one. Warps of the same place in their blocks hand them over to each
// other.
//
// That a piece is there, a word for each block that wants it says, by holding this launch's token. Nothing clears the
// words before: they are of 64 bits, and tokens come from a generator whose numbers do not repeat and mean nothing
// elsewhere, so that what lay there before is not one. Only a CUDA graph launches with the same token again; so whoever
// has read a piece clears its word.
//
// kMost: fragments that a piece has at most.
template <int kThreads, int kMost>
class Pieces {
 public:
  __device__ __forceinline__ explicit Pieces(const Params& p) : p_(p), lane_(threadIdx.x % 32) {}

  // For one block that will join it.
  template <int kSlabs, int kFragments>
  __device__ __forceinline__ void write(const float (&sum)[kSlabs][kFragments][4], int block) const {
    store(sum, block);
    if (lane_ == 0) publish(word(block, 0), p_.token);
  }

  // The piece, or, where there is none to begin with, zeros, or, if they are not wanted, anything. All at once, into the
  // registers where they stay.
  template <bool kZeros, int kSlabs, int kFragments>
  __device__ __forceinline__ void begin_with(float (&sum)[kSlabs][kFragments][4], bool has_piece,
                                             int block) const {
    if (has_piece) wait(lane_ == 0, word(block, 0));
#pragma unroll
    for (int f = 0; f < kSlabs * kFragments; ++f) {
      float (&to)[4] = sum[f / kFragments][f % kFragments];
      if (kZeros) {
        load_or_zero(to, at(block, f), has_piece);
      } else {
        load_if(to, at(block, f), has_piece);
      }
    }
  }

  // Those of blocks first to last, in this order.
  template <int kSlabs, int kFragments>
  __device__ __forceinline__ void add(float (&sum)[kSlabs][kFragments][4], int first, int last) const {
    wait(lane_ <= last - first, word(first + lane_, 0));
#pragma unroll 1
    for (int block = first; block <= last; ++block) add_piece<kFragments>(sum, block);
  }

  // For two parts: each block adds up, and writes, half of the columns, and hands the other block its half.
  template <class T, int kWarpgroups, int kSlabs, int kFragments>
  __device__ __forceinline__ void join_two(float (&sum)[kSlabs][kFragments][4], int block, Place place,
                                           uint32_t table) const {
    // Of a slab. The own half moves to the front: so the rest is the same code.
    constexpr int kHalf = kFragments / 2;
    const bool is_second = block % 2 != 0;
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
#pragma unroll
      for (int j = 0; j < kHalf; ++j) {
        float (&a)[4] = sum[s][j], (&b)[4] = sum[s][j + kHalf];
        const float4 v =
            is_second ? make_float4(a[0], a[1], a[2], a[3]) : make_float4(b[0], b[1], b[2], b[3]);
        *at(block, s * kHalf + j) = v;
#pragma unroll
        for (int c = 0; c < 4; ++c) a[c] = is_second ? b[c] : a[c];
      }
    }
    __syncwarp();
    if (lane_ == 0) publish(word(block, 0), p_.token);
    wait(lane_ == 0, word(block ^ 1, 0));
    add_piece<kHalf>(sum, block ^ 1);
    place.column += is_second ? 8 * kHalf : 0;
    write_set<T, kWarpgroups, false, kHalf>(p_, sum, place, table, false);
  }

  // For more parts: each block adds up, and writes, a share of the fragments.
  template <class T, int kSlabs, int kFragments>
  __device__ __forceinline__ void join(const float (&sum)[kSlabs][kFragments][4], int block,
                                       const Place& place) const {
    constexpr int kCount = kSlabs * kFragments;
    const int parts = p_.division.parts, part = block % parts, first = block - part;
    store(sum, block);
    const bool has_other = lane_ < parts && lane_ != part;
    if (has_other) publish(word(block, lane_), p_.token);
    wait(has_other, word(first + lane_, part));
    constexpr int kAtOnce = 4;
    const int end = kCount * (part + 1) / parts;
#pragma unroll 1
    for (int begin = kCount * part / parts; begin < end; begin += kAtOnce) {
      float total[kAtOnce][4] = {};
#pragma unroll 1
      for (int other = 0; other < parts; other += kAtOnce) {
        float v[kAtOnce][kAtOnce][4];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
          for (int f = 0; f < kAtOnce; ++f)
            load_or_zero(v[i][f], at(first + other + i, begin + f), other + i < parts && begin + f < end);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
          for (int f = 0; f < kAtOnce; ++f) {
#pragma unroll
            for (int c = 0; c < 4; ++c) total[f][c] += v[i][f][c];
          }
        }
      }
#pragma unroll
      for (int f = 0; f < kAtOnce; ++f) {
        const int r = (begin + f) / kFragments, j = (begin + f) % kFragments;
        if (begin + f < end) write_out<T>(p_, total[f], load_bias(p_, place, r), place, r, j);
      }
    }
  }

 private:
  // A block's piece, which has the first kWidth fragments of each slab.
  template <int kWidth, int kSlabs, int kFragments>
  __device__ __forceinline__ void add_piece(float (&sum)[kSlabs][kFragments][4], int block) const {
    constexpr int kCount = kSlabs * kWidth;
    constexpr int kAtOnce = kCount % 8 == 0   ? 8
                            : kCount % 6 == 0 ? 6
                            : kCount % 4 == 0 ? 4
                                              : 2;  // loads under way, as registers allow
    static_assert(kCount % kAtOnce == 0);
#pragma unroll
    for (int begin = 0; begin < kCount; begin += kAtOnce) {
      float4 v[kAtOnce];
#pragma unroll
      for (int f = 0; f < kAtOnce; ++f) v[f] = __ldcg(at(block, begin + f));
#pragma unroll
      for (int f = 0; f < kAtOnce; ++f) {
        float (&to)[4] = sum[(begin + f) / kWidth][(begin + f) % kWidth];
        to[0] += v[f].x, to[1] += v[f].y, to[2] += v[f].z, to[3] += v[f].w;
      }
    }
  }
  __device__ __forceinline__ float4* at(int block, int fragment) const {
    return static_cast<float4*>(p_.pieces) + (int64_t{block} * kMost + fragment) * kThreads + threadIdx.x;
  }
  // Of this warp's piece of a block, for part `reader` of the set, or, where pieces have one reader, for that.
  __device__ __forceinline__ uint64_t* word(int block, int reader) const {
    return p_.written + (block * p_.division.parts + reader) * (kThreads / 32) + threadIdx.x / 32;
  }
  template <int kSlabs, int kFragments>
  __device__ __forceinline__ void store(const float (&sum)[kSlabs][kFragments][4], int block) const {
#pragma unroll
    for (int f = 0; f < kSlabs * kFragments; ++f) {
      const float (&v)[4] = sum[f / kFragments][f % kFragments];
      *at(block, f) = make_float4(v[0], v[1], v[2], v[3]);
    }
    __syncwarp();
  }
  // Until each lane that waits has seen its word, which it clears.
  __device__ __forceinline__ void wait(bool waits, uint64_t* word) const {
    while (!__all_sync(0xffffffff, !waits || is_published(word, p_.token))) {
    }
    if (waits) *word = 0;
    __syncwarp();
  }

  const Params& p_;
  const int lane_;
};

}  // namespace flute::sm90
