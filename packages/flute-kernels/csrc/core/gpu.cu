#include "core/gpu.h"

#include <array>
#include <atomic>

#include "core/cuda.h"

namespace flute {
namespace {

__global__ void probe() {}

constexpr int kMaxDevices = 64;

struct Slot {
  std::atomic<bool> known{false};
  Gpu gpu;
};

}  // namespace

Status cuda_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // a refused launch must not be reported again by a later call
  return {std::string(what) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error) + "."};
}

Status find_gpu(int device, Gpu* gpu) {
  static std::array<Slot, kMaxDevices> slots;
  if (device < 0 || device >= kMaxDevices) {
    return {"device index is " + std::to_string(device) + "; supported are 0 to " +
            std::to_string(kMaxDevices - 1) + "."};
  }
  Slot& slot = slots[device];
  if (!slot.known.load(std::memory_order_acquire)) {
    int major = 0, minor = 0, count = 0, shared = 0;
    for (const auto& [attribute, value] : {std::pair{cudaDevAttrComputeCapabilityMajor, &major},
                                           {cudaDevAttrComputeCapabilityMinor, &minor},
                                           {cudaDevAttrMultiProcessorCount, &count},
                                           {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &shared}}) {
      const Status status =
          cuda_status(cudaDeviceGetAttribute(value, attribute, device), "cudaDeviceGetAttribute");
      if (!status.ok()) return status;
    }
    slot.gpu = {device, 10 * major + minor, count, shared};  // two threads may write the same
    slot.known.store(true, std::memory_order_release);
  }
  *gpu = slot.gpu;
  return {};
}

Status check_gpu(int device) {
  Gpu gpu;
  if (const Status status = find_gpu(device, &gpu); !status.ok()) return status;
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  if (cudaFuncGetAttributes(&attributes, probe) == cudaSuccess) return {};
  cudaGetLastError();
  const std::string capability =
      std::to_string(gpu.capability / 10) + "." + std::to_string(gpu.capability % 10);
  return {"the GPU has compute capability " + capability +
          "; this build has code for " FLUTE_CUDA_ARCHITECTURES "."};
}

}  // namespace flute
