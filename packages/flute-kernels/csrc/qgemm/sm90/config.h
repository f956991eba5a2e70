// The shapes in which the kernel is compiled, and what a launch needs. Host and device read this.
#pragma once

#include <cstdint>

#include "core/both.h"
#include "qgemm/common/layout.h"

namespace flute::sm90 {

// One compiled shape. A block multiplies a group of rows of weights by `columns` rows of x.
struct Config {
  int columns;     // 32, 64, 128
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
FLUTE_BOTH constexpr bool shares_registers(const Config& c) { return c.columns * c.slabs >= 128; }
FLUTE_BOTH constexpr int threads(const Config& c) {
  return 128 * c.warpgroups + (shares_registers(c) ? 128 : 32);
}

// Shared memory of a block: the table, barriers, and a ring of stages. A stage holds what the block multiplies of
// one unit of K: the image of x, which a product wants at a multiple of 1024, then codes and scales.
struct Stage {
  int x, codes, scales;  // bytes

  FLUTE_BOTH constexpr Stage(int bits, int scales_per_unit, const Config& c)
      : x(c.columns * layout::kUnit * 2),
        codes(tiles(c) * 128 * bits),
        scales(tiles(c) * 32 * scales_per_unit) {}
  FLUTE_BOTH constexpr int used() const { return x + codes + scales; }
  FLUTE_BOTH constexpr int bytes() const { return (used() + 1023) / 1024 * 1024; }
};
constexpr int kBarrierBytes = 1024;
constexpr int kSharedBytes = 226 * 1024;  // of a block on compute capability 9.0
constexpr int kMostStages = 16;

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
  void* parts;             // of sums, where several blocks share K
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
