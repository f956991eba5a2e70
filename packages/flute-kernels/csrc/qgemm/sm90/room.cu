#include "qgemm/sm90/room.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <random>

#include "core/cuda.h"
#include "core/launch.h"
#include "qgemm/common/layout.h"
#include "qgemm/sm90/plan.h"
#include "qgemm/sm90/tensor_map.h"
#include "sm90_kernels.h"

namespace flute::sm90 {

// Fewer rows of x leave most of the products' columns empty, and the sm80 room is faster, unless the weight is so large
// that little else than its main loop counts (docs/kernel-notes.md).
constexpr int64_t kFewestRows = 17, kFewestRowsOfLarge = 9, kLarge = int64_t{1} << 28;
// Of a mixture, in all, or more where so many experts share them that most have one.
constexpr int64_t kFewestRowsOfMixture = 9;
constexpr int64_t kMostRows = int64_t{1} << 30;
constexpr int kRowsOfBand = 2048;  // of x that blocks read at about the same time: schedule.cuh

namespace {

int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Of plans made before: a model has the same few shapes at every step, and a call asks several times.
Plan plan_of(const QgemmProblem& p) {
  using Key = std::array<int64_t, 8>;
  struct Made {
    Key key;
    Plan plan;
  };
  thread_local std::array<Made, 32> made{};
  const QWeight& w = p.weight;
  const Key key{
      w.n, w.k, w.bits, w.group, w.table_count, p.m, p.counts ? p.experts : 0, p.gpu.multiprocessors};
  Made& here = made[static_cast<uint64_t>(w.n / 16 * 31 + w.k / 16 * 7 + p.m) % made.size()];
  if (here.key != key)
    here = {key, p.counts ? make_grouped_plan(w, p.m, p.experts, p.gpu) : make_plan(w, p.m, p.gpu)};
  return here.plan;
}

// A number that nothing else has, by all that is likely: a count, scattered over 64 bits (splitmix64: Steele, Lea,
// Flood, 2014), from a random beginning.
uint64_t new_token() {
  static std::atomic<uint64_t> count{std::random_device{}() * (uint64_t{1} << 32) + std::random_device{}()};
  uint64_t z = count.fetch_add(0x9e3779b97f4a7c15, std::memory_order_relaxed);
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

}  // namespace

bool supports(const QgemmProblem& p) {
  if (p.gpu.capability != 90 || p.dtype == DType::f32) return false;
  const bool is_large = p.weight.bits == 4 && p.weight.n * p.weight.k >= kLarge;
  const int64_t fewest = p.counts   ? std::max(kFewestRowsOfMixture, p.experts / 4 + 1)
                         : is_large ? kFewestRowsOfLarge
                                    : kFewestRows;
  if (p.m < fewest) return false;
  return p.m <= kMostRows && plan_of(p).config >= 0;
}

int64_t workspace_bytes(const QgemmProblem& p) {
  const Plan plan = plan_of(p);
  return plan.pieces_bytes + plan.written_bytes;
}

Status launch(const QgemmProblem& p) {
  const QWeight& w = p.weight;
  const Plan plan = plan_of(p);
  const Config& config = kConfigs[plan.config];
  char* const workspace = static_cast<char*>(p.workspace);
  Params params{};
  if (Status status = make_map(p, box_columns(config), &params.x); !status.ok()) return status;
  params.codes = static_cast<const uint32_t*>(w.codes);
  params.scales = static_cast<const uint32_t*>(w.scales);
  params.tables = w.tables;
  params.pieces = workspace;
  params.written = reinterpret_cast<uint64_t*>(workspace + plan.pieces_bytes);
  params.token = plan.written_bytes > 0 ? new_token() : 0;
  params.out = static_cast<uint16_t*>(p.out);
  params.bias = p.bias;
  params.ldo = p.ldo;
  const layout::Segments segments = layout::segments(w, p.experts);
  params.n = static_cast<int>(w.n / p.experts);
  params.m = static_cast<int>(p.m);
  params.tiles = static_cast<int>(layout::tiles(w.n));
  params.units = static_cast<int>(layout::units(w.k));
  params.tiles_per_segment = static_cast<int>(segments.tiles);
  params.groups_per_segment = make_divisor(plan.groups_per_segment);
  params.segments_per_table = make_divisor(static_cast<int>(segments.per_table));
  params.table_count = static_cast<int>(w.table_count);
  params.column_blocks = plan.column_blocks;
  const int bands = ceil_div(plan.column_blocks, std::max(1, kRowsOfBand / config.columns));
  const int band = ceil_div(plan.column_blocks, bands);
  params.sets_of_band = make_divisor(plan.groups * band);
  params.band = make_divisor(band);
  params.last_band = make_divisor(plan.column_blocks - (ceil_div(plan.column_blocks, band) - 1) * band);
  params.parts = make_divisor(plan.parts);
  params.stages = make_divisor(stages_of(config, static_cast<int>(layout::units(w.k))));
  const auto stores = [&](int64_t count) {
    return p.ldo % count == 0 && reinterpret_cast<uintptr_t>(p.out) % (2 * count) == 0;
  };
  params.stores_fours = stores(4), params.stores_eights = stores(8);
  params.is_cluster = plan.is_cluster;
  if (p.counts) {
    params.counts = p.counts;
    params.experts = static_cast<int>(p.experts);
    params.segments_per_expert = static_cast<int>(segments.per_expert);
    params.division.parts = 1;
  } else {
    params.division = division(static_cast<int>(plan.sets), stages_of(config, params.units), plan.blocks,
                               plan.parts, plan.waves);
  }
  params.group_shift = layout::group_shift(w);
  params.bias_dtype = static_cast<int>(p.bias_dtype);
  void* arguments[] = {&params};
  const DeviceGuard guard(p.gpu.device);
  const Stage stage(w.bits, kernel_group(w), config);
  return flute::launch({kernel_for(p, plan.config), static_cast<unsigned>(plan.blocks), 1, 1, threads(config),
                        shared_bytes(stage, config), static_cast<unsigned>(plan.is_cluster ? plan.parts : 1)},
                       arguments, p.gpu.device, p.stream);
}

}  // namespace flute::sm90
