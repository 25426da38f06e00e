// CUDA kernels of swiglu: elementwise over rows that may have gaps between them.
#pragma once

#include "cuda/lib/float8.cuh"

namespace lumina_kernels::cuda {

constexpr int kSwigluThreads = 256;

// `rows` rows of F values in each tensor; `step` is from row to row, in elements.
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

// A thread has 8 columns of a row.
inline LaunchConfig swiglu_config(int64_t rows, int64_t F) {
  const int64_t blocks = ceil_div(rows * ceil_div(F, 8), kSwigluThreads);
  return {dim3(static_cast<unsigned>(blocks)), dim3(kSwigluThreads)};
}

// Row and first column of this thread; a row >= rows where it has nothing to do.
__device__ __forceinline__ void swiglu_place(int64_t rows, int64_t F, int64_t& row,
                                             int64_t& column) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSwigluThreads + threadIdx.x;
  const int64_t pieces = ceil_div(F, 8);
  row = rows == 1 ? (i < pieces ? 0 : 1) : divide(i, pieces);
  column = (i - row * pieces) * 8;
}

// out = a / (1 + exp(-a)) * b
__global__ void __launch_bounds__(kSwigluThreads) swiglu_fwd_kernel(const SwigluFwdParams p) {
  int64_t row, column;
  swiglu_place(p.rows, p.F, row, column);
  if (row >= p.rows) return;
  const int count = static_cast<int>(min(p.F - column, int64_t{8}));
  const Float8 a = load8(p.a, row * p.a_step + column, count);
  const Float8 b = load8(p.b, row * p.b_step + column, count);
  store8(p.out, row * p.F + column, count,
         by_column([&](int k) { return a[k] / (1.0f + expf(-a[k])) * b[k]; }));
}

// With s = 1 / (1 + exp(-a)): da = dout * b * s * (1 + a * (1 - s)),  db = dout * a * s
__global__ void __launch_bounds__(kSwigluThreads) swiglu_bwd_kernel(const SwigluBwdParams p) {
  int64_t row, column;
  swiglu_place(p.rows, p.F, row, column);
  if (row >= p.rows) return;
  const int count = static_cast<int>(min(p.F - column, int64_t{8}));
  const Float8 dout = load8(p.dout, row * p.dout_step + column, count);
  const Float8 a = load8(p.a, row * p.a_step + column, count);
  const Float8 b = load8(p.b, row * p.b_step + column, count);
  const Float8 s = by_column([&](int k) { return 1.0f / (1.0f + expf(-a[k])); });
  store8(p.da, row * p.F + column, count, dout * b * (s * (1.0f + a * (1.0f - s))));
  store8(p.db, row * p.F + column, count, dout * (a * s));
}

}  // namespace lumina_kernels::cuda
