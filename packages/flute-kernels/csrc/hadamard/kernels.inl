// Blockwise fast Walsh-Hadamard transform, written once over the names of simd/*.h.
//
// A block is widened to float32 in a buffer on the stack and passed over log2(block) times. Stages
// whose partners lie in different vectors are additions of whole vectors; those inside a vector swap
// lanes: new = swapped + (+-1) * old, the sign being minus where the lane's bit of that stage is set.
#pragma once

#include "hadamard/kernels.h"
#include "qgemm/cpu/kernels.inl"

namespace flute::cpu {
namespace {

template <int H>
FLUTE_INLINE void lane_stage(float* v, int64_t block) {
  if constexpr (H < S::W) {
    float sign[S::W];
    for (int i = 0; i < S::W; ++i) sign[i] = (i & H) ? -1.f : 1.f;
    const F signs = S::load(sign);
    for (int64_t i = 0; i < block; i += S::W) {
      const F a = S::load(v + i);
      S::store(v + i, S::fma(a, signs, S::template xor_lanes<H>(a)));
    }
  }
}

void transform(float* v, int64_t block) {
  int64_t h = 1;
  if (block >= S::W) {
    lane_stage<1>(v, block);
    lane_stage<2>(v, block);
    lane_stage<4>(v, block);
    lane_stage<8>(v, block);
    h = S::W;
  }
  for (; h < block; h *= 2) {
    for (int64_t i = 0; i < block; i += 2 * h) {
      for (int64_t j = i; j < i + h; ++j) {
        const float a = v[j], b = v[j + h];
        v[j] = a + b;
        v[j + h] = a - b;
      }
    }
  }
}

void hadamard(const HadamardArgs& a, int64_t begin, int64_t end) {
  alignas(64) float v[4096];
  const float norm = 1.f / __builtin_sqrtf(static_cast<float>(a.block));
  for (int64_t r = begin; r < end; ++r) {
    for (int64_t c = 0; c < a.columns; c += a.block) {
      load_floats(a.x, a.dtype, r * a.ldx + c, a.block, v);
      const float* signs = a.signs ? a.signs + c : nullptr;
      if (signs && !a.transpose) {
        for (int64_t i = 0; i < a.block; ++i) v[i] *= signs[i];
      }
      transform(v, a.block);
      for (int64_t i = 0; i < a.block; ++i) v[i] *= norm;
      if (signs && a.transpose) {
        for (int64_t i = 0; i < a.block; ++i) v[i] *= signs[i];
      }
      store_floats(v, a.block, a.out, a.dtype, r * a.ldo + c);
    }
  }
}

constexpr HadamardKernel kHadamardKernel = hadamard;

}  // namespace
}  // namespace flute::cpu
