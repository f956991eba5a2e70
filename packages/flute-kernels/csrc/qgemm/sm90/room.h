// The room for compute capability 9.0: warpgroup products, the copy engine.
#pragma once

#include "core/status.h"
#include "qgemm/problem.h"

namespace flute::sm90 {

bool supports(const QgemmProblem& problem);
int64_t workspace_bytes(const QgemmProblem& problem);
Status launch(const QgemmProblem& problem);

}  // namespace flute::sm90
