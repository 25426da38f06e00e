// The modulated norm y = (n * weight + bias) * (1 + scale) + shift, n = norm(x), as the kernels of
// three ops have it.
#pragma once

#include "cuda/lib/rows.cuh"

namespace lumina_kernels::cuda {

// Each may be missing. Gradients of scale and shift: see `modulate_bwd`.
struct ModulationView {
  RowsView weight, bias, scale, shift;
};

// f(k, parameter) for the columns of a piece, where the parameter is there.
template <class F>
__device__ __forceinline__ void with_parameter(const RowsView& parameter, int64_t b, int64_t l,
                                               int column, int D, F f) {
  if (!is_there(parameter)) return;
  float p[8];
  load8(parameter.values, parameter.row(b, l) + column, D - column, p);
#pragma unroll
  for (int k = 0; k < 8; ++k) f(k, p[k]);
}

// n becomes y in the span at `base` of row l of sample b.
template <int kPieces>
__device__ __forceinline__ void modulate(const ModulationView& m, int64_t b, int64_t l, int base,
                                         int D, float (&n)[kPieces][8]) {
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const int column = column_of(base, j);
    with_parameter(m.weight, b, l, column, D, [&](int k, float p) { n[j][k] *= p; });
    with_parameter(m.bias, b, l, column, D, [&](int k, float p) { n[j][k] += p; });
    with_parameter(m.scale, b, l, column, D, [&](int k, float p) { n[j][k] *= 1.0f + p; });
    with_parameter(m.shift, b, l, column, D, [&](int k, float p) { n[j][k] += p; });
  }
}

// d, the gradient of y, becomes that of n; the sums over rows get f * d * n and f * d.
//
// f is 1 + scale where `scale` has a row per token: then its gradient d * (n * weight + bias) is
// written to `dscale`, row `token`. Else f is 1, and the second stage knows scale.
template <int kPieces>
__device__ __forceinline__ void modulate_bwd(const ModulationView& m, const Values& dscale,
                                             int64_t b, int64_t l, int64_t token, int base, int D,
                                             const float (&n)[kPieces][8], float (&d)[kPieces][8],
                                             float (&dn_sum)[kPieces][8],
                                             float (&d_sum)[kPieces][8]) {
  const bool per_token = is_there(dscale);
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const int column = column_of(base, j);
    const auto scale = [&](int k, float p) { d[j][k] *= 1.0f + p; };
    if (per_token) {
      float y[8];
      for (int k = 0; k < 8; ++k) y[k] = n[j][k];
      with_parameter(m.weight, b, l, column, D, [&](int k, float p) { y[k] *= p; });
      with_parameter(m.bias, b, l, column, D, [&](int k, float p) { y[k] += p; });
      for (int k = 0; k < 8; ++k) y[k] *= d[j][k];
      store8(dscale, token * D + column, D - column, y);
      with_parameter(m.scale, b, l, column, D, scale);
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      dn_sum[j][k] += d[j][k] * n[j][k];
      d_sum[j][k] += d[j][k];
    }
    if (!per_token) with_parameter(m.scale, b, l, column, D, scale);
    with_parameter(m.weight, b, l, column, D, [&](int k, float p) { d[j][k] *= p; });
  }
}

}  // namespace lumina_kernels::cuda
