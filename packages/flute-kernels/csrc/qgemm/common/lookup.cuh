// Codes to weights: a table in shared memory, and the lookups.
//
// A byte of codes is an index into the pair table. Each of its 256 entries is copied into all 32 banks, so that
// no two lanes of a warp ever want different lines of the same bank:
//
//   entry i, copy c at 256 * i + 4 * c      2 bits: four weights, sixteen copies, at 256 * i + 8 * c
//
// With 256 bytes from one entry to the next, the address is a byte of codes above a constant byte, which one
// PRMT puts together (128 would do, but takes two instructions; what lies between is free for others). So a lookup
// is a PRMT and a load of 4 bytes for two weights (3 and 4 bits) or of 8 for four (2 bits): 128 bytes a clock
// and multiprocessor, 64 weights, which is all that shared memory gives.
#pragma once

#include "core/convert.cuh"
#include "qgemm/common/layout.h"

namespace flute {

// All of a block's dynamic shared memory; the table is first.
extern __shared__ __align__(1024) unsigned char shared[];

// i * 256 + offset, for a byte i of a word and an offset whose byte 1 is zero: there goes the byte of the word. PTX
// ISA 9.0, 9.7.8.7, prmt.
template <int kByte>
__device__ __forceinline__ uint32_t table_address(uint32_t word, uint32_t offset) {
  uint32_t address;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(address) : "r"(word), "r"(offset), "n"(0x7604 | kByte << 4));
  return address;
}

// A table on its way into every bank. Eight threads make the 128 bytes of an entry, each a line of 16 of
// them; of all 2048 lines, a thread makes every kThreads-th.
template <int kBits, class T, int kThreads>
struct Table {
  static constexpr int kLines = (2048 + kThreads - 1) / kThreads;
  float2 low[kLines], high[kBits == 2 ? kLines : 1];

  __device__ __forceinline__ void load(const float2* table, int first = 0) {
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      const int entry = (first + i * kThreads + threadIdx.x) / 8 & 255;
      // 3 bits: 64 entries four times over, so that the two top bits of an index do not matter.
      low[i] = table[kBits == 2 ? entry & 15 : kBits == 3 ? entry & 63 : entry];
      if (kBits == 2) high[i] = table[entry >> 4];
    }
  }
  __device__ __forceinline__ void store(int first = 0) const {
#pragma unroll
    for (int i = 0; i < kLines; ++i) {
      const int line = first + i * kThreads + threadIdx.x;
      if (line >= 2048) break;
      const uint32_t a = pack_two<T>(low[i].x, low[i].y);
      const uint32_t b = kBits == 2 ? pack_two<T>(high[i].x, high[i].y) : a;
      *reinterpret_cast<uint4*>(shared + line / 8 * 256 + line % 8 * 16) = make_uint4(a, b, a, b);
    }
  }
};

// Table entries by their offset in the table. The table's address should be the constant of the load
// instruction: else the compiler adds it to every offset, one more instruction a lookup. Machine code for
// 8.x does that by itself. From 9.0 on, an address in shared memory also names the block of a cluster, in its top
// byte. So there the constant is written: dynamic shared memory begins behind 1 KB that the system keeps. The
// kernel checks it, and one that runs in clusters has the top byte in its offsets.
#if __CUDA_ARCH__ >= 900
constexpr int kTableAddress = 1024;
__device__ __forceinline__ bool table_is_elsewhere() {
  return (static_cast<uint32_t>(__cvta_generic_to_shared(shared)) & 0xffffff) != kTableAddress;
}
__device__ __forceinline__ uint32_t table_base() { return 0; }
#else
constexpr int kTableAddress = 0;
__device__ __forceinline__ bool table_is_elsewhere() { return false; }
__device__ __forceinline__ uint32_t table_base() {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
#endif
__device__ __forceinline__ void load_entry(uint32_t& pair, uint32_t offset) {
  asm volatile("ld.shared.b32 %0, [%1+%2];" : "=r"(pair) : "r"(offset + table_base()), "n"(kTableAddress));
}
__device__ __forceinline__ void load_entry(uint32_t& low, uint32_t& high, uint32_t offset) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2+%3];"
               : "=r"(low), "=r"(high)
               : "r"(offset + table_base()), "n"(kTableAddress));
}

// 3 bits: the indices that lie in the top bits of the three words.
__device__ __forceinline__ uint32_t fourth_word(const uint32_t (&words)[4]) {
  return (words[0] >> 6 & 0x03030303u) | (words[1] >> 4 & 0x0c0c0c0cu) | (words[2] >> 2 & 0x30303030u);
}

// The A fragments of the two products of K half h, from a lane's words of a unit. In fragment q, register 2p + r has
// row half r of the low (p = 0) or high columns: pair i = 2q + p.
template <int kBits, int h>
__device__ __forceinline__ void look_up(uint32_t (&a)[2][4], const uint32_t (&words)[4], uint32_t offset) {
  if constexpr (kBits == 2) {
    load_entry(a[0][0], a[0][1], table_address<h>(words[0], offset));
    load_entry(a[0][2], a[0][3], table_address<2 + h>(words[0], offset));
    load_entry(a[1][0], a[1][1], table_address<h>(words[1], offset));
    load_entry(a[1][2], a[1][3], table_address<2 + h>(words[1], offset));
  } else if constexpr (kBits == 3) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t word = words[2 * h + r];
      load_entry(a[0][r], table_address<0>(word, offset));
      load_entry(a[0][2 + r], table_address<1>(word, offset));
      load_entry(a[1][r], table_address<2>(word, offset));
      load_entry(a[1][2 + r], table_address<3>(word, offset));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load_entry(a[i / 2][i % 2 * 2], table_address<2 * h>(words[i], offset));
      load_entry(a[i / 2][i % 2 * 2 + 1], table_address<2 * h + 1>(words[i], offset));
    }
  }
}

}  // namespace flute
