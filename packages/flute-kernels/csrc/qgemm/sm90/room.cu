#include "qgemm/sm90/room.h"

#include <algorithm>

#include "core/cuda.h"
#include "core/launch.h"
#include "qgemm/common/layout.h"
#include "qgemm/sm90/image.cuh"
#include "qgemm/sm90/plan.h"
#include "sm90_kernels.h"

namespace flute::sm90 {

// Fewer rows of x leave most of the products' columns empty, and the sm80 room is faster; for more, dequantizing
// the weight once is, of a small weight soon (docs/kernel-notes.md).
constexpr int64_t kFewestRows = 17, kMostRows = 1024, kMostRowsOfSmall = 384, kSmall = int64_t{1} << 25;

bool supports(const QgemmProblem& p) {
  const int64_t most_rows = p.weight.n * p.weight.k < kSmall ? kMostRowsOfSmall : kMostRows;
  return p.gpu.capability == 90 && p.dtype != DType::f32 && p.m >= kFewestRows && p.m <= most_rows &&
         make_plan(p.weight, p.m, p.gpu).config >= 0;
}

int64_t workspace_bytes(const QgemmProblem& p) {
  const Plan plan = make_plan(p.weight, p.m, p.gpu);
  return plan.image_bytes + plan.parts_bytes + plan.arrived_bytes;
}

Status launch(const QgemmProblem& p) {
  const QWeight& w = p.weight;
  const Plan plan = make_plan(w, p.m, p.gpu);
  const Config& config = kConfigs[plan.config];
  const int units = static_cast<int>(layout::units(w.k));
  char* const workspace = static_cast<char*>(p.workspace);
  char* const parts = workspace + plan.image_bytes;
  int* const arrived = reinterpret_cast<int*>(parts + plan.parts_bytes);
  ImageParams image{};
  image.x = static_cast<const uint16_t*>(p.x);
  image.image = workspace;
  image.ldx = p.ldx;
  image.m = static_cast<int>(p.m);
  image.units = units;
  image.columns = config.columns;
  image.image_rows = plan.column_blocks * config.columns;
  image.image_units = stages_of(units) * kStageUnits;
  image.arrived = arrived;
  image.arrivals = plan.groups * plan.column_blocks;
  Params params{static_cast<const uint32_t*>(w.codes),
                static_cast<const uint32_t*>(w.scales),
                w.tables,
                workspace,
                plan.cluster ? nullptr : parts,
                arrived,
                static_cast<uint16_t*>(p.out),
                p.bias,
                p.ldo,
                static_cast<int>(w.n),
                static_cast<int>(p.m),
                static_cast<int>(layout::tiles(w.n)),
                units,
                static_cast<int>(layout::tiles_per_table(w)),
                plan.groups_per_table,
                layout::group_shift(w),
                static_cast<int>(p.bias_dtype)};
  void* of_image[] = {&image};
  void* arguments[] = {&params};
  const DeviceGuard guard(p.gpu.device);
  const int64_t image_threads =
      std::max<int64_t>(int64_t{image.image_rows} * image.image_units * 2, image.arrivals);
  const Status status = flute::launch(
      {reinterpret_cast<const void*>(&make_image),
       static_cast<unsigned>((image_threads + kImageThreads - 1) / kImageThreads), 1, 1, kImageThreads, 0},
      of_image, p.gpu.device, p.stream);
  if (!status.ok()) return status;
  const Stage stage(w.bits, kernel_group(w), config);
  return flute::launch(
      {kernel_for(p, plan.config), static_cast<unsigned>(plan.parts),
       static_cast<unsigned>(plan.column_blocks), static_cast<unsigned>(plan.groups), threads(config),
       shared_bytes(stage), static_cast<unsigned>(plan.cluster ? plan.parts : 1)},
      arguments, p.gpu.device, p.stream);
}

}  // namespace flute::sm90
