#include <algorithm>

#include "core/cuda.h"
#include "qgemm/common/cuda_weight.h"
#include "qgemm/common/exchange.cuh"
#include "qgemm/common/layout.h"

namespace flute::layout {
namespace {

constexpr int kThreads = 256;

struct Shape {
  int64_t n, k, row_words, tiles, total;
  int bits;
};

// One lane of one unit a thread: 16 pairs of two rows, read from the rows' bit streams.
__global__ void pack_kernel(const uint32_t* qweight, uint32_t* codes, Shape s) {
  for (int64_t id = blockIdx.x * int64_t{kThreads} + threadIdx.x; id < s.total;
       id += gridDim.x * int64_t{kThreads}) {
    const int lane = id % 32, g = lane / 4, t = lane % 4;
    const int64_t unit = id / 32 / s.tiles, tile = id / 32 % s.tiles;
    uint32_t words[4] = {0, 0, 0, 0};
    for (int r = 0; r < 2; ++r) {
      const int64_t row = tile * kTile + g + 8 * r;
      if (row >= s.n) continue;
      const uint32_t* stream = qweight + row * s.row_words;
      for (int h = 0; h < 2; ++h) {
        const int64_t k = unit * kUnit + 32 * h + 8 * t;
        if (k >= s.k) continue;
        // Eight codes are 16, 24 or 32 bits; of 24, some straddle two words.
        const int64_t bit = k * s.bits;
        const uint32_t low = stream[bit / 32];
        const uint32_t high = bit % 32 + 8 * s.bits > 32 ? stream[bit / 32 + 1] : 0;
        const uint32_t eight = __funnelshift_r(low, high, bit % 32);
        const uint32_t mask = (1u << (2 * s.bits)) - 1;
        for (int i = 0; i < 4; ++i) set_pair_number(s.bits, words, h, r, i, eight >> (2 * s.bits * i) & mask);
      }
    }
    if (s.bits == 3) {  // all lanes of a warp come here: s.total is a multiple of 32
      for (int w = 0; w < 3; ++w) words[w] = exchange_bytes(words[w], lane);
    }
    uint32_t* out = codes + id / 32 * (32 * s.bits);
    for (int w = 0; w < s.bits; ++w) out[word_offset(s.bits, lane, w)] = words[w];
  }
}

// One word of a row's stream a thread.
__global__ void unpack_kernel(const uint32_t* codes, uint32_t* qweight, Shape s) {
  for (int64_t id = blockIdx.x * int64_t{kThreads} + threadIdx.x; id < s.total;
       id += gridDim.x * int64_t{kThreads}) {
    const int64_t row = id / s.row_words, word = id % s.row_words;
    const int64_t first = 32 * word / (2 * s.bits);  // pair that holds the word's lowest bit
    uint64_t bits = 0;
    int filled = 0;
    const int skip = static_cast<int>(32 * word - first * 2 * s.bits);
    for (int64_t pair = first; filled < skip + 32; ++pair, filled += 2 * s.bits) {
      if (2 * pair >= s.k) break;
      const int64_t k = 2 * pair, unit = k / kUnit;
      const int h = k / 32 % 2, run = k / 8 % 4, place = pair % 4, g = row % 8, r = row / 8 % 2;
      const int i = s.bits == 3 ? run : place, lane = 4 * g + (s.bits == 3 ? place : run);
      const uint32_t* in = codes + (unit * s.tiles + row / kTile) * (32 * s.bits);
      uint32_t words[4];
      for (int w = 0; w < s.bits; ++w) words[w] = in[word_offset(s.bits, lane, w)];
      bits |= uint64_t{pair_number(s.bits, words, h, r, i)} << filled;
    }
    qweight[id] = static_cast<uint32_t>(bits >> skip);
  }
}

int grid(int64_t threads, const Gpu& gpu) {
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  return static_cast<int>(std::min<int64_t>(blocks, int64_t{gpu.multiprocessors} * 32));
}

}  // namespace

Status pack(const void* qweight, void* codes, int64_t n, int64_t k, int bits, const Gpu& gpu, void* stream) {
  const DeviceGuard guard(gpu.device);
  const Shape shape{n, k, k * bits / 32, tiles(n), units(k) * tiles(n) * 32, bits};
  pack_kernel<<<grid(shape.total, gpu), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint32_t*>(qweight), static_cast<uint32_t*>(codes), shape);
  return cuda_status(cudaGetLastError(), "packing codes");
}

Status unpack(const void* codes, void* qweight, int64_t n, int64_t k, int bits, const Gpu& gpu,
              void* stream) {
  const DeviceGuard guard(gpu.device);
  const Shape shape{n, k, k * bits / 32, tiles(n), n * (k * bits / 32), bits};
  unpack_kernel<<<grid(shape.total, gpu), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint32_t*>(codes), static_cast<uint32_t*>(qweight), shape);
  return cuda_status(cudaGetLastError(), "unpacking codes");
}

}  // namespace flute::layout
