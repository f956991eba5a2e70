// How the CUDA rooms store a weight. K is cut into units of 64 and N into tiles of 16 rows; a warp
// multiplies one 16 x 64 unit of one tile at a time, and what each of its 32 lanes needs is one run of
// bytes, the runs of a unit being neighbours:
//
//   codes   uint32 [units][tiles][32 runs][bits]       (3 bits: [2 words of 32 runs][1 word of 32 runs])
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
//   4 bits  word i, byte 2h + r
//   2 bits  byte 2i + h of the run, its low nibble for r = 0: a byte names four weights
//   3 bits  with q = 2h + r: q < 3: the low six bits of byte i of word q. q = 3: the two top bits of byte
//           i of words 0, 1, 2, from low to high. So three lookups of four need no masking: their table
//           is repeated four times, and the top bits of the byte do not matter.
//
// A product that reads x as it lies in memory (sm90) wants k = 16s + 2t, + 1, + 8 and + 9 in lane t: pair t of the
// runs of lanes 2s and 2s + 1. That is why all that has the same i lies together, in a word, or at 2 bits in half of
// one: lane t reads that part of each of the four runs. And it is why run 4g + t lies at place 4g + (t xor g / 2): so
// 32 lanes that read a word of such runs each want 32 different banks of shared memory. At 3 bits a run does not
// divide into four. So there the exchange is made once and for all: byte i of lane t's words is stored as byte t of
// lane i's (exchange.cuh), a lane has what that product wants, and the other, sm80, loads the same pairs of x.
#pragma once

#include <cstdint>

#include "core/both.h"
#include "qgemm/problem.h"

namespace flute::layout {

constexpr int kTile = 16;  // rows
constexpr int kUnit = 64;  // weights along K

constexpr int kEntryBytes = 256, kTableBytes = 256 * kEntryBytes;  // in shared memory: lookup.cuh

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

// Segments are rows of one expert that use one table; borders of experts are borders of tiles.
struct Segments {
  int64_t tiles, per_table, per_expert;
};
// Without tiles where tables and experts do not divide the rows in a common way.
inline Segments segments(const QWeight& w, int64_t experts) {
  const int64_t tables = w.table_count;
  if (experts == 1) return {tiles_per_table(w), 1, tables};
  if (w.n % (experts * kTile) != 0) return {0, 0, 0};
  const int64_t of_expert = w.n / experts / kTile;
  if (experts % tables == 0) return {of_expert, experts / tables, 1};
  if (tables % experts == 0 && of_expert % (tables / experts) == 0)
    return {tiles_per_table(w), 1, tables / experts};
  return {0, 0, 0};
}

// The number of pair i of row half r and K half h, from the words that a lane holds of a unit.
FLUTE_BOTH inline uint32_t pair_number(int bits, const uint32_t* words, int h, int r, int i) {
  if (bits == 4) return words[i] >> (8 * (2 * h + r)) & 0xff;
  if (bits == 2) return words[i / 2] >> (16 * (i % 2) + 8 * h + 4 * r) & 0xf;
  const int q = 2 * h + r;
  if (q < 3) return words[q] >> (8 * i) & 0x3f;
  uint32_t number = 0;
  for (int j = 0; j < 3; ++j) number |= (words[j] >> (8 * i + 6) & 3) << (2 * j);
  return number;
}

// Adds pair i of (h, r) to words that were zero.
FLUTE_BOTH inline void set_pair_number(int bits, uint32_t* words, int h, int r, int i, uint32_t number) {
  if (bits == 4) {
    words[i] |= number << (8 * (2 * h + r));
  } else if (bits == 2) {
    words[i / 2] |= number << (16 * (i % 2) + 8 * h + 4 * r);
  } else if (2 * h + r < 3) {
    words[2 * h + r] |= number << (8 * i);
  } else {
    for (int j = 0; j < 3; ++j) words[j] |= (number >> (2 * j) & 3) << (8 * i + 6);
  }
}

// The place of a lane's run in its unit.
FLUTE_BOTH constexpr int place_of_run(int bits, int lane) { return bits == 3 ? lane : lane ^ lane / 8; }

// Where word w of a lane lies in its unit.
FLUTE_BOTH inline int word_offset(int bits, int lane, int w) {
  return bits == 3 ? (w < 2 ? 2 * lane + w : 64 + lane) : bits * place_of_run(bits, lane) + w;
}

}  // namespace flute::layout
