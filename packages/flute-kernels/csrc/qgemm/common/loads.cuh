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
// x may have been written by the kernel before, so not through the read-only path.
__device__ __forceinline__ void load_x(uint4& v, const uint16_t* p, bool on) {
  asm volatile("{.reg .pred q; setp.ne.s32 q, %5, 0;\n@q ld.global.v4.b32 {%0, %1, %2, %3}, [%4];}"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
               : "l"(p), "r"(int{on}));
}
// The same 16 bytes to shared memory, as part of the copies that the lane commits next (PTX ISA 9.0, 9.7.9.25.3.1,
// cp.async).
__device__ __forceinline__ void copy_x(uint32_t to, const uint16_t* p, bool on) {
  asm volatile(
      "{.reg .pred q; setp.ne.s32 q, %2, 0;\n@q cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(to), "l"(p),
      "r"(int{on})
      : "memory");
}

}  // namespace flute
