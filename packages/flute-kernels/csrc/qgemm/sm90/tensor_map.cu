#include "qgemm/sm90/tensor_map.h"

#include <cuda.h>

#include "core/cuda.h"
#include "qgemm/common/layout.h"

namespace flute::sm90 {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, asked for by name, so that nothing here has to be linked to the driver.
Status find_encode(Encode* encode) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
  if (const Status status = cuda_status(error, "cudaGetDriverEntryPointByVersion"); !status.ok())
    return status;
  if (result != cudaDriverEntryPointSuccess)
    return {"the GPU's driver has no cuTensorMapEncodeTiled; CUDA 12 came with it."};
  *encode = reinterpret_cast<Encode>(found);
  return {};
}

}  // namespace

Status make_map(const QgemmProblem& p, int columns, TensorMap* map) {
  static Encode encode = nullptr;
  static const Status found = find_encode(&encode);
  if (!found.ok()) return found;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(layout::units(p.weight.k)) * layout::kUnit,
                              static_cast<cuuint64_t>(p.m)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(p.ldx) * sizeof(uint16_t)};
  const cuuint32_t box[] = {layout::kUnit, static_cast<cuuint32_t>(columns)}, steps[] = {1, 1};
  // Beyond a box's line of 128 bytes, the cache may fetch its neighbour: it is wanted next.
  const CUresult result =
      encode(reinterpret_cast<CUtensorMap*>(map), CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<void*>(p.x),
             sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return {};
  return {"cuTensorMapEncodeTiled refuses x of " + std::to_string(p.m) + " rows, " + std::to_string(p.ldx) +
          " elements apart, with error " + std::to_string(static_cast<int>(result)) + "."};
}

}  // namespace flute::sm90
