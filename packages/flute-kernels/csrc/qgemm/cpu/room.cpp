#include "qgemm/cpu/room.h"

#include <algorithm>
#include <atomic>

#include "core/parallel.h"
#include "cpu_isa/isa.h"
#include "qgemm/cpu/kernels.h"
#include "qgemm/cpu/layout.h"

namespace flute::cpu {
namespace {

// Up to this many passes over the codes, each serving max_mr rows of x, decoding again is cheaper than
// decoding into a buffer and reading it back.
constexpr int64_t kGemvPasses = 1;
// Packed x is kept below this, so that it stays in the last-level cache while panels stream past it.
constexpr int64_t kPackedXBytes = 8 << 20;
// Below this many weights a second thread costs more than it brings.
constexpr int64_t kWeightsPerThread = 1 << 15;
// A thread takes work in pieces, several for each thread so that a slow core is evened out, but none
// larger than this many weights.
constexpr int64_t kPiecesPerThread = 8;
constexpr int64_t kWeightsPerPiece = 1 << 17;

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

int useful_threads(const QWeight& w, int threads) {
  return static_cast<int>(std::clamp<int64_t>(w.n * w.k / kWeightsPerThread, 1, std::max(1, threads)));
}

int64_t blocks_per_piece(const QWeight& w, int threads) {
  const int64_t even = blocks(w) / (threads * kPiecesPerThread);
  return std::clamp<int64_t>(even, 1, std::max<int64_t>(1, kWeightsPerPiece / (kBlock * w.k)));
}

bool is_gemv(const QgemmKernels& kernels, int64_t m) { return m <= kernels.max_mr * kGemvPasses; }

// How the tiled product cuts x, and where in the workspace its parts lie.
struct Tiling {
  bool bf16;
  int64_t rows;           // of x at a time
  int64_t packed_bytes;   // of those rows
  int64_t scratch_bytes;  // of one thread

  Tiling(const QgemmKernels& kernels, const QgemmProblem& p) {
    bf16 = kernels.bf16_dot && p.dtype == DType::bf16;
    const int64_t row_bytes = p.weight.k * (bf16 ? 2 : 4);
    const int64_t fit = std::max<int64_t>(kPackedXBytes / row_bytes, 96);
    const int64_t passes = (p.m + fit - 1) / fit;
    rows = round_up((p.m + passes - 1) / passes, kernels.gemm_mr);
    packed_bytes = round_up(rows * row_bytes, 64);
    scratch_bytes = round_up(kernels.panel_scratch(rows), 64);
  }
};

// Calls fn(thread, begin, end) for pieces of [0, total). Every thread has a share of its own and takes
// it in order, so that it reads memory as one stream, which the hardware prefetches across the pieces'
// borders (dealing pieces out in turn cost a third of the time of a 576 x 576 matrix); a thread that is
// done helps with the shares of others.
template <class Fn>
void in_pieces(int threads, int64_t total, int64_t piece, Fn&& fn) {
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  };
  constexpr int kMaxShares = 64;
  const int shares = std::clamp(threads, 1, kMaxShares);
  const int64_t pieces = (total + piece - 1) / piece;
  Share share[kMaxShares];
  for (int i = 0; i < shares; ++i) {
    share[i].next.store(pieces * i / shares * piece, std::memory_order_relaxed);
    share[i].end = std::min(pieces * (i + 1) / shares * piece, total);
  }
  parallel(threads, [&](int thread, int) {
    for (int i = 0; i < shares; ++i) {
      Share& from = share[(thread + i) % shares];
      for (;;) {
        const int64_t begin = from.next.fetch_add(piece, std::memory_order_relaxed);
        if (begin >= from.end) break;
        fn(thread, begin, std::min(begin + piece, from.end));
      }
    }
  });
}

const void* row_of(const void* base, DType dtype, int64_t row, int64_t stride) {
  return static_cast<const char*>(base) + row * stride * size_of(dtype);
}

Output output_of(const QgemmProblem& p, int64_t first_row) {
  void* out = const_cast<void*>(row_of(p.out, p.dtype, first_row, p.ldo));
  return {out, p.ldo, p.dtype, p.bias, p.bias_dtype};
}

void launch_gemv(const QgemmKernels& kernels, const QgemmProblem& p) {
  const QWeight& w = p.weight;
  const int threads = useful_threads(w, p.threads);
  for (int64_t m = 0; m < p.m; m += kernels.max_mr) {
    const Output out = output_of(p, m);
    const int64_t rows = std::min<int64_t>(kernels.max_mr, p.m - m);
    const void* from = row_of(p.x, p.dtype, m, p.ldx);
    const float* x = static_cast<const float*>(from);
    if (rows > 1 || p.dtype != DType::f32) {
      kernels.pack_columns(from, p.dtype, p.ldx, rows, w.k, static_cast<float*>(p.workspace));
      x = static_cast<const float*>(p.workspace);
    }
    in_pieces(threads, blocks(w), blocks_per_piece(w, threads),
              [&](int, int64_t begin, int64_t end) { kernels.gemv(w, x, rows, out, begin, end); });
  }
}

void launch_tiled(const QgemmKernels& kernels, const QgemmProblem& p) {
  const QWeight& w = p.weight;
  const Tiling tiling(kernels, p);
  char* packed = static_cast<char*>(p.workspace);
  char* scratch = packed + tiling.packed_bytes;
  const int64_t panels = (w.n + kernels.panel_rows - 1) / kernels.panel_rows;
  for (int64_t m = 0; m < p.m; m += tiling.rows) {
    const int64_t rows = std::min(tiling.rows, p.m - m);
    const void* x = row_of(p.x, p.dtype, m, p.ldx);
    in_pieces(p.threads, rows, kernels.gemm_mr, [&](int, int64_t begin, int64_t end) {
      kernels.pack_x(x, p.dtype, p.ldx, w.k, begin, end, packed, tiling.bf16);
    });
    const Output out = output_of(p, m);
    in_pieces(p.threads, panels, 1, [&](int thread, int64_t panel, int64_t) {
      kernels.panel(w, {packed, rows}, out, panel, scratch + thread * tiling.scratch_bytes, tiling.bf16);
    });
  }
}

}  // namespace

bool supports(const QgemmProblem&) { return true; }

int64_t workspace_bytes(const QgemmProblem& p) {
  const QgemmKernels& kernels = isa().qgemm;
  if (is_gemv(kernels, p.m)) return std::min<int64_t>(p.m, kernels.max_mr) * p.weight.k * 4;
  const Tiling tiling(kernels, p);
  return tiling.packed_bytes + p.threads * tiling.scratch_bytes;
}

Status launch(const QgemmProblem& p) {
  const QgemmKernels& kernels = isa().qgemm;
  if (p.m == 0 || p.weight.n == 0) return {};
  if (is_gemv(kernels, p.m)) launch_gemv(kernels, p);
  else launch_tiled(kernels, p);
  return {};
}

Status dequantize(const DequantizeProblem& p) {
  const QgemmKernels& kernels = isa().qgemm;
  const QWeight& w = p.weight;
  const int threads = useful_threads(w, p.threads);
  in_pieces(threads, blocks(w), blocks_per_piece(w, threads),
            [&](int, int64_t begin, int64_t end) { kernels.dequantize(w, p.out, p.dtype, begin, end); });
  return {};
}

}  // namespace flute::cpu
