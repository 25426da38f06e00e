// The PTX instructions of sm_90a that kernels use: barriers in shared memory, tensor copies (TMA)
// and products of warp groups (wgmma). On the host they are in tests/cuda_host/hopper.h.
#pragma once

#include "cuda/lib/ptx.cuh"
#ifndef LUMINA_CUDA_HOST
#include <cuda.h>
#endif

// The dynamic shared memory, aligned as patterns of swizzled tiles repeat.
#ifdef LUMINA_CUDA_HOST
#define LUMINA_SHARED_TILES(T, name) LUMINA_DYNAMIC_SHARED(T, name)
#else
#define LUMINA_SHARED_TILES(T, name)                                     \
  extern __shared__ __align__(1024) unsigned char lumina_shared_tiles[]; \
  const Shared<T> name = reinterpret_cast<T*>(lumina_shared_tiles)
#endif

namespace lumina_kernels::cuda {

#ifdef LUMINA_CUDA_HOST
using TensorMap = cuda_host::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// Swizzling by 16 (none), 32, 64 or 128 bytes, the bytes of a row of a tile: where element i of a
// tile is, of 16-bit numbers, without and with it.
__device__ __forceinline__ int swizzled(int i, int bytes) {
  return i ^ (i >> 6 & (bytes / 16 - 1)) << 3;
}

// --- barriers ---

// Makes this thread's accesses to shared memory, and barriers it initialised, known to TMA and
// wgmma; other threads' follow a barrier after it.
__device__ __forceinline__ void fence_proxy_async() {
#ifdef LUMINA_CUDA_HOST
  cuda_host::fence_proxy_async();
#else
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// A phase ends after `count` arrivals and the bytes they expect.
__device__ __forceinline__ void mbarrier_init(Shared<uint64_t> barrier, int count) {
#ifdef LUMINA_CUDA_HOST
  cuda_host::mbarrier_init(barrier.raw(), count);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
#endif
}

__device__ __forceinline__ void mbarrier_arrive(Shared<uint64_t> barrier LUMINA_SITE) {
#ifdef LUMINA_CUDA_HOST
  cuda_host::mbarrier_arrive(barrier.raw(), 0, site);
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
#endif
}

// Arrives, and lets the phase wait for `bytes` of copies too.
__device__ __forceinline__ void mbarrier_arrive_expect(Shared<uint64_t> barrier,
                                                       int bytes LUMINA_SITE) {
#ifdef LUMINA_CUDA_HOST
  cuda_host::mbarrier_arrive(barrier.raw(), bytes, site);
#else
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
#endif
}

// Waits for the end of the phase of this parity, 0 for the first one. The one before the first
// counts as ended.
__device__ __forceinline__ void mbarrier_wait(Shared<uint64_t> barrier, int parity LUMINA_SITE) {
#ifdef LUMINA_CUDA_HOST
  cuda_host::mbarrier_wait(barrier.raw(), parity, site);
#else
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ready;\n"
      "bra again;\n"
      "ready:\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}

// Barrier `id`, from 1 to 15, of `threads` threads, whole warps.
__device__ __forceinline__ void named_barrier(int id, int threads LUMINA_SITE) {
#ifdef LUMINA_CUDA_HOST
  cuda_host::named_barrier(id, threads, true, site);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Counts for the barrier, without waiting.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads LUMINA_SITE) {
#ifdef LUMINA_CUDA_HOST
  cuda_host::named_barrier(id, threads, false, site);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Registers of a thread, of which its warp group gives some back, or takes more.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
#ifndef LUMINA_CUDA_HOST
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
#ifndef LUMINA_CUDA_HOST
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

// --- copies ---

// One thread starts the copy of a box of a tensor of 4 dimensions to shared memory, with zeros
// outside of the tensor. The barrier counts its bytes, those of zeros too.
template <class T>
__device__ __forceinline__ void tensor_copy(Shared<T> to, const TensorMap& map,
                                            Shared<uint64_t> barrier, int x0, int x1, int x2,
                                            int x3) {
#ifdef LUMINA_CUDA_HOST
  cuda_host::tensor_copy(to.raw(), to.begin(), to.end(), map, barrier.raw(), {x0, x1, x2, x3});
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4, %5, %6}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
      : "memory");
#endif
}

// --- products of a warp group: 64 rows, of which warp i of the group has 16, from row 16 i on ---

// Where a matrix is in shared memory, 16 deep, of 16-bit numbers. It consists of rows of `bytes`
// bytes, by which it is swizzled, and of groups of 8 such rows, `stride` bytes apart. If they are
// longer than the rows of the tile, the rest is `leading` bytes further on. Without swizzling, both
// steps are one where there is but one group across.
template <class T>
__device__ __forceinline__ uint64_t matrix_descriptor(Shared<T> start, int bytes, int stride,
                                                      int leading) {
#ifdef LUMINA_CUDA_HOST
  const uint32_t at = cuda_host::shared_address(start.raw());
#else
  const uint32_t at = shared_address(start);
#endif
  const uint64_t swizzle = bytes == 128 ? 1 : bytes == 64 ? 2 : bytes == 32 ? 3 : 0;
  return (at & 0x3FFFF) >> 4 | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | swizzle << 62;
}

// The descriptor of a matrix that begins `elements` numbers further on.
__device__ __forceinline__ uint64_t advance(uint64_t descriptor, int elements) {
  return descriptor + static_cast<uint64_t>(elements / 8);
}

// Before the first product, and after registers of products were written.
__device__ __forceinline__ void wgmma_fence(LUMINA_ONLY_SITE) {
#ifdef LUMINA_CUDA_HOST
  cuda_host::wgmma_fence(site);
#else
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void wgmma_commit(LUMINA_ONLY_SITE) {
#ifdef LUMINA_CUDA_HOST
  cuda_host::wgmma_commit(site);
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most the kPending latest groups of products are in flight.
template <int kPending>
__device__ __forceinline__ void wgmma_wait(LUMINA_ONLY_SITE) {
#ifdef LUMINA_CUDA_HOST
  cuda_host::wgmma_wait(kPending, site);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
#endif
}

// The compiler does not know that a product is in flight until a wait: what uses these registers
// stays behind this.
template <int kCount>
__device__ __forceinline__ void after_wait(float (&d)[kCount][4]) {
#ifndef LUMINA_CUDA_HOST
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    asm volatile("" : "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])::"memory");
  }
#endif
}

#define LUMINA_D1(i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define LUMINA_D4(i) LUMINA_D1(i), LUMINA_D1((i) + 1), LUMINA_D1((i) + 2), LUMINA_D1((i) + 3)
#define LUMINA_D8(i) LUMINA_D4(i), LUMINA_D4((i) + 4)
#define LUMINA_D16(i) LUMINA_D8(i), LUMINA_D8((i) + 8)
#define LUMINA_R4 "%0, %1, %2, %3"
#define LUMINA_R16 LUMINA_R4 ", %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define LUMINA_R32 \
  LUMINA_R16       \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define LUMINA_R64                                                                   \
  LUMINA_R32                                                                         \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define LUMINA_WGMMA_KEYS(type)                                                    \
  asm volatile(                                                                    \
      "{\n.reg .pred sum;\nsetp.ne.b32 sum, %66, 0;\n"                             \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " {" LUMINA_R64 \
      "}, %64, %65, sum, 1, 1, 0, 0;\n}"                                           \
      : LUMINA_D16(0)                                                              \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
#define LUMINA_WGMMA_VALUES(n, type, registers, operands, from_a, from_b)                         \
  asm volatile("{\n.reg .pred sum;\nsetp.ne.b32 sum, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" #n \
               "k16.f32." type "." type " {" registers "}, {" from_a "}, " from_b                 \
               ", sum, 1, 1, 1;\n}"                                                               \
               : operands                                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define LUMINA_WGMMA_WIDTHS(type)                                                               \
  if constexpr (kN == 8) {                                                                      \
    LUMINA_WGMMA_VALUES(8, type, LUMINA_R4, LUMINA_D1(kFrom), "%4, %5, %6, %7", "%8");          \
  } else if constexpr (kN == 32) {                                                              \
    LUMINA_WGMMA_VALUES(32, type, LUMINA_R16, LUMINA_D4(kFrom), "%16, %17, %18, %19", "%20");   \
  } else if constexpr (kN == 64) {                                                              \
    LUMINA_WGMMA_VALUES(64, type, LUMINA_R32, LUMINA_D8(kFrom), "%32, %33, %34, %35", "%36");   \
  } else {                                                                                      \
    LUMINA_WGMMA_VALUES(128, type, LUMINA_R64, LUMINA_D16(kFrom), "%64, %65, %66, %67", "%68"); \
  }

// d (64 x 128) = a bᵀ, or that more than before: a (64 x 16) and b (128 x 16) lie in rows of 16 of
// their tiles. Warps have fragments of d like those of ptx.cuh, d[i] for columns 8 i to 8 i + 7.
template <Dtype kDtype>
__device__ __forceinline__ void wgmma_keys(float (&d)[16][4], uint64_t a, uint64_t b,
                                           bool accumulate LUMINA_SITE) {
#ifdef LUMINA_CUDA_HOST
  cuda_host::wgmma({&d[0][0], 128, nullptr, a, b, accumulate, kDtype == Dtype::kHalf}, site);
#else
  if constexpr (kDtype == Dtype::kHalf) {
    LUMINA_WGMMA_KEYS("f16");
  } else {
    LUMINA_WGMMA_KEYS("bf16");
  }
#endif
}

// Columns 8 kFrom to 8 kFrom + kN - 1 of d += a b: fragments of a (64 x 16) as in ptx.cuh, and b
// (16 x kN), whose rows lie along those of its tile.
template <Dtype kDtype, int kN, int kFrom, int kTiles>
__device__ __forceinline__ void wgmma_values(float (&d)[kTiles][4], const uint32_t (&a)[4],
                                             uint64_t b LUMINA_SITE) {
  static_assert(kN == 8 || kN == 32 || kN == 64 || kN == 128);
  static_assert(8 * kFrom + kN <= 8 * kTiles);
#ifdef LUMINA_CUDA_HOST
  cuda_host::wgmma({&d[kFrom][0], kN, a, 0, b, true, kDtype == Dtype::kHalf}, site);
#else
  if constexpr (kDtype == Dtype::kHalf) {
    LUMINA_WGMMA_WIDTHS("f16")
  } else {
    LUMINA_WGMMA_WIDTHS("bf16")
  }
#endif
}

}  // namespace lumina_kernels::cuda
