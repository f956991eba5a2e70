// Conversions between float and the 16-bit types, by the name of the target.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/dtype.h"

namespace flute {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// Two values as one register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack_two(float low, float high) {
  const T l = from_float<T>(low), h = from_float<T>(high);
  return static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&l)) |
         static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(&h)) << 16;
}

// A 16-bit scale in the low half of `bits`, fp16 or bf16.
__device__ __forceinline__ float scale_to_float(uint32_t bits, bool is_bf16) {
  const float half = __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
  return is_bf16 ? __uint_as_float(bits << 16) : half;
}

// Element i of an array of any of the three types.
__device__ __forceinline__ float load_float(const void* data, int64_t i, DType dtype) {
  if (dtype == DType::f32) return static_cast<const float*>(data)[i];
  return scale_to_float(static_cast<const uint16_t*>(data)[i], dtype == DType::bf16);
}

}  // namespace flute
