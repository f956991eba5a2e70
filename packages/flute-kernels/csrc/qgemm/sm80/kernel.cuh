// y^T = W_hat * x^T for up to 16 rows of x, with the weights as operand A of mma.m16n8k16.
//
// What bounds it. Few rows of x mean that every code is read once and used at once: the time is that of
// reading the codes or of looking them up, whichever is longer. A lookup is one 4-byte load from shared
// memory for two weights (3 and 4 bits) or one of 8 bytes for four (2 bits), and shared memory gives 128
// bytes a clock and multiprocessor: 64 weights. The codes themselves, the scales and x come through the
// same pipe, so the kernel counts its wavefronts: of a 16 x 64 unit at 4 bits, 16 for the lookups, 4 for
// the codes, half a one for the scale, and for x (2 to 16) / tiles.
//
// Who does what. A warp owns `tiles` neighbouring tiles of 16 rows and every warps_k-th unit of 64
// along K; its fragments of x (x.cuh) serve all its tiles. The lanes' codes lie in memory in the
// order in which the lanes need them (common/layout.h), so a unit is one load a lane, always under way
// `depth` units ahead. common/lookup.cuh says how a byte of codes becomes two or four weights, in the
// registers of the A fragments of two products. Scales are applied to the sums, in float, once every 64 or
// 32 weights: 4 FMAs an accumulator tile, where scaling the weights would take 16 and round.
//
// What is rounded: table entries to the type of x (exact where they fit it, as fp16 tables do for fp16),
// the result once. Sums run in float in a fixed order: each warp over its units, then the block over its
// warps; blocks share no sums.
//
// When. Codes, scales and the table do not depend on the kernel before, so they are loaded before
// waiting for it; x and the result come after. Of a mixture of experts, all but a table for all of them does.
#pragma once

#include <type_traits>

#include "core/convert.cuh"
#include "core/early.cuh"
#include "core/mma.cuh"
#include "qgemm/common/experts.cuh"
#include "qgemm/common/layout.h"
#include "qgemm/common/loads.cuh"
#include "qgemm/common/lookup.cuh"
#include "qgemm/sm80/config.h"
#include "qgemm/sm80/x.cuh"

namespace flute::sm80 {

// Rows of x that are nobody's: zeros.
template <int kThreads>
__device__ __forceinline__ void write_zeros(const Params& p, int first) {
  for (int m = first + blockIdx.y; m < p.m; m += gridDim.y) {
    for (int n = threadIdx.x; n < p.n; n += kThreads) p.out[m * p.ldo + n] = 0;
  }
}

// kGroup: of scales, 32, or 64 for all above. S: the scales' type.
template <int kBits, class T, class S, int kGroup, int kColumns, int kTiles, int kWarpsK, int kWarpsN,
          int kDepth, int kResident, int kGrouped, int kForBits>
__global__ void __launch_bounds__(kWarpsK * kWarpsN * 32, kResident)
    kernel(const __grid_constant__ Params p) {
  static_assert(has_digit(kForBits, kBits));
  constexpr int kThreads = kWarpsK * kWarpsN * 32;
  constexpr int kFragments = kColumns / 8;
  constexpr int kUnitWords = 32 * kBits;
  constexpr int kScales = layout::scales_per_unit(kGroup);  // of a unit
  launch_dependents();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int warp_k = warp % kWarpsK, warp_n = warp / kWarpsK;
  int column0 = blockIdx.x * kColumns, end = p.m, segment = blockIdx.z;
  if (table_is_elsewhere()) __trap();
  const auto tables = static_cast<const float2*>(p.tables);
  Table<kBits, T, kThreads> entries;
  const bool has_table = kGrouped && p.table_count == 1;  // whoever's columns these are
  if (has_table) {
    entries.load(tables);
    entries.store();
  }
  if constexpr (kGrouped) {
    // Whose columns these are, the kernel before says. There are more blocks than any mixture needs; the last one has
    // none, and sees to the rows of x that are nobody's.
    wait_for_predecessor();
    int expert = -1;
    const Rows all = for_each_expert(p.counts, p.experts, p.m, kColumns, [&](const Rows& of) {
      const int block = blockIdx.x;
      if (block < of.first_block || block >= of.end_block) return;
      expert = of.expert, column0 = of.begin + (block - of.first_block) * kColumns, end = of.end;
    });
    const unsigned found = __ballot_sync(0xffffffff, expert >= 0);
    if (found == 0) {
      if (blockIdx.x + 1 == gridDim.x && blockIdx.z == 0) write_zeros<kThreads>(p, all.end);
      return;
    }
    const int finder = __ffs(found) - 1;
    column0 = __shfl_sync(0xffffffff, column0, finder), end = __shfl_sync(0xffffffff, end, finder);
    segment += __shfl_sync(0xffffffff, expert, finder) * p.segments_per_expert;
  }
  // A segment's last blocks move back until they are whole: some rows are then made twice, alike.
  const auto first_tile = [&](int group) {
    const int wanted = (blockIdx.y * kWarpsN + group) * kTiles;
    return segment * p.tiles_per_segment + min(wanted, p.tiles_per_segment - kTiles);
  };
  const int tile0 = first_tile(warp_n);

  const int table = kGrouped ? segment / p.segments_per_table : segment;
  if (!has_table) entries.load(tables + table * (1 << (2 * kBits)));

  // This warp's units are warp_k, warp_k + kWarpsK, ...: a block reads K front to back. All pointers move
  // by the same stride from one to the next, since kWarpsK units are always whole groups.
  const int64_t code_step = int64_t{p.tiles} * kUnitWords * kWarpsK;
  const uint32_t* codes = p.codes + (int64_t{warp_k} * p.tiles + tile0) * kUnitWords +
                          layout::place_of_run(kBits, lane) * (kBits == 4 ? 4 : 2);
  const int64_t scale_step = int64_t{p.tiles} * (8 * kScales) * (kWarpsK >> p.group_shift);
  const uint32_t* scales =
      p.scales + (int64_t{warp_k >> p.group_shift} * p.tiles + tile0) * (8 * kScales) + g * kScales;
  uint32_t ahead[kDepth][kTiles][kBits] = {}, scale[kDepth][kTiles][kScales] = {};
  const auto load_words = [&](int d, int r, bool on) {
    const uint32_t* at = codes + r * kUnitWords;
    if constexpr (kBits == 4) {
      load_codes(ahead[d][r], at, on);
    } else {
      load_codes(ahead[d][r][0], ahead[d][r][1], at, on);
      if constexpr (kBits == 3) load_codes(ahead[d][r][2], at - lane + 64, on);
    }
  };
  const auto load_scale = [&](int d, int r, bool on) {
    load_scales(scale[d][r], scales + r * (8 * kScales), on);
  };
  const auto advance = [&] { codes += code_step, scales += scale_step; };
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
      load_words(d, r, warp_k + d * kWarpsK < p.units);
      load_scale(d, r, warp_k + d * kWarpsK < p.units);
    }
    advance();
  }
  if constexpr (!kGrouped) {
    entries.store();
    wait_for_predecessor();
  }

  using X =
      std::conditional_t<has_ring(kBits), XThroughRing<kFragments, kThreads / 32>, XInRegisters<kFragments>>;
  X x(static_cast<uint32_t>(__cvta_generic_to_shared(shared)), p.units, kWarpsK);
#pragma unroll
  for (int j = 0; j < kFragments; ++j) {
    const int m = column0 + 8 * j + g;
    x.set_row(j, p.x + min(m, end - 1) * p.ldx + warp_k * layout::kUnit, m < end);
  }
  x.begin(warp_k);
  if (kGrouped && !has_table) entries.store();
  __syncthreads();  // the table is whole

  const uint32_t bank = kBits == 2 ? lane % 16 * 8 : lane * 4;
  float sum[kTiles][kFragments][4] = {};

  constexpr int kUnrolled = kDepth > 2 ? kDepth : 2;
  static_assert(kUnrolled % kDepth == 0 && kUnrolled % 2 == 0);  // codes; two sets or stages of x in turn
  for (int first = warp_k; first < p.units; first += kUnrolled * kWarpsK) {
#pragma unroll
    for (int l = 0; l < kUnrolled; ++l) {
      const int unit = first + l * kWarpsK, d = l % kDepth;
      if (l > 0 && unit >= p.units) break;
      const Fragments<kFragments>& now = x.take(l % 2, unit);
      const bool more = unit + kDepth * kWarpsK < p.units;
#pragma unroll
      for (int r = 0; r < kTiles; ++r) {
        uint32_t words[4];
#pragma unroll
        for (int w = 0; w < kBits; ++w) words[w] = ahead[d][r][w];
        if constexpr (kBits == 3) words[3] = fourth_word(words);
        // All lookups of the tile first: its registers are then free for the next unit's codes.
        uint32_t a[2][2][4];
        look_up<kBits, 0>(a[0], words, bank);
        look_up<kBits, 1>(a[1], words, bank);
        load_words(d, r, more);
        float part[kFragments][4] = {};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int j = 0; j < kFragments; ++j) {
            mma<T>(part[j], a[h][0], now[j][h].x, now[j][h].y);
            mma<T>(part[j], a[h][1], now[j][h].z, now[j][h].w);
          }
          if (h + 1 < 2 / kScales) continue;
          const float2 s = two_floats<S>(scale[d][r][kScales == 2 ? h : 0]);
#pragma unroll
          for (int j = 0; j < kFragments; ++j) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
              sum[r][j][c] = fmaf(c < 2 ? s.x : s.y, part[j][c], sum[r][j][c]);
              part[j][c] = 0.f;
            }
          }
        }
        load_scale(d, r, more);
      }
      advance();
    }
  }

  // Sums over the warps that shared K, in their order. The table's memory now holds the parts, each in
  // its fragment's order: lane 4g + t has rows g and g + 8 of columns 2t and 2t + 1.
  __syncthreads();
  constexpr int kParts = kWarpsN * kTiles * kFragments * 32;
  float4* const parts = reinterpret_cast<float4*>(shared);
#pragma unroll
  for (int r = 0; r < kTiles; ++r) {
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
      if (column0 + 8 * j + 2 * t >= end) continue;
      float (&s)[4] = sum[r][j];
      parts[warp_k * kParts + ((warp_n * kTiles + r) * kFragments + j) * 32 + lane] =
          make_float4(s[0], s[1], s[2], s[3]);
    }
  }
  __syncthreads();
  for (int id = threadIdx.x; id < kParts; id += kThreads) {
    const int j = id / 32 % kFragments, tile = id / 32 / kFragments;
    const int m = column0 + 8 * j + 2 * t;
    if (m >= end) continue;
    float4 total = parts[id];
#pragma unroll
    for (int w = 1; w < kWarpsK; ++w) {
      const float4 part = parts[w * kParts + id];
      total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
    }
    const int above = kGrouped ? segment / p.segments_per_expert * p.n : 0;  // rows of other experts
    const int row = (first_tile(tile / kTiles) + tile % kTiles) * layout::kTile + g - above;
    T* const out = reinterpret_cast<T*>(p.out);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = row + 8 * half;
      if (n >= p.n) break;
      const float bias = p.bias ? load_float(p.bias, n, static_cast<DType>(p.bias_dtype)) : 0.f;
      out[m * p.ldo + n] = from_float<T>((half ? total.z : total.x) + bias);
      if (m + 1 < end) out[(m + 1) * p.ldo + n] = from_float<T>((half ? total.w : total.y) + bias);
    }
  }
}

}  // namespace flute::sm80
