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
// At the end, blocks that share a group add up their parts of K, in the order of the parts. Where they run at the
// same time, as a cluster, each adds up a share of the rows, which it reads from the others' shared memory. Else they
// write their sums to memory, and the block that comes last adds them up.
//
// What bounds it. At 32 columns, instructions: a warp spends about 60 on its 16 x 64 weights, of which 36 look up
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

// kGroup: of scales, 32, 64, or 128 for all above. S: the scales' type.
template <int kBits, class T, class S, int kGroup, int kColumns, int kWarpgroups, int kSlabs>
__global__ void __launch_bounds__(kThreadsOf<kColumns, kWarpgroups, kSlabs>, 1)
    kernel(const __grid_constant__ Params p) {
  constexpr Config kConfig{kColumns, kWarpgroups, kSlabs};
  constexpr Stage kStage(kBits, kGroup, kConfig);
  constexpr int kThreads = kWarpgroups * 128, kFragments = kColumns / 8;
  static_assert(kSlabs * kFragments * kThreads * 16 <= stages(kStage) * kStage.bytes());
  constexpr int kSteps = layout::scales_per_unit(kGroup);  // of a slab's unit: the products of one scale
  constexpr int kHalves = 2 / kSteps;
  launch_dependents();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  Ring<kStage.bytes(), stages(kStage)> ring(base + layout::kTableBytes);
  if (threadIdx.x == 0) ring.init(kWarpgroups * 4);
  const Share mine(stages_of(p.units));
  const Group group(p, blockIdx.z, tiles(kConfig));
  __syncthreads();
  if (warp >= kWarpgroups * 4) {
    if constexpr (shares_registers(kConfig)) leave_registers<24>();
    if (warp == kWarpgroups * 4 && is_elected())
      fill<kBits, kGroup, stages(kStage)>(ring, p, kStage, group.tile, blockIdx.y, mine.first, mine.count);
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
  const uint32_t bank = kept((base & 0xff000000) + (kBits == 2 ? lane % 16 * 8 : lane * 4));
  const uint32_t leader = kept(lane == 0);
  const uint32_t codes_at = kept(kStage.x + warp_tile * (128 * kBits) + lane * (kBits == 4 ? 16 : 8));
  const uint32_t scales_at = kept(kStage.x + kStage.codes() + (warp_tile * 8 + lane / 4) * (4 * kSteps));
  uint32_t words[kSlabs][4];
  const auto load_words = [&](int u) {
#pragma unroll
    for (int r = 0; r < kSlabs; ++r) {
      const uint32_t at = ring.data() + codes_at + u * kStage.unit_codes + r * (4 * 128 * kBits);
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
  uint32_t scale[2] = {};  // of the products that run, and of the next
  const auto add = [&](int r) {
    const float2 s = two_floats<S>(scale[0]);
#pragma unroll
    for (int j = 0; j < kFragments; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[r][j][c] = fmaf(c < 2 ? s.x : s.y, part[r][j][c], sum[r][j][c]);
    }
    hold(sum[r]);
  };

  // Sums of groups of 128 and more begin and end with stages, every one or every few of them.
  const int stages_per_scale =
      static_cast<int>(kept(p.group_shift >= 31 ? 0x7fffffff : 1 << p.group_shift)) / kStageUnits;
  int until_scale = kGroup < 128 ? 1 : stages_per_scale - mine.first % stages_per_scale;
  bool fresh = true;           // this stage's products begin sums
  bool ended = false;          // those of the stage before ended them
  uint32_t running_empty = 0;  // barrier of the stage before, whose last products run
  int left = mine.count;
  ring.wait_full();
  load_words(0);
  while (left > 0) {
    --left, --until_scale;
    const uint32_t data = ring.data(), empty = ring.empty();
    const uint64_t x = descriptor(data);
    const bool ends = kGroup < 128 || until_scale == 0 || left == 0;
#pragma unroll
    for (int u = 0; u < kStageUnits; ++u) {
#pragma unroll
      for (int r = 0; r < kSlabs; ++r) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const bool last_of_unit = r + 1 == kSlabs && s + 1 == kSteps;
          uint32_t (&now)[kHalves][2][4] = a[((u * kSlabs + r) * kSteps + s) % 2];
          if (kBits == 3 && s == 0) words[r][3] = fourth_word(words[r]);
#pragma unroll
          for (int h = 0; h < kHalves; ++h) look_up<kBits>(now[h], words[r], s * kHalves + h, bank);
          const uint32_t line = kGroup < 128 ? u * kStage.scale_line : 0;
          if (kGroup < 128 || (u + 1 == kStageUnits && ends))
            load_shared(scale[1], data + scales_at + line + r * (4 * 32 * kSteps) + 4 * s);
          if (last_of_unit && u + 1 < kStageUnits) load_words(u + 1);
          if (last_of_unit && u + 1 == kStageUnits && left > 0) {
            ring.advance();
            ring.wait_full();
            load_words(0);
          }
          // The products before these: of which slab, and whether they are the last of their sums.
          const bool first_of_unit = r == 0 && s == 0;
          const int before = s > 0 ? r : r > 0 ? r - 1 : kSlabs - 1;
          products_wait();
          hold(part[before]);
          if (first_of_unit && u == 0) {
            if (ended) add(before);
            if (leader && running_empty != 0) barrier_arrive(running_empty);
          } else if (kGroup < 128 || (!first_of_unit && u + 1 == kStageUnits)) {
            if (ends) add(before);
          }
          scale[0] = scale[1];
          hold(part[r]);
          products_begin();
#pragma unroll
          for (int h = 0; h < kHalves; ++h) {
#pragma unroll
            for (int q = 0; q < 2; ++q) {
              const bool begins = h == 0 && q == 0 && (kGroup < 128 || (u == 0 && fresh));
              Product<T, kColumns>::run(part[r], now[h][q],
                                        x + u * (kColumns * 128 / 16) + 2 * (2 * (s * kHalves + h) + q),
                                        !begins);
            }
          }
          products_end();
        }
      }
    }
    fresh = ended = ends;
    if (until_scale == 0) until_scale = stages_per_scale;
    running_empty = empty;
  }
  products_wait();
  hold(part[kSlabs - 1]);
  add(kSlabs - 1);

  wait_for_predecessor();
  const Place place{(group.tile + warp_tile) * layout::kTile + lane / 4, group.first_row,
                    static_cast<int>(blockIdx.y) * kColumns + 2 * (lane % 4)};
  if (mine.parts > 1) {
    all_lookers();  // have read the last stage and looked up the last weight
    if (p.parts == nullptr) {
      join_in_cluster<T, kThreads>(p, sum, mine, place, base + layout::kTableBytes + kBarrierBytes);
      return;
    }
    if (!join_in_memory<kThreads>(p, sum, mine, all_lookers)) return;
  }
#pragma unroll
  for (int r = 0; r < kSlabs; ++r) {
#pragma unroll
    for (int j = 0; j < kFragments; ++j) write_out<T>(p, sum[r][j], place, r, j);
  }
}

}  // namespace flute::sm90
