#include "qgemm/sm80/room.h"

#include <atomic>

#include "core/cuda.h"
#include "core/launch.h"
#include "qgemm/common/layout.h"
#include "qgemm/sm80/kernels.h"
#include "qgemm/sm80/plan.h"

namespace flute::sm80 {
namespace {

const KernelRow* kernels(int bits, DType dtype) {
  const bool half = dtype == DType::f16;
  switch (bits) {
    case 2: return half ? kKernels_b2_f16 : kKernels_b2_bf16;
    case 3: return half ? kKernels_b3_f16 : kKernels_b3_bf16;
    default: return half ? kKernels_b4_f16 : kKernels_b4_bf16;
  }
}

// What is asked once of each kernel on each GPU: that it may use its shared memory, and whether its code
// waits for its predecessor. Code made from PTX for an older architecture does not, and must not start
// early.
struct Prepared {
  std::atomic<int> state{0};  // 0 unknown, 1 plain, 2 with programmatic dependent launch
};
constexpr int kDevices = 16;
Prepared prepared[kDevices][3][2][kConfigCount][2][2];  // device, bits, type of x, and as in KernelRow

Status prepare(Prepared* slot, const void* kernel, int shared, int* state) {
  *state = slot ? slot->state.load(std::memory_order_acquire) : 0;
  if (*state) return {};
  cudaFuncAttributes attributes;
  Status status = cuda_status(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  if (!status.ok()) return status;
  status = cuda_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
                       "cudaFuncSetAttribute");
  if (!status.ok()) return status;
  *state = attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90 ? 2 : 1;
  if (slot) slot->state.store(*state, std::memory_order_release);
  return {};
}

}  // namespace

bool supports(const QgemmProblem& p) { return p.gpu.capability >= 80 && p.dtype != DType::f32; }

int64_t workspace_bytes(const QgemmProblem&) { return 0; }

Status launch(const QgemmProblem& p) {
  if (p.m == 0) return {};
  const QWeight& w = p.weight;
  const Plan plan = make_plan(w, p.m, p.gpu);
  const Config& config = kConfigs[plan.config];
  const int wide = w.scale_dtype == DType::bf16, fine = layout::scales_per_unit(w) - 1;
  const int half = p.dtype == DType::f16;
  const void* kernel = kernels(w.bits, p.dtype)[plan.config].of[wide][fine];

  const DeviceGuard guard(p.gpu.device);
  const int shared = shared_bytes(config);
  Prepared* slot =
      p.gpu.device < kDevices ? &prepared[p.gpu.device][w.bits - 2][half][plan.config][wide][fine] : nullptr;
  int state = 0;
  if (Status status = prepare(slot, kernel, shared, &state); !status.ok()) return status;

  Params params{static_cast<const uint32_t*>(w.codes),
                static_cast<const uint32_t*>(w.scales),
                w.tables,
                static_cast<const uint16_t*>(p.x),
                static_cast<uint16_t*>(p.out),
                p.bias,
                p.ldx,
                p.ldo,
                static_cast<int>(w.n),
                static_cast<int>(p.m),
                static_cast<int>(layout::tiles(w.n)),
                static_cast<int>(layout::units(w.k)),
                static_cast<int>(layout::tiles_per_table(w)),
                layout::group_shift(w),
                static_cast<int>(p.bias_dtype)};
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch{};
  // Blocks that differ in x alone are neighbours: they share codes in the L2 cache. No index needs a division.
  launch.gridDim = dim3(plan.column_blocks, plan.blocks_per_table, static_cast<unsigned>(w.table_count));
  launch.blockDim = dim3(config.warps_k * config.warps_n * 32);
  launch.dynamicSmemBytes = shared;
  launch.stream = static_cast<cudaStream_t>(p.stream);
  launch.attrs = &early;
  launch.numAttrs = state == 2 && launch_early() ? 1 : 0;
  void* arguments[] = {&params};
  return cuda_status(cudaLaunchKernelExC(&launch, kernel, arguments), "launching qgemm");
}

}  // namespace flute::sm80
