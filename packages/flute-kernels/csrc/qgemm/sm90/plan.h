// Which compiled shape serves a problem, and how many blocks. Pure host code: no CUDA, no GPU.
#pragma once

#include "qgemm/problem.h"

namespace flute::sm90 {

struct Plan {
  int config = -1;  // index into kConfigs; -1: none serves the problem
  int groups_per_table = 0, groups = 0, column_blocks = 0;
  int parts = 1;         // of K, each for one block
  bool cluster = false;  // whether the parts of a group are a cluster, or meet in memory
  // Of the workspace: x, the sums of parts, and a count for each group and block of columns.
  int64_t image_bytes = 0, parts_bytes = 0, arrived_bytes = 0;
};

Plan make_plan(const QWeight& weight, int64_t m, const Gpu& gpu);

}  // namespace flute::sm90
