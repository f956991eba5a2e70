#include "hadamard/cuda/rotate.h"

#include <algorithm>
#include <cmath>

#include "core/cuda.h"
#include "hadamard/cuda/lanes.cuh"
#include "hadamard/cuda/tensor.cuh"

namespace flute::cuda {
namespace {

struct Kernel {
  void (*run)(Args);
  int resident;  // blocks of a multiprocessor
};

template <class T, int kTeam>
Kernel choose(int block, bool whole) {
  if constexpr (sizeof(T) == 2) {
    if (whole && block >= kExchangeSmallest) return {rotate_by_tensor_cores<T, kTeam>, kTensorResident};
    if (whole && block >= kTensorSmallest) return {rotate_by_tensor_cores<T, 0>, kTensorResident};
  }
  return {whole ? rotate_by_lanes<T, kTeam, true> : rotate_by_lanes<T, kTeam, false>, kLanesResident};
}

template <class T>
Kernel choose(int block, bool whole) {
  return block <= kWarpValues       ? choose<T, 1>(block, whole)
         : block == 2 * kWarpValues ? choose<T, 2>(block, whole)
                                    : choose<T, 4>(block, whole);
}

bool aligned(const void* data, int64_t stride, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size_of(dtype) % 16 == 0;
}

}  // namespace

Status rotate(const HadamardArgs& h, int64_t rows, const Gpu& gpu, void* stream) {
  if (rows * h.columns == 0) return {};
  // Rows of blocks of 2 and 4 may end inside a run of eight; other rows may be unaligned.
  const bool whole = h.columns % 8 == 0 && aligned(h.x, h.ldx, h.dtype) && aligned(h.out, h.ldo, h.dtype) &&
                     reinterpret_cast<uintptr_t>(h.signs) % 16 == 0;
  const int block = static_cast<int>(h.block);
  const Kernel kernel = h.dtype == DType::f32   ? choose<float>(block, whole)
                        : h.dtype == DType::f16 ? choose<__half>(block, whole)
                                                : choose<__nv_bfloat16>(block, whole);
  const DeviceGuard guard(gpu.device);
  // Positions in the kernels are 32-bit numbers: more than a billion values take several launches.
  const int64_t most_rows = std::max<int64_t>(1, (int64_t{1} << 30) / h.columns);
  for (int64_t first = 0; first < rows; first += most_rows) {
    const int64_t total = std::min(most_rows, rows - first) * h.columns;
    const Args args{static_cast<const char*>(h.x) + first * h.ldx * size_of(h.dtype),
                    static_cast<char*>(h.out) + first * h.ldo * size_of(h.dtype),
                    h.signs,
                    h.ldx,
                    h.ldo,
                    Divisor(static_cast<uint32_t>(h.columns)),
                    static_cast<int>(total),
                    block,
                    1.f / sqrtf(static_cast<float>(block)),
                    h.transpose};
    // As many blocks as are resident together; each goes on with the next part while there is one.
    constexpr int64_t kPerBlock = kWarps * kWarpValues;
    const int64_t blocks =
        std::min((total + kPerBlock - 1) / kPerBlock, int64_t{gpu.multiprocessors} * kernel.resident);
    kernel.run<<<static_cast<unsigned>(blocks), kWarps * 32, 0, static_cast<cudaStream_t>(stream)>>>(args);
    if (const Status status = cuda_status(cudaGetLastError(), "rotating"); !status.ok()) return status;
  }
  return {};
}

}  // namespace flute::cuda
