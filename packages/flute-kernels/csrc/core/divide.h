// Division by numbers that are known before a launch, as a multiplication: a GPU has no instruction to divide integers,
// and what the compiler puts in its place takes some 150 clocks.
#pragma once

#include <cstdint>

#include "core/both.h"

namespace flute {

// Granlund and Montgomery, Division by Invariant Integers using Multiplication (1994), for dividends below 2^31.
struct Divisor {
  int divisor;
  uint32_t multiplier;
  int shift;

  FLUTE_BOTH int quotient(int n) const {
#ifdef __CUDA_ARCH__
    const uint32_t high = __umulhi(multiplier, n);
#else
    const uint32_t high = static_cast<uint32_t>(uint64_t{multiplier} * static_cast<uint32_t>(n) >> 32);
#endif
    return static_cast<int>((high + static_cast<uint32_t>(n)) >> shift);
  }
};

inline Divisor make_divisor(int divisor) {
  int shift = 0;
  while ((int64_t{1} << shift) < divisor) ++shift;
  const uint64_t excess = (uint64_t{1} << shift) - static_cast<uint64_t>(divisor);
  return {divisor, static_cast<uint32_t>((excess << 32) / static_cast<uint64_t>(divisor) + 1), shift};
}

}  // namespace flute
