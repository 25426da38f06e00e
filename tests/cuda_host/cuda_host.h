// CUDA device code on the host: what g++ needs to compile and run the .cuh and .cu files of csrc/.
//
// Every file is compiled with `-x c++ -DLUMINA_CUDA_HOST -include cuda_host.h`. A thread of a block
// is a fiber. It runs until a barrier or a warp collective (shuffle, vote, mma, ldmatrix) and goes
// on when all threads named there have come; every other launch runs the threads and the blocks
// backwards. What hardware would not forgive is a std::runtime_error, which names kernel, block and
// thread:
//   - a barrier or a collective that some of its threads do not reach, or not at the same line;
//   - shared memory: out of bounds, misaligned, never written, still under way (cp.async), or
//     touched by two threads with no barrier between them where one of the two writes;
//   - global memory: out of the bounds of its tensor, or misaligned.
// What Hopper adds is in hopper.h. Pointers carry their bounds: Global<T> and Shared<T> are classes
// here and T* under nvcc.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_host {

// The place of a call in the sources.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};
#define CUDA_HOST_SITE ::cuda_host::Site::here()

[[noreturn]] void fail(const std::string& what);  // adds kernel, block and thread

// Of the device, which decides how launchers divide work. Of 0, unless a test says other, every
// grid is large.
extern int multiprocessors;

// Runs body() once for every thread of the grid. `name` is the kernel as written at the launch.
void run(const char* name, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
         void* context);

void barrier(Site site);

// A collective of the lanes in `mask`. The last one to arrive calls `resolve` with what each lane
// provided, in lanes[0..31]; null for lanes outside the mask.
enum class Kind { kSyncWarp, kShuffle, kVote, kMma, kLdmatrix, kWgmma };
void collective(Kind kind, unsigned mask, void* mine, void (*resolve)(void** lanes), Site site);
unsigned lane();

// --- memory ---
void* static_shared(const void* key, size_t bytes, size_t align);
void* dynamic_shared();
size_t dynamic_shared_bytes();
void read_shared(const void* at, size_t bytes, const void* begin, const void* end, size_t align);
void write_shared(void* at, size_t bytes, const void* begin, const void* end, size_t align);
void copy_async(void* to, const void* begin, const void* end, const void* from, size_t bytes,
                size_t valid);
void copy_async_commit();
void copy_async_wait(int pending);
void count_bank_conflicts(const void* const* rows, int count);  // of 16-byte rows read at once
void count_multiply_adds(int count);  // what tensor cores could do in the time of an instruction

void check_global(const void* at, size_t bytes, const void* begin, const void* end, size_t align,
                  bool write);

template <class T>
std::string text(const T& value) {
  return std::to_string(value);
}

}  // namespace cuda_host

#include "hopper.h"
#include "pointers.h"

namespace cuda_host {

// --- warp collectives ---
template <class T>
struct Shuffle {
  T value;        // the value provided
  unsigned from;  // lane to read
  T out;
  bool valid;
};

template <class T>
T shuffle(unsigned mask, T value, unsigned from, Site site) {
  Shuffle<T> mine{value, from, value, true};
  collective(
      Kind::kShuffle, mask, &mine,
      [](void** lanes) {
        for (int i = 0; i < 32; ++i) {
          auto* self = static_cast<Shuffle<T>*>(lanes[i]);
          if (self == nullptr) continue;
          auto* other = static_cast<Shuffle<T>*>(lanes[self->from & 31]);
          self->valid = other != nullptr;
          if (self->valid) self->out = other->value;
        }
      },
      site);
  if (!mine.valid) fail("a shuffle reads lane " + text(from) + ", which is not in its mask");
  return mine.out;
}

unsigned vote(unsigned mask, bool predicate, Site site);

}  // namespace cuda_host

// --- what CUDA calls them ---
inline void __syncthreads(cuda_host::Site site = CUDA_HOST_SITE) { cuda_host::barrier(site); }
inline void __syncwarp(unsigned mask = ~0u, cuda_host::Site site = CUDA_HOST_SITE) {
  cuda_host::collective(cuda_host::Kind::kSyncWarp, mask, &mask, [](void**) {}, site);
}

// A lane that would read outside its segment of `width` lanes reads itself, as in hardware.
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32,
              cuda_host::Site site = CUDA_HOST_SITE) {
  const unsigned lane = cuda_host::lane();
  return cuda_host::shuffle(mask, v, (lane & ~(width - 1)) | (source & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32,
                  cuda_host::Site site = CUDA_HOST_SITE) {
  const unsigned lane = cuda_host::lane(), from = lane ^ bits;
  return cuda_host::shuffle(mask, v, from > (lane | (width - 1)) ? lane : from, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32,
                   cuda_host::Site site = CUDA_HOST_SITE) {
  const unsigned lane = cuda_host::lane(), from = lane + delta;
  return cuda_host::shuffle(mask, v, from > (lane | (width - 1)) ? lane : from, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32,
                 cuda_host::Site site = CUDA_HOST_SITE) {
  const unsigned lane = cuda_host::lane(), in_segment = lane & (width - 1);
  return cuda_host::shuffle(mask, v, in_segment < delta ? lane : lane - delta, site);
}
inline unsigned __ballot_sync(unsigned mask, bool p, cuda_host::Site site = CUDA_HOST_SITE) {
  return cuda_host::vote(mask, p, site);
}
inline int __any_sync(unsigned mask, bool p, cuda_host::Site site = CUDA_HOST_SITE) {
  return cuda_host::vote(mask, p, site) != 0;
}
inline int __all_sync(unsigned mask, bool p, cuda_host::Site site = CUDA_HOST_SITE) {
  return cuda_host::vote(mask, p, site) == mask;
}

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __float_as_uint(float x) {
  unsigned u;
  std::memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }
inline float __int_as_float(int i) { return __uint_as_float(static_cast<unsigned>(i)); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(unsigned x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
