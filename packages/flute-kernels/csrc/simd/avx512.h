// Sixteen floats with AVX-512 (F, BW, DQ, VL), and bfloat16 dot products where the unit is compiled
// with them. See scalar.h for what each name means.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace flute {
namespace {

struct Simd {
  static constexpr int W = 16;
  static constexpr int kMaxMr = 8;
  static constexpr int kChains = 8;    // independent sums of a matrix-vector product
  static constexpr int kGemmMr = 12;   // 12 x 2 accumulators, 2 weights, 1 x: 27 of 32 registers
  static constexpr int kGemmStep = 4;  // a last tile has a multiple of this many rows
  static constexpr int kGemmVr = 2;

  using F = __m512;
  using I = __m512i;

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float a) { return _mm512_set1_ps(a); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static I loadi(const uint32_t* p) { return _mm512_loadu_si512(p); }
  template <int S>
  static I shr(I a) {
    return _mm512_srli_epi32(a, S);
  }
  template <int S>
  static I shl(I a) {
    return _mm512_slli_epi32(a, S);
  }
  static I or_(I a, I b) { return _mm512_or_si512(a, b); }

  template <int E>
  struct Table {  // 256 entries: a gather from the first-level cache
    const float* t;
    explicit Table(const float* table) : t(table) {}
    F operator()(I i) const {
      return _mm512_i32gather_ps(_mm512_and_si512(i, _mm512_set1_epi32(E - 1)), t, 4);
    }
  };

#ifdef __AVX512VBMI__
  static constexpr bool kByteTable = true;
#else
  static constexpr bool kByteTable = false;
#endif

  static F load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F load_bf16(const uint16_t* p) {
    const I wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static void store_f16(uint16_t* p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_bf16(uint16_t* p, F a) {
    const I u = _mm512_castps_si512(a), top = _mm512_srli_epi32(u, 16);
    const I odd = _mm512_and_si512(top, _mm512_set1_epi32(1));
    I r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), top, _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
  }
  template <int H>
  static F xor_lanes(F a) {
    const I lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_permutexvar_ps(_mm512_xor_si512(lane, _mm512_set1_epi32(H)), a);
  }
  static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

#ifdef __AVX512BF16__
  static constexpr bool kBf16Dot = true;
  // Two neighbouring weights of each row, rounded to bfloat16, in one 32-bit lane.
  static I pair_bf16(F even, F odd) {
    const I halves = (I)_mm512_cvtne2ps_pbh(odd, even);
    return _mm512_permutexvar_epi16(interleave(), halves);
  }
  static I interleave() {  // lane r takes halves r (even) and 16 + r (odd)
    const I lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
  }
  static F dot_bf16(F acc, I a, I b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }
  static I set1i(uint32_t a) { return _mm512_set1_epi32(static_cast<int>(a)); }
  static void storei(uint32_t* p, I a) { _mm512_storeu_si512(p, a); }
#else
  static constexpr bool kBf16Dot = false;
#endif
};

template <>
struct Simd::Table<16> {
  F t;
  explicit Table(const float* table) : t(load(table)) {}
  F operator()(I i) const { return _mm512_permutexvar_ps(i, t); }
};

template <>
struct Simd::Table<8> : Simd::Table<16> {
  using Simd::Table<16>::Table;
};

template <>
struct Simd::Table<64> {  // two 32-entry lookups, chosen by index bit 5
  F t[4];
  explicit Table(const float* table) : t{load(table), load(table + 16), load(table + 32), load(table + 48)} {}
  F operator()(I i) const {
    const __mmask16 upper = _mm512_test_epi32_mask(i, _mm512_set1_epi32(32));
    const F low = _mm512_permutex2var_ps(t[0], i, t[1]);
    return _mm512_mask_blend_ps(upper, low, _mm512_permutex2var_ps(t[2], i, t[3]));
  }
};

#ifdef __AVX512VBMI__
// A table of 256 floats, cut into four planes of a byte each. One permute looks 64 bytes up in 128, so
// the four codes of sixteen 32-bit words are found in 12 instructions and put together in 16; gathers
// would take 64 loads.
template <>
struct Simd::Table<256> {
  alignas(64) uint8_t plane[4][256];
  explicit Table(const float* t) {
    for (int i = 0; i < 256; i += 16) {
      const I bits = _mm512_castps_si512(load(t + i));
      store_bytes(plane[0] + i, bits);
      store_bytes(plane[1] + i, shr<8>(bits));
      store_bytes(plane[2] + i, shr<16>(bits));
      store_bytes(plane[3] + i, shr<24>(bits));
    }
  }
  // The values of byte 0, 1, 2 and 3 of every word.
  void operator()(I words, F (&values)[4]) const {
    const __mmask64 upper = _mm512_movepi8_mask(words), odd8 = 0xaaaaaaaaaaaaaaaa;
    const __mmask32 odd16 = 0xaaaaaaaa;
    const I p0 = look_up(plane[0], words, upper), p1 = look_up(plane[1], words, upper);
    const I p2 = look_up(plane[2], words, upper), p3 = look_up(plane[3], words, upper);
    // 16-bit halves of values 0 and 2, then 1 and 3: low halves in a, high halves in b.
    const I a02 = _mm512_mask_blend_epi8(odd8, p0, _mm512_slli_epi16(p1, 8));
    const I a13 = _mm512_mask_blend_epi8(odd8, _mm512_srli_epi16(p0, 8), p1);
    const I b02 = _mm512_mask_blend_epi8(odd8, p2, _mm512_slli_epi16(p3, 8));
    const I b13 = _mm512_mask_blend_epi8(odd8, _mm512_srli_epi16(p2, 8), p3);
    values[0] = _mm512_castsi512_ps(_mm512_mask_blend_epi16(odd16, a02, shl<16>(b02)));
    values[1] = _mm512_castsi512_ps(_mm512_mask_blend_epi16(odd16, a13, shl<16>(b13)));
    values[2] = _mm512_castsi512_ps(_mm512_mask_blend_epi16(odd16, shr<16>(a02), b02));
    values[3] = _mm512_castsi512_ps(_mm512_mask_blend_epi16(odd16, shr<16>(a13), b13));
  }

 private:
  static I bytes(const uint8_t* p) { return _mm512_load_si512(p); }
  static void store_bytes(uint8_t* p, I a) {
    _mm_store_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
  }
  static I look_up(const uint8_t* t, I words, __mmask64 upper) {
    const I low = _mm512_permutex2var_epi8(bytes(t), words, bytes(t + 64));
    return _mm512_mask_blend_epi8(upper, low,
                                  _mm512_permutex2var_epi8(bytes(t + 128), words, bytes(t + 192)));
  }
};
#endif

}  // namespace
}  // namespace flute
