// What a thread of most kernels works on: 8 neighbouring columns in float32, 16 bytes of a 16-bit
// tensor.
#pragma once

#include "cuda/lib/ptx.cuh"

namespace lumina_kernels::cuda {

// Loops over its columns are unrolled, so that they stay in registers.
struct Float8 {
  float columns[8];

  __device__ __forceinline__ float& operator[](int k) { return columns[k]; }
  __device__ __forceinline__ const float& operator[](int k) const { return columns[k]; }
};

// f(k) for every column.
template <class F>
__device__ __forceinline__ Float8 by_column(F f) {
  Float8 result;
#pragma unroll
  for (int k = 0; k < 8; ++k) result[k] = f(k);
  return result;
}

// --- arithmetic, column by column ---

__device__ __forceinline__ Float8 operator+(const Float8& a, const Float8& b) {
  return by_column([&](int k) { return a[k] + b[k]; });
}
__device__ __forceinline__ Float8 operator-(const Float8& a, const Float8& b) {
  return by_column([&](int k) { return a[k] - b[k]; });
}
__device__ __forceinline__ Float8 operator*(const Float8& a, const Float8& b) {
  return by_column([&](int k) { return a[k] * b[k]; });
}
__device__ __forceinline__ Float8 operator+(float a, const Float8& b) {
  return by_column([&](int k) { return a + b[k]; });
}
__device__ __forceinline__ Float8 operator-(float a, const Float8& b) {
  return by_column([&](int k) { return a - b[k]; });
}
__device__ __forceinline__ Float8 operator-(const Float8& a, float b) {
  return by_column([&](int k) { return a[k] - b; });
}
__device__ __forceinline__ Float8 operator*(const Float8& a, float b) {
  return by_column([&](int k) { return a[k] * b; });
}
__device__ __forceinline__ Float8 operator*(float a, const Float8& b) {
  return by_column([&](int k) { return a * b[k]; });
}
template <class T>
__device__ __forceinline__ void operator+=(Float8& a, const T& b) {
  a = a + b;
}
template <class T>
__device__ __forceinline__ void operator*=(Float8& a, const T& b) {
  a = a * b;
}

// tanh to 2 units in the last place, without a branch. Where 1 - 2 / (exp(2x) + 1) would lose the
// digits of a small x, a polynomial; its largest relative error is 0.6 * 2^-24 before rounding.
__device__ __forceinline__ float tanh_of(float x) {
  const float square = x * x, size = fabsf(x);
  float poly = 0.0164309926f * square - 0.0526684485f;
  poly = poly * square + 0.13320674f;
  poly = poly * square - 0.333329439f;
  const float small = x + x * square * poly;
  const float large = 1.0f - 2.0f * reciprocal_approx(exp2_approx(2.88539008f * size) + 1.0f);
  return size < 0.55f ? small : copysignf(large, x);
}

__device__ __forceinline__ Float8 tanh(const Float8& x) {
  return by_column([&](int k) { return tanh_of(x[k]); });
}

// total += the columns of x, one after another.
__device__ __forceinline__ void add_columns(float& total, const Float8& x) {
#pragma unroll
  for (int k = 0; k < 8; ++k) total += x[k];
}

// total += the columns of a * b, one after another.
__device__ __forceinline__ void add_products(float& total, const Float8& a, const Float8& b) {
#pragma unroll
  for (int k = 0; k < 8; ++k) total += a[k] * b[k];
}

// --- memory ---

// 8 columns of 16 bits, of which the first `count` exist; the others are 0.
__device__ __forceinline__ uint4 load_shorts8(Global<unsigned char> from, bool vector, int count) {
  if (vector) return load_global<uint4>(from);
  const auto load = [&](int k) -> uint32_t {
    return k < count ? load_global<unsigned short>(from + 2 * k) : 0;
  };
  return make_uint4(load(0) | load(1) << 16, load(2) | load(3) << 16, load(4) | load(5) << 16,
                    load(6) | load(7) << 16);
}

__device__ __forceinline__ Float8 unpack8(const uint4& bits, Dtype dtype) {
  Float8 out;
  unpack2(bits.x, dtype, out[0], out[1]);
  unpack2(bits.y, dtype, out[2], out[3]);
  unpack2(bits.z, dtype, out[4], out[5]);
  unpack2(bits.w, dtype, out[6], out[7]);
  return out;
}

// Elements i to i + 7, of which the first `count` exist, any number; the others read as 0. i is a
// multiple of 8 from the start of a row.
//
// In two steps: a conversion waits for its load, and with it what follows in the code, so that a
// kernel with several loads asks for all bits before it converts any.
struct Bits8 {
  uint4 first, second;  // `second` has no value if the dtype has 16 bits
};

__device__ __forceinline__ Bits8 load_bits8(const Values& x, int64_t i, int count) {
  Bits8 bits;
  const bool vector = x.vectors && count >= 8;
  if (x.dtype != Dtype::kFloat) {
    bits.first = load_shorts8(x.data + 2 * i, vector, count);
    return bits;
  }
  const auto from = x.data + 4 * i;
  if (vector) return {load_global<uint4>(from), load_global<uint4>(from + 16)};
  const auto load = [&](int k) -> uint32_t {
    return k < count ? load_global<unsigned>(from + 4 * k) : 0;
  };
  return {make_uint4(load(0), load(1), load(2), load(3)),
          make_uint4(load(4), load(5), load(6), load(7))};
}

__device__ __forceinline__ Float8 to_float8(const Bits8& bits, Dtype dtype) {
  // In this order bfloat16 takes a branch of its own; otherwise its 8 instructions and the 8 of
  // float16 are all issued, under predicates.
  if (dtype == Dtype::kBFloat16) return unpack8(bits.first, Dtype::kBFloat16);
  if (dtype == Dtype::kHalf) return unpack8(bits.first, Dtype::kHalf);
  const uint4 &a = bits.first, &b = bits.second;
  return {{__uint_as_float(a.x), __uint_as_float(a.y), __uint_as_float(a.z), __uint_as_float(a.w),
           __uint_as_float(b.x), __uint_as_float(b.y), __uint_as_float(b.z), __uint_as_float(b.w)}};
}

// Both steps at once, for kernels that are short of registers: it takes 4 fewer for a moment, and 8
// instructions more.
__device__ __forceinline__ void load8(const Values& x, int64_t i, int count, Float8& out) {
  const bool vector = x.vectors && count >= 8;
  if (x.dtype == Dtype::kFloat) {
    out = to_float8(load_bits8({x.data, Dtype::kFloat, x.vectors}, i, count), Dtype::kFloat);
  } else {
    out = unpack8(load_shorts8(x.data + 2 * i, vector, count), x.dtype);
  }
}

__device__ __forceinline__ Float8 load8(const Values& x, int64_t i, int count) {
  Float8 out;
  load8(x, i, count, out);
  return out;
}

__device__ __forceinline__ void load8(const Values& x, int64_t i, int count, Bits8& out) {
  out = load_bits8(x, i, count);
}

__device__ __forceinline__ uint4 pack8(const Float8& in, Dtype dtype) {
  return make_uint4(pack2(in[0], in[1], dtype), pack2(in[2], in[3], dtype),
                    pack2(in[4], in[5], dtype), pack2(in[6], in[7], dtype));
}

__device__ __forceinline__ void store_shorts8(Global<unsigned char> to, bool vector, int count,
                                              const uint4& bits) {
  if (vector) return store_global(to, bits);
  const auto store = [&](int k, uint32_t value) {
    if (k < count) store_global(to + 2 * k, static_cast<uint16_t>(value));
  };
  store(0, bits.x), store(1, bits.x >> 16), store(2, bits.y), store(3, bits.y >> 16);
  store(4, bits.z), store(5, bits.z >> 16), store(6, bits.w), store(7, bits.w >> 16);
}

// The first `count` columns go to memory, the others leave it untouched.
__device__ __forceinline__ void store8(const Values& x, int64_t i, int count, const Float8& in) {
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
  store_shorts8(x.data + 2 * i, vector, count, pack8(in, x.dtype));
}

// The same with a branch for each dtype, so that the conversion of one is issued and not of both,
// under predicates. Kernels of whole rows run out of registers with it.
__device__ __forceinline__ void store8_branching(const Values& x, int64_t i, int count,
                                                 const Float8& in) {
  if (x.dtype == Dtype::kBFloat16) {
    store8({x.data, Dtype::kBFloat16, x.vectors}, i, count, in);
  } else if (x.dtype == Dtype::kHalf) {
    store8({x.data, Dtype::kHalf, x.vectors}, i, count, in);
  } else {
    store8({x.data, Dtype::kFloat, x.vectors}, i, count, in);
  }
}

}  // namespace lumina_kernels::cuda
