// One warp transforms 256 neighbouring values, or a whole block where that is longer: lane l holds values
// 8l .. 8l + 7 of each 256. Stages of 1, 2, 4 are inside a lane, 8 to 128 between lanes, longer ones inside
// a lane again. There is no shared memory and no barrier, and each warp has up to 8 KB of loads under way.
// The longest block holds 128 floats a lane, which still leaves 12 warps on a multiprocessor.
#include <algorithm>

#include "core/convert.cuh"
#include "core/cuda.h"
#include "hadamard/cuda.h"

namespace flute::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kSpan = 256;

struct Args {
  const void* x;
  void* out;
  const float* signs;
  int64_t ldx, ldo, columns, total;  // total = rows * columns
  int block;
  float factor;
  bool transpose;
};

// Where a lane's first eight values lie: a block is never in two rows, so further ones of a long block are
// 256 apart in the same row.
struct Place {
  int64_t row, column;
};
__device__ __forceinline__ Place place(int64_t at, const Args& a) {
  if (a.total <= 0x7fffffff) {  // a 64-bit division takes some hundred instructions
    const uint32_t row = static_cast<uint32_t>(at) / static_cast<uint32_t>(a.columns);
    return {row, static_cast<uint32_t>(at) - row * static_cast<uint32_t>(a.columns)};
  }
  return {at / a.columns, at % a.columns};
}

// Eight values from `at` of the flattened matrix on. kWhole: they lie in one row, aligned to 16 bytes.
template <class T, bool kWhole>
__device__ __forceinline__ void load_eight(float (&v)[8], const Args& a, int64_t at, const Place& p) {
  const T* x = static_cast<const T*>(a.x);
  if constexpr (kWhole) {
    const T* from = x + p.row * a.ldx + p.column;
    if constexpr (sizeof(T) == 2) {
      const uint4 bits = *reinterpret_cast<const uint4*>(from);
      const T* values = reinterpret_cast<const T*>(&bits);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = to_float(values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 four = reinterpret_cast<const float4*>(from)[i];
        v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const Place each = place(at + i, a);
      v[i] = at + i < a.total ? to_float(x[each.row * a.ldx + each.column]) : 0.f;
    }
  }
}

template <class T, bool kWhole>
__device__ __forceinline__ void store_eight(const float (&v)[8], const Args& a, int64_t at, const Place& p) {
  T* out = static_cast<T*>(a.out);
  if constexpr (kWhole) {
    T* to = out + p.row * a.ldo + p.column;
    if constexpr (sizeof(T) == 2) {
      *reinterpret_cast<uint4*>(to) = make_uint4(pack_two<T>(v[0], v[1]), pack_two<T>(v[2], v[3]),
                                                 pack_two<T>(v[4], v[5]), pack_two<T>(v[6], v[7]));
    } else {
      reinterpret_cast<float4*>(to)[0] = make_float4(v[0], v[1], v[2], v[3]);
      reinterpret_cast<float4*>(to)[1] = make_float4(v[4], v[5], v[6], v[7]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const Place each = place(at + i, a);
      if (at + i < a.total) out[each.row * a.ldo + each.column] = from_float<T>(v[i]);
    }
  }
}

template <bool kWhole>
__device__ __forceinline__ void apply_signs(float (&v)[8], const Args& a, int64_t at, const Place& p) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (kWhole) {
      v[i] *= a.signs[p.column + i];
    } else if (at + i < a.total) {
      v[i] *= a.signs[place(at + i, a).column];
    }
  }
}

template <class T, int kLong, bool kWhole>  // kLong: spans of 256 in a block, 1 for shorter blocks
__global__ void __launch_bounds__(kWarps * 32) kernel(const Args a) {
  const int lane = threadIdx.x % 32;
  const int64_t warp = blockIdx.x * int64_t{kWarps} + threadIdx.x / 32;
  const int64_t start = warp * (kSpan * kLong) + 8 * lane;
  const Place first = place(start, a);
  float v[kLong][8];
#pragma unroll
  for (int q = 0; q < kLong; ++q) {
    const int64_t at = start + q * kSpan;
    const Place p{first.row, first.column + q * kSpan};
    if (at < a.total) {
      load_eight<T, kWhole>(v[q], a, at, p);
      if (a.signs && !a.transpose) apply_signs<kWhole>(v[q], a, at, p);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) v[q][i] = 0.f;
    }
  }
#pragma unroll
  for (int q = 0; q < kLong; ++q) {
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
  for (int stride = 1; stride < kLong; stride *= 2) {
#pragma unroll
    for (int q = 0; q < kLong; ++q) {
      if (q & stride) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float low = v[q][i], high = v[q + stride][i];
        v[q][i] = low + high, v[q + stride][i] = low - high;
      }
    }
  }
#pragma unroll
  for (int q = 0; q < kLong; ++q) {
    const int64_t at = start + q * kSpan;
    const Place p{first.row, first.column + q * kSpan};
    if (at >= a.total) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) v[q][i] *= a.factor;
    if (a.signs && a.transpose) apply_signs<kWhole>(v[q], a, at, p);
    store_eight<T, kWhole>(v[q], a, at, p);
  }
}

using Kernel = void (*)(Args);

template <class T>
Kernel choose(int spans, bool whole) {
  if (!whole) {
    // Only blocks of 2 and 4 have rows that eight values can straddle; others are merely unaligned.
    return spans == 1   ? kernel<T, 1, false>
           : spans == 2 ? kernel<T, 2, false>
           : spans == 4 ? kernel<T, 4, false>
           : spans == 8 ? kernel<T, 8, false>
                        : kernel<T, 16, false>;
  }
  return spans == 1   ? kernel<T, 1, true>
         : spans == 2 ? kernel<T, 2, true>
         : spans == 4 ? kernel<T, 4, true>
         : spans == 8 ? kernel<T, 8, true>
                      : kernel<T, 16, true>;
}

bool aligned(const void* data, int64_t stride, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size_of(dtype) % 16 == 0;
}

}  // namespace

Status rotate(const cpu::HadamardArgs& h, int64_t rows, const Gpu& gpu, void* stream) {
  const int64_t total = rows * h.columns;
  if (total == 0) return {};
  const int spans = static_cast<int>(std::max<int64_t>(1, h.block / kSpan));
  const bool whole = h.columns % 8 == 0 && aligned(h.x, h.ldx, h.dtype) && aligned(h.out, h.ldo, h.dtype);
  const Kernel kernel = h.dtype == DType::f32   ? choose<float>(spans, whole)
                        : h.dtype == DType::f16 ? choose<__half>(spans, whole)
                                                : choose<__nv_bfloat16>(spans, whole);
  const int64_t per_block = int64_t{kWarps} * kSpan * spans;
  const Args args{h.x,
                  h.out,
                  h.signs,
                  h.ldx,
                  h.ldo,
                  h.columns,
                  total,
                  static_cast<int>(h.block),
                  1.f / sqrtf(static_cast<float>(h.block)),
                  h.transpose};
  const DeviceGuard guard(gpu.device);
  kernel<<<static_cast<unsigned>((total + per_block - 1) / per_block), kWarps * 32, 0,
           static_cast<cudaStream_t>(stream)>>>(args);
  return cuda_status(cudaGetLastError(), "rotating");
}

}  // namespace flute::cuda
