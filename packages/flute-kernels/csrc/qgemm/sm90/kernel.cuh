// y^T = W_hat * x^T on Hopper with warpgroup products: weights from registers as operand A, x from shared
// memory as operand B.
//
// Why. mma.sync takes x from registers, and every warp has to load it there through the pipe that also serves
// the lookups. A warpgroup product reads x from shared memory by itself: 16 rows of x then cost little more
// than one, and 64 a third of what they cost there.
//
// Who does what. A block multiplies a group of 64 * warpgroups * slabs rows of weights with kColumns rows of x,
// one unit of 64 along K after the other, or, where there are too few groups, several blocks do, each with a
// part of K. One thread keeps a ring of stages in shared memory filled with codes, scales, and x, of which the copy
// engine makes what the product reads (ring.cuh). The warpgroups multiply. Each takes its slabs of 64
// rows in turn: it looks the weights up (common/lookup.cuh) in the fragment layout of the product, which is that
// of mma.sync for each of the four warps, waits for the products that it started before, adds what is whole (the
// sums of a scale, times the scale) to its totals, and starts the next four products of 16 along K. So lookups
// run while products run, and warpgroups fill each other's pauses.
//
// Blocks stay, and take one item of work after the other (schedule.cuh). Where several have a part of a set's K each,
// their sums meet in the shared memory of a cluster or in memory (join.cuh). Of wide blocks, a warp for each warpgroup
// writes its results (output.cuh), and which item is the next is found while the last products run: at 256 columns and
// K = 4096 a main loop takes 66,000 clocks, and the pause before the next one 2,500.
//
// What bounds it. At 32 columns, instructions: a warp spends about 60 on its 16 x 64 weights, of which 36 look up
// and multiply. At 64 and more, the shared-memory pipe, of which a 16 x 64 tile at 4 bits takes 16 wavefronts for
// lookups, 4 for codes and kColumns / 4 for what the products read of x. The products themselves take
// kColumns / 2 clocks for 64 x 16 weights, but at least 13.
//
// When. Codes, scales and the table come before the wait for the kernel before, x and everything written after
// it. Of a mixture of experts (kGrouped), what there is to multiply is known after it alone (experts.cuh).
#pragma once

#include <type_traits>

#include "core/early.cuh"
#include "qgemm/common/lookup.cuh"
#include "qgemm/sm90/codes.cuh"
#include "qgemm/sm90/config.h"
#include "qgemm/sm90/experts.cuh"
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

// Barriers for some of a block's warps. The warp that copies is not in step, as one thread of it does more than the
// others: it needs the kind without `.aligned` (PTX ISA 9.0, 9.7.13.1, barrier).
template <int kNumber, int kCount>
__device__ __forceinline__ void wait_at_barrier() {
  asm volatile("barrier.sync.aligned %0, %1;" ::"n"(kNumber), "n"(kCount) : "memory");
}
template <int kNumber, int kCount>
__device__ __forceinline__ void wait_out_of_step() {
  asm volatile("barrier.sync %0, %1;" ::"n"(kNumber), "n"(kCount) : "memory");
}
template <int kNumber, int kCount>
__device__ __forceinline__ void arrive_out_of_step() {
  asm volatile("barrier.arrive %0, %1;" ::"n"(kNumber), "n"(kCount) : "memory");
}

// kGroup: of scales, 32, 64, or 128 for all above. S: the scales' type.
template <int kBits, class T, class S, int kGroup, int kColumns, int kWarpgroups, int kSlabs, int kGrouped,
          int kForBits>
__global__ void __launch_bounds__(kThreadsOf<kColumns, kWarpgroups, kSlabs, kGrouped>, 1)
    kernel(const __grid_constant__ Params p) {
  static_assert(has_digit(kForBits, kBits));
  constexpr Config kConfig{kColumns, kWarpgroups, kSlabs, kGrouped, kForBits};
  constexpr Stage kStage(kBits, kGroup, kConfig);
  constexpr int kThreads = kWarpgroups * 128;
  constexpr int kStages = stages(kStage, kConfig);
  static_assert((kSlabs * kColumns / 8 + kMostOfCluster) * kThreads * 16 <=
                shared_bytes(kStage, kConfig));  // join_in_cluster
  constexpr int kWarps = kWarpgroups * 4;        // that multiply; the next one copies
  const int stages_in_all = p.stages.divisor;
  launch_dependents();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t base = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  Ring<kStage.bytes(), kStages> ring(base + layout::kTableBytes, base + before_stages(kConfig));
  const auto first_table = static_cast<const float2*>(p.tables);
  Table<kBits, T, kThreads> entries;
  if (warp < kWarps) entries.load(first_table);  // at once: nothing here takes as long
  const Experts<kColumns> experts(p, shared + layout::kTableBytes + kBarrierBytes);
  const auto find_set = [&](int number) {
    return kGrouped ? experts.find(number) : Set(p, number, kColumns);
  };
  Schedule schedule(p, p.division);
  constexpr int kAll = kThreads + 32;  // the warp that copies, too
  if (warp >= kWarps) {
    if constexpr (shares_registers(kConfig)) leave_registers<kWarpgroups == 2 ? 40 : 32>();
    if (warp > kWarps) {
      if constexpr (has_writers(kConfig)) {
        const bool is_joined =
            !kGrouped && (p.is_cluster || p.division.parts > 1);  // and written by those who join
        if (warp - kWarps <= kWarpgroups && !is_joined) write_for<kWarpgroups>(warp - kWarps - 1, p, base);
      }
      return;
    }
    const bool elected = is_elected();
    if (elected) {
      prefetch_map(&p.x);
      ring.init(kWarps);
    }
    __syncwarp();
    if constexpr (kGrouped) {
      wait_out_of_step<2, kAll>();
    } else {
      arrive_out_of_step<2, kAll>();
    }
    if constexpr (kGrouped) schedule = Schedule(p, experts.divide(stages_in_all));
    Filler<kBits, kGroup, kStages, kColumns, kWarpgroups, kSlabs, kGrouped, decltype(ring),
           decltype(find_set)>
        filler(ring, p, kStage, schedule, stages_in_all, find_set);
    if (elected) {
      filler.begin();
      filler.go_on();
    }
    return;
  }
  if constexpr (shares_registers(kConfig)) {
    // Of 3 * 168, 4 * 128 or 5 * 96 at the launch.
    take_registers<kWarpgroups == 2 ? 232 : kWarpgroups == 3 ? 160 : 112>();
  }
  if (table_is_elsewhere()) __trap();
  struct Work {
    bool is_there;
    Item item;
    Set set;
    Group group;
  };
  // Votes, here and below: so the compiler sees that a warp's threads go the same way, and keeps what the main loop
  // reckons with in uniform registers.
  const auto next_work = [&](Work& work) {
    work.is_there = same_of_warp(schedule.has_next());
    if (!work.is_there) return;
    work.item = schedule.next();
    work.set = find_set(work.item.set);
    work.group = Group(p, work.set.group, tiles(kConfig));
  };
  // Not set to anything here: of values from two places the compiler would not see that they are a warp's.
  Work next;
  // In shared memory, behind the next barrier. Which expert's is the first, a block does not know so early.
  int table = kGrouped && p.table_count > 1 ? -1 : 0;
  if constexpr (!kGrouped) {
    next_work(next);  // while the table is on its way
    if (p.table_count > 1) {
      table = next.is_there ? next.group.table : 0;
      entries.load(first_table + table * (1 << (2 * kBits)));
    }
  }
  entries.store();

  const int warp_tile = warp / 4 * (4 * kSlabs) + warp % 4;  // of the first slab
  const bool leader = kept(lane == 0);
  Codes<kBits, kGroup, kSlabs> codes(kStage, base, warp_tile, lane);
  const Pieces<kThreads, kSlabs * kColumns / 8> pieces(p);
  if constexpr (kGrouped) {
    wait_for_predecessor();
    if (warp == 0) experts.read_counts();
  }
  wait_at_barrier<2, kAll>();
  if constexpr (kGrouped) {
    schedule = Schedule(p, experts.divide(stages_in_all));
    next_work(next);
  } else {
    wait_for_predecessor();  // for which the first x does, too
  }
  // The next work is found while the last products of the one before run. (Of a mixture, there are no registers for it.)
  constexpr bool kFindsEarly = has_writers(kConfig) && !kGrouped;
  bool told_to_end = false;  // writers
  while (next.is_there) {
    const Work now = next;
    const Item& item = now.item;
    const Set& set = now.set;
    const Group& group = now.group;
    if (same_of_warp(group.table != table)) {
      table = group.table;
      entries.load(first_table + table * (1 << (2 * kBits)));
      wait_at_barrier<1, kThreads>();  // all have looked up the last weight of the one before
      entries.store();
      wait_at_barrier<1, kThreads>();
    }
    const bool begins_with_piece = same_of_warp(item.joins && schedule.begins_joins());
    const int count = kGrouped ? same_of_warp(item.count) : item.count;
    constexpr bool kScalesWeights = scales_weights(kConfig), kSharesJoinOfTwo = shares_join_of_two(kConfig);
    // A mixture's main loops begin with zeros: if not, the compiler lets each product end before the next begins.
    constexpr bool kZeros = !kScalesWeights || kGrouped;
    // All of an item, with so many columns. (Accumulators that loops for several have in common would spill.)
    const auto serve = [&](auto columns) {
      constexpr int kProduct = decltype(columns)::value;
      float sum[kSlabs][kProduct / 8][4];
      pieces.template begin_with<kZeros>(sum, begins_with_piece, schedule.number() + 1);
      const auto meanwhile = [&] {
        if constexpr (kFindsEarly) next_work(next);
      };
      if constexpr (kScalesWeights) {
        multiply_scaled_weights<T, S, kBits, kGroup, kColumns>(
            sum, ring, codes, kStage, count, !kZeros && !begins_with_piece, leader, meanwhile);
      } else {
        multiply_and_scale_sums<T, S, kBits, kGroup, kColumns>(sum, ring, codes, kStage, p.group_shift,
                                                               item.first, count, leader, meanwhile);
      }
      const int above =
          kGrouped ? group.tile / p.tiles_per_segment / p.segments_per_expert * p.n : 0;  // experts' rows
      const Place place{(group.tile + warp_tile) * layout::kTile - above, group.first_row - above, set.column,
                        set.end};
      if constexpr (!kGrouped) {
        if (p.is_cluster) return join_in_cluster<T, kThreads>(p, sum, schedule.part(), place, base);
        if (p.division.parts > 2) return pieces.template join<T>(sum, schedule.number(), place);
        if constexpr (kSharesJoinOfTwo) {
          if (p.division.parts == 2)
            return pieces.template join_two<T, kWarpgroups>(sum, schedule.number(), place, base);
        }
      }
      if (same_of_warp(item.is_piece)) return pieces.write(sum, schedule.number());
      if (same_of_warp(item.joins && !schedule.begins_joins()))
        pieces.add(sum, schedule.number() + 1, schedule.last_piece(item));
      const bool goes_on = kFindsEarly ? next.is_there : same_of_warp(schedule.has_next());
      write_set<T, kWarpgroups, has_writers(kConfig), kProduct / 8>(p, sum, place, base, goes_on);
      told_to_end = !goes_on;
    };
    if constexpr (has_widths(kConfig)) {
      constexpr int kQuarter = kColumns / 4;
      const int width = same_of_warp(width_for(kConfig, set.end - set.column));
      if (width == kQuarter) {
        serve(std::integral_constant<int, kQuarter>{});
      } else if (width == 2 * kQuarter) {
        serve(std::integral_constant<int, 2 * kQuarter>{});
      } else if (width == kColumns) {
        serve(std::integral_constant<int, kColumns>{});
      } else if constexpr (has_three_quarters(kConfig)) {
        serve(std::integral_constant<int, 3 * kQuarter>{});
      }
    } else {
      serve(std::integral_constant<int, kColumns>{});
      // The schedule has no more then; but where it has to say so, registers spill.
      if (!kGrouped && (p.is_cluster || p.division.parts > 1)) return;
    }
    if constexpr (!kFindsEarly) next_work(next);
  }
  if constexpr (has_writers(kConfig)) {
    if (!told_to_end) {
      wait_for(Lines::free, warp / 4);
      tell_writer_to_end(base);
    }
  }
  if constexpr (kGrouped) write_zeros<kThreads>(p, experts.rows() + blockIdx.x, gridDim.x);
}

}  // namespace flute::sm90
