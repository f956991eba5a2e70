// Four floats without intrinsics: the portable room, and the meaning of every operation that the
// other files in this folder give with instructions.
//
// A "vector" here holds W neighbouring output rows. Each file offers the same names:
//   F, I                  W floats, W 32-bit words
//   Table<E>              an E-entry table of floats; operator()(I) looks W indices up, of which only
//                         the low log2(E) bits count (8 and 16 entries share one 16-entry image whose
//                         entries repeat, so there the low three bits decide)
//   load_f16, store_f16 … conversions, rounding to nearest even
//   xor_lanes<H>          lane i takes lane i ^ H: the exchange of a Hadamard stage
#pragma once

#include <cstdint>
#include <cstring>

namespace flute {
namespace {

struct Simd {
  static constexpr int W = 4;
  static constexpr int kMaxMr = 4;           // rows of x that one pass over the codes serves
  static constexpr int kChains = 4;          // independent sums of a matrix-vector product
  static constexpr bool kByteTable = false;  // whether Table<256> looks up the four bytes of a word at once
  static constexpr int kGemmMr = 2;    // rows of x in a register tile: 2 x 4 accumulators of 16 registers
  static constexpr int kGemmStep = 1;  // a last tile has a multiple of this many rows
  static constexpr int kGemmVr = 4;    // vectors of output rows in a register tile
  static constexpr bool kBf16Dot = false;

  struct F {
    float v[W];
  };
  struct I {
    uint32_t v[W];
  };

  static F zero() { return F{{0, 0, 0, 0}}; }
  static F set1(float a) { return F{{a, a, a, a}}; }
  static F load(const float* p) {
    F r;
    memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static void store(float* p, F a) { memcpy(p, a.v, sizeof a.v); }
  static F add(F a, F b) {
    for (int i = 0; i < W; ++i) a.v[i] += b.v[i];
    return a;
  }
  static F mul(F a, F b) {
    for (int i = 0; i < W; ++i) a.v[i] *= b.v[i];
    return a;
  }
  static F fma(F a, F b, F c) {
    for (int i = 0; i < W; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  static I loadi(const uint32_t* p) {
    I r;
    memcpy(r.v, p, sizeof r.v);
    return r;
  }
  template <int S>
  static I shr(I a) {
    for (int i = 0; i < W; ++i) a.v[i] >>= S;
    return a;
  }
  template <int S>
  static I shl(I a) {
    for (int i = 0; i < W; ++i) a.v[i] <<= S;
    return a;
  }
  static I or_(I a, I b) {
    for (int i = 0; i < W; ++i) a.v[i] |= b.v[i];
    return a;
  }

  template <int E>
  struct Table {
    const float* t;
    explicit Table(const float* table) : t(table) {}
    F operator()(I i) const {
      F r;
      for (int l = 0; l < W; ++l) r.v[l] = t[i.v[l] & (E - 1)];
      return r;
    }
  };

  static float bits_to_float(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
  }
  static uint32_t float_to_bits(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
  }
  static float f16_to_f32(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
    const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
    if (magnitude >= 0x7c00u << 13) return bits_to_float(sign | 0x7f800000 | magnitude);  // inf, NaN
    // 2^112 moves the exponent from half's bias to float's, and normalises subnormals on the way.
    return bits_to_float(sign | float_to_bits(bits_to_float(magnitude) * 0x1p112f));
  }
  static uint16_t f32_to_f16(float f) {
    const uint32_t u = float_to_bits(f);
    const uint32_t sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
    if (a > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | ((a >> 13) & 0x3ff));
    if (a >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and more round to inf
    if (a < 0x38800000) {                                              // below 2^-14: subnormal
      const float shifted = bits_to_float(a) + 0.5f;  // the adder rounds to a multiple of 2^-24
      return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000));
    }
    return static_cast<uint16_t>(sign | ((a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13));
  }
  static uint16_t f32_to_bf16(float f) {
    const uint32_t u = float_to_bits(f);
    if ((u & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((u >> 16) | 0x40);
    return static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
  static F load_f16(const uint16_t* p) {
    F r;
    for (int i = 0; i < W; ++i) r.v[i] = f16_to_f32(p[i]);
    return r;
  }
  static F load_bf16(const uint16_t* p) {
    F r;
    for (int i = 0; i < W; ++i) r.v[i] = bits_to_float(static_cast<uint32_t>(p[i]) << 16);
    return r;
  }
  static void store_f16(uint16_t* p, F a) {
    for (int i = 0; i < W; ++i) p[i] = f32_to_f16(a.v[i]);
  }
  static void store_bf16(uint16_t* p, F a) {
    for (int i = 0; i < W; ++i) p[i] = f32_to_bf16(a.v[i]);
  }
  template <int H>
  static F xor_lanes(F a) {
    F r;
    for (int i = 0; i < W; ++i) r.v[i] = a.v[i ^ H];
    return r;
  }
  static void prefetch(const void* p) { __builtin_prefetch(p); }
};

}  // namespace
}  // namespace flute
