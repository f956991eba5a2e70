// How results are written: out is y, so that neighbours there are rows of weights. A warp has 16 of them, 32 bytes.
//
// The sums of a whole set change places in shared memory, so that they are written in lines of 128 bytes: of a slab, the 64
// rows of a warpgroup. There is room beside the table, of whose 256 bytes an entry the second half is free: a line for each
// column. What several blocks share, each writes as it has it, 32 bytes a column.
//
// All blocks have results at about the same time, and then wait for memory to take them. So wide blocks, which have most,
// leave that to a warp that has nothing else to do: one for each warpgroup, which puts the last of a set's lines there
// (those that find room at the same time), says so, and goes on with the next set.
#pragma once

#include "core/convert.cuh"
#include "qgemm/common/layout.h"
#include "qgemm/sm90/config.h"
#include "qgemm/sm90/ptx.cuh"

namespace flute::sm90 {

// A warp's results: fragment j of slab r has the 16 rows from row + 64 * r, and the eight columns from column + 8 * j.
struct Place {
  int row, first_row, column, end;  // end: of columns
};

// Of a slab, what is added to rows g and g + 8.
__device__ __forceinline__ float2 load_bias(const Params& p, const Place& place, int r) {
  if (p.bias == nullptr) return {};
  const int row = place.row + 64 * r + threadIdx.x % 32 / 4;
  const auto dtype = static_cast<DType>(p.bias_dtype);
  return {row < p.n ? load_float(p.bias, row, dtype) : 0.f,
          row + 8 < p.n ? load_float(p.bias, row + 8, dtype) : 0.f};
}

// Columns whose results a warpgroup has in shared memory at the same time.
FLUTE_BOTH constexpr int columns_at_once(int columns, int warpgroups) {
  const int lines = 256 / warpgroups;
  int parts = (columns + lines - 1) / lines;
  while (columns % (16 * parts) != 0) ++parts;
  return columns / parts;
}

// 16 bytes, if so. A predicate, since branches would keep the stores of many columns from being under way together.
__device__ __forceinline__ void store_16_bytes_if(void* to, const uint32_t (&v)[4], bool on) {
  asm volatile(
      "{.reg .pred on; setp.ne.b32 on, %5, 0;\n@on st.global.v4.b32 [%0], {%1, %2, %3, %4};}" ::"l"(to),
      "r"(v[0]), "r"(v[1]), "r"(v[2]), "r"(v[3]), "r"(int{on})
      : "memory");
}

constexpr int kLine = 256;  // from one to the next

__device__ __forceinline__ uint32_t lines_of(uint32_t table, int warpgroup, int warpgroups) {
  return table + 128 + warpgroup * (256 / warpgroups * kLine);
}

// What lines hold: 64 rows of some columns.
struct Written {
  int row, first_row, column, columns;
};

// Writes what is in lines, by kThreads threads. There are kColumns of them or fewer.
template <int kThreads, int kColumns>
__device__ __forceinline__ void write_lines(const Params& p, const Written& w, uint32_t lines, int thread) {
  // Eight threads have a line, so that all have a step of them; some steps are under way at once.
  constexpr int kStep = kThreads / 8, kSteps = kColumns / kStep;
  constexpr int kAtOnce = kSteps % 4 == 0 ? 4 : kSteps % 3 == 0 ? 3 : kSteps % 2 == 0 ? 2 : 1;
  constexpr int kOther = kStep % 8 == 0 ? 0 : 64;  // see write_set: bytes that places in odd steps differ by
  const int line = thread / 8, row = w.row + 8 * (thread % 8);
  uint32_t from = lines + line * kLine + 16 * (thread % 8 ^ line % 8);
  uint16_t* at = p.out + (w.column + line) * p.ldo + row;
  const int count = row < w.first_row ? 0 : min(p.n - row, 8);
  if (p.stores_eights && count == 8) {  // all at once, and at a multiple of 16 bytes
#pragma unroll 1
    for (int c = line; c < w.columns; c += kAtOnce * kStep, from += kAtOnce * kStep * kLine) {
      static_assert(kOther == 0 || kAtOnce % 2 == 0);
      uint32_t v[kAtOnce][4];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) load_shared(v[i], (from ^ (i % 2 * kOther)) + i * kStep * kLine);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i, at += kStep * p.ldo)
        store_16_bytes_if(at, v[i], c + i * kStep < w.columns);
    }
    return;
  }
#pragma unroll 1
  for (int c = line; c < w.columns && count > 0; c += kStep, from += kStep * kLine, at += kStep * p.ldo) {
    uint32_t v[4];
    load_shared(v, from);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < count) at[i] = static_cast<uint16_t>(v[i / 2] >> 16 * (i % 2));
    }
    from ^= kOther;
  }
}

// What a warpgroup's writer reads when lines are full, behind the ring's barriers.
__device__ __forceinline__ uint32_t message_to_writer(uint32_t table, int warpgroup) {
  static_assert(kMostStages * 16 + 3 * 16 <= kBarrierBytes);
  return table + layout::kTableBytes + kBarrierBytes - 16 * (warpgroup + 1);
}

// By one warp, until it is told to end.
template <int kWarpgroups>
__device__ __forceinline__ void write_for(int warpgroup, const Params& p, uint32_t table) {
  while (true) {
    say(Lines::free, warpgroup);
    wait_for(Lines::full, warpgroup);
    uint32_t message[4];
    load_shared(message, message_to_writer(table, warpgroup));
    const Written written{static_cast<int>(message[0]), static_cast<int>(message[1]),
                          static_cast<int>(message[2]), static_cast<int>(message[3])};
    if (written.columns < 0) return;
    write_lines<32, 16>(p, written, lines_of(table, warpgroup, kWarpgroups), threadIdx.x % 32);
  }
}
// By the warpgroup, when lines are free.
__device__ __forceinline__ void tell_writer(const Written& written, uint32_t table) {
  const int warpgroup = threadIdx.x / 128;
  if (threadIdx.x % 128 == 0) {
    const uint32_t message[4]{static_cast<uint32_t>(written.row), static_cast<uint32_t>(written.first_row),
                              static_cast<uint32_t>(written.column), static_cast<uint32_t>(written.columns)};
    store_shared(message_to_writer(table, warpgroup), message);
  }
  say(Lines::full, warpgroup);
}
__device__ __forceinline__ void tell_writer_to_end(uint32_t table) { tell_writer({0, 0, 0, -1}, table); }

template <int kCount, int kSlabs, int kFragments>
__device__ __forceinline__ void add_bias(const Params& p, float (&sum)[kSlabs][kFragments][4],
                                         const Place& place) {
#pragma unroll
  for (int s = 0; s < kSlabs; ++s) {
    const float2 bias = load_bias(p, place, s);
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      sum[s][j][0] += bias.x, sum[s][j][1] += bias.x, sum[s][j][2] += bias.y, sum[s][j][3] += bias.y;
  }
}

// Of a set, the first kCount fragments of columns, by all warps that multiply. Where they have writers, `goes_on` says
// whether there is more to multiply; if not, they write all by themselves, and tell those to end.
template <class T, int kWarpgroups, bool kHasWriters, int kCount, int kSlabs, int kFragments>
__device__ __forceinline__ void write_set(const Params& p, float (&sum)[kSlabs][kFragments][4],
                                          const Place& place, uint32_t table, bool goes_on) {
  constexpr int kColumns = columns_at_once(8 * kCount, kWarpgroups);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, warpgroup = threadIdx.x / 128;
  const uint32_t lines = lines_of(table, warpgroup, kWarpgroups);
  // Four 8 x 8 matrices are 16 rows of 16 columns. Pieces of 16 bytes lie in another order in each of eight lines, so that
  // what a warp writes or reads of them is in all banks.
  const int r = lane % 8, piece = 2 * warp + lane / 8 % 2;
  const uint32_t to = lines + (lane / 16 * 8 + r) * kLine + 16 * (piece ^ r);
  if (p.bias != nullptr) add_bias<kCount>(p, sum, place);
#pragma unroll
  for (int s = 0; s < kSlabs; ++s) {
#pragma unroll
    for (int first = 0; first < 8 * kCount; first += kColumns) {
      // Until what was there has been read.
      if (kHasWriters && s == 0 && first == 0) {
        wait_for(Lines::free, warpgroup);
        if (!goes_on) tell_writer_to_end(table);
      } else {
        wait_at_warpgroup(warpgroup);
      }
#pragma unroll
      for (int c = 0; c < kColumns; c += 16) {
        const float (&a)[4] = sum[s][(first + c) / 8], (&b)[4] = sum[s][(first + c) / 8 + 1];
        store_transposed(to + c * kLine, pack_two<T>(a[0], a[1]), pack_two<T>(a[2], a[3]),
                         pack_two<T>(b[0], b[1]), pack_two<T>(b[2], b[3]));
      }
      const int column = place.column + first;
      const Written written{place.row - 16 * warp + 64 * s, place.first_row, column,
                            max(0, min(place.end - column, kColumns))};
      if (kHasWriters && goes_on && s + 1 == kSlabs && first + kColumns == 8 * kCount) {
        tell_writer(written, table);
      } else {
        wait_at_warpgroup(warpgroup);
        write_lines<128, kColumns>(p, written, lines, threadIdx.x % 128);
      }
    }
  }
}

// A fragment. Lane 4g + t has rows g and g + 8 of columns 2t and 2t + 1. Transposed, it has rows 2t and 2t + 1, and 8
// further, of column g; then neighbours exchange what makes four rows in a run: 8 bytes, and of four lanes a sector of 32.
template <class T>
__device__ __forceinline__ void write_out(const Params& p, const float (&sum)[4], float2 bias,
                                          const Place& place, int r, int j) {
  const uint32_t low = transposed(pack_two<T>(sum[0] + bias.x, sum[1] + bias.x));
  const uint32_t high = transposed(pack_two<T>(sum[2] + bias.y, sum[3] + bias.y));
  const int lane = threadIdx.x % 32, t = lane % 4;
  const bool is_odd = t % 2 != 0;
  const uint32_t received = __shfl_xor_sync(0xffffffff, is_odd ? low : high, 1);
  const uint2 rows = is_odd ? make_uint2(received, high) : make_uint2(low, received);

  const int tile_row = place.row + 64 * r, row = tile_row + (is_odd ? 6 : 0) + 2 * t;
  const int column = place.column + 8 * j + lane / 4;
  if (column >= place.end || tile_row < place.first_row) return;
  uint16_t* const to = p.out + column * p.ldo + row;
  if (p.stores_fours && row + 3 < p.n) {
    *reinterpret_cast<uint2*>(to) = rows;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t pair = i < 2 ? rows.x : rows.y;
    if (row + i < p.n) to[i] = static_cast<uint16_t>(i % 2 ? pair >> 16 : pair);
  }
}

// Rows of x that are nobody's: zeros. `first` and `step`: of columns, a block's.
template <int kThreads>
__device__ __forceinline__ void write_zeros(const Params& p, int first, int step) {
  for (int column = first; column < p.m; column += step) {
    for (int row = threadIdx.x; row < p.n; row += kThreads) p.out[column * p.ldo + row] = 0;
  }
}

}  // namespace flute::sm90
