// The last stages of blocks of 512 and more: warps swap values through shared memory, so that these stages lie
// inside a lane, where a stage is an addition a value. Shuffles would take the pipe of shared memory as long for
// every two stages, and more instructions.
//
// Values go by their number n within the team: bit 8 and up are what is left to do. A lane gets, of some of the
// 256 numbers below, all values: kVector neighbours, so that a warp stores whole lines. The place of value n is n
// with bit 2 flipped by bit 8 and bit 4 by bit 9; so neither the writes, whose neighbouring lanes differ in bits 8
// and 9, nor the reads, whose lanes are neighbours, want a bank twice.
#pragma once

#include "hadamard/cuda/butterfly.cuh"
#include "hadamard/cuda/matrix.cuh"

namespace flute::cuda {

// kTeam: warps that share values.
template <int kTeam>
struct Exchange {
  static constexpr int kVector = kTeam == 4 ? 2 : 4;   // values of a lane with neighbouring numbers
  static constexpr int kHigh = 4 * kTeam;              // different bits from 8 on
  static constexpr int kLow = 32 / (kVector * kHigh);  // vectors of a lane with the same bits from 8 on
  float values[kLow][kHigh][kVector];

  // Number of a lane's first value with high bits 0.
  static __device__ __forceinline__ int first(int low, int member, int lane) {
    return low * 128 + member * (256 / kTeam) + lane * kVector;
  }

  // v[q][i] has number from + (q / 2) * 128 + (q % 2) * 32 + i, where bits 0 to 2, 5 and 7 of `from` are zero.
  __device__ __forceinline__ void swap(const float (&v)[kRuns][8], int from, int warp, int lane) {
    __shared__ __align__(16) float values_by_place[kWarps * kWarpValues];
    const int member = warp % kTeam;
    float* const team = values_by_place + (warp - member) * kWarpValues;
    const auto flipped = [](int number, int high) { return number ^ (high & 1) << 2 ^ (high & 2) << 3; };
    const int to = flipped(from, from >> 8);
    wait();  // for the turn before to have read all
#pragma unroll
    for (int q = 0; q < kRuns; ++q) {
#pragma unroll
      for (int i = 0; i < 8; i += 4)
        *reinterpret_cast<float4*>(team + (to ^ i) + (q >> 1) * 128 + (q & 1) * 32) =
            make_float4(v[q][i], v[q][i + 1], v[q][i + 2], v[q][i + 3]);
    }
    wait();
#pragma unroll
    for (int low = 0; low < kLow; ++low) {
#pragma unroll
      for (int high = 0; high < kHigh; ++high) {
        const float* at = team + flipped(first(low, member, lane), high) + high * 256;
        if constexpr (kVector == 4) {
          const float4 f = *reinterpret_cast<const float4*>(at);
          float (&to)[kVector] = values[low][high];
          to[0] = f.x, to[1] = f.y, to[2] = f.z, to[3] = f.w;
        } else {
          const float2 f = *reinterpret_cast<const float2*>(at);
          values[low][high][0] = f.x, values[low][high][1] = f.y;
        }
      }
    }
  }

  // The stage of bit 8 + kBit.
  template <int kBit>
  __device__ __forceinline__ void stage() {
#pragma unroll
    for (int low = 0; low < kLow; ++low) {
#pragma unroll
      for (int high = 0; high < kHigh; ++high) {
        if (high & 1 << kBit) continue;
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          float &a = values[low][high][i], &b = values[low][high | 1 << kBit][i];
          const float difference = a - b;
          a += b, b = difference;
        }
      }
    }
  }

 private:
  static __device__ __forceinline__ void wait() {
    if constexpr (kTeam == 1) __syncwarp();
    else __syncthreads();
  }
};

}  // namespace flute::cuda
