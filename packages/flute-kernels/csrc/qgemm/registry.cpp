// Every room, in the order in which they are asked.
#include "qgemm/common/cuda_weight.h"
#include "qgemm/cpu/room.h"
#include "qgemm/room.h"
#include "qgemm/sm80/room.h"
#include "qgemm/sm90/room.h"

namespace flute {
namespace {

const Room kRooms[] = {
    {"cpu", Device::cpu, cpu::supports, cpu::workspace_bytes, cpu::launch, cpu::dequantize},
    {"sm90", Device::cuda, sm90::supports, sm90::workspace_bytes, sm90::launch, layout::dequantize},
    {"sm80", Device::cuda, sm80::supports, sm80::workspace_bytes, sm80::launch, layout::dequantize},
};

}  // namespace

const Room* find_room(Device device, const QgemmProblem& problem) {
  for (const Room& room : kRooms) {
    if (room.device == device && room.supports(problem)) return &room;
  }
  return nullptr;
}

const Room* first_room(Device device) {
  for (const Room& room : kRooms) {
    if (room.device == device) return &room;
  }
  return nullptr;
}

}  // namespace flute
