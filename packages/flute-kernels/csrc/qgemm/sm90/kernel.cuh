// y^T = W_hat * x^T on Hopper with warpgroup products: weights from registers as operand A, x from shared
// memory as operand B.
//
// Why. mma.sync takes x from registers, and every warp has to load it there through the pipe that also serves
// the lookups. A warpgroup product reads x from shared memory by itself: 16 rows of x then cost little more
// than one, and 64 a third of what they cost there.
//
// Who does what. A block multiplies a group of 64 * warpgroups * slabs rows of weights with kColumns rows of x,
// one unit of 64 along K after the other, or, where there are too few groups, several blocks do, each with a
// part of K. One thread keeps a ring of stages in shared memory filled with codes, scales, and x, which image.cuh
// has put into the order that the product reads (ring.cuh). The warpgroups multiply. Each takes its slabs of 64
// rows in turn: it looks the weights up (common/lookup.cuh) in the fragment layout of the product, which is that
// of mma.sync for each of the four warps, waits for the products that it started before, adds what is whole (the
// sums of a scale, times the scale) to its totals, and starts the next four products of 16 along K. So lookups
// run while products run, and warpgroups fill each other's pauses.
//
// At the end, blocks that share a group write their sums to memory, and the one that comes last adds them up, in
// the order of the parts of K, whoever it is.
//
// What bounds it. At 32 columns, instructions: a warp spends about 80 on its 16 x 64 weights, of which 36 look up
// and multiply. At 64 and more, the shared-memory pipe, of which a 16 x 64 tile at 4 bits takes 16 wavefronts for
// lookups, 4 for codes and kColumns / 4 for what the products read of x. The products themselves take
// kColumns / 2 clocks for 64 x 16 weights, but at least 13.
//
// When. Codes, scales and the table come before the wait for the kernel before, x and everything written after
// it.
#pragma once

#include "core/early.cuh"
#include "qgemm/common/lookup.cuh"
#include "qgemm/sm90/config.h"
#include "qgemm/sm90/output.cuh"
#include "qgemm/sm90/ptx.cuh"
#include "qgemm/sm90/ring.cuh"

namespace flute::sm90 {

template <int... kNumbers>
constexpr int kThreadsOf = threads(Config{kNumbers...});

// kScales: scales of a unit, 1 or (groups of 32) 2. S: their type.
template <int kBits, class T, class S, int kScales, int kColumns, int kWarpgroups, int kSlabs>
__global__ void __launch_bounds__(kThreadsOf<kColumns, kWarpgroups, kSlabs>, 1)
    kernel(const __grid_constant__ Params p) {
  constexpr Config kConfig{kColumns, kWarpgroups, kSlabs};
  constexpr Stage kStage(kBits, kScales, kConfig);
  constexpr int kThreads = kWarpgroups * 128, kFragments = kColumns / 8;
  constexpr int kSteps = kScales, kHalves = 2 / kScales;  // a step: the products of one scale of a unit
  constexpr int kUnrolled = kSlabs * kSteps % 2 ? 2 : 1;  // steps use two sets of A fragments in turn
  launch_dependents();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  Ring<kStage.bytes(), stages(kStage)> ring(base + layout::kTableBytes);
  if (threadIdx.x == 0) ring.init(kWarpgroups * 4);
  const Share mine(p.units);
  const Group group(p, blockIdx.z, tiles(kConfig));
  __syncthreads();
  if (warp >= kWarpgroups * 4) {
    if constexpr (shares_registers(kConfig)) leave_registers<24>();
    if (warp == kWarpgroups * 4 && is_elected())
      fill<kBits, kScales, stages(kStage)>(ring, p, kStage, group.tile, blockIdx.y, mine.first, mine.count);
    return;
  }
  if constexpr (shares_registers(kConfig)) {
    static_assert(kWarpgroups == 2, "168 registers a thread at the launch are 2 * 240 + 24 now");
    take_registers<240>();
  }
  if (table_is_elsewhere()) __trap();
  const auto all_lookers = [] { asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory"); };
  {
    Table<kBits, T, kThreads> entries;
    entries.load(static_cast<const float2*>(p.tables) + group.table * (1 << (2 * kBits)));
    entries.store();
    all_lookers();
  }

  const int warp_tile = warp / 4 * (4 * kSlabs) + warp % 4;  // of the first slab
  const uint32_t bank = kept(kBits == 2 ? lane % 16 * 8 : lane * 4);
  const int units_per_scale = static_cast<int>(kept(p.group_shift >= 31 ? 0x7fffffff : 1 << p.group_shift));
  const uint32_t leader = kept(lane == 0);
  const uint32_t codes_at = kept(kStage.x + warp_tile * (128 * kBits) + lane * (kBits == 4 ? 16 : 8));
  const uint32_t scales_at = kept(kStage.x + kStage.codes + (warp_tile * 8 + lane / 4) * (4 * kScales));
  uint32_t words[kSlabs][4];
  const auto load_words = [&] {
#pragma unroll
    for (int r = 0; r < kSlabs; ++r) {
      const uint32_t at = ring.data() + codes_at + r * (4 * 128 * kBits);
      if constexpr (kBits == 4) {
        load_shared(words[r], at);
      } else {
        load_shared(words[r][0], words[r][1], at);
        if constexpr (kBits == 3) load_shared(words[r][2], at + 256 - lane * 4);
      }
    }
  };

  float sum[kSlabs][kFragments][4] = {}, part[kSlabs][kFragments][4];
  uint32_t a[2][kHalves][2][4];
  uint32_t scale[2] = {};      // of the products that run, and of the next
  bool fresh = true;           // the next products of a slab begin the sums of a scale
  bool ends = false;           // the products that run end them
  uint32_t running_empty = 0;  // barrier of the stage whose products run
  const auto finish = [&](int r) {
    products_wait();
    hold(part[r]);
    if (!ends) return;
    const float2 s = two_floats<S>(scale[0]);
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[r][j][c] = fmaf(c < 2 ? s.x : s.y, part[r][j][c], sum[r][j][c]);
    }
    hold(sum[r]);
  };

  int until_scale = units_per_scale - mine.first % units_per_scale;  // units
  int left = mine.count;
  ring.wait_full();
  load_words();
  while (left > 0) {
#pragma unroll
    for (int u = 0; u < kUnrolled; ++u) {
      if (u > 0 && left == 0) {
        products_wait();  // on every way out of the pipeline, or the compiler makes it none
        break;
      }
      --left, --until_scale;
      const uint32_t data = ring.data(), empty = ring.empty();
      const uint64_t x = descriptor(data);
      const bool unit_ends = kScales == 2 || until_scale == 0 || left == 0;
#pragma unroll
      for (int r = 0; r < kSlabs; ++r) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          uint32_t (&now)[kHalves][2][4] = a[((u * kSlabs + r) * kSteps + s) % 2];
          if (kBits == 3 && s == 0) words[r][3] = fourth_word(words[r]);
#pragma unroll
          for (int h = 0; h < kHalves; ++h) look_up<kBits>(now[h], words[r], s * kHalves + h, bank);
          if (unit_ends) load_shared(scale[1], data + scales_at + r * (4 * 32 * kScales) + 4 * s);
          if (r + 1 == kSlabs && s + 1 == kSteps && left > 0) {
            ring.advance();
            ring.wait_full();
            load_words();
          }
          if (r == 0 && s == 0) {
            finish(kSlabs - 1);
            if (leader && running_empty != 0) barrier_arrive(running_empty);
          } else {
            finish(s > 0 ? r : r - 1);
          }
          ends = unit_ends;
          scale[0] = scale[1];
          hold(part[r]);
          products_begin();
#pragma unroll
          for (int h = 0; h < kHalves; ++h) {
#pragma unroll
            for (int q = 0; q < 2; ++q) {
              const bool begins = h == 0 && q == 0 && (kScales == 2 || fresh);
              Product<T, kColumns>::run(part[r], now[h][q], x + 2 * (2 * (s * kHalves + h) + q), !begins);
            }
          }
          products_end();
        }
      }
      fresh = unit_ends;
      if (until_scale == 0) until_scale = units_per_scale;
      running_empty = empty;
    }
  }
  finish(kSlabs - 1);

  wait_for_predecessor();
  const int row = (group.tile + warp_tile) * layout::kTile + lane / 4,
            column = blockIdx.y * kColumns + 2 * (lane % 4);
  if (mine.parts > 1) {
    float4* const parts = static_cast<float4*>(p.parts) +
                          mine.set * mine.parts * int64_t{kSlabs * kFragments * kThreads} + threadIdx.x;
    const auto place = [&](int part, int fragment) {
      return parts + (part * (kSlabs * kFragments) + fragment) * kThreads;
    };
#pragma unroll
    for (int r = 0; r < kSlabs; ++r) {
#pragma unroll
      for (int j = 0; j < kFragments; ++j)
        *place(mine.part, r * kFragments + j) =
            make_float4(sum[r][j][0], sum[r][j][1], sum[r][j][2], sum[r][j][3]);
    }
    all_lookers();  // have written, and have looked up: the table makes room for a word
    if (threadIdx.x == 0) {
      __threadfence();
      *reinterpret_cast<int*>(shared) = atomicAdd(p.arrived + mine.set, 1);
      __threadfence();
    }
    all_lookers();
    if (*reinterpret_cast<const int*>(shared) + 1 < mine.parts) return;
#pragma unroll
    for (int f = 0; f < kSlabs * kFragments; ++f) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[f / kFragments][f % kFragments][c] = 0.f;
    }
#pragma unroll 2
    for (int i = 0; i < mine.parts; ++i) {
      float4 v[kSlabs * kFragments];
#pragma unroll
      for (int f = 0; f < kSlabs * kFragments; ++f) v[f] = __ldcg(place(i, f));
#pragma unroll
      for (int f = 0; f < kSlabs * kFragments; ++f) {
        float (&total)[4] = sum[f / kFragments][f % kFragments];
        total[0] += v[f].x, total[1] += v[f].y, total[2] += v[f].z, total[3] += v[f].w;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kSlabs; ++r) {
#pragma unroll
    for (int j = 0; j < kFragments; ++j)
      write_out<T>(p, sum[r][j], column + 8 * j, row + 64 * r, group.first_row);
  }
}

}  // namespace flute::sm90
