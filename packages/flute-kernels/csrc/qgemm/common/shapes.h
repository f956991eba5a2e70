// For which numbers of bits a shape is compiled: a field of each room's Config has them as digits, such as 24.
#pragma once

#include "core/both.h"

namespace flute {

FLUTE_BOTH constexpr bool has_digit(int digits, int digit) {
  return digits > 0 && (digits % 10 == digit || has_digit(digits / 10, digit));
}

}  // namespace flute
