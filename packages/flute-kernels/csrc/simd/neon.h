// Four floats with Advanced SIMD of 64-bit Arm. See scalar.h for what each name means.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace flute {
namespace {

struct Simd {
  static constexpr int W = 4;
  static constexpr int kMaxMr = 8;
  static constexpr int kChains = 8;  // independent sums of a matrix-vector product
  static constexpr bool kByteTable = false;
  static constexpr int kGemmMr = 6;    // 6 x 4 accumulators, 4 weights, x by lane: 30 of 32 registers
  static constexpr int kGemmStep = 3;  // a last tile has a multiple of this many rows
  static constexpr int kGemmVr = 4;
  static constexpr bool kBf16Dot = false;

  using F = float32x4_t;
  using I = uint32x4_t;

  static F zero() { return vdupq_n_f32(0); }
  static F set1(float a) { return vdupq_n_f32(a); }
  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F a) { vst1q_f32(p, a); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static I loadi(const uint32_t* p) { return vld1q_u32(p); }
  template <int S>
  static I shr(I a) {
    if constexpr (S == 0) return a;  // the instruction has no shift by zero
    else return vshrq_n_u32(a, S);
  }
  template <int S>
  static I shl(I a) {
    return vshlq_n_u32(a, S);
  }
  static I or_(I a, I b) { return vorrq_u32(a, b); }

  template <int E>
  struct Table {  // 64 and 256 entries: one load a lane
    const float* t;
    explicit Table(const float* table) : t(table) {}
    F operator()(I i) const {
      F r = vdupq_n_f32(t[vgetq_lane_u32(i, 0) & (E - 1)]);
      r = vsetq_lane_f32(t[vgetq_lane_u32(i, 1) & (E - 1)], r, 1);
      r = vsetq_lane_f32(t[vgetq_lane_u32(i, 2) & (E - 1)], r, 2);
      return vsetq_lane_f32(t[vgetq_lane_u32(i, 3) & (E - 1)], r, 3);
    }
  };

  static F load_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static F load_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
  static void store_f16(uint16_t* p, F a) { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(a))); }
  static void store_bf16(uint16_t* p, F a) {
    const I u = vreinterpretq_u32_f32(a), top = vshrq_n_u32(u, 16);
    const I odd = vandq_u32(top, vdupq_n_u32(1));
    const I rounded = vshrq_n_u32(vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
    const I number = vceqq_f32(a, a);
    vst1_u16(p, vmovn_u32(vbslq_u32(number, rounded, vorrq_u32(top, vdupq_n_u32(0x40)))));
  }
  template <int H>
  static F xor_lanes(F a) {
    if constexpr (H == 1) return vrev64q_f32(a);
    else return vextq_f32(a, a, 2);
  }
  static void prefetch(const void* p) { __builtin_prefetch(p); }
};

// A byte lookup in four registers is a lookup of sixteen floats when each index byte names one byte of
// a float: index * 4 + {0, 1, 2, 3}.
template <>
struct Simd::Table<16> {
  uint8x16x4_t t;
  explicit Table(const float* table) {
    for (int r = 0; r < 4; ++r) t.val[r] = vreinterpretq_u8_f32(load(table + 4 * r));
  }
  F operator()(I i) const {
    const I bytes =
        vmlaq_u32(vdupq_n_u32(0x03020100), vandq_u32(i, vdupq_n_u32(15)), vdupq_n_u32(0x04040404));
    return vreinterpretq_f32_u8(vqtbl4q_u8(t, vreinterpretq_u8_u32(bytes)));
  }
};

template <>
struct Simd::Table<8> {
  uint8x16x2_t t;
  explicit Table(const float* table) {
    for (int r = 0; r < 2; ++r) t.val[r] = vreinterpretq_u8_f32(load(table + 4 * r));
  }
  F operator()(I i) const {
    const I bytes = vmlaq_u32(vdupq_n_u32(0x03020100), vandq_u32(i, vdupq_n_u32(7)), vdupq_n_u32(0x04040404));
    return vreinterpretq_f32_u8(vqtbl2q_u8(t, vreinterpretq_u8_u32(bytes)));
  }
};

}  // namespace
}  // namespace flute
