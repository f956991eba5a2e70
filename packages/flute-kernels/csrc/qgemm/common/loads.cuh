// Loads from global memory with a predicate. Sections are of the PTX ISA manual, version 9.0.
#pragma once

#include <cstdint>

namespace flute {

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
// `value`, once `word` has been loaded; `nothing` is zero, which the compiler does not know. A warp waits for loads by
// counting those under way in six counters, and ptxas has one of them count all loads of a loop from global memory:
// who waits for one of these waits for all. So what is to be under way for long must not be asked for before what is
// wanted now is there, and this is how a load is made to depend on that.
__device__ __forceinline__ int after(uint32_t word, int value, uint32_t nothing) {
  return value + static_cast<int>(word & nothing);
}
// x may have been written by the kernel before, so not through the read-only path.
__device__ __forceinline__ void load_x(uint4& v, const uint16_t* p, bool on) {
  asm volatile("{.reg .pred q; setp.ne.s32 q, %5, 0;\n@q ld.global.v4.b32 {%0, %1, %2, %3}, [%4];}"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
               : "l"(p), "r"(int{on}));
}

}  // namespace flute
