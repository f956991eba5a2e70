// The shapes in which the kernel is compiled, and what a launch needs. Host and device read this.
#pragma once

#include <cstdint>

#include "core/both.h"
#include "qgemm/common/layout.h"

namespace flute::sm90 {

// One compiled shape: rows of x that a block multiplies at a time, and warpgroups that look up weights, each 64
// rows of them. One warpgroup more loads.
struct Config {
  int columns;     // 16, 32, 64, 128
  int warpgroups;  // 1 to 4
};

constexpr Config kConfigs[] = {
#define FLUTE_CONFIG(...) {__VA_ARGS__},
#include "sm90_configs.inc"
#undef FLUTE_CONFIG
};
constexpr int kConfigCount = sizeof(kConfigs) / sizeof(kConfigs[0]);

// Shared memory of a block: the table, barriers, and a ring of stages. A stage holds one unit of K: the image
// of x, then codes and scales of the block's rows.
struct Stage {
  int x, codes, scales;  // bytes

  FLUTE_BOTH constexpr Stage(int bits, int scales_per_unit, const Config& c)
      : x(c.columns * 128),
        codes(c.warpgroups * 4 * 128 * bits),
        scales(c.warpgroups * 4 * 32 * scales_per_unit) {}
  FLUTE_BOTH constexpr int used() const { return x + codes + scales; }
  FLUTE_BOTH constexpr int bytes() const {
    return (used() + 1023) / 1024 * 1024;
  }  // operand B begins at multiples of 1024
};
constexpr int kBarrierBytes = 1024;
constexpr int kSharedBytes = 227 * 1024;  // of a block on compute capability 9.0
constexpr int kMostStages = 12;

FLUTE_BOTH constexpr int stages(const Stage& stage) {
  const int fit = (kSharedBytes - 1024 - layout::kTableBytes - kBarrierBytes) / stage.bytes();
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
  void* parts;             // of sums, float4, that several blocks share
  uint16_t* out;
  const void* bias;
  int64_t ldo;
  int n, m;
  int tiles, units;
  int tiles_per_table, groups_per_table;  // a group: the rows that a block multiplies at a time
  int groups, column_blocks;
  int group_shift;  // log2 of units per scale
  int bias_dtype;
};

// The work in one line: groups of rows, in each the blocks of columns, in each the units of K. Every block
// takes an equal piece of it.
struct Piece {
  int begin, end;
};
FLUTE_BOTH inline Piece piece_of(int64_t total, int block, int blocks) {
  return {static_cast<int>(total * block / blocks), static_cast<int>(total * (block + 1) / blocks)};
}

}  // namespace flute::sm90
