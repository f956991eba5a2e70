// A room is one kernel family on one architecture. `supports` decides, `launch` obeys, and the
// registry's order says who is asked first.
#pragma once

#include "core/status.h"
#include "qgemm/problem.h"

namespace flute {

enum class Device : int32_t { cpu = 0, cuda = 1 };

struct Room {
  const char* name;
  Device device;
  bool (*supports)(const QgemmProblem&);
  int64_t (*workspace_bytes)(const QgemmProblem&);
  Status (*launch)(const QgemmProblem&);
  Status (*dequantize)(const DequantizeProblem&);
};

// The first room on `device` that supports the problem, or null.
const Room* find_room(Device device, const QgemmProblem& problem);
// The first room on `device`, or null: which layout weights must have there does not depend on x.
const Room* first_room(Device device);

}  // namespace flute
