// x as the copy engine sees it.
#pragma once

#include "core/status.h"
#include "qgemm/problem.h"
#include "qgemm/sm90/config.h"

namespace flute::sm90 {

// Of the problem's x, whose rows begin at multiples of 16 bytes: [M, K in whole units], in boxes of one unit by `columns`
// rows.
Status make_map(const QgemmProblem& p, int columns, TensorMap* map);

}  // namespace flute::sm90
