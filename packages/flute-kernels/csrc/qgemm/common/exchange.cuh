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

}  // namespace flute
