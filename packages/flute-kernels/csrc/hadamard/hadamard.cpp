#include "hadamard/hadamard.h"

#include <algorithm>

#include "core/parallel.h"
#include "cpu_isa/isa.h"

namespace flute::cpu {

void rotate(const HadamardArgs& args, int64_t rows, int threads) {
  constexpr int64_t kValuesPerThread = 1 << 15;  // fewer are done before a second thread has started
  const int64_t useful = std::min(rows, rows * args.columns / kValuesPerThread);
  const int used = static_cast<int>(std::clamp<int64_t>(useful, 1, std::max(1, threads)));
  parallel(used, [&](int thread, int count) {
    const Range range = share(rows, thread, count);
    isa().hadamard(args, range.begin, range.end);
  });
}

}  // namespace flute::cpu
