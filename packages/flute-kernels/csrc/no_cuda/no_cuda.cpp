// What a build without CUDA links in place of the GPU's half: rooms that support nothing, calls that refuse.
#include "core/gpu.h"
#include "hadamard/cuda/rotate.h"
#include "qgemm/common/cuda_weight.h"
#include "qgemm/sm80/room.h"

namespace flute {
namespace {

Status refuse() { return {"this build of flute-kernels has no GPU kernels."}; }

}  // namespace

Status find_gpu(int, Gpu*) { return refuse(); }
Status check_gpu(int) { return refuse(); }

namespace cuda {
Status rotate(const HadamardArgs&, int64_t, const Gpu&, void*) { return refuse(); }
}  // namespace cuda

namespace layout {
Status pack(const void*, void*, int64_t, int64_t, int, const Gpu&, void*) { return refuse(); }
Status unpack(const void*, void*, int64_t, int64_t, int, const Gpu&, void*) { return refuse(); }
Status dequantize(const DequantizeProblem&) { return refuse(); }
}  // namespace layout

namespace sm80 {
bool supports(const QgemmProblem&) { return false; }
int64_t workspace_bytes(const QgemmProblem&) { return 0; }
Status launch(const QgemmProblem&) { return refuse(); }
}  // namespace sm80

}  // namespace flute
