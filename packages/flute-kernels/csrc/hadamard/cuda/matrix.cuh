// The matrices as the kernels see them: one flat line of values, row after row, of which a launch has fewer than
// 2^31, in runs of eight neighbours.
#pragma once

#include <cstdint>

#include "core/convert.cuh"

namespace flute::cuda {

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
  int64_t ldx, ldo;
  Divisor columns;
  int total;  // values
  int block;
  float factor;
  bool transpose;
};

struct Place {
  int row, column;
};
__device__ __forceinline__ Place place(int at, const Args& a) {
  const int row = static_cast<int>(a.columns.quotient(at));
  return {row, at - row * static_cast<int>(a.columns.value)};
}

// Eight values as they lie in memory. kWhole: they lie in one row, aligned to 16 bytes.
template <class T, bool kWhole>
struct Run {
  uint4 bits[sizeof(T) / 2];

  __device__ __forceinline__ void load(const Args& a, int at) {
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
__device__ __forceinline__ void store_run(const float (&v)[8], const Args& a, int at) {
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
__device__ __forceinline__ void apply_signs(float (&v)[8], const Args& a, int at) {
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

}  // namespace flute::cuda
