// y^T = W_hat * x^T on Hopper, for 9 rows of x and more, with warpgroup products: weights from registers as
// operand A, x from shared memory as operand B.
//
// Why. mma.sync takes x from registers, and every warp has to load it there through the pipe that also serves
// the lookups. A warpgroup product reads x from shared memory without any warp: 16 rows of x then cost
// little more than one.
//
// Who does what. A block multiplies 64 * kWarpgroups rows of weights (a group) with kColumns rows of x, one
// unit of 64 along K after the other. One thread keeps a ring of stages filled with bulk copies: codes,
// scales, and the unit's part of x, which image.cu has put in the order and swizzle that the product reads.
// Each other warpgroup takes its 64 rows' codes from the stage, looks the weights up (common/lookup.cuh) into
// registers, the fragment layout of wgmma being that of mma.sync for each of the four warps, and starts four
// products of 16 along K. While they run it looks up the next unit; then it waits, gives the stage back,
// and, at the end of a scale, adds the sums times the scale to its totals.
//
// Which work. Groups, blocks of columns and units make one line, of which every block takes an equal piece, as
// many blocks as there are multiprocessors: no shape leaves some of them idle. Where a piece ends inside a
// group, the sums so far go to memory, and join.cu adds them up in the order of the blocks.
//
// When. Codes and scales of the first stages and the table come before the wait for the kernel before, x
// after it.
#pragma once

#include "core/early.cuh"
#include "qgemm/common/lookup.cuh"
#include "qgemm/sm90/config.h"
#include "qgemm/sm90/ptx.cuh"

namespace flute::sm90 {

// Rows of a group: the first tile, and the first row that it owns. The last group of a table moves back until
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

// Writes sums of rows n, n + 8 and columns m, m + 1.
template <class T>
__device__ __forceinline__ void write_out(const Params& p, const float (&sum)[4], int m, int n,
                                          int first_row) {
  T* const out = reinterpret_cast<T*>(p.out);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = n + 8 * half;
    if (row < first_row || row >= p.n) continue;
    const float bias = p.bias ? load_float(p.bias, row, static_cast<DType>(p.bias_dtype)) : 0.f;
    if (m < p.m) out[m * p.ldo + row] = from_float<T>(sum[2 * half] + bias);
    if (m + 1 < p.m) out[(m + 1) * p.ldo + row] = from_float<T>(sum[2 * half + 1] + bias);
  }
}

// kScales: scales of a unit, 1 or (groups of 32) 2. S: their type.
template <int kBits, class T, class S, int kScales, int kColumns, int kWarpgroups>
__global__ void __launch_bounds__(kWarpgroups * 128 + 128, 1) kernel(const __grid_constant__ Params p) {
  constexpr Config kConfig{kColumns, kWarpgroups};
  constexpr Stage kStage(kBits, kScales, kConfig);
  constexpr int kStages = stages(kStage), kTiles = 4 * kWarpgroups, kLookers = kWarpgroups * 128;
  constexpr int kFragments = kColumns / 8;
  launch_dependents();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  const uint32_t barriers = base + layout::kTableBytes, ring = barriers + kBarrierBytes;
  const auto full = [&](int stage) { return barriers + 16 * stage; };
  const auto empty = [&](int stage) { return barriers + 16 * stage + 8; };
  const int64_t total = int64_t{p.groups} * p.column_blocks * p.units;
  const Piece piece = piece_of(total, blockIdx.x, gridDim.x);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      barrier_init(full(stage), 1);
      barrier_init(empty(stage), kWarpgroups * 4);
    }
    barriers_are_initialized();
  }
  __syncthreads();

  if (warp >= kWarpgroups * 4) {  // loads
    leave_registers<kWarpgroups == 4 ? 24 : 40>();
    if (threadIdx.x != kLookers) return;
    const auto load_weights = [&](int i, int stage) {
      const int unit = i % p.units;
      const Group group(p, i / p.units / p.column_blocks, kTiles);
      const uint32_t at = ring + stage * kStage.bytes() + kStage.x;
      barrier_expect(full(stage), kStage.used());
      copy(at, p.codes + (int64_t{unit} * p.tiles + group.tile) * (32 * kBits), kStage.codes, full(stage));
      copy(at + kStage.codes,
           p.scales + (int64_t{unit >> p.group_shift} * p.tiles + group.tile) * (8 * kScales), kStage.scales,
           full(stage));
    };
    const auto load_x = [&](int i, int stage) {
      const int block = i / p.units % p.column_blocks;
      const char* image = static_cast<const char*>(p.image);
      copy(ring + stage * kStage.bytes(), image + (int64_t{block} * p.units + i % p.units) * kStage.x,
           kStage.x, full(stage));
    };
    const int first = min(piece.end - piece.begin, kStages);
    for (int i = 0; i < first; ++i) load_weights(piece.begin + i, i);
    wait_for_predecessor();
    for (int i = 0; i < first; ++i) load_x(piece.begin + i, i);
    int stage = 0, parity = 0;
    for (int i = piece.begin + kStages; i < piece.end; ++i) {
      barrier_wait(empty(stage), parity);
      load_weights(i, stage);
      load_x(i, stage);
      if (++stage == kStages) stage = 0, parity ^= 1;
    }
    return;
  }
  if constexpr (kWarpgroups == 4) take_registers<112>();
  if constexpr (kWarpgroups == 3) take_registers<152>();
  if constexpr (kWarpgroups == 2) take_registers<232>();
  if constexpr (kWarpgroups == 1) take_registers<240>();

  const int g = lane / 4, t = lane % 4;
  const uint32_t bank = kBits == 2 ? lane % 16 * 8 : lane * 4;
  int left = piece.end - piece.begin;
  if (left == 0) return;
  int unit = piece.begin % p.units, column_block = piece.begin / p.units % p.column_blocks;
  int group = piece.begin / p.units / p.column_blocks;
  if (table_is_elsewhere()) __trap();
  int table = Group(p, group, kTiles).table;
  const auto tables = [&] { return static_cast<const float2*>(p.tables) + table * (1 << (2 * kBits)); };
  const auto all_lookers = [] { asm volatile("bar.sync 1, %0;" ::"n"(kLookers) : "memory"); };
  {
    Table<kBits, T, kLookers> entries;
    entries.load(tables());
    entries.store();
    all_lookers();
  }
  const auto use_table_of = [&](int next_group) {
    const int wanted = Group(p, next_group, kTiles).table;
    if (wanted == table) return;
    table = wanted;
    all_lookers();  // have looked up
#pragma unroll 1
    for (int i = 0; i < (2048 + kLookers - 1) / kLookers;
         ++i) {  // few registers are free here, and tables change rarely
      Table<kBits, T, 2048> line;
      line.load(tables(), i * kLookers);
      line.store(i * kLookers);
    }
    all_lookers();
  };

  // The A fragments of a unit, and its scales.
  const auto look_up_unit = [&](uint32_t (&a)[2][2][4], uint32_t (&scale)[kScales], int stage, int parity) {
    barrier_wait(full(stage), parity);
    const uint32_t at = ring + stage * kStage.bytes() + kStage.x;
    const uint32_t codes = at + warp * (128 * kBits),
                   scales = at + kStage.codes + (warp * 8 + g) * (4 * kScales);
    uint32_t words[4];
    if constexpr (kBits == 4) {
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                   : "r"(codes + lane * 16));
    } else {
      asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];"
                   : "=r"(words[0]), "=r"(words[1])
                   : "r"(codes + lane * 8));
      if constexpr (kBits == 3) {
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(words[2]) : "r"(codes + 256 + lane * 4));
        words[3] = fourth_word(words);
      }
    }
#pragma unroll
    for (int s = 0; s < kScales; ++s)
      asm volatile("ld.shared.b32 %0, [%1];" : "=r"(scale[s]) : "r"(scales + 4 * s));
    look_up<kBits>(a[0], words, 0, bank);
    look_up<kBits>(a[1], words, 1, bank);
  };

  float part[kScales][kFragments][4], sum[kFragments][4] = {};
  uint32_t a[2][2][2][4], scale[2][kScales];
  int stage = 0, parity = 0;
  bool fresh = true;       // the next product begins a sum
  bool whole = unit == 0;  // this block has the group's first unit
  const unsigned scale_mask = p.group_shift >= 31 ? ~0u : (1u << p.group_shift) - 1;
  look_up_unit(a[0], scale[0], 0, 0);
  while (left > 0) {
#pragma unroll
    for (int turn = 0; turn < 2; ++turn) {
      if (left <= 0) break;
      const uint64_t x = descriptor(ring + stage * kStage.bytes());
      products_begin();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
          const bool begins = s == 0 && (kScales == 2 || (h == 0 && fresh));
          Product<T, kColumns>::run(part[kScales == 2 ? h : 0], a[turn][h][s], x + 2 * (2 * h + s), !begins);
        }
      }
      products_end();

      const bool last = unit + 1 == p.units || left == 1;  // of this block's part of the group
      const int next_stage = stage + 1 == kStages ? 0 : stage + 1;
      const int next_parity = stage + 1 == kStages ? parity ^ 1 : parity;
      if (left > 1) {
        if (last && column_block + 1 == p.column_blocks) use_table_of(group + 1);
        look_up_unit(a[1 - turn], scale[1 - turn], next_stage, next_parity);
      }
      products_wait();
      if (lane == 0) barrier_arrive(empty(stage));
      fresh = last || ((unit + 1) & scale_mask) == 0;
      if (kScales == 2 || fresh) {
#pragma unroll
        for (int h = 0; h < kScales; ++h) {
          const float2 s = two_floats<S>(scale[turn][h]);
#pragma unroll
          for (int j = 0; j < kFragments; ++j) {
#pragma unroll
            for (int c = 0; c < 4; ++c) sum[j][c] = fmaf(c < 2 ? s.x : s.y, part[h][j][c], sum[j][c]);
          }
        }
      }
      if (last) {
        if (whole && unit + 1 == p.units) {
          const Group rows(p, group, kTiles);
#pragma unroll
          for (int j = 0; j < kFragments; ++j)
            write_out<T>(p, sum[j], column_block * kColumns + 8 * j + 2 * t,
                         (rows.tile + warp) * layout::kTile + g, rows.first_row);
        } else {
          // Two places a block: for a group that the block before began, and for one that the next goes on with.
          float4* to = static_cast<float4*>(p.parts) +
                       (int64_t{blockIdx.x} * 2 + whole) * (kFragments * kLookers) + threadIdx.x;
#pragma unroll
          for (int j = 0; j < kFragments; ++j)
            to[j * kLookers] = make_float4(sum[j][0], sum[j][1], sum[j][2], sum[j][3]);
        }
#pragma unroll
        for (int j = 0; j < kFragments; ++j) {
#pragma unroll
          for (int c = 0; c < 4; ++c) sum[j][c] = 0.f;
        }
        whole = true;
      }
      if (++unit == p.units) {
        unit = 0;
        if (++column_block == p.column_blocks) column_block = 0, ++group;
      }
      --left, stage = next_stage, parity = next_parity;
    }
  }
}

// Adds up what several blocks have of a group and block of columns, in the order of the blocks.
// Grid: column blocks, groups; blocks: of kernel().
template <class T, int kColumns, int kWarpgroups>
__global__ void __launch_bounds__(128) join(const __grid_constant__ Params p, int blocks) {
  constexpr int kTiles = 4 * kWarpgroups, kLookers = kWarpgroups * 128, kFragments = kColumns / 8;
  launch_dependents();
  wait_for_predecessor();
  const int64_t total = int64_t{p.groups} * p.column_blocks * p.units;
  const int begin = (blockIdx.y * p.column_blocks + blockIdx.x) * p.units, end = begin + p.units;
  int first = static_cast<int>(int64_t{begin} * blocks / total);
  while (piece_of(total, first, blocks).end <= begin) ++first;
  if (piece_of(total, first, blocks).end >= end) return;  // one block had all of it
  const Group rows(p, blockIdx.y, kTiles);
  for (int id = blockIdx.z * 128 + threadIdx.x; id < kFragments * kLookers; id += gridDim.z * 128) {
    float sum[4] = {};
    for (int block = first;; ++block) {
      const Piece piece = piece_of(total, block, blocks);
      const float4 part = static_cast<const float4*>(
          p.parts)[(int64_t{block} * 2 + (begin >= piece.begin)) * (kFragments * kLookers) + id];
      sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
      if (piece.end >= end) break;
    }
    const int j = id / kLookers, thread = id % kLookers, lane = thread % 32;
    write_out<T>(p, sum, blockIdx.x * kColumns + 8 * j + lane % 4 * 2,
                 (rows.tile + thread / 32) * layout::kTile + lane / 4, rows.first_row);
  }
}

}  // namespace flute::sm90
