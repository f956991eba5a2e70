#include "qgemm/sm90/plan.h"

#include <algorithm>
#include <cmath>

#include "qgemm/common/layout.h"
#include "qgemm/sm90/config.h"

namespace flute::sm90 {
namespace {

constexpr int64_t kMostSets = int64_t{1} << 30;
constexpr int64_t kMostParts = 32;  // lanes of a warp: join.cuh

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool serves(const Config& c, const QWeight& w, int64_t tiles_per_segment) {
  return has_digit(c.bits, w.bits) && tiles(c) <= tiles_per_segment;
}

// The narrowest columns that hold m, or the widest.
int columns_for(const QWeight& w, int64_t m, int64_t tiles_per_table) {
  int columns = 0;
  for (const Config& c : kConfigs) {
    if (c.grouped || !serves(c, w, tiles_per_table)) continue;
    if (columns < m ? c.columns > columns : c.columns >= m && c.columns < columns) columns = c.columns;
  }
  return columns;
}

// Of a unit of 64 along K, in microseconds on an H100, fitted to times that were measured (docs/kernel-notes.md). Lookups
// and products share a multiprocessor, so their times add up in part; the rest is what they do not explain. Sums that wait
// for their scales hold three warpgroups up, and so do spilled registers four of them.
double unit_time(const Config& c, int bits) {
  const double products = c.columns * (0.00131 * c.warpgroups * c.slabs + 0.00025);
  double time = std::hypot(0.138, products);
  if (scales_weights(c)) time -= 0.023;
  if (c.slabs > 1) time += scales_weights(c) ? 0.06 : bits == 3 ? 0.14 : 0.09;
  if (c.warpgroups == 2 && bits == 3) time += 0.012;
  if (c.warpgroups == 3) time += 0.045 + (scales_weights(c) ? 0.01 : 0.03 * (c.columns - 32) / 32);
  if (c.warpgroups == 4) time += shares_registers(c) ? 0.085 : bits == 2 ? 0.145 : 0.122;
  return time;
}
double stage_time(const Config& c, int bits) { return stage_units(c) * unit_time(c, bits); }

constexpr double kItem = 1.32;  // to begin and to end one

int shared_sets(const Plan& plan) { return sets_left(static_cast<int>(plan.sets), plan.waves, plan.blocks); }

// To move the weight and x once.
double least_time(const QWeight& w, int64_t m) {
  const double weights = static_cast<double>(w.n) * static_cast<double>(w.k);
  return (weights * (w.bits / 8.0 + 2.0 / static_cast<double>(w.group)) + 2.0 * m * (w.n + w.k)) / 3e6;
}

// No division of the work takes less than that, and what comes close to it takes a little longer.
double with_memory(double main, double least) {
  return std::pow(std::pow(main, 6.0) + std::pow(least, 6.0), 1 / 6.0);
}

double time_of(const Config& c, int bits, const Plan& plan, int stages, double least) {
  const double stage = stage_time(c, bits), sums = 1e-3 * c.columns * c.warpgroups * c.slabs;
  if (plan.parts > 1) {
    const double join = plan.is_cluster   ? 1.5 + 4.2 * sums
                        : plan.parts == 2 ? 1.03 + 2.5 * sums
                                          : 1.18 + 0.34 * (plan.parts - 1) + 8.4 * sums;
    return with_memory((stages + plan.parts - 1) / plan.parts * stage, least) + kItem + join;
  }
  const double sets = static_cast<double>(plan.sets) / plan.blocks;
  const double main = with_memory(std::max(sets, static_cast<double>(plan.waves)) * stages * stage, least);
  if (sets < 1) return main + kItem + 1.8 + 12.3 * sums;
  const double shared = static_cast<double>(shared_sets(plan)) / plan.blocks;  // 0, or between 1 and 2
  return main + plan.waves * kItem + (shared > 0 ? 8.0 * shared - 4.6 + 8.0 * sums : 0);
}

// Clusters do not fill a GPU whole, as each lies within one of the few parts that it is made of: of an H200's 132
// multiprocessors, 66 pairs can be had at once, 39 triples or 30 quadruples.
bool run_at_once(int64_t clusters, int64_t blocks, int64_t multiprocessors) {
  return blocks <= kMostOfCluster &&
         clusters * blocks <= (blocks == 2 ? multiprocessors : multiprocessors * 7 / 8);
}

// Of an expert, on average: blocks of columns, and what a stage of one of them takes.
struct ColumnBlocks {
  double count, stage;
};

// Wide blocks' loops for fewer columns have fewer weights under way than narrow blocks, for a quarter fewer than memory
// wants. And blocks of 128 columns look weights up twice as often as those of 256: a GPU at its limit of power pays.
constexpr double kQuarter = 1.3, kHalf = 1.05, kTwice = 1.05;

// Experts have between half as many and one and a half times as many rows of x as the average; who has how many is not
// known here.
ColumnBlocks column_blocks(const Config& c, int bits, double average) {
  constexpr int kExperts = 16;
  double count = 0, time = 0;
  for (int i = 0; i < kExperts; ++i) {
    const int rows = std::max(1, static_cast<int>(std::lround(average * (0.5 + (i + 0.5) / kExperts))));
    const int whole = (rows - 1) / c.columns;
    const int columns = width_for(c, rows - whole * c.columns);  // of the last block
    const double last = unit_time({columns, c.warpgroups, c.slabs, 1, c.bits}, bits);
    count += whole + 1;
    const double factor = 4 * columns <= c.columns ? kQuarter : columns < c.columns ? kHalf : 1;
    time += whole * stage_time(c, bits) + stage_units(c) * last * factor;
  }
  return {count / kExperts, time / count * (c.columns == 128 ? kTwice : 1)};
}

void add_workspace(Plan& plan) {
  const Config& c = kConfigs[plan.config];
  plan.pieces_bytes = int64_t{plan.blocks} * rows(c) * c.columns * int64_t{sizeof(float)};
  plan.written_bytes = int64_t{plan.blocks} * plan.parts * 4 * c.warpgroups * int64_t{sizeof(uint64_t)};
}

}  // namespace

Plan make_plan(const QWeight& w, int64_t m, const Gpu& gpu) {
  const int64_t tiles_per_table = layout::tiles_per_table(w);
  const int units = static_cast<int>(layout::units(w.k));
  const int columns = columns_for(w, m, tiles_per_table);
  const double at_least = least_time(w, m);
  Plan best;
  double least = 0;
  for (int i = 0; i < kConfigCount; ++i) {
    const Config& c = kConfigs[i];
    // Wider blocks would multiply zeros, and much narrower ones look all weights up again and again.
    if (c.grouped || !serves(c, w, tiles_per_table)) continue;
    if (c.columns > columns || 2 * c.columns < columns) continue;
    Plan plan;
    plan.config = i;
    plan.groups_per_segment = static_cast<int>(ceil_div(tiles_per_table, tiles(c)));
    plan.groups = static_cast<int>(plan.groups_per_segment * w.table_count);
    plan.column_blocks = static_cast<int>(ceil_div(m, c.columns));
    plan.sets = int64_t{plan.groups} * plan.column_blocks;
    if (plan.sets > kMostSets) continue;
    const int stages = stages_of(c, units);
    const auto consider = [&] {
      const double time = time_of(c, w.bits, plan, stages, at_least);
      if (best.config < 0 || time < least) best = plan, least = time;
    };
    if (plan.sets > gpu.multiprocessors) {
      plan.blocks = gpu.multiprocessors;
      plan.waves = static_cast<int>(ceil_div(plan.sets, plan.blocks));
      consider();
      plan.waves = waves_of(static_cast<int>(plan.sets), plan.blocks);
      if (shared_sets(plan) > 0) consider();
      continue;
    }
    const int64_t most_parts = std::min({gpu.multiprocessors / plan.sets, int64_t{stages}, kMostParts});
    for (plan.parts = 1; plan.parts <= most_parts; ++plan.parts) {
      plan.blocks = static_cast<int>(plan.parts * plan.sets);
      plan.waves = plan.parts == 1;
      plan.is_cluster = false;
      consider();
      plan.is_cluster = plan.parts > 1 && run_at_once(plan.sets, plan.parts, gpu.multiprocessors);
      if (plan.is_cluster) consider();
    }
    if (plan.sets * stages >= gpu.multiprocessors && gpu.multiprocessors % plan.sets != 0) {
      plan.parts = 1, plan.waves = 0, plan.is_cluster = false;
      plan.blocks = gpu.multiprocessors;
      consider();
    }
  }
  if (best.config >= 0 && shared_sets(best) > 0 && !best.is_cluster) add_workspace(best);
  return best;
}

Plan make_grouped_plan(const QWeight& w, int64_t m, int64_t experts, const Gpu& gpu) {
  const layout::Segments segments = layout::segments(w, experts);
  Plan best;
  double least = 0;
  if (experts > kMostExperts || m < 1) return best;
  const double busy = static_cast<double>(std::min(m, experts));
  for (int i = 0; i < kConfigCount; ++i) {
    const Config& c = kConfigs[i];
    if (!c.grouped || !serves(c, w, segments.tiles)) continue;
    Plan plan;
    plan.config = i;
    plan.groups_per_segment = static_cast<int>(ceil_div(segments.tiles, tiles(c)));
    plan.groups = static_cast<int>(plan.groups_per_segment * segments.per_expert);  // of an expert
    plan.blocks = gpu.multiprocessors;
    const ColumnBlocks of_expert = column_blocks(c, w.bits, static_cast<double>(m) / busy);
    plan.column_blocks = static_cast<int>(std::lround(busy * of_expert.count));
    const int stages = stages_of(c, static_cast<int>(layout::units(w.k)));
    const double item_time = kItem + stages * of_expert.stage;
    plan.sets = int64_t{plan.groups} * plan.column_blocks;
    if (plan.sets > kMostSets) continue;
    const double time = std::ceil(static_cast<double>(plan.sets) / plan.blocks) * item_time;
    if (best.config < 0 || time < least) best = plan, least = time;
  }
  if (best.config >= 0) add_workspace(best);
  return best;
}

}  // namespace flute::sm90
