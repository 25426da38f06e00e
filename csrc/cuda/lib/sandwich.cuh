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
  uint4 weight, gate;
};

template <RowKind kKind>
__device__ __forceinline__ SandwichAhead load_ahead(const Sandwich& s, int64_t b, int column,
                                                    int D) {
  return {load_ahead<kKind>(s.weight, b, column, D), load_ahead<kKind>(s.gate, b, column, D)};
}

// What n is multiplied by: tanh(gate) * weight, or, if the gate has a row per token, weight.
template <RowKind kKind, bool kTanh>
__device__ __forceinline__ Float8 sandwich_factor(const Sandwich& s, const SandwichAhead& ahead,
                                                  int64_t b, int column, int D) {
  Float8 factor = by_column([](int) { return 1.0f; });
  with_ahead<kKind>(s.weight, ahead.weight, b, column, D,
                    [&](const Float8& weight) { factor = weight; });
  if (!kPlain<kKind> && s.gate.per_token) return factor;
  with_ahead<kKind>(s.gate, ahead.gate, b, column, D, [&](const Float8& gate) {
#pragma unroll  // a column at a time: with 8 results of tanh at once ptxas spills on sm_100
    for (int k = 0; k < 8; ++k) factor[k] *= kTanh ? tanh_of(gate[k]) : gate[k];
  });
  return factor;
}

// n becomes residual + tanh(gate) * n * weight.
template <RowKind kKind, bool kTanh, int kRows>
__device__ __forceinline__ void sandwich(const Sandwich& s, const Float8& factor,
                                         const uint4 (&residual)[kRows], const RowGroup& rows,
                                         int column, int D, Float8 (&n)[kRows]) {
  for_each<kRows>([&](int r) { n[r] *= factor; });
  if (!kPlain<kKind> && s.gate.per_token) {
    with_parameter(s.gate, rows.b, rows.l, column, D,
                   [&](const Float8& gate) { n[0] *= kTanh ? tanh(gate) : gate; });
  }
  with_rows<kKind>(s.residual, residual, rows, column, D,
                   [&](int r, const Float8& x) { n[r] += x; });
}

// d, the gradient of the output, becomes that of n; the sum over rows gets f * d * n.
//
// If `gate` has a row per token, f is tanh(gate), and the gradient of the gate,
// (1 - tanh²) * d * n * weight, is written to `dgate`; without kTanh f is the gate and its gradient
// d * n * weight. Otherwise f is 1, and the second stage applies the gate.
template <RowKind kKind, bool kTanh, int kRows>
__device__ __forceinline__ void sandwich_bwd(const Sandwich& s, const Values& dgate,
                                             const RowGroup& rows, int column, int D,
                                             const Float8& factor, const Float8 (&n)[kRows],
                                             Float8 (&d)[kRows], Float8& gate_sum) {
  if (!kPlain<kKind> && is_there(dgate)) {
    Float8 g = load8(s.gate.values, rows.of(s.gate, 0) + column, D - column);
    if (kTanh) g = tanh(g);
    Float8 dg = d[0] * n[0] * factor;
    if (kTanh) dg *= 1.0f - g * g;
    store8(dgate, rows.of(D, 0) + column, D - column, dg);
    d[0] *= g;
  }
  for_each<kRows>([&](int r) {
    if (r == 0 || r <= rows.last) gate_sum += d[r] * n[r];
    d[r] *= factor;
  });
}

}  // namespace lumina_kernels::cuda
