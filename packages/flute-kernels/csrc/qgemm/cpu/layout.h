// How the CPU room stores a weight. Sixteen neighbouring output rows form a block, and a block's
// 32-bit words of codes lie word by word with the sixteen rows side by side:
//
//   codes   uint32 [ceil(N/16)][K*bits/32][16]   word w of row r as the checkpoint has it
//   scales  16-bit [ceil(N/16)][K/group][16]
//   tables  float  [T][vector_size][max(16, 2^(bits*vector_size))]
//
// One vector load therefore brings the same words of W rows, one shift brings the same code of W rows
// into the low bits of every lane, and one permute turns those into W weights: no lane ever needs
// masking, since a lookup reads only the low bits, and tables of 4 and 8 entries are repeated to 16.
// Rows beyond N are zero. The same layout serves every instruction set.
#pragma once

#include <cstdint>

#include "qgemm/problem.h"

namespace flute::cpu {

constexpr int64_t kBlock = 16;

inline int64_t blocks(const QWeight& w) { return (w.n + kBlock - 1) / kBlock; }
inline int table_stride(const QWeight& w) {
  const int entries = 1 << (w.bits * w.vector_size);
  return w.vector_size * (entries < 16 ? 16 : entries);
}
inline const uint32_t* block_codes(const QWeight& w, int64_t block) {
  return static_cast<const uint32_t*>(w.codes) + block * (w.k * w.bits / 32) * kBlock;
}
inline const uint16_t* block_scales(const QWeight& w, int64_t block) {
  return static_cast<const uint16_t*>(w.scales) + block * (w.k / w.group) * kBlock;
}
inline const float* block_table(const QWeight& w, int64_t block) {
  const int64_t table = w.table_of_block ? w.table_of_block[block] : 0;
  return static_cast<const float*>(w.tables) + table * table_stride(w);
}

}  // namespace flute::cpu
