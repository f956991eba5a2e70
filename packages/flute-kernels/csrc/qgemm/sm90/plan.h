// Which compiled shape serves a problem, and how many blocks. Pure host code: no CUDA, no GPU.
#pragma once

#include "qgemm/problem.h"

namespace flute::sm90 {

struct Plan {
  int config;  // index into kConfigs; -1: none serves the problem
  int groups_per_table, groups, column_blocks;
  int parts;  // of K, each for one block
  // Of the workspace: x, the sums of parts, and a count for each group and block of columns.
  int64_t image_bytes, parts_bytes, arrived_bytes;
};

Plan make_plan(const QWeight& weight, int64_t m, const Gpu& gpu);

}  // namespace flute::sm90
