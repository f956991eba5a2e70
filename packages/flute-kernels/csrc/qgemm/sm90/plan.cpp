#include "qgemm/sm90/plan.h"

#include <algorithm>
#include <cmath>

#include "qgemm/common/layout.h"
#include "qgemm/sm90/config.h"

namespace flute::sm90 {
namespace {

constexpr int64_t kMostSets = int64_t{1} << 30;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The narrowest columns that hold m, or the widest.
int columns_for(int64_t m) {
  int columns = 0;
  for (const Config& c : kConfigs) {
    if (columns < m ? c.columns > columns : c.columns >= m && c.columns < columns) columns = c.columns;
  }
  return columns;
}

// Microseconds on an H200, less what all plans of a problem take (docs/kernel-notes.md). Lookups and products share a
// multiprocessor, so their times add up in part.
double time_of(const Config& c, const Plan& plan, int stages) {
  const int slabs = c.warpgroups * c.slabs;
  const double unit = std::hypot(0.0724 * slabs, c.columns * (0.00114 * slabs + 0.00057)) -
                      (scales_weights(c) ? 0.05 : 0) + (c.slabs > 1 ? 0.027 : 0) +
                      (c.warpgroups == 3   ? -0.009
                       : c.warpgroups == 4 ? 0.013
                                           : 0);
  const double sums = 1e-3 * c.columns * slabs;
  if (plan.parts > 1) {
    const double join = plan.is_cluster ? 1.54 + 5.8 * sums : 3.38 + 3.95 * (plan.parts - 1) * sums;
    return static_cast<double>((stages + plan.parts - 1) / plan.parts) * stage_units(c) * unit + 1.72 + join;
  }
  const double sets = static_cast<double>(plan.sets) / plan.blocks;
  const double shared = plan.shared_sets() > 0 ? 2.5 * 1.72 + 18.4 * sums : 0;
  return sets * stages * stage_units(c) * unit + plan.waves * 1.72 + shared;
}

// Clusters do not fill a GPU whole, as each lies within one of the few parts that it is made of: of an H200's 132
// multiprocessors, 66 pairs can be had at once, 39 triples or 30 quadruples.
bool run_at_once(int64_t clusters, int64_t blocks, int64_t multiprocessors) {
  return blocks <= kMostOfCluster &&
         clusters * blocks <= (blocks == 2 ? multiprocessors : multiprocessors * 7 / 8);
}

}  // namespace

Plan make_plan(const QWeight& w, int64_t m, const Gpu& gpu) {
  const int64_t tiles_per_table = layout::tiles_per_table(w);
  const int units = static_cast<int>(layout::units(w.k));
  const int columns = columns_for(m);
  Plan best;
  double least = 0;
  for (int i = 0; i < kConfigCount; ++i) {
    const Config& c = kConfigs[i];
    // Wider blocks would multiply zeros, and narrower ones look all weights up again, which pays only for wide x.
    if (c.columns > columns || c.columns < std::min(columns, 128)) continue;
    if (tiles(c) > tiles_per_table) continue;
    Plan plan;
    plan.config = i;
    plan.groups_per_table = static_cast<int>(ceil_div(tiles_per_table, tiles(c)));
    plan.groups = static_cast<int>(plan.groups_per_table * w.table_count);
    plan.column_blocks = static_cast<int>(ceil_div(m, c.columns));
    plan.sets = int64_t{plan.groups} * plan.column_blocks;
    if (plan.sets > kMostSets) continue;
    const int stages = stages_of(c, units);
    const auto consider = [&] {
      const double time = time_of(c, plan, stages);
      if (best.config < 0 || time < least) best = plan, least = time;
    };
    if (plan.sets > gpu.multiprocessors) {
      plan.blocks = gpu.multiprocessors;
      plan.waves = static_cast<int>(plan.sets / plan.blocks - (plan.sets % plan.blocks != 0));
      consider();
    }
    const int64_t most_parts = std::min<int64_t>(gpu.multiprocessors / plan.sets, stages);
    for (plan.parts = 1; plan.parts <= most_parts; ++plan.parts) {
      plan.blocks = static_cast<int>(plan.parts * plan.sets);
      plan.waves = plan.parts == 1;
      plan.is_cluster = plan.parts > 1 && run_at_once(plan.sets, plan.parts, gpu.multiprocessors);
      consider();
    }
  }
  if (best.config < 0) return best;
  const Config& c = kConfigs[best.config];
  const int64_t warps = 4 * c.warpgroups;
  best.image_bytes = int64_t{stages_of(c, units)} * best.column_blocks * Stage(w.bits, 128, c).x;
  if (best.shared_sets() > 0 && !best.is_cluster) {
    best.pieces_bytes = int64_t{best.blocks} * rows(c) * c.columns * int64_t{sizeof(float)};
    best.written_bytes = best.blocks * warps * int64_t{sizeof(int)};
  }
  return best;
}

}  // namespace flute::sm90
