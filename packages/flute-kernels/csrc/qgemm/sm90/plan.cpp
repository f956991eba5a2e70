#include "qgemm/sm90/plan.h"

#include <algorithm>

#include "qgemm/common/layout.h"
#include "qgemm/sm90/config.h"

namespace flute::sm90 {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kFewestUnits = 4;  // of a block: with fewer, filling its table and ring takes longer

}  // namespace

Plan make_plan(const QWeight& w, int64_t m, const Gpu& gpu) {
  const int64_t tiles_per_table = layout::tiles_per_table(w);
  // The narrowest columns that hold m, or the widest.
  int columns = 0;
  for (const Config& c : kConfigs) {
    if (columns < m ? c.columns > columns : c.columns >= m && c.columns < columns) columns = c.columns;
  }
  // Of these, the most rows of weights that a table has.
  int best = -1;
  for (int i = 0; i < kConfigCount; ++i) {
    const Config& c = kConfigs[i];
    if (c.columns != columns || 4 * c.warpgroups > tiles_per_table) continue;
    if (best < 0 || c.warpgroups > kConfigs[best].warpgroups) best = i;
  }
  Plan plan{};
  plan.config = best;
  if (best < 0) return plan;
  const Config& c = kConfigs[best];
  plan.groups_per_table = static_cast<int>(ceil_div(tiles_per_table, 4 * c.warpgroups));
  plan.groups = static_cast<int>(plan.groups_per_table * w.table_count);
  plan.column_blocks = static_cast<int>(ceil_div(m, c.columns));
  const int64_t units = layout::units(w.k), total = units * plan.groups * plan.column_blocks;
  if (total > 0x7fffffff / 2) return {-1};
  plan.blocks = static_cast<int>(std::clamp<int64_t>(total / kFewestUnits, 1, gpu.multiprocessors));
  plan.joins = (int64_t{plan.groups} * plan.column_blocks) % plan.blocks != 0;
  plan.image_bytes = units * plan.column_blocks * c.columns * 128;
  plan.parts_bytes = plan.joins ? int64_t{plan.blocks} * 2 * c.warpgroups * 128 * c.columns * 2 : 0;
  return plan;
}

}  // namespace flute::sm90
