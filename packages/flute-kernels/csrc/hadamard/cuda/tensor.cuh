// Rotation of 16-bit values in blocks of 128 and more, with the first four stages on the tensor cores.
//
// Why. Shuffles between lanes are what bounds the other kernel: five for every value at 256. A product with the
// 16 x 16 Hadamard matrix does four stages at once, on the values as they come, since 1 and -1 are exact; and as
// its results lie in other lanes than its operand did, it also brings stages that were between lanes into them.
//
// How. A warp has 1024 values. Of the ten bits of a value's number, bit by bit from 0:
//
//                        0       1, 2    3, 4     5        6       7       8, 9
//   loaded               word    word    t        g        run     run     g
//   in the product       k       -       k        column   k       -       column
//   of its results       row     -       row      column   row     -       column
//   then in              lane's  lane's  g        lane's   g       lane's  t
//
// where lane = 4g + t, and "lane's" are the 32 results that a lane has (core/mma.cuh says which). So stages 0, 3, 4,
// 6 are the product, and 1, 2, 5, 7 are inside a lane. For the others, of blocks of 512 and more, there is
// exchange.cuh.
#pragma once

#include "core/mma.cuh"
#include "hadamard/cuda/butterfly.cuh"
#include "hadamard/cuda/exchange.cuh"
#include "hadamard/cuda/matrix.cuh"

namespace flute::cuda {

constexpr int kTensorResident = 5;    // blocks of a multiprocessor
constexpr int kTensorSmallest = 128;  // with smaller blocks, values of others would be multiplied by zeros
constexpr int kExchangeSmallest = 512;

// The lane's part of the Hadamard matrix, times `scale`, as operand A. Bits of a row: 3, 4, 6, 0; of a column: 0, 3,
// 4, 6.
template <class T>
__device__ __forceinline__ void hadamard_16(uint32_t (&a)[4], float scale, int lane) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float entry[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = lane / 4 + i % 2 * 8, column = lane % 4 * 2 + i / 2 * 8 + e;
      const int row_in_order_of_columns = row << 1 & 15 | row >> 3;
      entry[e] = __popc(row_in_order_of_columns & column) % 2 ? -scale : scale;
    }
    a[i] = pack_two<T>(entry[0], entry[1]);
  }
}

// Flips the signs of two packed values.
__device__ __forceinline__ void flip(uint32_t& pair, uint32_t low_sign, uint32_t high_sign) {
  pair ^= __byte_perm(low_sign, high_sign, 0x7632) & 0x80008000;
}

// Writes neighbours: scaled, if they are not yet, and with their signs if those come last.
template <class T, bool kScaled, int kCount>
__device__ __forceinline__ void finish(float (&v)[kCount], const Args& a, const Place& p) {
  static_assert(kCount % 2 == 0 && sizeof(T) == 2);
  uint32_t bits[kCount / 2];
#pragma unroll
  for (int i = 0; i < kCount; i += 2) {
    float x = v[i], y = v[i + 1];
    if (!kScaled) x *= a.factor, y *= a.factor;
    if (a.signs && a.transpose) {
      const float2 signs = __ldg(reinterpret_cast<const float2*>(a.signs + p.column + i));
      x *= signs.x, y *= signs.y;
    }
    bits[i / 2] = pack_two<T>(x, y);
  }
  T* const to = static_cast<T*>(a.out) + p.row * a.ldo + p.column;
  if constexpr (kCount == 8) store_16_bytes(to, bits[0], bits[1], bits[2], bits[3]);
  if constexpr (kCount == 4) *reinterpret_cast<uint2*>(to) = make_uint2(bits[0], bits[1]);
  if constexpr (kCount == 2) *reinterpret_cast<uint32_t*>(to) = bits[0];
}

// kTeam: warps that share blocks of 512 and more; 0: blocks are smaller.
template <class T, int kTeam>
__global__ void __launch_bounds__(kWarps * 32, kTensorResident)
    rotate_by_tensor_cores(const __grid_constant__ Args a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int load0 = warp * kWarpValues + (g >> 1) * 256 + (g & 1) * 32 + t * 8;
  const int result0 = t * 256 + (g >> 2) * 64 + (g & 3) * 8;  // of the warp's
  constexpr bool kScaled = kTeam == 4;  // by the matrix: the factor of 4096 is a power of two
  uint32_t matrix[4];
  hadamard_16<T>(matrix, kScaled ? a.factor : 1.f, lane);

  // Runs of a lane that surely lie in one row, and the places of the first of each such set.
  constexpr int kSame = kTeam == 0 ? 2 : kRuns, kSets = kRuns / kSame;
  const auto set_place = [&](int base, int set) { return place(base + load0 + set * (kSame * 64), a); };
  uint4 next[kRuns] = {};
  const auto load = [&](int base) {
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      if (base + load0 + set * (kSame * 64) >= a.total) continue;
      const Place p = set_place(base, set);
      const T* x = static_cast<const T*>(a.x) + p.row * a.ldx + p.column;
#pragma unroll
      for (int q = 0; q < kSame; ++q) next[set * kSame + q] = *reinterpret_cast<const uint4*>(x + q * 64);
    }
  };
  const int step = static_cast<int>(gridDim.x) * (kWarps * kWarpValues);
  int base = static_cast<int>(blockIdx.x) * (kWarps * kWarpValues);
  load(base);
  for (; base < a.total; base += step) {
    float v[kRuns][8];
    if (a.signs && !a.transpose) {
#pragma unroll
      for (int set = 0; set < kSets; ++set) {
        if (base + load0 + set * (kSame * 64) >= a.total) continue;
        const uint4* signs = reinterpret_cast<const uint4*>(a.signs + set_place(base, set).column);
        uint4 s[kSame][2];
#pragma unroll
        for (int q = 0; q < kSame; ++q) s[q][0] = __ldg(signs + q * 16), s[q][1] = __ldg(signs + q * 16 + 1);
#pragma unroll
        for (int q = 0; q < kSame; ++q) {
          uint4& run = next[set * kSame + q];
          flip(run.x, s[q][0].x, s[q][0].y), flip(run.y, s[q][0].z, s[q][0].w);
          flip(run.z, s[q][1].x, s[q][1].y), flip(run.w, s[q][1].z, s[q][1].w);
        }
      }
    }
#pragma unroll
    for (int high = 0; high < 2; ++high) {  // bit 7
      const uint4 b0 = next[2 * high], b1 = next[2 * high + 1];
      const uint32_t low_words[4] = {b0.x, b0.y, b0.z, b0.w}, high_words[4] = {b1.x, b1.y, b1.z, b1.w};
#pragma unroll
      for (int w = 0; w < 4; ++w) {  // bits 1 and 2
        float c[4] = {};
        mma<T>(c, matrix, low_words[w], high_words[w]);
#pragma unroll
        for (int i = 0; i < 4; ++i) v[2 * high + i % 2][2 * w + i / 2] = c[i];
      }
    }
    load(base + step);
    inside_runs<2>(v);
    inside_runs<4>(v);
    between_runs<1>(v);
    if (kTeam > 0 || a.block > 128) between_runs<2>(v);
    if constexpr (kTeam == 0) {
#pragma unroll
      for (int q = 0; q < kRuns; ++q) {
        const int at = base + warp * kWarpValues + result0 + (q >> 1) * 128 + (q & 1) * 32;
        if (at < a.total) finish<T, kScaled>(v[q], a, place(at, a));
      }
    } else {
      using Last = Exchange<kTeam>;
      const int member = warp % kTeam, team0 = base + (warp - member) * kWarpValues;
      Last last;
      last.swap(v, member * kWarpValues + result0, warp, lane);
      last.template stage<0>();
      if (kTeam > 1 || a.block > 512) last.template stage<1>();
      if constexpr (kTeam > 1) last.template stage<2>();
      if constexpr (kTeam > 2) last.template stage<3>();
#pragma unroll
      for (int low = 0; low < Last::kLow; ++low) {
        constexpr int kInRow = kTeam == 1 ? 2 : Last::kHigh;  // high bits of a block of 512, or of the team
#pragma unroll
        for (int high = 0; high < Last::kHigh; high += kInRow) {
          const int at = team0 + Last::first(low, member, lane) + high * 256;
          if (at >= a.total) continue;
          Place p = place(at, a);
#pragma unroll
          for (int i = 0; i < kInRow; ++i, p.column += 256)
            finish<T, kScaled>(last.values[low][high + i], a, p);
        }
      }
    }
  }
}

}  // namespace flute::cuda
