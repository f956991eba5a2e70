// Which compiled shape serves a problem, and how many blocks. Pure host code: no CUDA, no GPU.
#pragma once

#include "qgemm/problem.h"

namespace flute::sm80 {

struct Plan {
  int config;            // index into kConfigs
  int blocks_per_table;  // blocks along the rows of one table
  int row_blocks, column_blocks;
};

// Any supported problem has a plan.
Plan make_plan(const QWeight& weight, int64_t m, const Gpu& gpu);

}  // namespace flute::sm80
