// Rotation of values of any type and alignment.
//
// A lane holds runs of eight neighbouring values; 32 lanes make a span of 256, and a warp has four spans under way
// at a time. Stages of 1, 2, 4 are inside a lane, 8 to 128 between lanes, 256 and 512 inside a lane again. Only
// blocks of 2048 and 4096 need more than a warp: two or four warps then hold 1024 values each, swap spans
// through shared memory, and do the last stages on spans of the same number.
#pragma once

#include "hadamard/cuda/butterfly.cuh"
#include "hadamard/cuda/matrix.cuh"

namespace flute::cuda {

constexpr int kSpan = 256;
constexpr int kLanesResident = 5;  // blocks of a multiprocessor

// kTeam: warps that share a block of values.
template <class T, int kTeam, bool kWhole>
__global__ void __launch_bounds__(kWarps * 32, kWhole ? kLanesResident : 1)
    rotate_by_lanes(const __grid_constant__ Args a) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, member = warp % kTeam;
  // Spans of a team: those that this warp loads and, after the swap, those that it stores.
  const int team0 = (warp - member) * kWarpValues + 8 * lane;
  const auto loaded = [&](int q) { return team0 + member * kWarpValues + q * kSpan; };
  const auto stored = [&](int q) {
    constexpr int kEach = Team<kTeam>::kEach;
    return kTeam == 1 ? loaded(q) : team0 + q / kEach * kWarpValues + (member * kEach + q % kEach) * kSpan;
  };
  Run<T, kWhole> next[kRuns] = {};
  const auto load = [&](int base) {
#pragma unroll
    for (int q = 0; q < kRuns; ++q) {
      if (base + loaded(q) < a.total) next[q].load(a, base + loaded(q));
    }
  };
  const int step = static_cast<int>(gridDim.x) * (kWarps * kWarpValues);
  int base = static_cast<int>(blockIdx.x) * (kWarps * kWarpValues);
  load(base);
  for (; base < a.total; base += step) {
    float v[kRuns][8];
#pragma unroll
    for (int q = 0; q < kRuns; ++q) {
      next[q].to_floats(v[q]);
      if (a.signs && !a.transpose && base + loaded(q) < a.total)
        apply_signs<kWhole>(v[q], a, base + loaded(q));
    }
    load(base + step);
    inside_runs<1>(v);
    if (a.block > 2) inside_runs<2>(v);
    if (a.block > 4) inside_runs<4>(v);
    if (a.block > 8) between_lanes<1>(v, lane);
    if (a.block > 16) between_lanes<2>(v, lane);
    if (a.block > 32) between_lanes<4>(v, lane);
    if (a.block > 64) between_lanes<8>(v, lane);
    if (a.block > 128) between_lanes<16>(v, lane);
    if (a.block > 256) between_runs<1>(v);
    if (a.block > 512) between_runs<2>(v);
    if constexpr (kTeam > 1) Team<kTeam>::between_warps(v, warp, lane);
#pragma unroll
    for (int q = 0; q < kRuns; ++q) {
      const int at = base + stored(q);
      if (at >= a.total) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) v[q][i] *= a.factor;
      if (a.signs && a.transpose) apply_signs<kWhole>(v[q], a, at);
      store_run<T, kWhole>(v[q], a, at);
    }
  }
}

}  // namespace flute::cuda
