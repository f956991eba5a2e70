// How the CUDA rooms store a weight. K is cut into units of 64 and N into tiles of 16 rows; a warp
// multiplies one 16 x 64 unit of one tile at a time, and what each of its 32 lanes needs is one run of
// bytes, the runs of a unit being neighbours:
//
//   codes   uint32 [units][tiles][32 lanes][bits]      (3 bits: [2 words of 32 lanes][1 word of 32 lanes])
//   scales  16-bit [ceil(K/group)][tiles][8][2]         rows g and g + 8 beside each other
//           16-bit [units][tiles][8][2 groups][2]       groups of 32, both of a unit together
//   tables  float  [T][4^bits][2]                       pairs of weights, whatever the vector size
//
// Where K ends inside a unit, the rest has code 0, and x is taken as zero there. Tiles are padded with rows
// of code 0 and scale 0.
//
// Lane 4g + t, g = 0..7, t = 0..3, owns rows g and g + 8 of the tile and, in each half h = 0, 1 of the
// unit, the eight neighbours k = 32h + 8t .. + 7. That is the A fragment of two m16n8k16 products, if
// the 16 values of K that one product sums are taken as 8t + 4s .. + 3 for t = 0..3 (s = 0, 1 is which
// product): the first two are the fragment's low columns, the last two its high ones. Any order of K
// will do as long as x uses the same, and this one makes eight neighbours of x, one 16-byte load, the
// matching B fragments of both products.
//
// The eight weights of row half r (0: row g, 1: row g + 8) and K half h are four pairs, each with a
// number of 2 * bits bits that says which entry of the pair table it is. Of pairs i = 0..3:
//   4 bits  word 2h + r, byte i
//   2 bits  word h, byte 2r + i / 2, its low nibble for even i: a byte names four weights
//   3 bits  with q = 2h + r: q < 3: the low six bits of byte i of word q. q = 3: the two top bits of byte
//           i of words 0, 1, 2, from low to high. So three lookups of four need no masking: their table
//           is repeated four times, and the top bits of the byte do not matter.
#pragma once

#include <cstdint>

#include "core/both.h"
#include "qgemm/problem.h"

namespace flute::layout {

constexpr int kTile = 16;  // rows
constexpr int kUnit = 64;  // weights along K

constexpr int kTableBytes = 256 * 256;  // in shared memory: lookup.cuh

inline int64_t tiles(int64_t n) { return (n + kTile - 1) / kTile; }
inline int64_t units(int64_t k) { return (k + kUnit - 1) / kUnit; }
// The group size as kernels know it: where all of K is one group, a line of scales never ends.
inline int64_t group_size(const QWeight& w) { return w.group == w.k ? INT64_MAX : w.group; }
FLUTE_BOTH constexpr int scales_per_unit(int64_t group_size) { return group_size == 32 ? 2 : 1; }
inline int scales_per_unit(const QWeight& w) { return scales_per_unit(group_size(w)); }
// log2 of the units that share a line of scales; a group of all of K has one line, whatever K is.
inline int group_shift(const QWeight& w) {
  if (w.group == w.k) return 31;
  int shift = 0;
  while ((int64_t{kUnit} << shift) < w.group) ++shift;
  return shift;
}
// Every table serves the same number of tiles: their borders lie at multiples of 16 rows.
inline int64_t tiles_per_table(const QWeight& w) { return tiles((w.n + w.table_count - 1) / w.table_count); }

// The number of pair i of row half r and K half h, from the words that a lane holds of a unit.
FLUTE_BOTH inline uint32_t pair_number(int bits, const uint32_t* words, int h, int r, int i) {
  if (bits == 4) return words[2 * h + r] >> (8 * i) & 0xff;
  if (bits == 2) return words[h] >> (16 * r + 4 * i) & 0xf;
  const int q = 2 * h + r;
  if (q < 3) return words[q] >> (8 * i) & 0x3f;
  uint32_t number = 0;
  for (int j = 0; j < 3; ++j) number |= (words[j] >> (8 * i + 6) & 3) << (2 * j);
  return number;
}

// Adds pair i of (h, r) to words that were zero.
FLUTE_BOTH inline void set_pair_number(int bits, uint32_t* words, int h, int r, int i, uint32_t number) {
  if (bits == 4) {
    words[2 * h + r] |= number << (8 * i);
  } else if (bits == 2) {
    words[h] |= number << (16 * r + 4 * i);
  } else if (2 * h + r < 3) {
    words[2 * h + r] |= number << (8 * i);
  } else {
    for (int j = 0; j < 3; ++j) words[j] |= (number >> (2 * j) & 3) << (8 * i + 6);
  }
}

// Where word w of a lane lies in its unit.
FLUTE_BOTH inline int word_offset(int bits, int lane, int w) {
  return bits == 3 ? (w < 2 ? 2 * lane + w : 64 + lane) : bits * lane + w;
}

}  // namespace flute::layout
