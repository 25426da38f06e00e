// The gated residual of a normalised row, residual + tanh(gate) * n * weight, shared by two ops.
#pragma once

#include "cuda/lib/modulation.cuh"

namespace lumina_kernels::cuda {

// The weight may be missing. With kTanh there is a gate; without, it is used as it is and may be
// missing. (As a flag of the launch it took the backward up to 10 registers more.)
struct Sandwich {
  RowsView residual, weight, gate;
};

struct SandwichAhead {
  uint4 residual, weight, gate;
};

__device__ __forceinline__ SandwichAhead load_ahead(const Sandwich& s, int64_t b, int64_t l,
                                                    int column, int D) {
  return {load_ahead(s.residual, b, l, column, D), load_ahead(s.weight, b, l, column, D),
          load_ahead(s.gate, b, l, column, D)};
}

// n becomes residual + tanh(gate) * n * weight in the span at `base` of row l of sample b.
template <bool kTanh, bool kAhead, int kPieces>
__device__ __forceinline__ void sandwich(const Sandwich& s, const SandwichAhead& ahead, int64_t b,
                                         int64_t l, int base, int D, Float8 (&n)[kPieces]) {
  for_pieces<kPieces>([&](int j) {
    const int column = column_of(base, j);
    with_parameter<kAhead>(s.weight, ahead.weight, b, l, column, D,
                           [&](const Float8& weight) { n[j] *= weight; });
    with_parameter<kAhead>(s.gate, ahead.gate, b, l, column, D, [&](const Float8& gate) {
#pragma unroll  // a column at a time: with 8 results of tanh at once ptxas spills on sm_100
      for (int k = 0; k < 8; ++k) n[j][k] *= kTanh ? tanh_of(gate[k]) : gate[k];
    });
    with_parameter<kAhead>(s.residual, ahead.residual, b, l, column, D,
                           [&](const Float8& residual) { n[j] += residual; });
  });
}

// d, the gradient of the output, becomes that of n; the sum over rows gets f * d * n.
//
// If `gate` has a row per token, f is tanh(gate), and the gradient of the gate,
// (1 - tanh²) * d * n * weight, is written to `dgate`, row `token`; without kTanh f is the gate
// and its gradient d * n * weight. Otherwise f is 1, and the second stage applies the gate.
template <bool kTanh, int kPieces>
__device__ __forceinline__ void sandwich_bwd(const Sandwich& s, const Values& dgate, int64_t b,
                                             int64_t l, int64_t token, int base, int D,
                                             const Float8 (&n)[kPieces], Float8 (&d)[kPieces],
                                             Float8 (&gate_sum)[kPieces]) {
  for_pieces<kPieces>([&](int j) {
    const int column = column_of(base, j);
    Float8 g;
    with_parameter(s.gate, b, l, column, D,
                   [&](const Float8& gate) { g = kTanh ? tanh(gate) : gate; });
    if (is_there(dgate)) {
      Float8 dg = d[j];
      if (kTanh) dg = (1.0f - g * g) * dg;
      dg *= n[j];
      gate_sum[j] += g * d[j] * n[j];
      with_parameter(s.weight, b, l, column, D, [&](const Float8& weight) { dg *= weight; });
      store8(dgate, token * D + column, D - column, dg);
    } else {
      gate_sum[j] += d[j] * n[j];
    }
    if (kTanh || is_there(s.gate)) d[j] *= g;
    with_parameter(s.weight, b, l, column, D, [&](const Float8& weight) { d[j] *= weight; });
  });
}

}  // namespace lumina_kernels::cuda
