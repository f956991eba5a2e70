#include "qgemm/sm90/plan.h"

#include <algorithm>

#include "qgemm/common/layout.h"
#include "qgemm/sm90/config.h"

namespace flute::sm90 {
namespace {

constexpr int64_t kMostOfGrid = 65535;
constexpr int kMostParts = 8;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The narrowest columns that hold m, or the widest.
int columns_for(int64_t m) {
  int columns = 0;
  for (const Config& c : kConfigs) {
    if (columns < m ? c.columns > columns : c.columns >= m && c.columns < columns) columns = c.columns;
  }
  return columns;
}

// Microseconds on an H200 (docs/kernel-notes.md); the plan needs only their proportions.
double time_of(const Config& c, const Plan& plan, int64_t units, int64_t multiprocessors) {
  const double share = c.warpgroups == 2 ? 1 : c.warpgroups == 3 ? 1.16 : 1.33;
  const double unit =
      (0.087 + c.warpgroups * c.slabs * (0.0117 + 0.00104 * c.columns)) * share + (c.slabs > 1 ? 0.087 : 0);
  const double join = plan.parts == 1 ? 0
                      : plan.cluster  ? 1.45 + 0.022 * c.columns
                                      : (plan.parts - 1) * (0.13 + 0.036 * c.columns);
  const int64_t blocks = int64_t{plan.groups} * plan.column_blocks * plan.parts;
  const auto waves = static_cast<double>(ceil_div(blocks, multiprocessors));
  return waves * (static_cast<double>(ceil_div(units, plan.parts)) * unit + 2.9) + join;
}

// Clusters do not fill a GPU whole, as each lies within one of the few parts that it is made of: of an H200's 132
// multiprocessors, 66 pairs can be had at once, 39 triples or 30 quadruples.
bool run_at_once(int64_t clusters, int blocks, int64_t multiprocessors) {
  return blocks <= kMostOfCluster &&
         clusters * blocks <= (blocks == 2 ? multiprocessors : multiprocessors * 7 / 8);
}

}  // namespace

Plan make_plan(const QWeight& w, int64_t m, const Gpu& gpu) {
  const int64_t tiles_per_table = layout::tiles_per_table(w),
                stages = stages_of(static_cast<int>(layout::units(w.k)));
  const int columns = columns_for(m);
  Plan best;
  double least = 0;
  for (int i = 0; i < kConfigCount; ++i) {
    const Config& c = kConfigs[i];
    // Blocks of fewer columns would look all weights up again; it pays where the widest do not hold x either.
    if (m <= columns && c.columns != columns) continue;
    if (tiles(c) > tiles_per_table) continue;
    Plan plan;
    plan.config = i;
    plan.groups_per_table = static_cast<int>(ceil_div(tiles_per_table, tiles(c)));
    plan.groups = static_cast<int>(plan.groups_per_table * w.table_count);
    plan.column_blocks = static_cast<int>(ceil_div(m, c.columns));
    if (plan.groups > kMostOfGrid || plan.column_blocks > kMostOfGrid) continue;
    for (plan.parts = 1; plan.parts <= std::min<int64_t>(kMostParts, stages); ++plan.parts) {
      // Parts are there to fill the GPU once; with more blocks than that they would only cost memory.
      const int64_t sets = int64_t{plan.groups} * plan.column_blocks;
      if (plan.parts > 1 && sets * plan.parts > gpu.multiprocessors) break;
      plan.cluster = plan.parts > 1 && run_at_once(sets, plan.parts, gpu.multiprocessors);
      const double time = time_of(c, plan, stages * kStageUnits, gpu.multiprocessors);
      if (best.config < 0 || time < least) best = plan, least = time;
    }
  }
  if (best.config < 0) return best;
  const Config& c = kConfigs[best.config];
  const int64_t sets = int64_t{best.groups} * best.column_blocks;
  best.image_bytes = stages * best.column_blocks * Stage(w.bits, 128, c).x;
  best.parts_bytes =
      best.parts > 1 && !best.cluster ? sets * best.parts * rows(c) * c.columns * int64_t{sizeof(float)} : 0;
  best.arrived_bytes = sets * int64_t{sizeof(int)};
  return best;
}

}  // namespace flute::sm90
