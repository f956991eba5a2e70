// Stages of the fast Hadamard transform on what a warp holds: four runs of eight values a lane, 1024 in all.
#pragma once

namespace flute::cuda {

constexpr int kWarps = 4;          // of a block
constexpr int kRuns = 4;           // of a lane
constexpr int kWarpValues = 1024;  // 32 lanes' runs

// a + b, a - b of two runs.
__device__ __forceinline__ void butterfly(float (&low)[8], float (&high)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float a = low[i], b = high[i];
    low[i] = a + b, high[i] = a - b;
  }
}

// Between runs q and q + kStride of a lane.
template <int kStride>
__device__ __forceinline__ void between_runs(float (&v)[kRuns][8]) {
#pragma unroll
  for (int q = 0; q < kRuns; ++q) {
    if (!(q & kStride)) butterfly(v[q], v[q + kStride]);
  }
}

// Between values i and i + kStride of a run.
template <int kStride>
__device__ __forceinline__ void inside_runs(float (&v)[kRuns][8]) {
#pragma unroll
  for (int q = 0; q < kRuns; ++q) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i & kStride) continue;
      const float a = v[q][i], b = v[q][i + kStride];
      v[q][i] = a + b, v[q][i + kStride] = a - b;
    }
  }
}

// Between lanes whose numbers differ by kStep.
template <int kStep>
__device__ __forceinline__ void between_lanes(float (&v)[kRuns][8], int lane) {
  const float sign = lane & kStep ? -1.f : 1.f;
#pragma unroll
  for (int q = 0; q < kRuns; ++q) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[q][i] = fmaf(sign, v[q][i], __shfl_xor_sync(~0u, v[q][i], kStep));
  }
}

// Between the kTeam warps, 2 or 4, that share a block of values. Each gets some of the runs of all of them: run
// q of member m is then what was run m * kEach + q % kEach of member q / kEach.
template <int kTeam>
struct Team {
  static constexpr int kEach = kRuns / kTeam;

  static __device__ __forceinline__ void between_warps(float (&v)[kRuns][8], int warp, int lane) {
    __shared__ float4 swap[kWarps][kRuns][2][32];
    const int member = warp % kTeam;
    __syncthreads();  // the turn before has read all
#pragma unroll
    for (int q = 0; q < kRuns; ++q) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        swap[warp][q][i][lane] = make_float4(v[q][4 * i], v[q][4 * i + 1], v[q][4 * i + 2], v[q][4 * i + 3]);
    }
    __syncthreads();
#pragma unroll
    for (int q = 0; q < kRuns; ++q) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 four = swap[warp - member + q / kEach][member * kEach + q % kEach][i][lane];
        v[q][4 * i] = four.x, v[q][4 * i + 1] = four.y, v[q][4 * i + 2] = four.z, v[q][4 * i + 3] = four.w;
      }
    }
    if constexpr (kTeam == 4) between_runs<1>(v);
    between_runs<2>(v);
  }
};

}  // namespace flute::cuda
