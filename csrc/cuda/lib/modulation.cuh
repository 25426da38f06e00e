// The modulation of a norm, y = (n * weight + bias) * (1 + scale) + shift, shared by three ops.
#pragma once

#include "cuda/lib/rows_bwd.cuh"

namespace lumina_kernels::cuda {

// Each may be missing.
struct ModulationView {
  RowsView weight, bias, scale, shift;
};

// f(parameter) with this thread's columns of row l of sample b, where the parameter exists.
template <class F>
__device__ __forceinline__ void with_parameter(const RowsView& parameter, int64_t b, int64_t l,
                                               int column, int D, F f) {
  if (is_there(parameter)) {
    f(load8(parameter.values, parameter.row(b, l) + column, D - column));
  }
}

// --- loads ahead of the statistics ---

// Whether a thread loads what it needs after the statistics of its row before them. Only what has
// 16 bits: float32 would take twice the registers, and is loaded where it is used.
template <int kPieces, bool kWide>
constexpr bool kLoadsAhead = kPieces == 1 && !kWide;

__device__ __forceinline__ uint4 load_ahead(const RowsView& parameter, int64_t b, int64_t l,
                                            int column, int D) {
  uint4 bits;  // without a value if there is nothing to load
  if (is_there(parameter) && parameter.values.dtype != Dtype::kFloat) {
    const auto from = parameter.values.data + 2 * (parameter.row(b, l) + column);
    bits = load_shorts8(from, parameter.values.vectors && D - column >= 8, D - column);
  }
  return bits;
}

// with_parameter, of bits that were loaded ahead if kAhead.
template <bool kAhead, class F>
__device__ __forceinline__ void with_parameter(const RowsView& parameter, const uint4& ahead,
                                               int64_t b, int64_t l, int column, int D, F f) {
  if (!is_there(parameter)) return;
  const Dtype dtype = parameter.values.dtype;
  Float8 x;
  if (kAhead && dtype == Dtype::kBFloat16) {  // a branch of its own, as in to_float8
    x = unpack8(ahead, Dtype::kBFloat16);
  } else if (kAhead && dtype == Dtype::kHalf) {
    x = unpack8(ahead, Dtype::kHalf);
  } else {
    load8(parameter.values, parameter.row(b, l) + column, D - column, x);
  }
  f(x);
}

// --- the modulation ---

// n becomes y in the span at `base` of row l of sample b. Its parameters are rarely read from far,
// and waiting in registers they would take two of five blocks from an SM.
template <int kPieces>
__device__ __forceinline__ void modulate(const ModulationView& m, int64_t b, int64_t l, int base,
                                         int D, Float8 (&n)[kPieces]) {
  for_pieces<kPieces>([&](int j) {
    const int column = column_of(base, j);
    with_parameter(m.weight, b, l, column, D, [&](const Float8& weight) { n[j] *= weight; });
    with_parameter(m.bias, b, l, column, D, [&](const Float8& bias) { n[j] += bias; });
    with_parameter(m.scale, b, l, column, D, [&](const Float8& scale) { n[j] *= 1.0f + scale; });
    with_parameter(m.shift, b, l, column, D, [&](const Float8& shift) { n[j] += shift; });
  });
}

// d, the gradient of y, becomes that of n; the sums over rows get f * d * n and f * d.
//
// If `scale` has a row per token, f is 1 + scale, and the gradient of scale, d * (n * weight +
// bias), is written to `dscale`, row `token`. Otherwise f is 1, and the second stage applies scale.
template <int kPieces>
__device__ __forceinline__ void modulate_bwd(const ModulationView& m, const Values& dscale,
                                             int64_t b, int64_t l, int64_t token, int base, int D,
                                             const Float8 (&n)[kPieces], Float8 (&d)[kPieces],
                                             Float8 (&dn_sum)[kPieces], Float8 (&d_sum)[kPieces]) {
  const bool per_token = is_there(dscale);
  for_pieces<kPieces>([&](int j) {
    const int column = column_of(base, j);
    const auto apply_scale = [&](const Float8& scale) { d[j] *= 1.0f + scale; };
    if (per_token) {
      Float8 y = n[j];
      with_parameter(m.weight, b, l, column, D, [&](const Float8& weight) { y *= weight; });
      with_parameter(m.bias, b, l, column, D, [&](const Float8& bias) { y += bias; });
      store8(dscale, token * D + column, D - column, y * d[j]);
      with_parameter(m.scale, b, l, column, D, apply_scale);
    }
    dn_sum[j] += d[j] * n[j];
    d_sum[j] += d[j];
    if (!per_token) with_parameter(m.scale, b, l, column, D, apply_scale);
    with_parameter(m.weight, b, l, column, D, [&](const Float8& weight) { d[j] *= weight; });
  });
}

}  // namespace lumina_kernels::cuda
