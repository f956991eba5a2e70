// The room for GPUs with the instructions of compute capability 8.0: mma.sync and plain loads.
#pragma once

#include "core/status.h"
#include "qgemm/problem.h"

namespace flute::sm80 {

bool supports(const QgemmProblem& problem);
int64_t workspace_bytes(const QgemmProblem& problem);
Status launch(const QgemmProblem& problem);

}  // namespace flute::sm80
