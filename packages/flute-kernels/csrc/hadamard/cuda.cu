// A lane holds runs of eight neighbouring values; 32 lanes make a span of 256, and a warp has four spans under
// way at a time. Stages of 1, 2, 4 are inside a lane, 8 to 128 between lanes, 256 and 512 inside a lane again.
// Only blocks of 2048 and 4096 need more than a warp: two or four warps then hold 1024 values each, swap
// spans through shared memory, and do the last stages on spans of the same number.
#include <algorithm>

#include "core/convert.cuh"
#include "core/cuda.h"
#include "hadamard/cuda.h"

namespace flute::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kSpan = 256;
constexpr int kSpans = 4;     // that a warp holds
constexpr int kResident = 5;  // blocks of a multiprocessor

// Division by a number known at launch, of dividends below 2^31: a multiplication, where the processor's own
// division takes some twenty instructions (Granlund and Montgomery, 1994).
struct Divisor {
  uint32_t value, factor, shift;

  explicit Divisor(uint32_t d) : value(d), shift(0) {
    while ((uint64_t{1} << shift) < d) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const {
    return (__umulhi(n, factor) + n) >> shift;
  }
};

struct Args {
  const void* x;
  void* out;
  const float* signs;
  int64_t ldx, ldo, columns, total;  // total = rows * columns
  Divisor divisor;                   // columns, used while total is below 2^31
  int block;
  float factor;
  bool transpose;
};

struct Place {
  int64_t row, column;
};
__device__ __forceinline__ Place place(int64_t at, const Args& a) {
  if (a.total <= 0x7fffffff) {
    const uint32_t row = a.divisor.quotient(static_cast<uint32_t>(at));
    return {row, static_cast<uint32_t>(at) - row * a.divisor.value};
  }
  return {at / a.columns, at % a.columns};
}

// Eight values from `at` of the flattened matrix on, as they lie in memory. kWhole: they lie in one row,
// aligned to 16 bytes.
template <class T, bool kWhole>
struct Run {
  uint4 bits[sizeof(T) / 2];

  __device__ __forceinline__ void load(const Args& a, int64_t at) {
    const T* x = static_cast<const T*>(a.x);
    if constexpr (kWhole) {
      const Place p = place(at, a);
      const uint4* from = reinterpret_cast<const uint4*>(x + p.row * a.ldx + p.column);
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(T) / 2); ++i) bits[i] = from[i];
    } else {
      T* values = reinterpret_cast<T*>(bits);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (at + i >= a.total) continue;
        const Place p = place(at + i, a);
        values[i] = x[p.row * a.ldx + p.column];
      }
    }
  }
  __device__ __forceinline__ void to_floats(float (&v)[8]) const {
    const T* values = reinterpret_cast<const T*>(bits);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = to_float(values[i]);
  }
};

template <class T, bool kWhole>
__device__ __forceinline__ void store_run(const float (&v)[8], const Args& a, int64_t at) {
  T* out = static_cast<T*>(a.out);
  if constexpr (kWhole) {
    const Place p = place(at, a);
    store_eight(out + p.row * a.ldo + p.column, v);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (at + i >= a.total) continue;
      const Place p = place(at + i, a);
      out[p.row * a.ldo + p.column] = from_float<T>(v[i]);
    }
  }
}

template <bool kWhole>
__device__ __forceinline__ void apply_signs(float (&v)[8], const Args& a, int64_t at) {
  if constexpr (kWhole) {
    const float* signs = a.signs + place(at, a).column;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 four = *reinterpret_cast<const float4*>(signs + 4 * i);
      v[4 * i] *= four.x, v[4 * i + 1] *= four.y, v[4 * i + 2] *= four.z, v[4 * i + 3] *= four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (at + i < a.total) v[i] *= a.signs[place(at + i, a).column];
    }
  }
}

// v[0] + v[1], v[0] - v[1] of two runs.
__device__ __forceinline__ void butterfly(float (&low)[8], float (&high)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float a = low[i], b = high[i];
    low[i] = a + b, high[i] = a - b;
  }
}

// kTeam: warps that share a block of values.
template <class T, int kTeam, bool kWhole>
__global__ void __launch_bounds__(kWarps * 32, kWhole ? kResident : 1) kernel(const Args a) {
  constexpr int64_t kPerBlock = int64_t{kWarps} * kSpans * kSpan;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, member = warp % kTeam;
  // Spans of a team: those that this warp loads and, after the swap, those that it stores.
  const int team0 = (warp - member) * (kSpans * kSpan) + 8 * lane;
  const auto loaded = [&](int q) { return team0 + (member * kSpans + q) * kSpan; };
  const auto stored = [&](int q) {
    constexpr int kEach = kSpans / kTeam;  // span numbers that fall to a member, each kTeam times
    return kTeam == 1 ? loaded(q) : team0 + (q / kEach * kSpans + member * kEach + q % kEach) * kSpan;
  };
  Run<T, kWhole> next[kSpans] = {};
  const auto load = [&](int64_t base) {
#pragma unroll
    for (int q = 0; q < kSpans; ++q) {
      if (base + loaded(q) < a.total) next[q].load(a, base + loaded(q));
    }
  };
  int64_t base = blockIdx.x * kPerBlock;
  load(base);
  for (; base < a.total; base += gridDim.x * kPerBlock) {
    float v[kSpans][8];
#pragma unroll
    for (int q = 0; q < kSpans; ++q) {
      next[q].to_floats(v[q]);
      if (a.signs && !a.transpose && base + loaded(q) < a.total)
        apply_signs<kWhole>(v[q], a, base + loaded(q));
    }
    load(base + gridDim.x * kPerBlock);
#pragma unroll
    for (int q = 0; q < kSpans; ++q) {
#pragma unroll
      for (int stride = 1; stride < 8; stride *= 2) {
        if (stride >= a.block) break;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (i & stride) continue;
          const float low = v[q][i], high = v[q][i + stride];
          v[q][i] = low + high, v[q][i + stride] = low - high;
        }
      }
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        if (8 * step >= a.block) break;
        const float sign = lane & step ? -1.f : 1.f;
#pragma unroll
        for (int i = 0; i < 8; ++i) v[q][i] = fmaf(sign, v[q][i], __shfl_xor_sync(~0u, v[q][i], step));
      }
    }
#pragma unroll
    for (int stride = 1; stride < kSpans; stride *= 2) {
      if (stride * kSpan >= a.block) break;
#pragma unroll
      for (int q = 0; q < kSpans; ++q) {
        if (!(q & stride)) butterfly(v[q], v[q + stride]);
      }
    }
    if constexpr (kTeam > 1) {
      __shared__ float4 swap[kWarps][kSpans][2][32];
      constexpr int kEach = kSpans / kTeam;
      __syncthreads();  // the turn before has read all
#pragma unroll
      for (int q = 0; q < kSpans; ++q) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          swap[warp][q][i][lane] =
              make_float4(v[q][4 * i], v[q][4 * i + 1], v[q][4 * i + 2], v[q][4 * i + 3]);
      }
      __syncthreads();
#pragma unroll
      for (int q = 0; q < kSpans; ++q) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float4 four = swap[warp - member + q / kEach][member * kEach + q % kEach][i][lane];
          v[q][4 * i] = four.x, v[q][4 * i + 1] = four.y, v[q][4 * i + 2] = four.z, v[q][4 * i + 3] = four.w;
        }
      }
#pragma unroll
      for (int stride = kEach; stride < kSpans; stride *= 2) {
#pragma unroll
        for (int q = 0; q < kSpans; ++q) {
          if (!(q & stride)) butterfly(v[q], v[q + stride]);
        }
      }
    }
#pragma unroll
    for (int q = 0; q < kSpans; ++q) {
      const int64_t at = base + stored(q);
      if (at >= a.total) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) v[q][i] *= a.factor;
      if (a.signs && a.transpose) apply_signs<kWhole>(v[q], a, at);
      store_run<T, kWhole>(v[q], a, at);
    }
  }
}

using Kernel = void (*)(Args);

template <class T, bool kWhole>
Kernel by_team(int team) {
  return team == 1 ? kernel<T, 1, kWhole> : team == 2 ? kernel<T, 2, kWhole> : kernel<T, 4, kWhole>;
}

// Rows of blocks of 2 and 4 may end inside a run of eight; other rows may be unaligned.
template <class T>
Kernel choose(int team, bool whole) {
  return whole ? by_team<T, true>(team) : by_team<T, false>(team);
}

bool aligned(const void* data, int64_t stride, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size_of(dtype) % 16 == 0;
}

}  // namespace

Status rotate(const HadamardArgs& h, int64_t rows, const Gpu& gpu, void* stream) {
  const int64_t total = rows * h.columns;
  if (total == 0) return {};
  const int team = static_cast<int>(std::max<int64_t>(1, h.block / (kSpan * kSpans)));
  const bool whole = h.columns % 8 == 0 && aligned(h.x, h.ldx, h.dtype) && aligned(h.out, h.ldo, h.dtype) &&
                     reinterpret_cast<uintptr_t>(h.signs) % 16 == 0;
  const Kernel kernel = h.dtype == DType::f32   ? choose<float>(team, whole)
                        : h.dtype == DType::f16 ? choose<__half>(team, whole)
                                                : choose<__nv_bfloat16>(team, whole);
  const int64_t per_block = int64_t{kWarps} * kSpan * kSpans;
  // As many blocks as are resident together; each goes on with the next part while there is one.
  const int64_t blocks =
      std::min((total + per_block - 1) / per_block, int64_t{gpu.multiprocessors} * kResident);
  const Args args{h.x,
                  h.out,
                  h.signs,
                  h.ldx,
                  h.ldo,
                  h.columns,
                  total,
                  Divisor(static_cast<uint32_t>(std::min<int64_t>(h.columns, 0x7fffffff))),
                  static_cast<int>(h.block),
                  1.f / sqrtf(static_cast<float>(h.block)),
                  h.transpose};
  const DeviceGuard guard(gpu.device);
  kernel<<<static_cast<unsigned>(blocks), kWarps * 32, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return cuda_status(cudaGetLastError(), "rotating");
}

}  // namespace flute::cuda
