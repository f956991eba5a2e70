#include "qgemm/sm80/room.h"

#include "core/cuda.h"
#include "core/launch.h"
#include "qgemm/common/layout.h"
#include "qgemm/sm80/plan.h"
#include "sm80_kernels.h"

namespace flute::sm80 {

// With more rows of x, dequantizing the weight once is faster (docs/kernel-notes.md); with more rows of weights a
// grid could be too large.
constexpr int64_t kMostRows = 128, kMostWeightRows = 65535 * layout::kTile;

namespace {

Plan plan_of(const QgemmProblem& p) {
  return p.counts ? make_grouped_plan(p.weight, p.m, p.experts, p.gpu) : make_plan(p.weight, p.m, p.gpu);
}

}  // namespace

bool supports(const QgemmProblem& p) {
  if (p.gpu.capability < 80 || p.dtype == DType::f32) return false;
  if (p.counts) return p.m <= kMostRows * p.experts && plan_of(p).config >= 0;  // as many for each of them
  return p.m <= kMostRows && p.weight.n <= kMostWeightRows;
}

int64_t workspace_bytes(const QgemmProblem&) { return 0; }

Status launch(const QgemmProblem& p) {
  if (p.m == 0) return {};
  const QWeight& w = p.weight;
  const Plan plan = plan_of(p);
  const layout::Segments segments = layout::segments(w, p.experts);
  const Config& config = kConfigs[plan.config];
  Params params{static_cast<const uint32_t*>(w.codes),
                static_cast<const uint32_t*>(w.scales),
                w.tables,
                static_cast<const uint16_t*>(p.x),
                static_cast<uint16_t*>(p.out),
                p.bias,
                p.ldx,
                p.ldo,
                static_cast<int>(w.n / p.experts),
                static_cast<int>(p.m),
                static_cast<int>(layout::tiles(w.n)),
                static_cast<int>(layout::units(w.k)),
                static_cast<int>(segments.tiles),
                static_cast<int>(segments.per_table),
                static_cast<int>(w.table_count),
                layout::group_shift(w),
                static_cast<int>(p.bias_dtype),
                p.counts,
                static_cast<int>(p.experts),
                static_cast<int>(segments.per_expert)};
  void* arguments[] = {&params};
  const DeviceGuard guard(p.gpu.device);
  // Blocks that differ in x alone are neighbours: they share codes in the L2 cache. No index needs a division.
  return flute::launch(
      {kernel_for(p, plan.config), static_cast<unsigned>(plan.column_blocks),
       static_cast<unsigned>(plan.blocks_per_table), static_cast<unsigned>(segments.per_expert),
       config.warps_k * config.warps_n * 32, shared_bytes(config, w.bits)},
      arguments, p.gpu.device, p.stream);
}

}  // namespace flute::sm80
