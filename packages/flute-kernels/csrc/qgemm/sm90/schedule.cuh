// Which rows, columns and part of K a block multiplies, one item after the other.
//
// A set is a group of rows with a block of columns; sets of the same group are neighbours, so that they read its
// weights at about the same time. Which pieces a set has depends on nothing but sizes, and so does the order in which
// they are added.
//
// Few sets: each is that of `parts` blocks, which have one item, a part of its K.
//
// More sets than blocks: each block multiplies some whole, until there are between one and two left for each. These are
// divided evenly: a block has the beginning of one set, perhaps another whole, and the end of a third, whose beginning
// is by then what the next block has done first. All begin at the same time with stage 0 of K, and go on, around the end
// of a whole set, with the stage that follows: so most blocks want the same x at the same time, and the hardware
// between them and the cache asks for it once.
#pragma once

#include <cstdint>

#include "qgemm/common/layout.h"
#include "qgemm/sm90/config.h"

namespace flute::sm90 {

struct Item {
  int set, first, count;  // stages of K: count of them from the first on, around the end if they are all
};

// Rows of a group: its first tile, and the first row that it owns. The last group of a table moves back until
// it is whole; rows that it shares with the one before are that one's.
struct Group {
  int table, tile, first_row;

  __device__ __forceinline__ Group(const Params& p, int number, int tiles) {
    table = number / p.groups_per_table;
    const int wanted = number % p.groups_per_table * tiles;
    tile = table * p.tiles_per_table + min(wanted, p.tiles_per_table - tiles);
    first_row = (table * p.tiles_per_table + wanted) * layout::kTile;
  }
};

class Schedule {
 public:
  __device__ __forceinline__ Schedule(const Params& p, int stages) : p_(p), stages_(stages), waves_(p.waves) {
    const int64_t all = int64_t{p.shared_sets} * stages;
    const int begin = static_cast<int>(all * number() / gridDim.x);
    left_ = static_cast<int>(all * (number() + 1) / gridDim.x) - begin;
    set_ = begin / stages;
    elsewhere_ = begin - set_ * stages;
  }

  // A count, and no end that next() finds: so the compiler sees that a warp's threads leave the loop together, and keeps
  // what the main loop inside reckons with in uniform registers.
  __device__ __forceinline__ int items() const {
    return waves_ + (elsewhere_ + left_ + stages_ - 1) / stages_;
  }

  __device__ __forceinline__ Item next() {
    if (p_.parts > 1) return {set_, elsewhere_, left_};
    if (waves_ > 0) {
      --waves_;
      return {p_.shared_sets + static_cast<int>(waves_ * gridDim.x) + number(), 0, stages_};
    }
    Item item{set_++, after_, stages_};
    if (elsewhere_ > 0) {
      item.count = after_ = stages_ - elsewhere_;
      elsewhere_ = 0;
    } else if (left_ < stages_) {
      item.first = stages_ - left_;
      item.count = left_;
    }
    left_ -= item.count;
    return item;
  }

  // Of the block. The one that begins a set waits for those with higher numbers, and these must be there: blocks start
  // in the order of blockIdx, so numbers run against it. Those of a cluster start together.
  __device__ __forceinline__ int number() const {
    return p_.is_cluster ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
  }

 private:
  const Params& p_;
  const int stages_;
  int waves_, set_;
  int elsewhere_;  // stages of this set that come before this block's in the run of all
  int left_;       // stages of all shared sets
  int after_ = 0;  // the stage after those of the first shared set
};

}  // namespace flute::sm90
