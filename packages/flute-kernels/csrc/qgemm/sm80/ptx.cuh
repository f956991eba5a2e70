// The instructions that C++ has no words for. Sections are of the PTX ISA manual, version 9.0.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flute::sm80 {

// Loads of codes: read once, so they do not take space in L1 (9.7.9.8, ld.global.nc). A load that is
// off leaves the registers as they are; a predicate costs no branch.
__device__ __forceinline__ void load_codes(uint32_t (&v)[4], const uint32_t* p, bool on) {
  asm volatile(
      "{.reg .pred q; setp.ne.s32 q, %5, 0;\n"
      "@q ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];}"
      : "+r"(v[0]), "+r"(v[1]), "+r"(v[2]), "+r"(v[3])
      : "l"(p), "r"(int{on}));
}
__device__ __forceinline__ void load_codes(uint32_t& v0, uint32_t& v1, const uint32_t* p, bool on) {
  asm volatile(
      "{.reg .pred q; setp.ne.s32 q, %3, 0;\n"
      "@q ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];}"
      : "+r"(v0), "+r"(v1)
      : "l"(p), "r"(int{on}));
}
__device__ __forceinline__ void load_codes(uint32_t& v, const uint32_t* p, bool on) {
  asm volatile(
      "{.reg .pred q; setp.ne.s32 q, %2, 0;\n"
      "@q ld.global.nc.L1::no_allocate.b32 %0, [%1];}"
      : "+r"(v)
      : "l"(p), "r"(int{on}));
}

// Loads of scales; the four lanes of a row pair read the same.
__device__ __forceinline__ void load_scales(uint32_t (&v)[1], const uint32_t* p, bool on) {
  asm volatile("{.reg .pred q; setp.ne.s32 q, %2, 0;\n@q ld.global.nc.b32 %0, [%1];}"
               : "+r"(v[0])
               : "l"(p), "r"(int{on}));
}
__device__ __forceinline__ void load_scales(uint32_t (&v)[2], const uint32_t* p, bool on) {
  asm volatile("{.reg .pred q; setp.ne.s32 q, %3, 0;\n@q ld.global.nc.v2.b32 {%0, %1}, [%2];}"
               : "+r"(v[0]), "+r"(v[1])
               : "l"(p), "r"(int{on}));
}
// x may have been written by the kernel before, so not through the read-only path.
__device__ __forceinline__ void load_x(uint4& v, const uint16_t* p, bool on) {
  asm volatile("{.reg .pred q; setp.ne.s32 q, %5, 0;\n@q ld.global.v4.b32 {%0, %1, %2, %3}, [%4];}"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
               : "l"(p), "r"(int{on}));
}

// c += a * b, m16n8k16, accumulated in float. 9.7.14.5.8.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
__device__ __forceinline__ void mma<__half>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                   uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace flute::sm80
