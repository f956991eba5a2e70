#include "qgemm/sm90/room.h"

#include <algorithm>
#include <array>

#include "core/cuda.h"
#include "core/launch.h"
#include "qgemm/common/layout.h"
#include "qgemm/sm90/image.cuh"
#include "qgemm/sm90/plan.h"
#include "sm90_kernels.h"

namespace flute::sm90 {

// Fewer rows of x leave most of the products' columns empty, and the sm80 room is faster; for more, dequantizing
// the weight once is, of a small weight sooner (docs/kernel-notes.md).
constexpr int64_t kFewestRows = 17, kMostRows = 2048, kMostRowsOfSmall = 1024, kSmall = int64_t{1} << 25;

namespace {

// Of plans made before: a model has the same few shapes at every step, and a call asks several times.
Plan plan_of(const QgemmProblem& p) {
  using Key = std::array<int64_t, 7>;
  struct Made {
    Key key;
    Plan plan;
  };
  thread_local std::array<Made, 32> made{};
  const QWeight& w = p.weight;
  const Key key{w.n, w.k, w.bits, w.group, w.table_count, p.m, p.gpu.multiprocessors};
  Made& here = made[static_cast<uint64_t>(w.n / 16 * 31 + w.k / 16 * 7 + p.m) % made.size()];
  if (here.key != key) here = {key, make_plan(w, p.m, p.gpu)};
  return here.plan;
}

}  // namespace

bool supports(const QgemmProblem& p) {
  const int64_t most_rows = p.weight.n * p.weight.k < kSmall ? kMostRowsOfSmall : kMostRows;
  return p.gpu.capability == 90 && p.dtype != DType::f32 && p.m >= kFewestRows && p.m <= most_rows &&
         plan_of(p).config >= 0;
}

int64_t workspace_bytes(const QgemmProblem& p) {
  const Plan plan = plan_of(p);
  return plan.image_bytes + plan.pieces_bytes + plan.written_bytes;
}

Status launch(const QgemmProblem& p) {
  const QWeight& w = p.weight;
  const Plan plan = plan_of(p);
  const Config& config = kConfigs[plan.config];
  const int units = static_cast<int>(layout::units(w.k));
  char* const workspace = static_cast<char*>(p.workspace);
  char* const pieces = workspace + plan.image_bytes;
  int* const written = reinterpret_cast<int*>(pieces + plan.pieces_bytes);
  ImageParams image{};
  image.x = static_cast<const uint16_t*>(p.x);
  image.image = workspace;
  image.ldx = p.ldx;
  image.m = static_cast<int>(p.m);
  image.units = units;
  image.columns = config.columns;
  image.image_rows = plan.column_blocks * config.columns;
  image.image_units = stages_of(config, units) * stage_units(config);
  image.zeroed = written;
  image.zeros = static_cast<int>(plan.written_bytes / sizeof(int));
  Params params{};
  params.codes = static_cast<const uint32_t*>(w.codes);
  params.scales = static_cast<const uint32_t*>(w.scales);
  params.tables = w.tables;
  params.image = workspace;
  params.pieces = pieces;
  params.written = written;
  params.out = static_cast<uint16_t*>(p.out);
  params.bias = p.bias;
  params.ldo = p.ldo;
  params.n = static_cast<int>(w.n);
  params.m = static_cast<int>(p.m);
  params.tiles = static_cast<int>(layout::tiles(w.n));
  params.units = units;
  params.tiles_per_table = static_cast<int>(layout::tiles_per_table(w));
  params.groups_per_table = plan.groups_per_table;
  params.column_blocks = plan.column_blocks;
  params.stores_fours = p.ldo % 4 == 0 && reinterpret_cast<uintptr_t>(p.out) % 8 == 0;
  params.waves = plan.waves;
  params.shared_sets = static_cast<int>(plan.shared_sets());
  params.parts = plan.parts;
  params.is_cluster = plan.is_cluster;
  params.group_shift = layout::group_shift(w);
  params.bias_dtype = static_cast<int>(p.bias_dtype);
  void* of_image[] = {&image};
  void* arguments[] = {&params};
  const DeviceGuard guard(p.gpu.device);
  const int64_t image_threads =
      std::max<int64_t>(int64_t{image.image_rows} * image.image_units * 2, image.zeros);
  const Status status = flute::launch(
      {reinterpret_cast<const void*>(&make_image),
       static_cast<unsigned>((image_threads + kImageThreads - 1) / kImageThreads), 1, 1, kImageThreads, 0},
      of_image, p.gpu.device, p.stream);
  if (!status.ok()) return status;
  const Stage stage(w.bits, kernel_group(w), config);
  return flute::launch({kernel_for(p, plan.config), static_cast<unsigned>(plan.blocks), 1, 1, threads(config),
                        shared_bytes(stage), static_cast<unsigned>(plan.is_cluster ? plan.parts : 1)},
                       arguments, p.gpu.device, p.stream);
}

}  // namespace flute::sm90
