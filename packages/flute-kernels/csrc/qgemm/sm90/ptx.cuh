// Hopper's instructions that C++ has no words for. Sections are of the PTX ISA manual, version 9.0.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flute::sm90 {

// Barriers in shared memory that count arrivals and bytes (9.7.13.15, mbarrier).
__device__ __forceinline__ void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ __forceinline__ void barriers_are_initialized() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A copy of whole 16-byte pieces from global to shared memory, made by the copy engine; the barrier learns of
// its bytes (9.7.9.25.4.1, cp.async.bulk). It is for one thread, chosen by is_elected() so that the compiler knows
// that it is one (9.7.13.14, elect.sync).
__device__ __forceinline__ void copy(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}
// A box of a matrix, from column and row on, likewise (9.7.9.27.1.2, cp.async.bulk.tensor): its rows, of 128 bytes,
// swizzled. What lies outside of the matrix becomes zeros, which count as bytes that have come.
__device__ __forceinline__ void copy_box(uint32_t to, const void* map, int column, int row,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
__device__ __forceinline__ void prefetch_map(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ bool is_elected() {
  uint32_t elected;
  asm volatile("{.reg .pred is;\nelect.sync _|is, 0xffffffff;\nselp.u32 %0, 1, 0, is;}" : "=r"(elected));
  return elected != 0;
}

__device__ __forceinline__ void load_shared(uint32_t& v, uint32_t at) {
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(at));
}
__device__ __forceinline__ void load_shared_half(uint32_t& v, uint32_t at) {
  asm volatile("ld.shared.u16 %0, [%1];" : "=r"(v) : "r"(at));
}
__device__ __forceinline__ void load_shared(uint32_t& v0, uint32_t& v1, uint32_t at) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v0), "=r"(v1) : "r"(at));
}
__device__ __forceinline__ void load_shared(uint32_t (&v)[4], uint32_t at) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(at));
}
__device__ __forceinline__ void store_shared(uint32_t at, const uint32_t (&v)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v[0]), "r"(v[1]), "r"(v[2]),
               "r"(v[3])
               : "memory");
}
// Four 8 x 8 matrices of 16-bit values, of each of which lane 4g + t has row g, columns 2t and 2t + 1; their rows, of 16
// bytes, are where lanes 8i to 8i + 7 say for matrix i (9.7.14.5.15, ldmatrix; 9.7.14.5.16, stmatrix). Stored transposed,
// they have columns there.
__device__ __forceinline__ void load_matrices(uint32_t (&v)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(at));
}
__device__ __forceinline__ void store_transposed(uint32_t at, uint32_t v0, uint32_t v1, uint32_t v2,
                                                 uint32_t v3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v0),
               "r"(v1), "r"(v2), "r"(v3)
               : "memory");
}
__device__ __forceinline__ void load_shared(float (&v)[4], uint32_t at) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3])
               : "r"(at)
               : "memory");
}

// Blocks of a cluster wait for each other (9.7.13.4, barrier.cluster; threads that have ended count as arrived), and
// write each other's shared memory (9.7.9.24, mapa).
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
__device__ __forceinline__ uint32_t of_block(uint32_t at, int block) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(block));
  return there;
}
__device__ __forceinline__ void store_to_block(uint32_t there, const float (&v)[4], bool on) {
  asm volatile(
      "{.reg .pred on; setp.ne.b32 on, %5, 0;\n"
      "@on st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};}" ::"r"(there),
      "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(int{on})
      : "memory");
}

// A word in memory that says that what was written before it can be seen (8, memory consistency model).
__device__ __forceinline__ void publish(uint64_t* word, uint64_t token) {
  asm volatile("fence.acq_rel.gpu;\nst.relaxed.gpu.b64 [%0], %1;" ::"l"(word), "l"(token) : "memory");
}
__device__ __forceinline__ bool is_published(const uint64_t* word, uint64_t token) {
  uint64_t value;
  asm volatile("ld.acquire.gpu.b64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value == token;
}

// Four floats from memory, past the first cache, or zeros. It is one piece of code without branches: where accumulators
// of products come from different ways, the compiler lets each product end before the next begins.
__device__ __forceinline__ void load_or_zero(float (&v)[4], const void* from, bool loads) {
  asm volatile(
      "{.reg .pred loads; setp.ne.b32 loads, %5, 0;\n"
      "mov.b32 %0, 0; mov.b32 %1, 0; mov.b32 %2, 0; mov.b32 %3, 0;\n"
      "@loads ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];}"
      : "=&f"(v[0]), "=&f"(v[1]), "=&f"(v[2]), "=&f"(v[3])
      : "l"(from), "r"(int{loads})
      : "memory");
}

// The same, but anything instead of zeros.
__device__ __forceinline__ void load_if(float (&v)[4], const void* from, bool loads) {
  asm volatile(
      "{.reg .pred loads; setp.ne.b32 loads, %5, 0;\n@loads ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];}"
      : "=&f"(v[0]), "=&f"(v[1]), "=&f"(v[2]), "=&f"(v[3])
      : "l"(from), "r"(int{loads})
      : "memory");
}

// An 8 x 8 matrix of 16-bit values, of which lane 4g + t has row g, columns 2t and 2t + 1, transposed (9.7.14,
// movmatrix): now those are of its row g of columns.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
  uint32_t to;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to) : "r"(pair));
  return to;
}

// The four warps of a warpgroup meet (9.7.13.1, barrier). Numbers below 3 are the kernel's.
__device__ __forceinline__ void wait_at_warpgroup(int number) {
  asm volatile("barrier.sync.aligned %0, 128;" ::"r"(3 + number) : "memory");
}

// Of those and the warp that writes their results, one side says how its memory is now, and the other waits for it.
enum class Lines { full = 7, free = 10 };  // numbers of the first of three warpgroups
__device__ __forceinline__ void wait_for(Lines lines, int warpgroup) {
  asm volatile("barrier.sync.aligned %0, 160;" ::"r"(static_cast<int>(lines) + warpgroup) : "memory");
}
// To arrive and go on is enough of an order (9.7.13.1 has the same example). The sanitizer's racecheck does not see it, so
// for it (CMake's FLUTE_RACECHECK) both sides wait.
__device__ __forceinline__ void say(Lines lines, int warpgroup) {
#ifdef FLUTE_RACECHECK
  wait_for(lines, warpgroup);
#else
  asm volatile("barrier.arrive.aligned %0, 160;" ::"r"(static_cast<int>(lines) + warpgroup) : "memory");
#endif
}

// Warpgroup products (9.7.15): registers that take part may not be touched between fence and wait.
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_end() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all products have ended.
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// The compiler takes a product's results for known as soon as the product has been started: it must not move their
// uses across this.
template <int kCount>
__device__ __forceinline__ void hold(float (&v)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    asm volatile("" : "+f"(v[i][0]), "+f"(v[i][1]), "+f"(v[i][2]), "+f"(v[i][3])::"memory");
}

// Operands are complete here: what makes them may not sink to the products that use them.
__device__ __forceinline__ void hold(uint32_t (&v)[4]) {
  asm volatile("" : "+r"(v[0]), "+r"(v[1]), "+r"(v[2]), "+r"(v[3])::"memory");
}

// A value that all lanes of a warp have, so that the compiler knows it, too.
__device__ __forceinline__ int same_of_warp(int v) { return __reduce_max_sync(0xffffffff, v); }
__device__ __forceinline__ bool same_of_warp(bool v) { return __any_sync(0xffffffff, v); }

// A value that the compiler keeps in a register, as it does not know where it comes from.
__device__ __forceinline__ uint32_t kept(uint32_t v) {
  asm volatile("" : "+r"(v));
  return v;
}

// Registers move between warpgroups (9.7.17.1.5, setmaxnreg): the warps that bring x leave theirs.
template <int kCount>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
__device__ __forceinline__ void leave_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// Operand B in shared memory: rows of 128 bytes along K, swizzled by 128 bytes, eight rows every 1024 bytes
// (9.7.15.5.1, matrix descriptor). 32 bytes further lies the next 16 of K: add 2.
__device__ __forceinline__ uint64_t descriptor(uint32_t address) {
  uint64_t d;
  asm("mov.b64 %0, {%1, %2};" : "=l"(d) : "r"((address & 0x3ffff) >> 4 | 1 << 16), "n"(0x40000040));
  return d;
}

// d = a * b, or d += a * b: m64 n(kColumns) k16, a from registers, b from shared memory, d in float. Thread
// 32w + 4g + t of the warpgroup has rows 16w + g and 16w + g + 8 of columns 8j + 2t and 8j + 2t + 1 in d[j].
template <class T, int kColumns>
struct Product;

#define FLUTE_D(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define FLUTE_D2(i) FLUTE_D(i), FLUTE_D(i + 1)
#define FLUTE_D4(i) FLUTE_D2(i), FLUTE_D2(i + 2)
#define FLUTE_D8(i) FLUTE_D4(i), FLUTE_D4(i + 4)
#define FLUTE_D16(i) FLUTE_D8(i), FLUTE_D8(i + 8)
#define FLUTE_R4 "%0, %1, %2, %3"
#define FLUTE_R8 FLUTE_R4 ", %4, %5, %6, %7"
#define FLUTE_R16 FLUTE_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FLUTE_R24 FLUTE_R16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define FLUTE_R32 \
  FLUTE_R16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FLUTE_R48 \
  FLUTE_R32       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FLUTE_R64                                                                                     \
  FLUTE_R32                                                                                           \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FLUTE_R96                                                                                     \
  FLUTE_R64                                                                                           \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, " \
  "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FLUTE_R128                                                                                       \
  FLUTE_R96                                                                                              \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, " \
  "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// Operands behind the accumulators: four of a, the descriptor, whether to add.
#define FLUTE_PRODUCT(TYPE, NAME, COLUMNS, REGISTERS, A, DESCRIPTOR, ADD, ...)                          \
  template <>                                                                                           \
  struct Product<TYPE, COLUMNS> {                                                                       \
    static __device__ __forceinline__ void run(float (&d)[COLUMNS / 8][4], const uint32_t (&a)[4],      \
                                               uint64_t b, bool add) {                                  \
      asm volatile("{.reg .pred add; setp.ne.b32 add, " ADD                                             \
                   ", 0;\n"                                                                             \
                   "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME " {" REGISTERS \
                   "}, {" A "}, " DESCRIPTOR ", add, 1, 1, 0;}"                                         \
                   : __VA_ARGS__                                                                        \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{add}));                \
    }                                                                                                   \
  };
#define FLUTE_PRODUCTS(COLUMNS, REGISTERS, A, DESCRIPTOR, ADD, ...)                 \
  FLUTE_PRODUCT(__half, "f16", COLUMNS, REGISTERS, A, DESCRIPTOR, ADD, __VA_ARGS__) \
  FLUTE_PRODUCT(__nv_bfloat16, "bf16", COLUMNS, REGISTERS, A, DESCRIPTOR, ADD, __VA_ARGS__)
FLUTE_PRODUCTS(16, FLUTE_R8, "%8, %9, %10, %11", "%12", "%13", FLUTE_D2(0))
FLUTE_PRODUCTS(32, FLUTE_R16, "%16, %17, %18, %19", "%20", "%21", FLUTE_D4(0))
FLUTE_PRODUCTS(48, FLUTE_R24, "%24, %25, %26, %27", "%28", "%29", FLUTE_D2(0), FLUTE_D4(2))
FLUTE_PRODUCTS(64, FLUTE_R32, "%32, %33, %34, %35", "%36", "%37", FLUTE_D8(0))
FLUTE_PRODUCTS(96, FLUTE_R48, "%48, %49, %50, %51", "%52", "%53", FLUTE_D8(0), FLUTE_D4(8))
FLUTE_PRODUCTS(128, FLUTE_R64, "%64, %65, %66, %67", "%68", "%69", FLUTE_D8(0), FLUTE_D8(8))
FLUTE_PRODUCTS(192, FLUTE_R96, "%96, %97, %98, %99", "%100", "%101", FLUTE_D16(0), FLUTE_D8(16))
FLUTE_PRODUCTS(256, FLUTE_R128, "%128, %129, %130, %131", "%132", "%133", FLUTE_D16(0), FLUTE_D16(16))
#undef FLUTE_D
#undef FLUTE_D2
#undef FLUTE_D4
#undef FLUTE_D8
#undef FLUTE_D16
#undef FLUTE_R4
#undef FLUTE_R8
#undef FLUTE_R16
#undef FLUTE_R24
#undef FLUTE_R32
#undef FLUTE_R48
#undef FLUTE_R64
#undef FLUTE_R96
#undef FLUTE_R128
#undef FLUTE_PRODUCT
#undef FLUTE_PRODUCTS

}  // namespace flute::sm90
