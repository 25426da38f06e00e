// CUDA kernels of swiglu: elementwise over rows that may have gaps between them.
#pragma once

#include "cuda/lib/flat.cuh"

namespace lumina_kernels::cuda {

// `rows` rows of F values in each tensor; a `step` is the distance of two rows, in elements.
struct SwigluFwdParams {
  Values a, b, out;
  int64_t a_step, b_step;
  int64_t rows, F;
};

struct SwigluBwdParams {
  Values dout, a, b, da, db;
  int64_t dout_step, a_step, b_step;
  int64_t rows, F;
};

// out = a / (1 + exp(-a)) * b
__global__ void __launch_bounds__(kFlatThreads) swiglu_fwd_kernel(const SwigluFwdParams p) {
  for_flat_rows(p.rows, p.F, [&](int64_t row, const auto& column, const auto& count) {
    Bits8 a_bits[kFlatPieces], b_bits[kFlatPieces];
    load_flat(p.a, row * p.a_step, column, count, a_bits);
    load_flat(p.b, row * p.b_step, column, count, b_bits);
#pragma unroll
    for (int j = 0; j < kFlatPieces; ++j) {
      const Float8 a = to_float8(a_bits[j], p.a.dtype), b = to_float8(b_bits[j], p.b.dtype);
      store8_branching(p.out, row * p.F + column[j], count[j], by_column([&](int k) {
                         return a[k] * sigmoid_of(exp_approx(-a[k])) * b[k];
                       }));
    }
  });
}

// With s = 1 / (1 + exp(-a)): da = dout * b * s * (1 + a * (1 - s)),  db = dout * a * s
__global__ void __launch_bounds__(kFlatThreads) swiglu_bwd_kernel(const SwigluBwdParams p) {
  for_flat_rows(p.rows, p.F, [&](int64_t row, const auto& column, const auto& count) {
    Bits8 dout_bits[kFlatPieces], a_bits[kFlatPieces], b_bits[kFlatPieces];
    load_flat(p.dout, row * p.dout_step, column, count, dout_bits);
    load_flat(p.a, row * p.a_step, column, count, a_bits);
    load_flat(p.b, row * p.b_step, column, count, b_bits);
#pragma unroll
    for (int j = 0; j < kFlatPieces; ++j) {
      const Float8 dout = to_float8(dout_bits[j], p.dout.dtype);
      const Float8 a = to_float8(a_bits[j], p.a.dtype), b = to_float8(b_bits[j], p.b.dtype);
      Float8 da, db;
#pragma unroll
      for (int k = 0; k < 8; ++k) {  // in one loop: Float8's operators take 7 more registers
        const float s = sigmoid_of(exp_approx(-a[k]));
        da[k] = dout[k] * b[k] * (s * (1.0f + a[k] * (1.0f - s)));
        db[k] = dout[k] * (a[k] * s);
      }
      store8_branching(p.da, row * p.F + column[j], count[j], da);
      store8_branching(p.db, row * p.F + column[j], count[j], db);
    }
  });
}

}  // namespace lumina_kernels::cuda
