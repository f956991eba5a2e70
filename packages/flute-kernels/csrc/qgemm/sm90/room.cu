#include "qgemm/sm90/room.h"

#include "core/cuda.h"
#include "core/launch.h"
#include "qgemm/common/layout.h"
#include "qgemm/sm90/image.cuh"
#include "qgemm/sm90/kernels.h"
#include "qgemm/sm90/plan.h"

namespace flute::sm90 {

bool supports(const QgemmProblem& p) {
  // Compiled, but not chosen before its tests have run on a GPU. From 17 rows on is where it should begin: fewer
  // leave the tensor cores' columns empty, and the sm80 room needs no image of x.
  constexpr bool kTested = false;
  return kTested && p.gpu.capability == 90 && p.dtype != DType::f32 && p.m > 16 &&
         make_plan(p.weight, p.m, p.gpu).config >= 0;
}

int64_t workspace_bytes(const QgemmProblem& p) {
  const Plan plan = make_plan(p.weight, p.m, p.gpu);
  return plan.image_bytes + plan.parts_bytes;
}

Status launch(const QgemmProblem& p) {
  const QWeight& w = p.weight;
  const Plan plan = make_plan(w, p.m, p.gpu);
  const Config& config = kConfigs[plan.config];
  const int wide = w.scale_dtype == DType::bf16, per_unit = layout::scales_per_unit(w);
  const KernelRow& row = kKernels[w.bits - 2][p.dtype == DType::bf16][plan.config];
  const int units = static_cast<int>(layout::units(w.k));

  ImageParams image{static_cast<const uint16_t*>(p.x),   p.workspace,    p.ldx, static_cast<int>(p.m),
                    plan.column_blocks * config.columns, config.columns, units};
  Params params{static_cast<const uint32_t*>(w.codes),
                static_cast<const uint32_t*>(w.scales),
                w.tables,
                p.workspace,
                static_cast<char*>(p.workspace) + plan.image_bytes,
                static_cast<uint16_t*>(p.out),
                p.bias,
                p.ldo,
                static_cast<int>(w.n),
                static_cast<int>(p.m),
                static_cast<int>(layout::tiles(w.n)),
                units,
                static_cast<int>(layout::tiles_per_table(w)),
                plan.groups_per_table,
                plan.groups,
                plan.column_blocks,
                layout::group_shift(w),
                static_cast<int>(p.bias_dtype)};
  int blocks = plan.blocks;
  void* of_image[] = {&image};
  void* of_kernel[] = {&params};
  void* of_join[] = {&params, &blocks};

  const DeviceGuard guard(p.gpu.device);
  const auto device = p.gpu.device;
  const int64_t threads = int64_t{image.rows} * units * 2;
  Status status = flute::launch(
      {reinterpret_cast<const void*>(&make_image),
       static_cast<unsigned>((threads + kImageThreads - 1) / kImageThreads), 1, 1, kImageThreads, 0},
      of_image, device, p.stream);
  if (!status.ok()) return status;
  status = flute::launch({row.of[wide][per_unit - 1], static_cast<unsigned>(blocks), 1, 1,
                          config.warpgroups * 128 + 128, shared_bytes(Stage(w.bits, per_unit, config))},
                         of_kernel, device, p.stream);
  if (!status.ok() || !plan.joins) return status;
  const unsigned parts = static_cast<unsigned>((config.warpgroups * config.columns / 8 + 3) / 4);
  return flute::launch({row.join, static_cast<unsigned>(plan.column_blocks),
                        static_cast<unsigned>(plan.groups), parts, 128, 0},
                       of_join, device, p.stream);
}

}  // namespace flute::sm90
