#include "core/launch.h"

#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "core/cuda.h"

namespace flute {
namespace {

// What is asked once of each kernel on each GPU.
class Kernels {
 public:
  // Lets the kernel use `shared_bytes`, and says whether it may start early.
  Status prepare(const void* kernel, int device, int shared_bytes, bool* early) {
    const uintptr_t key = reinterpret_cast<uintptr_t>(kernel) * 64 + static_cast<unsigned>(device);
    {
      const std::shared_lock lock(mutex_);
      if (const auto found = known_.find(key); found != known_.end()) {
        *early = found->second;
        return {};
      }
    }
    cudaFuncAttributes attributes;
    Status status = cuda_status(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
    if (!status.ok()) return status;
    status =
        cuda_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
                    "cudaFuncSetAttribute");
    if (!status.ok()) return status;
    *early = attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90;
    const std::unique_lock lock(mutex_);
    known_[key] = *early;
    return {};
  }

 private:
  std::shared_mutex mutex_;
  std::unordered_map<uintptr_t, bool> known_;
};

}  // namespace

Status launch(const Launch& launch, void** arguments, int device, void* stream) {
  static Kernels kernels;
  bool early = false;
  if (Status status = kernels.prepare(launch.kernel, device, launch.shared_bytes, &early); !status.ok())
    return status;
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (early && launch_early()) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (launch.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = launch.cluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(launch.blocks_x, launch.blocks_y, launch.blocks_z);
  config.blockDim = dim3(launch.threads);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  return cuda_status(cudaLaunchKernelExC(&config, launch.kernel, arguments), "launching a kernel");
}

}  // namespace flute
