// Which rows, columns and part of K a block multiplies, one item after the other.
//
// A set is a group of rows with a block of columns; sets of the same group are neighbours, so that they read its
// weights at about the same time. Many columns are divided into bands, one after the other, since blocks that run at
// the same time should read few rows of x, which take four times the bytes of rows of weights. Which pieces a set has
// depends on nothing but sizes, and so does the order in which they are added.
//
// Few sets: each is that of `parts` blocks, which have one item, a part of its K.
//
// More sets than blocks: each block multiplies some whole. Where nearly all blocks have as many, that is all. Else there
// are between one and two sets left for each, and these are divided evenly: a block has the end of the run of one set,
// perhaps another set whole, and the beginning of a third, the rest of whose run is by then what the next block has done
// first. All begin at the same time with stage 0 of K, and go on, around the end of a whole set, with the stage that
// follows: so most blocks want the same x at the same time, and the hardware between them and the cache asks for it once.
//
// Nearly as many sets as blocks are divided evenly, too. Then a block has less than a set, and of a set there can be
// three pieces, which come at the same time.
#pragma once

#include <cstdint>

#include "qgemm/common/layout.h"
#include "qgemm/sm90/config.h"

namespace flute::sm90 {

struct Item {
  int set, first, count;  // stages of K: count of them from the first on, around the end if they are all
  bool is_piece;          // whose sums go to the block that joins the set's pieces
  bool joins;             // others' pieces; of more than two parts, each does a share (join.cuh)
};

// Rows of a group: its first tile, and the first row that it owns. The last group of a segment moves back until
// it is whole; rows that it shares with the one before are that one's.
struct Group {
  int table, tile, first_row;

  Group() = default;
  __device__ __forceinline__ Group(const Params& p, int number, int tiles) {
    const int segment = p.groups_per_segment.quotient(number);
    const int wanted = (number - segment * p.groups_per_segment.divisor) * tiles;
    table = p.segments_per_table.quotient(segment);
    tile = segment * p.tiles_per_segment + min(wanted, p.tiles_per_segment - tiles);
    first_row = (segment * p.tiles_per_segment + wanted) * layout::kTile;
  }
};

// The group and the columns, which are rows of x, of a set.
struct Set {
  int group, column, end;

  Set() = default;
  __device__ __forceinline__ Set(const Params& p, int number, int columns) : end(p.m) {
    const int band = p.sets_of_band.quotient(number), first = band * p.band.divisor;
    const int in_band = number - band * p.sets_of_band.divisor;
    const Divisor width = first + p.band.divisor < p.column_blocks ? p.band : p.last_band;
    group = width.quotient(in_band);
    column = (first + in_band - group * width.divisor) * columns;
  }
  __device__ __forceinline__ Set(int group, int column, int end) : group(group), column(column), end(end) {}
};

class Schedule {
 public:
  __device__ __forceinline__ Schedule(const Params& p, const Division& division)
      : d_(division), is_cluster_(p.is_cluster), stages_(p.stages.divisor), waves_(division.waves) {
    if (waves_ > 0 && set_of_wave(waves_ - 1) >= d_.sets) --waves_;
    if (d_.parts > 1) {
      set_ = p.parts.quotient(number());
      elsewhere_ = begin_of(part());
      left_ = begin_of(part() + 1) - elsewhere_;
    } else {
      const int begin = begin_of(number());
      left_ = begin_of(number() + 1) - begin;
      set_ = p.stages.quotient(begin);
      elsewhere_ = begin - set_ * stages_;
    }
  }

  __device__ __forceinline__ bool has_next() const { return waves_ > 0 || left_ > 0; }

  __device__ __forceinline__ Item next() {
    if (d_.parts > 1) {
      const Item item{set_, elsewhere_, left_, elsewhere_ > 0, elsewhere_ == 0};
      left_ = 0;
      return item;
    }
    if (waves_ > 0) {
      --waves_;
      return {set_of_wave(waves_), 0, stages_, false, false};
    }
    const int count = min(left_, stages_ - elsewhere_), later = stages_ - elsewhere_ - count;
    const bool is_whole = count == stages_;
    const Item item{set_++, is_whole ? after_ : later, count, elsewhere_ > 0, elsewhere_ == 0 && later > 0};
    if (!is_whole) after_ = later + count;
    left_ -= count;
    elsewhere_ = 0;
    return item;
  }

  // Of the block. The one that joins pieces waits for those with higher numbers, and these must be there: blocks start
  // in the order of blockIdx, so numbers run against it. Those of a cluster start together.
  __device__ __forceinline__ int number() const {
    return is_cluster_ ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
  }

  // Of the set that is this block's, if it has parts.
  __device__ __forceinline__ int part() const { return number() - set_ * d_.parts; }

  __device__ __forceinline__ bool begins_joins() const { return d_.begins_joins; }

  // The pieces that an item joins are those of the blocks after this one, up to here.
  __device__ __forceinline__ int last_piece(const Item& item) const {
    if (d_.parts > 1) return number() + 1;
    const int stage = (item.set + 1) * stages_ - 1, longer = d_.extra * (d_.share + 1);
    return stage < longer ? stage / (d_.share + 1) : d_.extra + (stage - longer) / d_.share;
  }

 private:
  // There is none of this number where the last wave is not full.
  __device__ __forceinline__ int set_of_wave(int wave) const {
    return d_.shared_sets + wave * static_cast<int>(gridDim.x) + number();
  }
  // Stages before the block, in the run of all shared sets, or before the part, in its set.
  __device__ __forceinline__ int begin_of(int block) const {
    const int sharer = min(block, d_.sharers);
    return sharer * d_.share + min(sharer, d_.extra);
  }

  Division d_;
  bool is_cluster_;
  int stages_;
  int waves_, set_;
  int elsewhere_;  // stages of this set that come before this block's in the run of all
  int left_;       // stages of all shared sets
  int after_ = 0;  // the stage after those of the set before
};

}  // namespace flute::sm90
