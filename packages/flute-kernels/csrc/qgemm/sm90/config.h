// The shapes in which the kernel is compiled, and what a launch needs. Host and device read this.
#pragma once

#include <cstdint>

#include "core/both.h"
#include "qgemm/common/layout.h"

namespace flute::sm90 {

// One compiled shape. A block multiplies a group of rows of weights by `columns` rows of x.
struct Config {
  int columns;     // 32, 48, 64, 96, 128
  int warpgroups;  // of four warps that multiply
  int slabs;       // of 64 rows, that a warpgroup multiplies in turn
};

constexpr Config kConfigs[] = {
#define FLUTE_CONFIG(...) {__VA_ARGS__},
#include "sm90_configs.inc"
#undef FLUTE_CONFIG
};
constexpr int kConfigCount = sizeof(kConfigs) / sizeof(kConfigs[0]);

FLUTE_BOTH constexpr int rows(const Config& c) { return 64 * c.warpgroups * c.slabs; }
FLUTE_BOTH constexpr int tiles(const Config& c) { return 4 * c.warpgroups * c.slabs; }
// Where two warpgroups' sums need more than the 168 registers a thread that nine warps can have, there is a third
// warpgroup, so that it can leave them its registers. Else one more warp is enough to copy.
FLUTE_BOTH constexpr bool shares_registers(const Config& c) { return c.columns * c.slabs >= 96; }
FLUTE_BOTH constexpr int threads(const Config& c) {
  return 128 * c.warpgroups + (shares_registers(c) ? 128 : 32);
}

// Shared memory of a block: the table, barriers, and a ring of stages. A stage holds what the block multiplies of
// kStageUnits units of K: the image of x, which a product wants at a multiple of 1024, then codes and scales. Two
// units, as a barrier, a step of the ring and a scale then serve 128 weights of a row.
constexpr int kStageUnits = 2;
FLUTE_BOTH constexpr int stages_of(int units) { return (units + kStageUnits - 1) / kStageUnits; }

// Group sizes that have kernels of their own; the last one's serve all above.
constexpr int kGroups[] = {32, 64, 128};
constexpr int kGroupCount = 3;

// Lines of scales of a stage. A line of groups of 32 has two scales a row.
FLUTE_BOTH constexpr int scale_lines(int group) { return group >= 128 ? 1 : 2; }

struct Stage {
  int x, unit_codes, scale_line, scales;  // bytes

  FLUTE_BOTH constexpr Stage(int bits, int group, const Config& c)
      : x(kStageUnits * c.columns * layout::kUnit * 2),
        unit_codes(tiles(c) * 128 * bits),
        scale_line(tiles(c) * 32 * layout::scales_per_unit(group)),
        scales(scale_line * scale_lines(group)) {}
  FLUTE_BOTH constexpr int codes() const { return kStageUnits * unit_codes; }
  FLUTE_BOTH constexpr int used() const { return x + codes() + scales; }
  FLUTE_BOTH constexpr int bytes() const { return (used() + 1023) / 1024 * 1024; }
};
constexpr int kMostOfCluster = 4;  // blocks

constexpr int kBarrierBytes = 1024;
constexpr int kSharedBytes = 227 * 1024;  // that a block can have on compute capability 9.0
constexpr int kMostStages = 8;

FLUTE_BOTH constexpr int stages(const Stage& stage) {
  const int fit = (kSharedBytes - layout::kTableBytes - kBarrierBytes) / stage.bytes();
  return fit < kMostStages ? fit : kMostStages;
}
FLUTE_BOTH constexpr int shared_bytes(const Stage& stage) {
  return layout::kTableBytes + kBarrierBytes + stages(stage) * stage.bytes();
}

struct Params {
  const uint32_t* codes;
  const uint32_t* scales;  // pairs: rows g and g + 8
  const void* tables;      // float pairs
  const void* image;       // of x
  void* parts;             // of sums, where several blocks share K and are no cluster; else null
  int* arrived;            // blocks that have written theirs, by group and block of columns; zero at first
  uint16_t* out;
  const void* bias;
  int64_t ldo;
  int n, m;
  int tiles, units;
  int tiles_per_table, groups_per_table;
  int group_shift;  // log2 of units per scale
  int bias_dtype;
};

}  // namespace flute::sm90
