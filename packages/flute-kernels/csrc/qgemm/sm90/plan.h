// Which compiled shape serves a problem, and how many blocks. Pure host code: no CUDA, no GPU.
#pragma once

#include "qgemm/problem.h"

namespace flute::sm90 {

struct Plan {
  int config = -1;  // index into kConfigs; -1: none serves the problem
  int groups_per_segment = 0, groups = 0, column_blocks = 0;
  // A set is a group with a block of columns. Few sets have `parts` blocks each. Of more, each block multiplies `waves`
  // whole (the last wave may have fewer sets than blocks) and shares the others, of which there are none, or between one
  // and two for each block. With one part, no wave, and fewer sets than blocks, these share them, too.
  int64_t sets = 0;
  int blocks = 0, parts = 1, waves = 0;
  bool is_cluster = false;  // whether the parts of a set run at the same time; else they meet in memory
  // Of the workspace: pieces of sets, and a word for each block's warps.
  int64_t pieces_bytes = 0, written_bytes = 0;
};

Plan make_plan(const QWeight& weight, int64_t m, const Gpu& gpu);

// For a mixture of experts. Which of them have how many rows, only the GPU knows: it divides the work among the blocks.
Plan make_grouped_plan(const QWeight& weight, int64_t m, int64_t experts, const Gpu& gpu);

}  // namespace flute::sm90
