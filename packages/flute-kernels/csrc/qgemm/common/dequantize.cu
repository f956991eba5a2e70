#include <algorithm>

#include "core/convert.cuh"
#include "core/cuda.h"
#include "qgemm/common/cuda_weight.h"
#include "qgemm/common/layout.h"

namespace flute::layout {
namespace {

constexpr int kWarps = 8;

struct Args {
  const uint32_t* codes;
  const uint16_t* scales;
  const float2* tables;
  void* out;
  int64_t k, tiles, tile0, rows, units, tiles_per_table;
  int group_shift;  // log2 of chunks per group, where a group is a chunk or more
  bool scale_bf16;
};

template <class T>
__device__ __forceinline__ void store_eight(T* to, const float (&v)[8]) {
  if constexpr (sizeof(T) == 2) {
    uint4 out = {pack_two<T>(v[0], v[1]), pack_two<T>(v[2], v[3]), pack_two<T>(v[4], v[5]),
                 pack_two<T>(v[6], v[7])};
    *reinterpret_cast<uint4*>(to) = out;
  } else {
    *reinterpret_cast<float4*>(to) = make_float4(v[0], v[1], v[2], v[3]);
    *reinterpret_cast<float4*>(to + 4) = make_float4(v[4], v[5], v[6], v[7]);
  }
}

// A block takes one tile of 16 rows and walks along K, a unit a warp. Lanes store 16-byte runs of K; a
// row's 128 bytes of a unit come from one warp. The pair table lies in shared memory as float: the
// product with the scale is rounded once, to the type of the result.
template <int kBits, class T, int kScales>
__global__ void __launch_bounds__(kWarps * 32) dequantize_kernel(const Args a) {
  __shared__ float2 table[1 << (2 * kBits)];
  const int64_t tile = a.tile0 + blockIdx.x;
  const float2* from = a.tables + tile / a.tiles_per_table * (1 << (2 * kBits));
  for (int i = threadIdx.x; i < 1 << (2 * kBits); i += kWarps * 32) table[i] = from[i];
  __syncthreads();

  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (int64_t unit = blockIdx.y * kWarps + threadIdx.x / 32; unit < a.units;
       unit += int64_t{kWarps} * gridDim.y) {
    const uint32_t* in = a.codes + (unit * a.tiles + tile) * (32 * kBits);
    uint32_t words[kBits];
#pragma unroll
    for (int w = 0; w < kBits; ++w) words[w] = in[word_offset(kBits, lane, w)];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t k = unit * kUnit + 32 * h + 8 * t;
      if (k >= a.k) continue;
      const int64_t chunk = unit / 2;
      const int which = kScales == 4 ? 2 * (unit % 2) + h : kScales == 2 ? unit % 2 : 0;
      const int64_t line = kScales == 1 ? chunk >> a.group_shift : chunk;
      const uint16_t* scale = a.scales + (((line * a.tiles + tile) * 8 + g) * kScales + which) * 2;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t row = blockIdx.x * int64_t{kTile} + g + 8 * r;
        if (row >= a.rows) continue;
        const float s = scale_to_float(scale[r], a.scale_bf16);
        float v[8];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float2 pair = table[pair_number(kBits, words, h, r, i)];
          v[2 * i] = s * pair.x, v[2 * i + 1] = s * pair.y;
        }
        store_eight(static_cast<T*>(a.out) + row * a.k + k, v);
      }
    }
  }
}

using Kernel = void (*)(Args);

template <int kBits, class T>
Kernel by_scales(int scales) {
  return scales == 4   ? dequantize_kernel<kBits, T, 4>
         : scales == 2 ? dequantize_kernel<kBits, T, 2>
                       : dequantize_kernel<kBits, T, 1>;
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
  const int scales = scales_per_chunk(w);
  const Kernel kernel = w.bits == 4   ? by_type<4>(p.dtype, scales)
                        : w.bits == 3 ? by_type<3>(p.dtype, scales)
                                      : by_type<2>(p.dtype, scales);
  const int64_t row_tiles = tiles(p.rows);
  // Enough blocks to fill the GPU, each long enough to pay for its table.
  const int64_t wanted = int64_t{p.gpu.multiprocessors} * 16;
  const int64_t along_k =
      std::clamp<int64_t>(wanted / row_tiles, 1, (units(w.k) + 4 * kWarps - 1) / (4 * kWarps));
  const Args args{static_cast<const uint32_t*>(w.codes),
                  static_cast<const uint16_t*>(w.scales),
                  static_cast<const float2*>(w.tables),
                  p.out,
                  w.k,
                  tiles(w.n),
                  p.first_row / kTile,
                  p.rows,
                  units(w.k),
                  tiles_per_table(w),
                  group_shift(w),
                  w.scale_dtype == DType::bf16};
  const DeviceGuard guard(p.gpu.device);
  kernel<<<dim3(row_tiles, along_k), kWarps * 32, 0, static_cast<cudaStream_t>(p.stream)>>>(args);
  return cuda_status(cudaGetLastError(), "dequantizing");
}

}  // namespace flute::layout
