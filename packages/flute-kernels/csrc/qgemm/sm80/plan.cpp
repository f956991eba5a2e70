#include "qgemm/sm80/plan.h"

#include <algorithm>
#include <cmath>

#include "qgemm/common/layout.h"
#include "qgemm/sm80/config.h"

namespace flute::sm80 {
namespace {

constexpr int64_t kMostBlocks = 65535;  // of a grid's second dimension

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How much of the shared-memory pipe this many warps keep busy. Measured on an H200, and from 9 rows of x on on an H100
// (docs/kernel-notes.md): there a warp with many tiles has more to go on with while it waits; and of groups of 32, which
// have four times the scales, two blocks that share nothing hide more than one.
double use_of_pipe(const Config& c, int group, int64_t warps) {
  if (c.columns > 8) {
    const double many_tiles = group == 32 && c.resident > 1 ? 0.62 : 0.6;
    return warps >= 12 ? 0.68 : warps * c.tiles >= 56 ? many_tiles : warps >= 8 ? 0.42 : 0.35;
  }
  return warps >= 16 ? 0.85 : warps >= 12 ? 0.75 : warps >= 8 ? 0.6 : 0.35;
}

// Clocks from a block's first load to its first product: another block that begins then does not hide them all.
constexpr double kStart = 2000;

// Wavefronts in which a block makes its table. Of a mixture it has made it before it knows what else to do.
constexpr double kTable = 256;

// Of a mixture: what it takes longer where blocks fill all multiprocessors, and the next kernel's cannot begin early.
constexpr double kFull = 1000;

// Clocks that the busiest multiprocessor is at work: wavefronts of its shared-memory pipe (kernel.cuh
// counts them) over the part of the pipe that its warps can use.
double clocks(const Config& c, const QWeight& w, int64_t m, const Plan& plan, const Gpu& gpu) {
  const int fragments = c.columns / 8;
  const double units = static_cast<double>(layout::units(w.k));
  const int64_t rows_of_x = std::min<int64_t>(m, c.columns);
  const double x = 2.0 * std::min<int64_t>(8 * fragments, std::max<int64_t>(rows_of_x, 1));
  const double main = units * c.warps_n * (c.tiles * (16.0 + w.bits + 0.5) + x);
  const double ends = (c.grouped ? 0 : kTable) + 8.0 * c.warps_k * c.warps_n * c.tiles * fragments *
                                                     std::min<int64_t>(rows_of_x, 8) / 8.0;
  const int64_t blocks = int64_t{plan.row_blocks} * plan.column_blocks;
  const int64_t on_busiest = ceil_div(blocks, gpu.multiprocessors);
  const int resident = std::clamp<int>(gpu.shared_bytes / (shared_bytes(c, w.bits) + 1024), 1, c.resident);
  const int64_t warps = std::min<int64_t>(on_busiest, resident) * c.warps_k * c.warps_n;
  // Warps that have a unit fewer wait for the others.
  const double uneven = ceil_div(layout::units(w.k), c.warps_k) * c.warps_k / units;
  const double turns = static_cast<double>(on_busiest) / std::min<int64_t>(on_busiest, resident);
  const double full = c.grouped && on_busiest >= resident ? kFull : 0;
  return turns * kStart + full +
         on_busiest * (main * uneven + ends) / use_of_pipe(c, static_cast<int>(w.group), warps);
}

}  // namespace

Plan make_plan(const QWeight& w, int64_t m, const Gpu& gpu) {
  const int64_t tiles_per_table = layout::tiles_per_table(w);
  Plan best;
  double least = 0;
  for (int i = 0; i < kConfigCount; ++i) {
    const Config& c = kConfigs[i];
    if (c.grouped || !has_digit(c.bits, w.bits) || c.tiles > tiles_per_table) continue;
    if ((c.columns > 8) != (m > 8)) continue;
    if (ceil_div(tiles_per_table, c.tiles * c.warps_n) > kMostBlocks) continue;
    Plan plan;
    plan.config = i;
    plan.blocks_per_table = static_cast<int>(ceil_div(tiles_per_table, c.tiles * c.warps_n));
    plan.row_blocks = static_cast<int>(plan.blocks_per_table * w.table_count);
    plan.column_blocks = static_cast<int>(ceil_div(m, c.columns));
    const double cost = clocks(c, w, m, plan, gpu);
    if (best.config < 0 || cost < least) best = plan, least = cost;
  }
  return best;
}

Plan make_grouped_plan(const QWeight& w, int64_t m, int64_t experts, const Gpu& gpu) {
  const layout::Segments segments = layout::segments(w, experts);
  const int64_t active = std::clamp<int64_t>(m, 1, experts);
  const double rows = static_cast<double>(m) / active;  // of an expert that has some
  Plan best;
  double least = 0;
  for (int i = 0; i < kConfigCount; ++i) {
    const Config& c = kConfigs[i];
    if (!c.grouped || !has_digit(c.bits, w.bits) || c.tiles > segments.tiles) continue;
    Plan plan;
    plan.config = i;
    plan.blocks_per_table = static_cast<int>(ceil_div(segments.tiles, c.tiles * c.warps_n));
    if (plan.blocks_per_table > kMostBlocks || segments.per_expert > kMostBlocks) continue;
    plan.row_blocks = static_cast<int>(plan.blocks_per_table * segments.per_expert);
    // As many as any mixture needs, and one: an expert's last block need not be full, but has a row.
    plan.column_blocks = static_cast<int>(m / c.columns + std::min(experts, m) + 1);
    // Of those that have work, experts share the blocks of columns that their rows fill.
    Plan busy = plan;
    busy.column_blocks =
        static_cast<int>(active * std::max<int64_t>(1, std::llround(rows / c.columns + 0.5)));
    const double cost = clocks(c, w, c.columns, busy, gpu);
    if (best.config < 0 || cost < least) best = plan, least = cost;
  }
  return best;
}

}  // namespace flute::sm80
