// What four lanes have for each other.
#pragma once

#include <cstdint>

namespace flute {

// Byte i of lane t of four for byte t of lane i: a transposition, by the bits of i and t in turn.
__device__ __forceinline__ uint32_t exchange_bytes(uint32_t word, int lane) {
  const uint32_t first = __shfl_xor_sync(0xffffffff, word, 1);
  word = __byte_perm(word, first, lane & 1 ? 0x3715 : 0x6240);
  const uint32_t second = __shfl_xor_sync(0xffffffff, word, 2);
  return __byte_perm(word, second, lane & 2 ? 0x3276 : 0x5410);
}

// Of four values of lanes t, value t of lane t ^ i, for i = 0..3. So a lane has its own first, which saves a quarter of
// the exchange.
__device__ __forceinline__ void exchange(uint4& v, int lane) {
  const auto swap_if = [](bool on, uint32_t& a, uint32_t& b) {
    const uint32_t c = on ? b : a;
    b = on ? a : b, a = c;
  };
  swap_if(lane & 1, v.x, v.y), swap_if(lane & 1, v.z, v.w);
  swap_if(lane & 2, v.x, v.z), swap_if(lane & 2, v.y, v.w);
  v.y = __shfl_xor_sync(0xffffffff, v.y, 1);
  v.z = __shfl_xor_sync(0xffffffff, v.z, 2);
  v.w = __shfl_xor_sync(0xffffffff, v.w, 3);
}

}  // namespace flute
