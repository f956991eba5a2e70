// Programmatic dependent launch, from inside a kernel. PTX ISA 9.0, 9.7.13.13, griddepcontrol.
#pragma once

namespace flute {

// Lets the next kernel of the stream start
// before this one has ended, and waits until the one before has ended and its writes can be seen.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace flute
