// What a kernel returns: success, or one sentence with the numbers that caused the refusal.
#pragma once

#include <string>

namespace flute {

struct Status {
  std::string refusal;  // empty on success

  bool ok() const { return refusal.empty(); }
};

}  // namespace flute
