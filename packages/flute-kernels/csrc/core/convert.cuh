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

// Two values of a 16-bit type in one register, the first in the low half.
template <class T>
__device__ __forceinline__ float2 two_floats(uint32_t bits);
template <>
__device__ __forceinline__ float2 two_floats<__half>(uint32_t bits) {
  return __half22float2(*reinterpret_cast<const __half2*>(&bits));
}
template <>
__device__ __forceinline__ float2 two_floats<__nv_bfloat16>(uint32_t bits) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

// Two products of a 16-bit type in one register, each rounded once.
template <class T>
__device__ __forceinline__ uint32_t multiply_pairs(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t multiply_pairs<__half>(uint32_t a, uint32_t b) {
  uint32_t c;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
template <>
__device__ __forceinline__ uint32_t multiply_pairs<__nv_bfloat16>(uint32_t a, uint32_t b) {
  uint32_t c;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}

// One 16-byte store, written as an instruction, since the compiler may split a store through a pointer into four.
__device__ __forceinline__ void store_16_bytes(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
__device__ __forceinline__ void store_four(float* to, const float (&v)[4]) {
  store_16_bytes(to, __float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                 __float_as_uint(v[3]));
}

// Eight floats as T, in one or two 16-byte stores. `to` is aligned to 16 bytes.
template <class T>
__device__ __forceinline__ void store_eight(T* to, const float (&v)[8]) {
  if constexpr (sizeof(T) == 2) {
    store_16_bytes(to, pack_two<T>(v[0], v[1]), pack_two<T>(v[2], v[3]), pack_two<T>(v[4], v[5]),
                   pack_two<T>(v[6], v[7]));
  } else {
    store_four(to, {v[0], v[1], v[2], v[3]});
    store_four(to + 4, {v[4], v[5], v[6], v[7]});
  }
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
