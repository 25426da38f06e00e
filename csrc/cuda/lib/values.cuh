// Shared by all CUDA kernels: pointers, and values of any dtype.
//
// A .cuh holds device code and launch configurations, without torch and <<<>>>; its .cu holds the
// launchers (launch.h). Both are also compiled for the host and run there, with checks of bounds,
// alignment, barriers and shared memory (tests/cuda_host). This is why
//   - memory is reached through Global<T> and Shared<T>, which are T* under nvcc. Plain p[i] and
//     p + i work; wider accesses go through load_global, store_global, load_shared, store_shared;
//   - `auto` must not hold a shared[i]: write its type out;
//   - shared memory is declared by LUMINA_SHARED or LUMINA_DYNAMIC_SHARED;
//   - instructions in assembly are in ptx.cuh and ptx_hopper.cuh alone.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dtype.h"

#ifdef LUMINA_CUDA_HOST
#define LUMINA_SHARED(T, name, count) \
  static const char name##_key = 0;   \
  const Shared<T> name = cuda_host::shared_array<T>(&name##_key, (count))
#define LUMINA_DYNAMIC_SHARED(T, name) const Shared<T> name = cuda_host::shared_dynamic<T>()
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <class T>
using Global = T*;
template <class T>
using Shared = T*;

// Arrays of a block, aligned to 16 bytes; a kernel has at most one dynamic one.
#define LUMINA_SHARED(T, name, count) __shared__ __align__(16) T name[count]
#define LUMINA_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char lumina_dynamic_shared[]; \
  const Shared<T> name = reinterpret_cast<T*>(lumina_dynamic_shared)
#endif

namespace lumina_kernels::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

struct LaunchConfig {
  dim3 grid, block;
  size_t shared_bytes = 0;  // dynamic
};

// n / d for numbers >= 0, in 32 bits if they fit: a 64-bit division costs as much as the rest of a
// small kernel.
__device__ __forceinline__ int64_t divide(int64_t n, int64_t d) {
  return (n | d) >> 32 == 0 ? static_cast<uint32_t>(n) / static_cast<uint32_t>(d) : n / d;
}

// The same number, but the compiler no longer knows its origin. Otherwise it would move everything
// that follows from it, such as the addresses of six tensors, out of a loop over rows, and run out
// of registers.
__device__ __forceinline__ int opaque(int number) {
#ifndef LUMINA_CUDA_HOST
  asm volatile("" : "+r"(number));
#endif
  return number;
}

__device__ __forceinline__ int64_t opaque(int64_t number) {
#ifndef LUMINA_CUDA_HOST
  asm volatile("" : "+l"(number));
#endif
  return number;
}

// --- accesses of sizeof(V) bytes, aligned to that ---

// Not __ldg: the compiler may move its loads out of a loop over rows, and then spills registers.
template <class V, class T>
__device__ __forceinline__ V load_global(Global<T> p) {
#ifdef LUMINA_CUDA_HOST
  return p.template read<V>();
#else
  return *reinterpret_cast<const V*>(p);
#endif
}

template <class V, class T>
__device__ __forceinline__ void store_global(Global<T> p, const V& value) {
#ifdef LUMINA_CUDA_HOST
  p.template write<V>(value);
#else
  *reinterpret_cast<V*>(p) = value;
#endif
}

template <class V, class T>
__device__ __forceinline__ V load_shared(Shared<T> p) {
#ifdef LUMINA_CUDA_HOST
  return p.template read<V>();
#else
  return *reinterpret_cast<const V*>(p);
#endif
}

template <class V, class T>
__device__ __forceinline__ void store_shared(Shared<T> p, const V& value) {
#ifdef LUMINA_CUDA_HOST
  p.template write<V>(value);
#else
  *reinterpret_cast<V*>(p) = value;
#endif
}

// The same address as a pointer to another type.
template <class U, class T>
__device__ __forceinline__ Shared<U> as_shared(Shared<T> p) {
#ifdef LUMINA_CUDA_HOST
  return {(U*)p.raw(), p.begin(), p.end()};
#else
  return (U*)p;
#endif
}

// --- 16-bit numbers, as their bits; rounding is to nearest even ---

__device__ __forceinline__ float half_to_float(uint16_t bits) {
#ifdef LUMINA_CUDA_HOST
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return value;
#else
  return __half2float(__ushort_as_half(bits));
#endif
}

__device__ __forceinline__ uint16_t float_to_half(float value) {
#ifdef LUMINA_CUDA_HOST
  const _Float16 rounded = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
#else
  return __half_as_ushort(__float2half_rn(value));
#endif
}

__device__ __forceinline__ float bfloat16_to_float(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}

__device__ __forceinline__ uint16_t float_to_bfloat16(float value) {
#ifdef LUMINA_CUDA_HOST
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
#else
  return __bfloat16_as_ushort(__float2bfloat16_rn(value));
#endif
}

// Packs two values in a register, `low` in the lower half.
__device__ __forceinline__ uint32_t pack_half(float low, float high) {
#ifdef LUMINA_CUDA_HOST
  return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
#else
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
#endif
}

__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
#ifdef LUMINA_CUDA_HOST
  return float_to_bfloat16(low) | static_cast<uint32_t>(float_to_bfloat16(high)) << 16;
#else
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
#endif
}

// --- values of any dtype ---

// Values of one tensor; `data` is null if an optional tensor is missing.
struct Values {
  Global<unsigned char> data;
  Dtype dtype;
  bool vectors;  // every row starts at a multiple of 16 bytes, so that 8 columns are aligned
};

// Rows of D values without gaps: row l of sample b starts at element b * step_b + l * step_l.
// One row per sample (B, D) has step_l = 0, one row for all (D,) has step_b = 0 too.
struct RowsView {
  Values values;
  int64_t step_b, step_l;
  bool per_token;  // (B, L, D): a row of its own for every l

  __device__ __forceinline__ int64_t row(int64_t b, int64_t l) const {
    return b * step_b + l * step_l;
  }
};

__device__ __forceinline__ bool is_there(const Values& x) { return x.data != nullptr; }
__device__ __forceinline__ bool is_there(const RowsView& x) { return x.values.data != nullptr; }

__device__ __forceinline__ float load1(const Values& x, int64_t i) {
  if (x.dtype == Dtype::kFloat) return load_global<float>(x.data + 4 * i);
  const uint16_t bits = load_global<unsigned short>(x.data + 2 * i);
  return x.dtype == Dtype::kHalf ? half_to_float(bits) : bfloat16_to_float(bits);
}

__device__ __forceinline__ void store1(const Values& x, int64_t i, float value) {
  if (x.dtype == Dtype::kFloat) {
    store_global(x.data + 4 * i, value);
  } else {
    store_global(x.data + 2 * i,
                 x.dtype == Dtype::kHalf ? float_to_half(value) : float_to_bfloat16(value));
  }
}

__device__ __forceinline__ void unpack2(uint32_t bits, Dtype dtype, float& low, float& high) {
  if (dtype == Dtype::kHalf) {
    low = half_to_float(static_cast<uint16_t>(bits));
    high = half_to_float(static_cast<uint16_t>(bits >> 16));
  } else {
    low = __uint_as_float(bits << 16);
    high = __uint_as_float(bits & 0xFFFF0000u);
  }
}

__device__ __forceinline__ uint32_t pack2(float low, float high, Dtype dtype) {
  return dtype == Dtype::kHalf ? pack_half(low, high) : pack_bfloat16(low, high);
}

// --- sums in a fixed order ---

// The sum over the lanes of a warp, for every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(kAllLanes, x, bits);
  return x;
}

// The sums over the lanes of a warp of C values, a power of two, in half the instructions of as
// many warp_sums: a lane gets the sum of value lane / (32 / C).
template <int C>
__device__ __forceinline__ float warp_sums(float (&x)[C], int lane) {
  int bits = 16;
#pragma unroll
  for (int half = C / 2; half > 0; half /= 2, bits /= 2) {
    const bool upper = (lane & bits) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = upper ? x[i] : x[i + half];
      x[i] = (upper ? x[i + half] : x[i]) + __shfl_xor_sync(kAllLanes, sent, bits);
    }
  }
#pragma unroll
  for (; bits > 0; bits /= 2) x[0] += __shfl_xor_sync(kAllLanes, x[0], bits);
  return x[0];
}

}  // namespace lumina_kernels::cuda
