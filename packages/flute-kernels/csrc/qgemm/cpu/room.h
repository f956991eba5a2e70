// The CPU room: splits a problem over threads and hands the parts to the chosen instruction set.
#pragma once

#include "core/status.h"
#include "qgemm/problem.h"

namespace flute::cpu {

bool supports(const QgemmProblem& problem);
int64_t workspace_bytes(const QgemmProblem& problem);
Status launch(const QgemmProblem& problem);
Status dequantize(const DequantizeProblem& problem);

}  // namespace flute::cpu
