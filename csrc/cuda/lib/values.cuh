// What every CUDA kernel shares: pointers, dtypes as data, loads and stores of 8 values, sums.
//
// A .cuh holds device code and launch configurations, no torch and no <<<>>>; its .cu holds the
// launchers (launch.h). Both are also compiled for the host and run there, with bounds, alignment,
// barriers and shared memory checked (tests/cuda_host). For that
//   - memory is reached through Global<T> and Shared<T>, which are T* under nvcc. Plain p[i] and
//     p + i work; wider accesses go through load_global, store_global, load_shared, store_shared;
//   - `auto` must not hold a shared[i]: write its type out;
//   - shared memory is declared by LUMINA_SHARED or LUMINA_DYNAMIC_SHARED;
//   - instructions in assembly are in ptx.cuh alone.
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

// Arrays of the block, 16-byte aligned; at most one dynamic one in a kernel.
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

// n / d of numbers >= 0; 64-bit division costs as much as the rest of a small kernel.
__device__ __forceinline__ int64_t divide(int64_t n, int64_t d) {
  return (n | d) >> 32 == 0 ? static_cast<uint32_t>(n) / static_cast<uint32_t>(d) : n / d;
}

// --- accesses of sizeof(V) bytes, aligned to that ---

// Not __ldg: what that loads may be moved out of a loop over rows, and then spills.
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

// The same place as pointer to another type.
template <class U, class T>
__device__ __forceinline__ Global<U> as_global(Global<T> p) {
#ifdef LUMINA_CUDA_HOST
  return {(U*)p.raw(), p.begin(), p.end()};
#else
  return (U*)p;
#endif
}

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

// Two values in a register, `low` in the lower half.
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

// Values of one tensor; `data` is null where an optional tensor is not there.
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

// A thread holds 8 columns that follow each other: 16 bytes in 16 bits. Elements i to i + 7 of
// which the first `count` are there (any number; the others are 0 and stay untouched). i is a
// multiple of 8 from the start of a row.
__device__ __forceinline__ void load8(const Values& x, int64_t i, int count, float (&out)[8]) {
  const bool vector = x.vectors && count >= 8;
  if (x.dtype == Dtype::kFloat) {
    const auto from = x.data + 4 * i;
    if (vector) {
      const float4 lo = load_global<float4>(from), hi = load_global<float4>(from + 16);
      out[0] = lo.x, out[1] = lo.y, out[2] = lo.z, out[3] = lo.w;
      out[4] = hi.x, out[5] = hi.y, out[6] = hi.z, out[7] = hi.w;
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k) out[k] = k < count ? load_global<float>(from + 4 * k) : 0.0f;
    }
    return;
  }
  const auto from = x.data + 2 * i;
  uint4 bits = make_uint4(0, 0, 0, 0);
  if (vector) {
    bits = load_global<uint4>(from);
  } else {
    const auto load = [&](int k) -> uint32_t {
      return k < count ? load_global<unsigned short>(from + 2 * k) : 0;
    };
    bits = make_uint4(load(0) | load(1) << 16, load(2) | load(3) << 16, load(4) | load(5) << 16,
                      load(6) | load(7) << 16);
  }
  unpack2(bits.x, x.dtype, out[0], out[1]);
  unpack2(bits.y, x.dtype, out[2], out[3]);
  unpack2(bits.z, x.dtype, out[4], out[5]);
  unpack2(bits.w, x.dtype, out[6], out[7]);
}

__device__ __forceinline__ void store8(const Values& x, int64_t i, int count,
                                       const float (&in)[8]) {
  const bool vector = x.vectors && count >= 8;
  if (x.dtype == Dtype::kFloat) {
    const auto to = x.data + 4 * i;
    if (vector) {
      store_global(to, make_float4(in[0], in[1], in[2], in[3]));
      store_global(to + 16, make_float4(in[4], in[5], in[6], in[7]));
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        if (k < count) store_global(to + 4 * k, in[k]);
      }
    }
    return;
  }
  const auto to = x.data + 2 * i;
  const uint4 bits = make_uint4(pack2(in[0], in[1], x.dtype), pack2(in[2], in[3], x.dtype),
                                pack2(in[4], in[5], x.dtype), pack2(in[6], in[7], x.dtype));
  if (vector) {
    store_global(to, bits);
  } else {
    const auto store = [&](int k, uint32_t value) {
      if (k < count) store_global(to + 2 * k, static_cast<uint16_t>(value));
    };
    store(0, bits.x), store(1, bits.x >> 16), store(2, bits.y), store(3, bits.y >> 16);
    store(4, bits.z), store(5, bits.z >> 16), store(6, bits.w), store(7, bits.w >> 16);
  }
}

// --- sums in a fixed order ---

// Over the lanes of a warp, in every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int bits = 16; bits > 0; bits /= 2) x += __shfl_xor_sync(kAllLanes, x, bits);
  return x;
}

}  // namespace lumina_kernels::cuda
