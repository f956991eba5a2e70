// The Python face of the kernels, and the only file that knows nanobind.
//
// Tensors arrive as addresses and numbers: one nb::ndarray costs some five microseconds, an integer a
// tenth of one, and a decode step makes hundreds of calls. The Python side has checked every tensor.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#include "core/gpu.h"
#include "core/launch.h"
#include "cpu_isa/isa.h"
#include "hadamard/cuda/rotate.h"
#include "hadamard/hadamard.h"
#include "qgemm/common/cuda_weight.h"
#include "qgemm/room.h"
#include "qgemm/sm80/config.h"
#include "qgemm/sm80/plan.h"
#include "qgemm/sm90/config.h"
#include "qgemm/sm90/plan.h"

namespace nb = nanobind;

namespace flute {
namespace {

const void* address(uintptr_t value) { return reinterpret_cast<const void*>(value); }
void* pointer(uintptr_t value) { return reinterpret_cast<void*>(value); }

void raise_if_refused(const Status& status) {
  if (!status.ok()) throw std::invalid_argument(status.refusal);
}

// Workspace of a CPU call. Small ones, as in decoding, come from a buffer that each calling thread
// keeps; large ones live for the call.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    const size_t size = static_cast<size_t>((bytes + 63) / 64 * 64);
    if (size <= kKept) {
      static thread_local Memory kept;
      if (!kept) kept = allocate(kKept);
      data_ = kept.get();
    } else {
      own_ = allocate(size);
      data_ = own_.get();
    }
  }
  void* data() const { return data_; }

 private:
  static constexpr size_t kKept = 1 << 20;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  using Memory = std::unique_ptr<void, Free>;
  static Memory allocate(size_t size) {
    void* p = std::aligned_alloc(64, size);
    if (!p) throw std::bad_alloc();
    return Memory(p);
  }
  Memory own_;
  void* data_;
};

QWeight make_weight(uintptr_t codes, uintptr_t scales, int scale_dtype, uintptr_t tables,
                    uintptr_t table_of_block, int64_t table_count, int64_t n, int64_t k, int bits,
                    int vector_size, int64_t group) {
  return {address(codes),
          address(scales),
          static_cast<DType>(scale_dtype),
          address(tables),
          static_cast<const int32_t*>(address(table_of_block)),
          table_count,
          n,
          k,
          bits,
          vector_size,
          group};
}

void qgemm_cpu(const QWeight& weight, uintptr_t x, int64_t m, int64_t ldx, int dtype, uintptr_t bias,
               int bias_dtype, uintptr_t out, int64_t ldo, int threads) {
  QgemmProblem problem{weight,
                       address(x),
                       m,
                       ldx,
                       static_cast<DType>(dtype),
                       address(bias),
                       static_cast<DType>(bias_dtype),
                       pointer(out),
                       ldo,
                       threads,
                       nullptr,
                       {},
                       nullptr};
  const Room* room = find_room(Device::cpu, problem);
  if (!room) throw std::runtime_error("no CPU kernel supports this problem");
  nb::gil_scoped_release release;
  Workspace workspace(room->workspace_bytes(problem));
  problem.workspace = workspace.data();
  raise_if_refused(room->launch(problem));
}

void dequantize_cpu(const QWeight& weight, uintptr_t out, int dtype, int threads) {
  nb::gil_scoped_release release;
  raise_if_refused(
      first_room(Device::cpu)
          ->dequantize({weight, pointer(out), static_cast<DType>(dtype), threads, 0, weight.n, {}, nullptr}));
}

HadamardArgs hadamard_args(uintptr_t x, int64_t columns, int64_t ldx, int dtype, uintptr_t signs,
                           int64_t block, bool transpose, uintptr_t out, int64_t ldo) {
  return {address(x),
          ldx,
          pointer(out),
          ldo,
          static_cast<DType>(dtype),
          static_cast<const float*>(address(signs)),
          columns,
          block,
          transpose};
}

void hadamard_cpu(uintptr_t x, int64_t rows, int64_t columns, int64_t ldx, int dtype, uintptr_t signs,
                  int64_t block, bool transpose, uintptr_t out, int64_t ldo, int threads) {
  nb::gil_scoped_release release;
  cpu::rotate(hadamard_args(x, columns, ldx, dtype, signs, block, transpose, out, ldo), rows, threads);
}

// --- CUDA: every call names its device and its stream ---

Gpu gpu_of(int device) {
  Gpu gpu;
  raise_if_refused(find_gpu(device, &gpu));
  return gpu;
}

// 0: done. More: bytes of workspace that the call wants, being made without; then nothing was launched.
// -1: no fused kernel serves the problem, for which there is always dequantizing.
int64_t run_cuda(const QgemmProblem& problem) {
  const Room* room = find_room(Device::cuda, problem);
  if (!room) return -1;
  if (!problem.workspace) {
    if (const int64_t bytes = room->workspace_bytes(problem)) return bytes;
  }
  raise_if_refused(room->launch(problem));
  return 0;
}

int64_t qgemm_cuda(const QWeight& weight, uintptr_t x, int64_t m, int64_t ldx, int dtype, uintptr_t bias,
                   int bias_dtype, uintptr_t out, int64_t ldo, uintptr_t workspace, int device,
                   uintptr_t stream) {
  const QgemmProblem problem{weight,
                             address(x),
                             m,
                             ldx,
                             static_cast<DType>(dtype),
                             address(bias),
                             static_cast<DType>(bias_dtype),
                             pointer(out),
                             ldo,
                             0,
                             pointer(workspace),
                             gpu_of(device),
                             pointer(stream)};
  return run_cuda(problem);
}

// The same of a mixture of experts, whose weight has theirs one below the other: counts is their rows of x.
int64_t qgemm_grouped_cuda(const QWeight& weight, uintptr_t x, int64_t m, int64_t ldx, int dtype,
                           uintptr_t counts, int64_t experts, uintptr_t out, int64_t ldo, uintptr_t workspace,
                           int device, uintptr_t stream) {
  const QgemmProblem problem{weight,
                             address(x),
                             m,
                             ldx,
                             static_cast<DType>(dtype),
                             nullptr,
                             DType::f32,
                             pointer(out),
                             ldo,
                             0,
                             pointer(workspace),
                             gpu_of(device),
                             pointer(stream),
                             experts,
                             static_cast<const int32_t*>(address(counts))};
  return run_cuda(problem);
}

void dequantize_cuda(const QWeight& weight, uintptr_t out, int dtype, int64_t first_row, int64_t rows,
                     int device, uintptr_t stream) {
  raise_if_refused(first_room(Device::cuda)
                       ->dequantize({weight, pointer(out), static_cast<DType>(dtype), 0, first_row, rows,
                                     gpu_of(device), pointer(stream)}));
}

void hadamard_cuda(uintptr_t x, int64_t rows, int64_t columns, int64_t ldx, int dtype, uintptr_t signs,
                   int64_t block, bool transpose, uintptr_t out, int64_t ldo, int device, uintptr_t stream) {
  raise_if_refused(cuda::rotate(hadamard_args(x, columns, ldx, dtype, signs, block, transpose, out, ldo),
                                rows, gpu_of(device), pointer(stream)));
}

void pack_cuda(uintptr_t qweight, uintptr_t codes, int64_t n, int64_t k, int bits, int device,
               uintptr_t stream) {
  raise_if_refused(
      layout::pack(address(qweight), pointer(codes), n, k, bits, gpu_of(device), pointer(stream)));
}

void unpack_cuda(uintptr_t codes, uintptr_t qweight, int64_t n, int64_t k, int bits, int device,
                 uintptr_t stream) {
  raise_if_refused(
      layout::unpack(address(codes), pointer(qweight), n, k, bits, gpu_of(device), pointer(stream)));
}

// The sentence that refuses a GPU, or an empty string.
std::string refusal_of_gpu(int device) { return check_gpu(device).refusal; }

// What the sm80 room would launch on a GPU with these numbers: configuration and blocks. For tests and
// for understanding a time; needs no GPU. Of a mixture with so many experts, n is the rows of all; 0: it is none.
nb::dict plan_sm80(int64_t n, int64_t k, int bits, int64_t group, int64_t tables, int64_t m,
                   int multiprocessors, int shared_bytes, int64_t experts) {
  const QWeight weight = make_weight(0, 0, 1, 0, 0, tables, n, k, bits, 1, group);
  const Gpu gpu{0, 80, multiprocessors, shared_bytes};
  const sm80::Plan plan =
      experts == 0 ? sm80::make_plan(weight, m, gpu) : sm80::make_grouped_plan(weight, m, experts, gpu);
  const sm80::Config& config = sm80::kConfigs[plan.config];
  nb::dict out;
  out["columns"] = config.columns;
  out["tiles"] = config.tiles;
  out["warps_k"] = config.warps_k;
  out["warps_n"] = config.warps_n;
  out["depth"] = config.depth;
  out["blocks_per_table"] = plan.blocks_per_table;
  out["row_blocks"] = plan.row_blocks;
  out["column_blocks"] = plan.column_blocks;
  out["shared_bytes"] = sm80::shared_bytes(config, bits);
  return out;
}

// The same of the sm90 room; empty where it does not serve the problem.
nb::dict plan_sm90(int64_t n, int64_t k, int bits, int64_t group, int64_t tables, int64_t m,
                   int multiprocessors, int64_t experts) {
  const QWeight weight = make_weight(0, 0, 1, 0, 0, tables, n, k, bits, 1, group);
  const Gpu gpu{0, 90, multiprocessors, 0};
  const sm90::Plan plan =
      experts == 0 ? sm90::make_plan(weight, m, gpu) : sm90::make_grouped_plan(weight, m, experts, gpu);
  nb::dict out;
  if (plan.config < 0) return out;
  out["columns"] = sm90::kConfigs[plan.config].columns;
  out["rows"] = sm90::rows(sm90::kConfigs[plan.config]);
  out["groups"] = plan.groups;
  out["column_blocks"] = plan.column_blocks;
  out["blocks"] = plan.blocks;
  out["waves"] = plan.waves;
  out["parts"] = plan.parts;
  out["cluster"] = plan.is_cluster;
  out["workspace_bytes"] = plan.pieces_bytes + plan.written_bytes;
  return out;
}

// Asks for huge pages; a system that has none to give serves small ones, which is no error.
void advise_huge_pages(uintptr_t begin, size_t bytes) {
#if defined(__linux__)
  madvise(const_cast<void*>(address(begin)), bytes, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

}  // namespace
}  // namespace flute

NB_MODULE(_C, m) {
  using namespace flute;
  nb::class_<QWeight>(m, "QWeight", "A weight in a room's layout; it does not own the memory.")
      .def("__init__", [](QWeight* self, uintptr_t codes, uintptr_t scales, int scale_dtype, uintptr_t tables,
                          uintptr_t table_of_block, int64_t table_count, int64_t n, int64_t k, int bits,
                          int vector_size, int64_t group) {
        new (self) QWeight(make_weight(codes, scales, scale_dtype, tables, table_of_block, table_count, n, k,
                                       bits, vector_size, group));
      });
  m.def("qgemm_cpu", &qgemm_cpu);
  m.def("dequantize_cpu", &dequantize_cpu);
  m.def("hadamard_cpu", &hadamard_cpu);
  m.def("qgemm_cuda", &qgemm_cuda);
  m.def("qgemm_grouped_cuda", &qgemm_grouped_cuda);
  m.def("dequantize_cuda", &dequantize_cuda);
  m.def("hadamard_cuda", &hadamard_cuda);
  m.def("pack_cuda", &pack_cuda);
  m.def("unpack_cuda", &unpack_cuda);
  m.def("refusal_of_gpu", &refusal_of_gpu);
  m.def("plan_sm80", &plan_sm80);
  m.def("plan_sm90", &plan_sm90);
  m.def("launch_early", [](bool early) { launch_early() = early; });
  m.def("advise_huge_pages", &advise_huge_pages);
  m.def("available_isas", &cpu::available_isas);
  m.def("select_isa", &cpu::select_isa);
  m.def("isa", [] { return std::string(cpu::isa().name); });
  m.attr("CUDA_ARCHITECTURES") = FLUTE_CUDA_ARCHITECTURES;
  m.attr("CUDA_VERSION") = FLUTE_CUDA_VERSION;
}
