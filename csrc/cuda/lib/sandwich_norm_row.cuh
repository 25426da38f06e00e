// The gated residual of a normalised row, as the kernels of two ops have it.
#pragma once

#include "cuda/lib/modulation.cuh"

namespace lumina_kernels::cuda {

struct Sandwich {
  RowsView residual, weight, gate;
};

// n becomes residual + tanh(gate) * n * weight in the span at `base` of row l of sample b.
template <int kPieces>
__device__ __forceinline__ void sandwich(const Sandwich& s, int64_t b, int64_t l, int base, int D,
                                         float (&n)[kPieces][8]) {
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const int column = column_of(base, j);
    with_parameter(s.weight, b, l, column, D, [&](int k, float p) { n[j][k] *= p; });
    with_parameter(s.gate, b, l, column, D, [&](int k, float p) { n[j][k] *= tanhf(p); });
    with_parameter(s.residual, b, l, column, D, [&](int k, float p) { n[j][k] += p; });
  }
}

// d, the gradient of the output, becomes that of n; the sum over rows gets f * d * n.
//
// f is tanh(gate) where `gate` has a row per token: then its gradient (1 - tanh²) * d * n * weight
// is written to `dgate`, row `token`. Else f is 1, and the second stage knows the gate.
template <int kPieces>
__device__ __forceinline__ void sandwich_bwd(const Sandwich& s, const Values& dgate, int64_t b,
                                             int64_t l, int64_t token, int base, int D,
                                             const float (&n)[kPieces][8], float (&d)[kPieces][8],
                                             float (&gate_sum)[kPieces][8]) {
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const int column = column_of(base, j);
    float g[8];
    with_parameter(s.gate, b, l, column, D, [&](int k, float p) { g[k] = tanhf(p); });
    if (is_there(dgate)) {
      float dg[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        dg[k] = (1.0f - g[k] * g[k]) * d[j][k] * n[j][k];
        gate_sum[j][k] += g[k] * d[j][k] * n[j][k];
      }
      with_parameter(s.weight, b, l, column, D, [&](int k, float p) { dg[k] *= p; });
      store8(dgate, token * D + column, D - column, dg);
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k) gate_sum[j][k] += d[j][k] * n[j][k];
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) d[j][k] *= g[k];
    with_parameter(s.weight, b, l, column, D, [&](int k, float p) { d[j][k] *= p; });
  }
}

}  // namespace lumina_kernels::cuda
