// Which compiled shape serves a problem, and how many blocks. Pure host code: no CUDA, no GPU.
#pragma once

#include "qgemm/problem.h"

namespace flute::sm80 {

struct Plan {
  int config = -1;           // index into kConfigs
  int blocks_per_table = 0;  // blocks along the rows of one table
  int row_blocks = 0, column_blocks = 0;
};

// Any supported problem has a plan.
Plan make_plan(const QWeight& weight, int64_t m, const Gpu& gpu);

// For a mixture of experts, with as many column blocks as it can need; blocks_per_table: of a segment. -1 where there are
// too many.
Plan make_grouped_plan(const QWeight& weight, int64_t m, int64_t experts, const Gpu& gpu);

}  // namespace flute::sm80
