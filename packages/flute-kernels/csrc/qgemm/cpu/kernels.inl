// The CPU kernels, written once over the names of simd/*.h and compiled once per instruction set.
//
// Everything here has internal linkage and uses no function of the standard library: a function with
// a shared name, compiled here with AVX-512 and elsewhere without, might be merged by the linker into
// the wrong one and stop an older processor with an illegal instruction.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "qgemm/cpu/kernels.h"
#include "qgemm/cpu/layout.h"

#define FLUTE_INLINE inline __attribute__((always_inline))
#define FLUTE_LAMBDA_INLINE __attribute__((always_inline))

namespace flute::cpu {
namespace {

using S = Simd;
using F = S::F;
using I = S::I;

template <int V>
struct Int {
  static constexpr int value = V;
  constexpr operator int() const { return V; }
};

template <class Fn, int... Is>
FLUTE_INLINE void unroll_sequence(Fn&& fn, std::integer_sequence<int, Is...>) {
  (fn(Int<Is>{}), ...);
}
// fn(Int<0>) … fn(Int<N-1>), each with its index as a constant.
template <int N, class Fn>
FLUTE_INLINE void unroll(Fn&& fn) {
  unroll_sequence(fn, std::make_integer_sequence<int, N>{});
}

FLUTE_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
FLUTE_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// --- decode -------------------------------------------------------------------------------------

template <int Bits, int P>
struct Tables;
template <int Bits>
struct Tables<Bits, 1> {
  S::Table<(Bits == 4 ? 16 : 8)> value;
  explicit Tables(const float* t) : value(t) {}
};
template <int Bits>
struct Tables<Bits, 2> {
  static constexpr int kEntries = 1 << (2 * Bits);
  S::Table<kEntries> even, odd;
  explicit Tables(const float* t) : even(t), odd(t + kEntries) {}
};

// Code number J, of Width bits, from a stream whose words W rows side by side start at `words`.
template <int Width, int J>
FLUTE_INLINE I code(const uint32_t* words) {
  constexpr int bit = J * Width, word = bit / 32, shift = bit % 32;
  const I low = S::template shr<shift>(S::loadi(words + word * kBlock));
  if constexpr (shift + Width <= 32) return low;
  else return S::or_(low, S::template shl<32 - shift>(S::loadi(words + (word + 1) * kBlock)));
}

// Calls fn(Int<k>, F weights) for the 32 weights k of W rows; scales are not applied.
template <int Bits, int P, class Fn>
FLUTE_INLINE void decode32(const uint32_t* words, const Tables<Bits, P>& tables, Fn&& fn) {
  if constexpr (P == 1) {
    unroll<32>([&](auto k) FLUTE_LAMBDA_INLINE { fn(k, tables.value(code<Bits, k.value>(words))); });
  } else if constexpr (Bits == 4 && S::kByteTable) {
    unroll<4>([&](auto word) FLUTE_LAMBDA_INLINE {
      const I codes = S::loadi(words + word.value * kBlock);
      F even[4], odd[4];
      tables.even(codes, even);
      tables.odd(codes, odd);
      unroll<4>([&](auto j) FLUTE_LAMBDA_INLINE {
        fn(Int<8 * word.value + 2 * j.value>{}, even[j.value]);
        fn(Int<8 * word.value + 2 * j.value + 1>{}, odd[j.value]);
      });
    });
  } else {
    unroll<16>([&](auto j) FLUTE_LAMBDA_INLINE {
      const I index = code<2 * Bits, j.value>(words);
      fn(Int<2 * j.value>{}, tables.even(index));
      fn(Int<2 * j.value + 1>{}, tables.odd(index));
    });
  }
}

FLUTE_INLINE F load_as_float(const uint16_t* p, DType dtype) {
  return dtype == DType::f16 ? S::load_f16(p) : S::load_bf16(p);
}

// --- output -------------------------------------------------------------------------------------

FLUTE_INLINE void load_floats(const void* p, DType dtype, int64_t offset, int64_t count, float* out) {
  if (dtype == DType::f32) {
    memcpy(out, static_cast<const float*>(p) + offset, static_cast<size_t>(count) * 4);
    return;
  }
  const uint16_t* h = static_cast<const uint16_t*>(p) + offset;
  int64_t i = 0;
  for (; i + S::W <= count; i += S::W) S::store(out + i, load_as_float(h + i, dtype));
  if (i < count) {
    uint16_t tail[S::W] = {};
    float wide[S::W];
    memcpy(tail, h + i, static_cast<size_t>(count - i) * 2);
    S::store(wide, load_as_float(tail, dtype));
    memcpy(out + i, wide, static_cast<size_t>(count - i) * 4);
  }
}

FLUTE_INLINE void store_floats(const float* in, int64_t count, void* p, DType dtype, int64_t offset) {
  if (dtype == DType::f32) {
    memcpy(static_cast<float*>(p) + offset, in, static_cast<size_t>(count) * 4);
    return;
  }
  uint16_t* h = static_cast<uint16_t*>(p) + offset;
  const auto convert = [dtype](uint16_t* to, F v) FLUTE_LAMBDA_INLINE {
    if (dtype == DType::f16) S::store_f16(to, v);
    else S::store_bf16(to, v);
  };
  int64_t i = 0;
  for (; i + S::W <= count; i += S::W) convert(h + i, S::load(in + i));
  if (i < count) {
    float wide[S::W] = {};
    uint16_t tail[S::W];
    memcpy(wide, in + i, static_cast<size_t>(count - i) * 4);
    convert(tail, S::load(wide));
    memcpy(h + i, tail, static_cast<size_t>(count - i) * 2);
  }
}

// One row of the output: `count` sums of rows row0… of W.
FLUTE_INLINE void finish_row(float* sums, const float* bias, int64_t count, const Output& out, int64_t m,
                             int64_t row0) {
  if (bias) {
    for (int64_t i = 0; i < count; ++i) sums[i] += bias[i];
  }
  store_floats(sums, count, out.out, out.dtype, m * out.ldo + row0);
}

// --- matrix-vector ------------------------------------------------------------------------------

// Sums of one block of 16 rows with Mr rows of x, which lie column by column ([k][Mr]) so that one
// pointer reaches them all. Codes are decoded once for all of them; the scale
// multiplies a group's finished sum, so it costs one operation a group. A fused multiply-add takes
// four cycles and two start in each, so there are eight chains of them wherever registers allow.
template <int Bits, int P, int Mr>
void gemv_block(const QWeight& w, const float* x, int64_t block, float* sums) {
  constexpr int kChains = Mr == 1 ? S::kChains : Mr == 2 ? S::kChains / 2 : Mr <= 4 ? S::kChains / 4 : 1;
  constexpr int64_t kWords = Bits * kBlock;       // of 32 weights of a block
  constexpr int64_t kAhead = 2048 / (Bits * 64);  // prefetched chunks: about 2 KiB, over a page's end
  constexpr int64_t kScalesAhead = 128;           // of 8 groups: 256 bytes
  const int64_t chunks_per_group = w.group / 32, groups = w.k / w.group;
  const Tables<Bits, P> tables(block_table(w, block));
  for (int lane = 0; lane < kBlock; lane += S::W) {
    const uint32_t* words = block_codes(w, block) + lane;
    const uint16_t* scales = block_scales(w, block) + lane;
    const float* xk = x;
    F total[Mr];
    unroll<Mr>([&](auto m) FLUTE_LAMBDA_INLINE { total[m] = S::zero(); });
    for (int64_t g = 0; g < groups; ++g, scales += kBlock) {
      F sum[Mr][kChains];
      unroll<Mr * kChains>(
          [&](auto i) FLUTE_LAMBDA_INLINE { sum[i.value / kChains][i.value % kChains] = S::zero(); });
      for (int64_t c = 0; c < chunks_per_group; ++c, words += kWords, xk += 32 * Mr) {
        if (lane == 0) {
          unroll<Bits>([&](auto i)
                           FLUTE_LAMBDA_INLINE { S::prefetch(words + kAhead * kWords + i.value * kBlock); });
        }
        decode32<Bits, P>(words, tables, [&](auto k, F weight) FLUTE_LAMBDA_INLINE {
          unroll<Mr>([&](auto m) FLUTE_LAMBDA_INLINE {
            F& s = sum[m.value][k.value % kChains];
            s = S::fma(weight, S::set1(xk[k.value * Mr + m.value]), s);
          });
        });
      }
      if (lane == 0) S::prefetch(scales + kScalesAhead);
      const F scale = load_as_float(scales, w.scale_dtype);
      unroll<Mr>([&](auto m) FLUTE_LAMBDA_INLINE {
        F s = sum[m.value][0];
        unroll<kChains - 1>([&](auto i) FLUTE_LAMBDA_INLINE { s = S::add(s, sum[m.value][i.value + 1]); });
        total[m.value] = S::fma(s, scale, total[m.value]);
      });
    }
    unroll<Mr>([&](auto m) FLUTE_LAMBDA_INLINE { S::store(sums + m.value * kBlock + lane, total[m.value]); });
  }
}

template <int Bits, int P>
void gemv_blocks(const QWeight& w, const float* x, int64_t m, const Output& out, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    alignas(64) float sums[S::kMaxMr * kBlock];
    switch (m) {
      case 1: gemv_block<Bits, P, 1>(w, x, block, sums); break;
      case 2: gemv_block<Bits, P, 2>(w, x, block, sums); break;
      case 3: gemv_block<Bits, P, 3>(w, x, block, sums); break;
      case 4: gemv_block<Bits, P, 4>(w, x, block, sums); break;
      default:
        if constexpr (S::kMaxMr > 4) {
          switch (m) {
            case 5: gemv_block<Bits, P, 5>(w, x, block, sums); break;
            case 6: gemv_block<Bits, P, 6>(w, x, block, sums); break;
            case 7: gemv_block<Bits, P, 7>(w, x, block, sums); break;
            default: gemv_block<Bits, P, 8>(w, x, block, sums); break;
          }
        }
    }
    const int64_t row0 = block * kBlock, count = min_of(kBlock, w.n - row0);
    float bias[kBlock];
    if (out.bias) load_floats(out.bias, out.bias_dtype, row0, count, bias);
    for (int64_t i = 0; i < m; ++i)
      finish_row(sums + i * kBlock, out.bias ? bias : nullptr, count, out, i, row0);
  }
}

// --- tiled product ------------------------------------------------------------------------------
//
// A panel of kPanel output rows is decoded, scaled, to kDepth columns at a time, into a buffer that
// stays in the second-level cache, and multiplied with every row of x before the next columns are
// decoded: a weight is decoded once for all of x. The register tile is kGemmMr rows of x by kTile
// rows of W. Sums wait in float32 in the scratch between depths.

constexpr int kTile = S::kGemmVr * S::W;
constexpr int kPanel = kTile;
constexpr int64_t kDepth = 512;
static_assert(kTile % kBlock == 0);

// Rows of x come in tiles of kGemmMr; the last tile is as small as kGemmStep allows.
FLUTE_INLINE int64_t tile_rows(int64_t rows_left) {
  return min_of(S::kGemmMr, round_up(rows_left, S::kGemmStep));
}
int64_t panel_scratch(int64_t m) { return (m + S::kGemmStep + kDepth) * kTile * 4; }

// Calls fn(Int<rows>) for a tile of `rows` rows.
template <class Fn>
FLUTE_INLINE void with_tile_rows(int64_t rows, Fn&& fn) {
  constexpr int kStep = S::kGemmStep;
  if (rows == S::kGemmMr) return fn(Int<S::kGemmMr>{});
  unroll<S::kGemmMr / kStep - 1>([&](auto i) FLUTE_LAMBDA_INLINE {
    constexpr int candidate = (i.value + 1) * kStep;
    if (rows == candidate) fn(Int<candidate>{});
  });
}

template <int Bits, int P>
void decode_panel(const QWeight& w, int64_t block, int64_t k0, int64_t depth, float* out) {
  const Tables<Bits, P> tables(block_table(w, block));
  for (int lane = 0; lane < kBlock; lane += S::W) {
    const uint32_t* words = block_codes(w, block) + k0 / 32 * Bits * kBlock + lane;
    float* to = out + lane;
    for (int64_t k = k0; k < k0 + depth; k += 32, words += Bits * kBlock, to += 32 * kTile) {
      const F scale = load_as_float(block_scales(w, block) + k / w.group * kBlock + lane, w.scale_dtype);
      decode32<Bits, P>(words, tables, [&](auto i, F weight) FLUTE_LAMBDA_INLINE {
        S::store(to + i.value * kTile, S::mul(weight, scale));
      });
    }
  }
}

template <int Mr>
FLUTE_INLINE void tile_product(const float* weights, const float* x, int64_t depth, float* sums, bool first) {
  F acc[Mr][S::kGemmVr];
  for (int m = 0; m < Mr; ++m) {
    for (int v = 0; v < S::kGemmVr; ++v) acc[m][v] = first ? S::zero() : S::load(sums + m * kTile + v * S::W);
  }
  for (int64_t k = 0; k < depth; ++k, weights += kTile, x += Mr) {
    F weight[S::kGemmVr];
    unroll<S::kGemmVr>([&](auto v)
                           FLUTE_LAMBDA_INLINE { weight[v.value] = S::load(weights + v.value * S::W); });
    unroll<Mr>([&](auto m) FLUTE_LAMBDA_INLINE {
      const F value = S::set1(x[m.value]);
      unroll<S::kGemmVr>([&](auto v) FLUTE_LAMBDA_INLINE {
        acc[m.value][v.value] = S::fma(weight[v.value], value, acc[m.value][v.value]);
      });
    });
  }
  for (int m = 0; m < Mr; ++m) {
    for (int v = 0; v < S::kGemmVr; ++v) S::store(sums + m * kTile + v * S::W, acc[m][v]);
  }
}

#ifdef __AVX512BF16__
// The same with pairs of neighbouring columns in one 32-bit lane, both sides rounded to bfloat16.
template <int Bits, int P>
void decode_panel_bf16(const QWeight& w, int64_t block, int64_t k0, int64_t depth, uint32_t* out) {
  const Tables<Bits, P> tables(block_table(w, block));
  const uint32_t* words = block_codes(w, block) + k0 / 32 * Bits * kBlock;
  for (int64_t k = k0; k < k0 + depth; k += 32, words += Bits * kBlock, out += 16 * kTile) {
    const F scale = load_as_float(block_scales(w, block) + k / w.group * kBlock, w.scale_dtype);
    F even = S::zero();
    decode32<Bits, P>(words, tables, [&](auto i, F weight) FLUTE_LAMBDA_INLINE {
      const F value = S::mul(weight, scale);
      if constexpr (i.value % 2 == 0) even = value;
      else S::storei(out + i.value / 2 * kTile, S::pair_bf16(even, value));
    });
  }
}

template <int Mr>
FLUTE_INLINE void tile_product_bf16(const uint32_t* weights, const uint32_t* x, int64_t depth, float* sums,
                                    bool first) {
  F acc[Mr][S::kGemmVr];
  for (int m = 0; m < Mr; ++m) {
    for (int v = 0; v < S::kGemmVr; ++v) acc[m][v] = first ? S::zero() : S::load(sums + m * kTile + v * S::W);
  }
  for (int64_t k = 0; k < depth; k += 2, weights += kTile, x += Mr) {
    I weight[S::kGemmVr];
    unroll<S::kGemmVr>([&](auto v)
                           FLUTE_LAMBDA_INLINE { weight[v.value] = S::loadi(weights + v.value * S::W); });
    unroll<Mr>([&](auto m) FLUTE_LAMBDA_INLINE {
      const I value = S::set1i(x[m.value]);
      unroll<S::kGemmVr>([&](auto v) FLUTE_LAMBDA_INLINE {
        acc[m.value][v.value] = S::dot_bf16(acc[m.value][v.value], weight[v.value], value);
      });
    });
  }
  for (int m = 0; m < Mr; ++m) {
    for (int v = 0; v < S::kGemmVr; ++v) S::store(sums + m * kTile + v * S::W, acc[m][v]);
  }
}
#endif

template <int Bits, int P>
void panel_product(const QWeight& w, const PackedX& x, const Output& out, int64_t panel, void* scratch,
                   [[maybe_unused]] bool bf16) {
  constexpr int kBlocks = kTile / kBlock;
  float* weights = static_cast<float*>(scratch);
  float* sums = weights + kDepth * kTile;
  const int64_t row0 = panel * kPanel, block0 = panel * kBlocks, all_blocks = blocks(w);
  for (int64_t k0 = 0; k0 < w.k; k0 += kDepth) {
    const int64_t depth = min_of(kDepth, w.k - k0);
    for (int64_t b = 0; b < kBlocks; ++b) {
      const int64_t block = min_of(block0 + b, all_blocks - 1);  // beyond the end: any rows, never stored
#ifdef __AVX512BF16__
      if (bf16) {
        decode_panel_bf16<Bits, P>(w, block, k0, depth, reinterpret_cast<uint32_t*>(weights) + b * kBlock);
        continue;
      }
#endif
      decode_panel<Bits, P>(w, block, k0, depth, weights + b * kBlock);
    }
    for (int64_t m = 0; m < x.m; m += S::kGemmMr) {
      with_tile_rows(tile_rows(x.m - m), [&](auto rows) FLUTE_LAMBDA_INLINE {
        const int64_t offset = m * w.k + k0 * rows.value;
#ifdef __AVX512BF16__
        if (bf16) {
          tile_product_bf16<rows.value>(reinterpret_cast<uint32_t*>(weights),
                                        static_cast<const uint32_t*>(x.data) + offset / 2, depth,
                                        sums + m * kTile, k0 == 0);
          return;
        }
#endif
        tile_product<rows.value>(weights, static_cast<const float*>(x.data) + offset, depth, sums + m * kTile,
                                 k0 == 0);
      });
    }
  }
  const int64_t count = min_of(kPanel, w.n - row0);
  float bias[kPanel];
  if (out.bias) load_floats(out.bias, out.bias_dtype, row0, count, bias);
  for (int64_t m = 0; m < x.m; ++m) {
    finish_row(sums + m * kTile, out.bias ? bias : nullptr, count, out, m, row0);
  }
}

// Columns [0, k) of `rows` rows of x, side by side: to[c][width], float32.
FLUTE_INLINE void interleave(const void* x, DType dtype, int64_t ldx, int64_t k, int64_t row0, int64_t rows,
                             float* to, int64_t width) {
  constexpr int64_t kStrip = 64;  // columns widened at a time
  for (int64_t c0 = 0; c0 < k; c0 += kStrip, to += kStrip * width) {
    const int64_t columns = min_of(kStrip, k - c0);
    for (int64_t r = 0; r < rows; ++r) {
      float strip[kStrip];
      load_floats(x, dtype, (row0 + r) * ldx + c0, columns, strip);
      for (int64_t c = 0; c < columns; ++c) to[c * width + r] = strip[c];
    }
  }
}

void pack_x(const void* x, DType dtype, int64_t ldx, int64_t k, int64_t row_begin, int64_t row_end,
            void* packed, bool bf16) {
  for (int64_t r0 = row_begin; r0 < row_end; r0 += S::kGemmMr) {
    const int64_t rows = min_of(S::kGemmMr, row_end - r0), width = tile_rows(rows);
    if (!bf16) {
      float* to = static_cast<float*>(packed) + r0 * k;
      if (rows < width) memset(to, 0, static_cast<size_t>(width * k) * 4);
      interleave(x, dtype, ldx, k, r0, rows, to, width);
      continue;
    }
    // x is bfloat16: pairs of columns are moved as they are.
    auto* to = static_cast<uint32_t*>(packed) + r0 * k / 2;
    if (rows < width) memset(to, 0, static_cast<size_t>(width * k) * 2);
    constexpr int64_t kStrip = 64;
    for (int64_t c0 = 0; c0 < k; c0 += kStrip) {
      for (int64_t r = 0; r < rows; ++r) {
        const auto* from = static_cast<const uint16_t*>(x) + (r0 + r) * ldx;
        for (int64_t c = c0; c < min_of(c0 + kStrip, k); c += 2) memcpy(to + c / 2 * width + r, from + c, 4);
      }
    }
  }
}

void pack_columns(const void* x, DType dtype, int64_t ldx, int64_t m, int64_t k, float* out) {
  if (m == 1) return load_floats(x, dtype, 0, k, out);
  interleave(x, dtype, ldx, k, 0, m, out, m);
}

// --- dequantize ---------------------------------------------------------------------------------

template <int Bits, int P>
void dequantize_blocks(const QWeight& w, void* out, DType dtype, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const Tables<Bits, P> tables(block_table(w, block));
    const int64_t row0 = block * kBlock, rows = min_of(kBlock, w.n - row0);
    for (int64_t k = 0; k < w.k; k += 32) {
      float columns[32][kBlock];
      for (int lane = 0; lane < kBlock; lane += S::W) {
        const F scale = load_as_float(block_scales(w, block) + k / w.group * kBlock + lane, w.scale_dtype);
        decode32<Bits, P>(block_codes(w, block) + k / 32 * Bits * kBlock + lane, tables,
                          [&](auto i, F weight) FLUTE_LAMBDA_INLINE {
                            S::store(&columns[i.value][lane], S::mul(weight, scale));
                          });
      }
      for (int64_t r = 0; r < rows; ++r) {
        float row[32];
        for (int i = 0; i < 32; ++i) row[i] = columns[i][r];
        store_floats(row, 32, out, dtype, (row0 + r) * w.k + k);
      }
    }
  }
}

// --- choice of the template by the weight's numbers ----------------------------------------------

template <class Fn>
FLUTE_INLINE void with_weight_kind(const QWeight& w, Fn&& fn) {
  const int kind = w.bits * 2 + w.vector_size - 1;
  switch (kind) {
    case 4: fn(Int<2>{}, Int<1>{}); break;
    case 5: fn(Int<2>{}, Int<2>{}); break;
    case 6: fn(Int<3>{}, Int<1>{}); break;
    case 7: fn(Int<3>{}, Int<2>{}); break;
    case 8: fn(Int<4>{}, Int<1>{}); break;
    default: fn(Int<4>{}, Int<2>{}); break;
  }
}

void gemv(const QWeight& w, const float* x, int64_t m, const Output& out, int64_t begin, int64_t end) {
  with_weight_kind(w, [&](auto bits, auto p) { gemv_blocks<bits.value, p.value>(w, x, m, out, begin, end); });
}
void panel(const QWeight& w, const PackedX& x, const Output& out, int64_t index, void* scratch, bool bf16) {
  with_weight_kind(
      w, [&](auto bits, auto p) { panel_product<bits.value, p.value>(w, x, out, index, scratch, bf16); });
}
void dequantize(const QWeight& w, void* out, DType dtype, int64_t begin, int64_t end) {
  with_weight_kind(
      w, [&](auto bits, auto p) { dequantize_blocks<bits.value, p.value>(w, out, dtype, begin, end); });
}

constexpr QgemmKernels kQgemmKernels = {gemv,   S::kMaxMr,  panel,       panel_scratch, kPanel,
                                        pack_x, S::kGemmMr, S::kBf16Dot, pack_columns,  dequantize};

}  // namespace
}  // namespace flute::cpu
