// CUDA calls that become a Status, and the device that a call is made on.
#pragma once

#include <cuda_runtime_api.h>

#include "core/status.h"

namespace flute {

Status cuda_status(cudaError_t error, const char* what);

// Makes `device` the current one for its lifetime: launching needs it, and callers keep theirs.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    if (cudaGetDevice(&before_) != cudaSuccess) before_ = device;
    if (before_ != device) cudaSetDevice(device);
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_;
  bool changed_;
};

}  // namespace flute
