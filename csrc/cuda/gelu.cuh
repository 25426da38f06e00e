// CUDA kernels of gelu: elementwise over rows that may have gaps between them.
#pragma once

#include "cuda/lib/flat.cuh"

namespace lumina_kernels::cuda {

// `rows` rows of F values in each tensor; a `step` is the distance of two rows, in elements.
struct GeluFwdParams {
  Values x, out;
  int64_t x_step;
  int64_t rows, F;
};

struct GeluBwdParams {
  Values dout, x, dx;
  int64_t dout_step, x_step;
  int64_t rows, F;
};

// gelu(x) is x times `value`, of which `slope` is the derivative.
struct GeluGate {
  float value, slope;
};

template <bool kTanh>
__device__ __forceinline__ GeluGate gelu_gate(float x) {
  const float square = x * x;
  if (!kTanh) {
    return {0.5f * (1.0f + erff(x * 0.707106781f)), 0.398942280f * exp_approx(-0.5f * square)};
  }
  // (1 + tanh(z)) / 2 = 1 / (1 + exp(-2z)), and that of -z is exp(-2z) times as much.
  const float e = exp_approx(-fabsf(x) * (1.59576912f + 0.0713548163f * square));
  const float most = sigmoid_of(e);
  // Beyond 100 the slope is 0, of which an infinite square would make NaN.
  const float steep = 1.59576912f + 0.214064449f * fminf(square, 1e4f);
  return {x < 0.0f ? e * most : most, e * most * most * steep};
}

// out = x * gate(x)
template <bool kTanh>
__global__ void __launch_bounds__(kFlatThreads, 5) gelu_fwd_kernel(const GeluFwdParams p) {
  for_flat_rows(p.rows, p.F, [&](int64_t row, const auto& column, const auto& count) {
    Bits8 bits[kFlatPieces];
    load_flat(p.x, row * p.x_step, column, count, bits);
#pragma unroll
    for (int j = 0; j < kFlatPieces; ++j) {
      const Float8 x = to_float8(bits[j], p.x.dtype);
      store8_branching(p.out, row * p.F + column[j], count[j],
                       by_column([&](int k) { return x[k] * gelu_gate<kTanh>(x[k]).value; }));
    }
  });
}

// dx = dout * (gate(x) + x * gate'(x))
template <bool kTanh>
__global__ void __launch_bounds__(kFlatThreads) gelu_bwd_kernel(const GeluBwdParams p) {
  for_flat_rows(p.rows, p.F, [&](int64_t row, const auto& column, const auto& count) {
    Bits8 dout_bits[kFlatPieces], x_bits[kFlatPieces];
    load_flat(p.dout, row * p.dout_step, column, count, dout_bits);
    load_flat(p.x, row * p.x_step, column, count, x_bits);
#pragma unroll
    for (int j = 0; j < kFlatPieces; ++j) {
      const Float8 dout = to_float8(dout_bits[j], p.dout.dtype);
      const Float8 x = to_float8(x_bits[j], p.x.dtype);
      store8_branching(p.dx, row * p.F + column[j], count[j], by_column([&](int k) {
                         const GeluGate gate = gelu_gate<kTanh>(x[k]);
                         return dout[k] * (gate.value + x[k] * gate.slope);
                       }));
    }
  });
}

}  // namespace lumina_kernels::cuda
