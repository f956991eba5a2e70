#include <algorithm>

#include "core/convert.cuh"
#include "core/cuda.h"
#include "qgemm/common/cuda_weight.h"
#include "qgemm/common/exchange.cuh"
#include "qgemm/common/layout.h"

namespace flute::layout {
namespace {

constexpr int kWarps = 8;
constexpr int kUnits = 2 * kWarps;  // of a block

struct Args {
  const uint32_t* codes;
  const uint32_t* scales;  // pairs: rows g and g + 8
  const float2* tables;
  void* out;
  int64_t k, tiles, tile0, rows, units, tiles_per_table;
  int group_shift;
  bool scale_bf16;
};

// What a lane reads of a unit.
template <int kBits, int kScales>
struct Unit {
  uint32_t words[4], scales[kScales];

  __device__ __forceinline__ void load(const Args& a, int64_t unit, int64_t tile, int lane) {
    const uint32_t* in = a.codes + (unit * a.tiles + tile) * (32 * kBits);
    const int place = place_of_run(kBits, lane);
    if constexpr (kBits == 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(in + 4 * place);
      words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
    } else {
      const uint2 two = *reinterpret_cast<const uint2*>(in + 2 * place);
      words[0] = two.x, words[1] = two.y;
      if constexpr (kBits == 3) words[2] = in[64 + lane];
    }
    const uint32_t* from = a.scales + (((unit >> a.group_shift) * a.tiles + tile) * 8 + lane / 4) * kScales;
#pragma unroll
    for (int s = 0; s < kScales; ++s) scales[s] = from[s];
  }
};

// Stores eight floats of each of two neighbouring lanes, whose 64 bytes are neighbours, in two stores of both: first
// the even lane's, then the odd one's. A store of each lane's own first half would fill half of each 32-byte
// sector.
__device__ __forceinline__ void store_with_neighbour(float* to, const float (&v)[8], int lane, bool inside) {
  const bool odd = lane & 1;
  float first[4], second[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float own = odd ? v[4 + i] : v[i], others = __shfl_xor_sync(~0u, odd ? v[i] : v[4 + i], 1);
    first[i] = odd ? others : own, second[i] = odd ? own : others;
  }
  if (!inside) return;
  to -= odd ? 4 : 0;
  store_four(to, first);
  store_four(to + 8, second);
}

// A block takes 16 rows by 1024 of K, a unit a warp and then one more, whose codes are then under way.
// Blocks that run at the same time are neighbours along K: with a whole row of tiles a block, the GPU would
// write to thousands of places at once, and its memory would take a third of the bytes (measured). A row's
// part of a unit comes from one warp. The pair table lies in shared memory as float, since the product with
// the scale is rounded once, to the type of the result. A warp reads 8-byte entries half by half, so sixteen
// copies keep its lanes out of each other's banks.
template <int kBits, class T, int kScales>
__global__ void __launch_bounds__(kWarps * 32) dequantize_kernel(const Args a) {
  constexpr int kEntries = 1 << (2 * kBits), kCopies = 16;
  __shared__ float2 table[kEntries][kCopies];
  const int64_t tile = a.tile0 + blockIdx.y;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int64_t unit = int64_t{blockIdx.x} * kUnits + threadIdx.x / 32;
  const int64_t end = min(int64_t{blockIdx.x + 1} * kUnits, a.units);
  Unit<kBits, kScales> next;
  if (unit < end) next.load(a, unit, tile, lane);
  const float2* from = a.tables + tile / a.tiles_per_table * kEntries;
  for (int i = threadIdx.x; i < kEntries * kCopies; i += kWarps * 32)
    table[i / kCopies][i % kCopies] = from[i / kCopies];
  __syncthreads();

  for (; unit < end; unit += kWarps) {
    Unit<kBits, kScales> now = next;
    if constexpr (kBits == 3) {
#pragma unroll
      for (int w = 0; w < 3; ++w) now.words[w] = exchange_bytes(now.words[w], lane);
    }
    if (unit + kWarps < end) next.load(a, unit + kWarps, tile, lane);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t k = unit * kUnit + 32 * h + 8 * t;
      const uint32_t both = now.scales[kScales == 2 ? h : 0];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t row = blockIdx.y * int64_t{kTile} + g + 8 * r;
        const float s = scale_to_float(r ? both >> 16 : both, a.scale_bf16);
        float v[8];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 pair = table[pair_number(kBits, now.words, h, r, i)][lane % kCopies];
          v[2 * i] = s * pair.x, v[2 * i + 1] = s * pair.y;
        }
        T* const to = static_cast<T*>(a.out) + row * a.k + k;
        const bool inside = k < a.k && row < a.rows;
        if constexpr (sizeof(T) == 4) {
          store_with_neighbour(to, v, t, inside);
        } else if (inside) {
          store_eight(to, v);
        }
      }
    }
  }
}

using Kernel = void (*)(Args);

template <int kBits, class T>
Kernel by_scales(int scales) {
  return scales == 2 ? dequantize_kernel<kBits, T, 2> : dequantize_kernel<kBits, T, 1>;
}

template <int kBits>
Kernel by_type(DType dtype, int scales) {
  return dtype == DType::f32   ? by_scales<kBits, float>(scales)
         : dtype == DType::f16 ? by_scales<kBits, __half>(scales)
                               : by_scales<kBits, __nv_bfloat16>(scales);
}

}  // namespace

Status dequantize(const DequantizeProblem& p) {
  const QWeight& w = p.weight;
  if (p.rows == 0) return {};
  const int scales = scales_per_unit(w);
  const Kernel kernel = w.bits == 4   ? by_type<4>(p.dtype, scales)
                        : w.bits == 3 ? by_type<3>(p.dtype, scales)
                                      : by_type<2>(p.dtype, scales);
  const DeviceGuard guard(p.gpu.device);
  constexpr int64_t kMost = 65535;  // tiles of a launch: a grid's second dimension
  for (int64_t first = 0; first < tiles(p.rows); first += kMost) {
    const Args args{static_cast<const uint32_t*>(w.codes),
                    static_cast<const uint32_t*>(w.scales),
                    static_cast<const float2*>(w.tables),
                    static_cast<char*>(p.out) + first * kTile * w.k * size_of(p.dtype),
                    w.k,
                    tiles(w.n),
                    p.first_row / kTile + first,
                    p.rows - first * kTile,
                    units(w.k),
                    tiles_per_table(w),
                    group_shift(w),
                    w.scale_dtype == DType::bf16};
    const dim3 grid(static_cast<unsigned>((units(w.k) + kUnits - 1) / kUnits),
                    static_cast<unsigned>(std::min(kMost, tiles(p.rows) - first)));
    kernel<<<grid, kWarps * 32, 0, static_cast<cudaStream_t>(p.stream)>>>(args);
    if (const Status status = cuda_status(cudaGetLastError(), "dequantizing"); !status.ok()) return status;
  }
  return {};
}

}  // namespace flute::layout
