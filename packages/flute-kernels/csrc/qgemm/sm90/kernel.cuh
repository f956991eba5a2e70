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
// Blocks stay, and take one item of work after the other (schedule.cuh). Where several have a part of a set's K each,
// their sums meet in the shared memory of a cluster or in memory (join.cuh).
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
#include "qgemm/sm90/codes.cuh"
#include "qgemm/sm90/config.h"
#include "qgemm/sm90/join.cuh"
#include "qgemm/sm90/output.cuh"
#include "qgemm/sm90/ptx.cuh"
#include "qgemm/sm90/ring.cuh"
#include "qgemm/sm90/scale_sums.cuh"
#include "qgemm/sm90/scale_weights.cuh"
#include "qgemm/sm90/schedule.cuh"

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
  static_assert(kSlabs * kFragments * kThreads * 16 <= shared_bytes(kStage));  // join_in_cluster
  const int stages_in_all = stages_of(kConfig, p.units);
  launch_dependents();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  Ring<kStage.bytes(), stages(kStage)> ring(base + layout::kTableBytes);
  if (threadIdx.x == 0) ring.init(kWarpgroups * 4);
  Schedule schedule(p, stages_in_all);
  __syncthreads();
  if (warp >= kWarpgroups * 4) {
    if constexpr (shares_registers(kConfig)) leave_registers<kWarpgroups == 2 ? 40 : 32>();
    if (warp == kWarpgroups * 4 && is_elected())
      fill<kBits, kGroup, stages(kStage), tiles(kConfig)>(ring, p, kStage, schedule, stages_in_all);
    return;
  }
  if constexpr (shares_registers(kConfig)) {
    static_assert(kWarpgroups == 2 || kWarpgroups == 4);
    // Of 3 * 168 or 5 * 96 at the launch.
    take_registers<kWarpgroups == 2 ? 232 : 112>();
  }
  if (table_is_elsewhere()) __trap();
  const auto all_lookers = [] { asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory"); };

  const int warp_tile = warp / 4 * (4 * kSlabs) + warp % 4;  // of the first slab
  const bool leader = kept(lane == 0);
  Codes<kBits, kGroup, kSlabs> codes(kStage, base, warp_tile, lane);
  const Pieces<kThreads, kSlabs, kFragments> pieces(p);
  int table = -1;  // in shared memory
  all_lookers();   // are here together: the compiler wants to know (Schedule::items)
  for (int items = schedule.items(); items > 0; --items) {
    const Item item = schedule.next();
    const Group group(p, item.set / p.column_blocks, tiles(kConfig));
    if (group.table != table) {
      Table<kBits, T, kThreads> entries;
      entries.load(static_cast<const float2*>(p.tables) + group.table * (1 << (2 * kBits)));
      if (table >= 0) all_lookers();  // have looked up the last weight of the one before
      entries.store();
      all_lookers();
      table = group.table;
    }
    const bool is_whole = item.count == stages_in_all, begins = item.first == 0;
    const bool begins_with_piece = !is_whole && !begins && p.parts == 1;
    if (begins_with_piece) wait_for_predecessor();
    float sum[kSlabs][kFragments][4];
    pieces.begin_with(sum, begins_with_piece, schedule.number() + 1);
    if constexpr (scales_weights(kConfig)) {
      multiply_scaled_weights<T, S, kBits, kGroup, kColumns, kSlabs>(sum, ring, codes, kStage, item.count,
                                                                     leader);
    } else {
      multiply_and_scale_sums<T, S, kBits, kGroup, kColumns>(sum, ring, codes, kStage, p.group_shift,
                                                             item.first, item.count, leader);
    }

    wait_for_predecessor();
    const Place place{(group.tile + warp_tile) * layout::kTile, group.first_row,
                      item.set % p.column_blocks * kColumns};
    if (p.is_cluster) {
      all_lookers();  // have read the last stage and looked up the last weight
      join_in_cluster<T, kThreads>(p, sum, schedule.number() % p.parts, place, base);
      return;
    }
    if (!is_whole && begins == (p.parts == 1)) {
      pieces.write(sum, schedule.number());
      continue;
    }
    if (p.parts > 1) pieces.add(sum, schedule.number() + 1, schedule.number() + p.parts - 1);
    write_out<T>(p, sum, place);
  }
}

}  // namespace flute::sm90
