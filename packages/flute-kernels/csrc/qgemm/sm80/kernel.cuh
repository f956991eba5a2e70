// y^T = W_hat * x^T for up to 16 rows of x, with the weights as operand A of mma.m16n8k16.
//
// What bounds it. Few rows of x mean that every code is read once and used at once: the time is that of
// reading the codes or of looking them up, whichever is longer. A lookup is one 4-byte load from shared
// memory for two weights (3 and 4 bits) or one of 8 bytes for four (2 bits), and shared memory gives 128
// bytes a clock and multiprocessor: 64 weights. The codes themselves, the scales and x come through the
// same pipe, so the kernel counts its wavefronts: of a 16 x 64 unit at 4 bits, 16 for the lookups, 4 for
// the codes, half a one for the scale, and for x (2 to 16) / tiles.
//
// Who does what. A warp owns `tiles` neighbouring tiles of 16 rows and every warps_k-th chunk of 128
// along K; the fragments of x that it loads serve all its tiles. The lanes' codes lie in memory in the
// order in which the lanes need them (common/layout.h), so a unit is one load a lane, always under way
// `depth` units ahead. A byte of codes is an index into the pair table. Each of the table's 256 entries
// is copied into all 32 banks, so that no two lanes ever want different lines of the same bank:
//
//   entry i, copy c at 256 * i + 4 * c      2 bits: four weights, sixteen copies, at 256 * i + 8 * c
//
// With 256 bytes from one entry to the next, the address is a byte of codes above a constant byte, which
// one PRMT puts together (128 would do, but takes two instructions, and shared memory is not scarce). Two
// lookups a row half make the A fragments of two products. Scales are applied to the sums, in float, once
// every 64 or 32 weights: 4 FMAs an accumulator tile, where scaling the weights would take 16 and round.
//
// What is rounded: table entries to the type of x (exact where they fit it, as fp16 tables do for fp16),
// the result once. Sums run in float in a fixed order: each warp over its chunks, then the block over its
// warps; blocks share no sums.
//
// When. Codes, scales and the table do not depend on the kernel before, so they are loaded before
// waiting for it; x and the result come after.
#pragma once

#include "core/convert.cuh"
#include "qgemm/common/layout.h"
#include "qgemm/sm80/config.h"
#include "qgemm/sm80/ptx.cuh"

namespace flute::sm80 {

extern __shared__ __align__(1024) unsigned char shared[];

// Copies a table into every bank, as the type of x.
template <int kBits, class T, int kThreads>
__device__ __forceinline__ void fill_table(const float2* table) {
  const int copy = threadIdx.x % 8;  // 16 bytes of a line of 128
#pragma unroll
  for (int id = threadIdx.x; id < 256 * 8; id += kThreads) {
    const int entry = id / 8;
    uint4 line;
    if constexpr (kBits == 2) {
      const float2 low = table[entry & 15], high = table[entry >> 4];
      const uint32_t first = pack_two<T>(low.x, low.y), second = pack_two<T>(high.x, high.y);
      line = make_uint4(first, second, first, second);
    } else {
      // 3 bits: 64 entries four times over, so that the two top bits of an index do not matter.
      const float2 pair = table[kBits == 3 ? entry & 63 : entry];
      const uint32_t both = pack_two<T>(pair.x, pair.y);
      line = make_uint4(both, both, both, both);
    }
    *reinterpret_cast<uint4*>(shared + entry * 256 + copy * 16) = line;
  }
}

// The A fragments of the two products of K half h, from a lane's words of a unit.
template <int kBits>
__device__ __forceinline__ void look_up(uint32_t (&a)[2][4], const uint32_t (&words)[4], int h,
                                        uint32_t offset) {
  if constexpr (kBits == 2) {
    const auto quad = [&](uint32_t address, uint32_t& low, uint32_t& high) {
      const uint2 four = *reinterpret_cast<const uint2*>(shared + address);
      low = four.x, high = four.y;
    };
    quad(table_address<0>(words[h], offset), a[0][0], a[0][2]);
    quad(table_address<1>(words[h], offset), a[1][0], a[1][2]);
    quad(table_address<2>(words[h], offset), a[0][1], a[0][3]);
    quad(table_address<3>(words[h], offset), a[1][1], a[1][3]);
  } else {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t word = words[2 * h + r];
      const auto pair = [&](uint32_t address) {
        return *reinterpret_cast<const uint32_t*>(shared + address);
      };
      a[0][r] = pair(table_address<0>(word, offset));
      a[0][2 + r] = pair(table_address<1>(word, offset));
      a[1][r] = pair(table_address<2>(word, offset));
      a[1][2 + r] = pair(table_address<3>(word, offset));
    }
  }
}

// kScales: scales of a chunk (1 for groups of 128 and more).
template <int kBits, class T, int kScales, int kColumns, int kTiles, int kWarpsK, int kWarpsN, int kDepth,
          int kResident>
__global__ void __launch_bounds__(kWarpsK * kWarpsN * 32, kResident)
    kernel(const __grid_constant__ Params p) {
  constexpr int kThreads = kWarpsK * kWarpsN * 32;
  constexpr int kFragments = kColumns / 8;
  constexpr int kUnitWords = 32 * kBits;
  constexpr bool kScalesAhead = kTiles < 5;  // a whole chunk ahead; with more tiles, that hides no more
  launch_dependents();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int warp_k = warp % kWarpsK, warp_n = warp / kWarpsK;
  const int column0 = blockIdx.x % p.column_blocks * kColumns;
  const int row_block = blockIdx.x / p.column_blocks;
  const int table = row_block / p.blocks_per_table;
  // A table's last blocks move back until they are whole: some rows are then made twice, alike.
  const auto first_tile = [&](int group) {
    const int wanted = (row_block % p.blocks_per_table * kWarpsN + group) * kTiles;
    return table * p.tiles_per_table + min(wanted, p.tiles_per_table - kTiles);
  };
  const int tile0 = first_tile(warp_n);

  // This warp's chunks are warp_k, warp_k + kWarpsK, ...; `codes` stands at the next unit to load.
  const int mine = (p.chunks - warp_k + kWarpsK - 1) / kWarpsK;
  const int64_t unit_stride = int64_t{p.tiles} * kUnitWords;
  const int64_t chunk_stride = (2 * kWarpsK - 1) * unit_stride;  // from a second unit to the next first one
  const uint32_t* codes = p.codes + tile0 * int64_t{kUnitWords} + 2 * warp_k * unit_stride;
  const uint32_t* const scales = p.scales + (tile0 * int64_t{8} + g) * kScales;
  const int64_t scale_stride = p.tiles * int64_t{8 * kScales};

  uint32_t ahead[kDepth][kTiles][kBits];
  const auto load_unit = [&](int d, int r, bool on) {
    const uint32_t* at = codes + r * kUnitWords;
    if constexpr (kBits == 4) {
      load_codes(ahead[d][r], at + 4 * lane, on);
    } else {
      load_codes(ahead[d][r][0], ahead[d][r][1], at + 2 * lane, on);
      if constexpr (kBits == 3) load_codes(ahead[d][r][2], at + 64 + lane, on);
    }
  };
  uint32_t scale[kTiles][kScales], next_scale[kTiles][kScales];
  const auto load_scale = [&](int r, int i) {
    const int chunk = warp_k + i * kWarpsK;
    const int line = kScales == 1 ? chunk >> p.group_shift : chunk;
    load_scales(next_scale[r], scales + line * scale_stride + r * (8 * kScales), i < mine);
  };
#pragma unroll
  for (int d = 0; d < kDepth; ++d) {
#pragma unroll
    for (int r = 0; r < kTiles; ++r) {
#pragma unroll
      for (int w = 0; w < kBits; ++w) ahead[d][r][w] = 0;
      load_unit(d, r, d / 2 < mine);
      if (d == 0) {
#pragma unroll
        for (int s = 0; s < kScales; ++s) next_scale[r][s] = 0;
        load_scale(r, 0);
      }
    }
    codes += d % 2 ? chunk_stride : unit_stride;
  }
  fill_table<kBits, T, kThreads>(static_cast<const float2*>(p.tables) + table * (1 << (2 * kBits)));
  wait_for_predecessor();

  // x, a unit ahead: lanes 4g .. 4g + 3 hold row g. Rows beyond M and columns beyond K stay zero.
  const uint16_t* x[kFragments];
  bool has_row[kFragments];
  uint4 next_x[kFragments][2];
#pragma unroll
  for (int j = 0; j < kFragments; ++j) {
    const int m = column0 + 8 * j + g;
    has_row[j] = m < p.m;
    x[j] = p.x + min(m, p.m - 1) * p.ldx + 8 * t;
    next_x[j][0] = next_x[j][1] = make_uint4(0, 0, 0, 0);
  }
  const auto load_unit_of_x = [&](int unit) {
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int k = unit * layout::kUnit + 32 * h;
        if (k >= p.k) next_x[j][h] = make_uint4(0, 0, 0, 0);
        load_x(next_x[j][h], x[j] + k, k < p.k && has_row[j]);
      }
    }
  };
  load_unit_of_x(2 * warp_k);
  __syncthreads();  // the table is whole

  const uint32_t copy = kBits == 2 ? lane % 16 * 8 : lane * 4;
  float sum[kTiles][kFragments][4] = {};

  constexpr int kUnrolled = kDepth > 2 ? kDepth : 2;
  for (int i0 = 0; i0 < mine; i0 += kUnrolled / 2) {
#pragma unroll
    for (int l = 0; l < kUnrolled; ++l) {
      const int i = i0 + l / 2, d = l % kDepth, u = l % 2;  // chunk, register set, unit of the chunk
      if (l > 1 && i >= mine) break;
      const int unit = 2 * (warp_k + i * kWarpsK) + u;
      uint4 b[kFragments][2];
#pragma unroll
      for (int j = 0; j < kFragments; ++j) b[j][0] = next_x[j][0], b[j][1] = next_x[j][1];
      load_unit_of_x(u == 0 ? unit + 1 : unit + 2 * kWarpsK - 1);
      if (kScalesAhead && u == 0) {
#pragma unroll
        for (int r = 0; r < kTiles; ++r) {
#pragma unroll
          for (int s = 0; s < kScales; ++s) scale[r][s] = next_scale[r][s];
          load_scale(r, i + 1);
        }
      }
#pragma unroll
      for (int r = 0; r < kTiles; ++r) {
        uint32_t words[4];
#pragma unroll
        for (int w = 0; w < kBits; ++w) words[w] = ahead[d][r][w];
        if constexpr (kBits == 3)
          words[3] =
              (words[0] >> 6 & 0x03030303u) | (words[1] >> 4 & 0x0c0c0c0cu) | (words[2] >> 2 & 0x30303030u);
        load_unit(d, r, i + (u + kDepth) / 2 < mine);

        float part[kFragments][4] = {};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          uint32_t a[2][4];
          look_up<kBits>(a, words, h, copy);
#pragma unroll
          for (int j = 0; j < kFragments; ++j) {
            mma<T>(part[j], a[0], b[j][h].x, b[j][h].y);
            mma<T>(part[j], a[1], b[j][h].z, b[j][h].w);
          }
          if (h == 1 || kScales == 4) {
            const uint32_t both = (kScalesAhead ? scale : next_scale)[r][kScales == 4   ? 2 * u + h
                                                                         : kScales == 2 ? u
                                                                                        : 0];
            const float s0 = scale_to_float(both, p.scale_bf16),
                        s1 = scale_to_float(both >> 16, p.scale_bf16);
#pragma unroll
            for (int j = 0; j < kFragments; ++j) {
#pragma unroll
              for (int c = 0; c < 4; ++c) {
                sum[r][j][c] = fmaf(c < 2 ? s0 : s1, part[j][c], sum[r][j][c]);
                if (kScales == 4) part[j][c] = 0.f;
              }
            }
          }
        }
        if (!kScalesAhead && u == 1) load_scale(r, i + 1);
      }
      codes += (u + kDepth) % 2 ? chunk_stride : unit_stride;
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
      if (column0 + 8 * j + 2 * t >= p.m) continue;
      float (&s)[4] = sum[r][j];
      parts[warp_k * kParts + ((warp_n * kTiles + r) * kFragments + j) * 32 + lane] =
          make_float4(s[0], s[1], s[2], s[3]);
    }
  }
  __syncthreads();
  for (int id = threadIdx.x; id < kParts; id += kThreads) {
    const int j = id / 32 % kFragments, tile = id / 32 / kFragments;
    const int m = column0 + 8 * j + 2 * t;
    if (m >= p.m) continue;
    float4 total = parts[id];
#pragma unroll
    for (int w = 1; w < kWarpsK; ++w) {
      const float4 part = parts[w * kParts + id];
      total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
    }
    const int row = (first_tile(tile / kTiles) + tile % kTiles) * layout::kTile + g;
    T* const out = reinterpret_cast<T*>(p.out);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int n = row + 8 * half;
      if (n >= p.n) break;
      const float bias = p.bias ? load_float(p.bias, n, static_cast<DType>(p.bias_dtype)) : 0.f;
      out[m * p.ldo + n] = from_float<T>((half ? total.z : total.x) + bias);
      if (m + 1 < p.m) out[(m + 1) * p.ldo + n] = from_float<T>((half ? total.w : total.y) + bias);
    }
  }
}

}  // namespace flute::sm80
