// Element types that cross the boundary between Python and the kernels.
#pragma once

#include <cstdint>

namespace flute {

enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2 };

inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

}  // namespace flute
