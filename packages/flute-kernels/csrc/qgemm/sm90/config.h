// The shapes in which the kernel is compiled, and what a launch needs. Host and device read this.
#pragma once

#include <cstdint>

#include "core/both.h"
#include "core/divide.h"
#include "qgemm/common/layout.h"
#include "qgemm/common/shapes.h"

namespace flute::sm90 {

// One compiled shape. A block multiplies a group of rows of weights by `columns` rows of x.
struct Config {
  int columns;     // 16, 32, 48, 64, 96, 128, 192, 256
  int warpgroups;  // of four warps that multiply
  int slabs;       // of 64 rows, that a warpgroup multiplies in turn
  int grouped;     // 1: for mixtures of experts
  int bits;        // numbers of bits that have it, as digits
};

constexpr Config kConfigs[] = {
#define FLUTE_CONFIG(...) {__VA_ARGS__},
#include "sm90_configs.inc"
#undef FLUTE_CONFIG
};
constexpr int kConfigCount = sizeof(kConfigs) / sizeof(kConfigs[0]);

FLUTE_BOTH constexpr int rows(const Config& c) { return 64 * c.warpgroups * c.slabs; }
FLUTE_BOTH constexpr int tiles(const Config& c) { return 4 * c.warpgroups * c.slabs; }
// Of a mixture, an expert's last columns are few as often as many. So wide blocks have a main loop for each quarter of
// their columns; but at 256 columns none for three, as with that, too, the compiler would let products wait for each
// other. x is copied by quarters.
FLUTE_BOTH constexpr bool has_widths(const Config& c) { return c.grouped && c.columns >= 128; }
FLUTE_BOTH constexpr bool has_three_quarters(const Config& c) { return has_widths(c) && c.columns == 128; }
FLUTE_BOTH constexpr int box_columns(const Config& c) { return has_widths(c) ? c.columns / 4 : c.columns; }
// Columns that a block multiplies where so many are left.
FLUTE_BOTH constexpr int width_for(const Config& c, int left) {
  const int quarter = c.columns / 4;
  if (!has_widths(c) || left > (has_three_quarters(c) ? 3 : 2) * quarter) return c.columns;
  return (left + quarter - 1) / quarter * quarter;
}
// Wide blocks multiply weights by their scales, narrow ones sums: a sum that waits for its scale takes a register
// more, and the wide ones' registers are full of sums.
FLUTE_BOTH constexpr bool scales_weights(const Config& c) {
  return c.columns * c.slabs > (c.warpgroups == 3 || has_widths(c) ? 64 : 128);
}
// Where sums need more than the registers that a thread can have at the launch (168 of two warpgroups and a warp, 152 of
// three, 96 of four), the warp that copies has a warpgroup around it, which leaves the others its registers.
FLUTE_BOTH constexpr bool shares_registers(const Config& c) {
  return c.columns * c.slabs >= 96 || (c.warpgroups == 4 && c.columns >= 48);
}
// There, each warpgroup that multiplies has a warp that writes its results while it goes on (output.cuh).
FLUTE_BOTH constexpr bool has_writers(const Config& c) { return shares_registers(c) && c.warpgroups <= 3; }
// Whether the two parts of a set share the work of adding them up: with few sums, what takes long is to wait for each
// other. (Fragments of eight columns are written in pairs.)
FLUTE_BOTH constexpr bool shares_join_of_two(const Config& c) {
  return c.columns * c.warpgroups * c.slabs >= 192 && c.columns % 32 == 0;
}
FLUTE_BOTH constexpr int threads(const Config& c) {
  return 128 * c.warpgroups + (shares_registers(c) ? 128 : 32);
}

// Shared memory of a block: the table, in the free half of whose lines results change places (output.cuh), barriers,
// whose rows are whose, and a ring of stages. A stage holds what the block multiplies of stage_units units of K: x, which
// a product wants at a multiple of 1024, then codes and scales. Two units, as a barrier, a step of the ring and a scale
// then serve 128 weights of a row; one where x takes so much that there would be two stages in all.
FLUTE_BOTH constexpr int stage_units(const Config& c) { return c.columns > 128 ? 1 : 2; }
FLUTE_BOTH constexpr int stages_of(const Config& c, int units) {
  return (units + stage_units(c) - 1) / stage_units(c);
}

// Group sizes that have kernels of their own; the last one's serve all above.
constexpr int kGroups[] = {32, 64, 128};
constexpr int kGroupCount = 3;

// Of scales, a stage has a line for each unit, or for groups of 128 and more one. A line of groups of 32 has two
// scales a row.
struct Stage {
  int units, scale_lines;
  int x, unit_codes, scale_line;  // bytes

  FLUTE_BOTH constexpr Stage(int bits, int group, const Config& c)
      : units(stage_units(c)),
        scale_lines(group >= 128 ? 1 : units),
        x(units * c.columns * layout::kUnit * 2),
        unit_codes(tiles(c) * 128 * bits),
        scale_line(tiles(c) * 32 * layout::scales_per_unit(group)) {}
  FLUTE_BOTH constexpr int codes() const { return units * unit_codes; }
  FLUTE_BOTH constexpr int used() const { return x + codes() + scale_lines * scale_line; }
  FLUTE_BOTH constexpr int bytes() const { return (used() + 1023) / 1024 * 1024; }
};
constexpr int kMostOfCluster = 4;  // blocks

constexpr int kBarrierBytes = 1024;
constexpr int kMostExperts = 1023;
FLUTE_BOTH constexpr int experts_bytes(const Config& c) { return c.grouped ? 2 * 4 * (kMostExperts + 1) : 0; }
constexpr int kSharedBytes = 227 * 1024;  // that a block can have on compute capability 9.0
constexpr int kMostStages = 8;

FLUTE_BOTH constexpr int before_stages(const Config& c) {
  return layout::kTableBytes + kBarrierBytes + experts_bytes(c);
}
FLUTE_BOTH constexpr int stages(const Stage& stage, const Config& c) {
  const int fit = (kSharedBytes - before_stages(c)) / stage.bytes();
  return fit < kMostStages ? fit : kMostStages;
}
FLUTE_BOTH constexpr int shared_bytes(const Stage& stage, const Config& c) {
  return before_stages(c) + stages(stage, c) * stage.bytes();
}

// How sets and their stages of K are divided among blocks: schedule.cuh.
struct Division {
  int sets;   // in all
  int waves;  // of sets that blocks multiply whole, before they share the others; a last one need not be full
  int shared_sets;   // those others
  int parts;         // blocks of each set, if there are few; 1 where blocks share runs of sets
  int sharers;       // blocks that do, or parts
  int share, extra;  // stages of each of them; the first `extra` have one more
  int begins_joins;  // whether an item that joins a piece begins with it, as it came long before
};

// Of more sets than blocks, between one and two a block are left to share, or none.
FLUTE_BOTH constexpr int waves_of(int sets, int blocks) {
  return sets <= blocks ? 0 : sets / blocks - (sets % blocks != 0);
}

// What is left after the waves.
FLUTE_BOTH constexpr int sets_left(int sets, int waves, int blocks) {
  return sets > waves * blocks ? sets - waves * blocks : 0;
}

FLUTE_BOTH constexpr Division division(int sets, int stages, int blocks, int parts, int waves) {
  Division d{};
  d.sets = sets, d.parts = parts, d.waves = waves;
  d.shared_sets = sets_left(sets, waves, blocks);
  const int run = parts > 1 ? stages : d.shared_sets * stages;
  // Not more pieces of a set than can be added up soon.
  d.sharers = parts > 1 ? parts : d.shared_sets * 4 < blocks ? d.shared_sets * 4 : blocks;
  d.share = d.sharers > 0 ? run / d.sharers : 0;
  d.extra = run - d.share * d.sharers;
  d.begins_joins = parts == 1 && d.shared_sets >= blocks;
  return d;
}

// What the copy engine wants to know of a matrix: driver API, CUtensorMap.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

struct Params {
  TensorMap x;  // in boxes of kUnit along K and a block's columns
  const uint32_t* codes;
  const uint32_t* scales;  // pairs: rows g and g + 8
  const void* tables;      // float pairs
  void* pieces;            // sums of part of K, on their way to the block that adds them up: join.cuh
  uint64_t* written;       // by block and warp, `token` while its piece is there and not yet read
  uint64_t token;          // of this launch, like no other's
  uint16_t* out;
  const void* bias;
  int64_t ldo;
  int n, m;
  int tiles, units;
  int tiles_per_segment;  // rows of one table and one expert
  Divisor groups_per_segment, segments_per_table;
  int table_count;
  int column_blocks;
  Divisor sets_of_band, band, last_band;  // columns' blocks in a band of them: schedule.cuh
  Divisor parts, stages;                  // of a set, of all of K
  int stores_fours, stores_eights;        // whether so many neighbours of a row of out can be written at once
  int is_cluster;     // whether the parts of a set run at the same time and see each other's shared memory
  Division division;  // of a mixture of experts, all but `parts` is for the kernel to find out
  const int32_t* counts;
  int experts, segments_per_expert;
  int group_shift;  // log2 of units per scale
  int bias_dtype;
};

}  // namespace flute::sm90
