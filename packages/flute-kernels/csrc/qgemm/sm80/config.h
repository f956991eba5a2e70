// The shapes in which the kernel is compiled, and what a launch needs. Host and device read this.
#pragma once

#include <cstdint>

#include "core/both.h"
#include "qgemm/common/layout.h"
#include "qgemm/common/shapes.h"

namespace flute::sm80 {

// One compiled shape. A block has warps_k * warps_n warps: warps_n groups of `tiles` neighbouring tiles
// of 16 rows, each group's K divided among warps_k warps, unit by unit in turn. warps_k is a multiple of 4,
// so that warps_k units are whole groups of up to 256.
struct Config {
  int columns;  // rows of x that a block multiplies: 8 or 16
  int tiles;    // row tiles of a warp
  int warps_k, warps_n;
  int depth;     // units of codes on their way to a warp
  int resident;  // blocks that share a multiprocessor, given the registers
  int grouped;   // 1: for mixtures of experts
  int bits;      // numbers of bits that have it, as digits
};

constexpr Config kConfigs[] = {
#define FLUTE_CONFIG(...) {__VA_ARGS__},
#include "sm80_configs.inc"
#undef FLUTE_CONFIG
};
constexpr int kConfigCount = sizeof(kConfigs) / sizeof(kConfigs[0]);

// Group sizes that have kernels of their own; the last one's serve all above.
constexpr int kGroups[] = {32, 64};
constexpr int kGroupCount = 2;

// Whether x comes through a ring in shared memory (x.cuh): how many units of a warp it holds, bytes of a row's unit, and how
// many of these the table has room for.
FLUTE_BOTH constexpr bool has_ring(int bits) { return bits == 3; }
constexpr int kRingStages = 2, kLineBytes = 2 * layout::kUnit;
constexpr int kFreeLines = layout::kTableBytes / layout::kEntryBytes;

constexpr int shared_bytes(const Config& c, int bits) {
  const int warps = c.warps_k * c.warps_n, lines = warps * c.columns;  // of a stage of all warps' rings
  const bool is_behind = has_ring(bits) && kRingStages * lines > kFreeLines;
  const int main = layout::kTableBytes + (is_behind ? lines * kLineBytes : 0);
  const int sums = warps * c.tiles * (c.columns / 8) * 32 * 16;
  return sums > main ? sums : main;
}

struct Params {
  const uint32_t* codes;
  const uint32_t* scales;  // pairs: rows g and g + 8
  const void* tables;      // float pairs
  const uint16_t* x;
  uint16_t* out;
  const void* bias;
  int64_t ldx, ldo;
  int n, m;
  int tiles, units;
  int tiles_per_segment;  // rows of one table and one expert
  int segments_per_table, table_count;
  int group_shift;  // log2 of units per scale
  int bias_dtype;
  const int32_t* counts;  // of a mixture of experts
  int experts, segments_per_expert;
};

}  // namespace flute::sm80
