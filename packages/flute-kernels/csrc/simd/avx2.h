// Eight floats with AVX2, FMA and F16C. See scalar.h for what each name means.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace flute {
namespace {

struct Simd {
  static constexpr int W = 8;
  static constexpr int kMaxMr = 4;
  static constexpr int kChains = 4;  // independent sums of a matrix-vector product
  static constexpr bool kByteTable = false;
  static constexpr int kGemmMr = 6;    // 6 x 2 accumulators, 2 weights, 1 x: 15 of 16 registers
  static constexpr int kGemmStep = 3;  // a last tile has a multiple of this many rows
  static constexpr int kGemmVr = 2;
  static constexpr bool kBf16Dot = false;

  using F = __m256;
  using I = __m256i;

  static F zero() { return _mm256_setzero_ps(); }
  static F set1(float a) { return _mm256_set1_ps(a); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F a) { _mm256_storeu_ps(p, a); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static I loadi(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
  template <int S>
  static I shr(I a) {
    return _mm256_srli_epi32(a, S);
  }
  template <int S>
  static I shl(I a) {
    return _mm256_slli_epi32(a, S);
  }
  static I or_(I a, I b) { return _mm256_or_si256(a, b); }

  template <int E>
  struct Table {  // 64 and 256 entries: a gather from the first-level cache
    const float* t;
    explicit Table(const float* table) : t(table) {}
    F operator()(I i) const {
      return _mm256_i32gather_ps(t, _mm256_and_si256(i, _mm256_set1_epi32(E - 1)), 4);
    }
  };

  static F load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F load_bf16(const uint16_t* p) {
    const I wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static void store_f16(uint16_t* p, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_bf16(uint16_t* p, F a) {
    const I u = _mm256_castps_si256(a);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    I r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const I quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
    const I nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, quiet, nan);
    r = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(r));
  }
  template <int H>
  static F xor_lanes(F a) {
    const I lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_permutevar8x32_ps(a, _mm256_xor_si256(lane, _mm256_set1_epi32(H)));
  }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
};

template <>
struct Simd::Table<8> {
  F t;
  explicit Table(const float* table) : t(load(table)) {}
  F operator()(I i) const { return _mm256_permutevar8x32_ps(t, i); }
};

template <>
struct Simd::Table<16> {  // two halves, chosen by index bit 3, which the blend reads from the sign
  F low, high;
  explicit Table(const float* table) : low(load(table)), high(load(table + 8)) {}
  F operator()(I i) const {
    const F choose = _mm256_castsi256_ps(_mm256_slli_epi32(i, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i), choose);
  }
};

}  // namespace
}  // namespace flute
