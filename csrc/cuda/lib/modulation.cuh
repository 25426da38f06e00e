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

// --- what the rows of a sample share ---

// A parameter of sample b.
template <RowKind kKind>
__device__ __forceinline__ uint4 load_ahead(const RowsView& x, int64_t b, int column, int D) {
  if (!is_there(x)) return {};
  return load_ahead<kKind>(x.values, x.row(b, 0) + column, D - column);
}

template <RowKind kKind, class F>
__device__ __forceinline__ void with_ahead(const RowsView& x, const uint4& ahead, int64_t b,
                                           int column, int D, F f) {
  if (!is_there(x)) return;
  const uint4 bits[] = {ahead};
  with_rows<kKind>(x, bits, {b, 0, 0, 0}, column, D, [&](int, const Float8& x) { f(x); });
}

// y = n * factor + offset, and then, if `scale` has a row per token, * (1 + scale) + shift, or if
// `shift` has, + shift.
struct Affine {
  Float8 factor, offset;
};

struct AffineAhead {
  uint4 weight, bias, scale, shift;
};

template <RowKind kKind>
__device__ __forceinline__ AffineAhead load_ahead(const ModulationView& m, int64_t b, int column,
                                                  int D) {
  const auto load = [&](const RowsView& x) { return load_ahead<kKind>(x, b, column, D); };
  return {load(m.weight), load(m.bias), load(m.scale), load(m.shift)};
}

template <RowKind kKind>
__device__ __forceinline__ Affine affine(const ModulationView& m, const AffineAhead& ahead,
                                         int64_t b, int column, int D) {
  Affine a = {by_column([](int) { return 1.0f; }), {}};
  const auto with = [&](const RowsView& x, const uint4& bits, auto f) {
    with_ahead<kKind>(x, bits, b, column, D, f);
  };
  with(m.weight, ahead.weight, [&](const Float8& weight) { a.factor = weight; });
  with(m.bias, ahead.bias, [&](const Float8& bias) { a.offset = bias; });
  if (!kPlain<kKind> && m.scale.per_token) return a;
  with(m.scale, ahead.scale, [&](const Float8& scale) {
    a.factor *= 1.0f + scale;
    a.offset *= 1.0f + scale;
  });
  if (!kPlain<kKind> && m.shift.per_token) return a;
  with(m.shift, ahead.shift, [&](const Float8& shift) { a.offset += shift; });
  return a;
}

// n becomes y.
template <RowKind kKind, int kRows>
__device__ __forceinline__ void modulate(const ModulationView& m, const Affine& a,
                                         const RowGroup& rows, int column, int D,
                                         Float8 (&n)[kRows]) {
  for_each<kRows>(
      [&](int r) { n[r] = by_column([&](int k) { return n[r][k] * a.factor[k] + a.offset[k]; }); });
  if (kPlain<kKind>) return;
  const auto with = [&](const RowsView& x, auto f) {
    with_parameter(x, rows.b, rows.l, column, D, f);
  };
  if (m.scale.per_token) with(m.scale, [&](const Float8& scale) { n[0] *= 1.0f + scale; });
  if (m.scale.per_token || m.shift.per_token) {
    with(m.shift, [&](const Float8& shift) { n[0] += shift; });
  }
}

// d, the gradient of y, becomes that of n; the sums over rows get f * d * n and f * d.
//
// If `scale` has a row per token, f is 1 + scale, and the gradient of scale, d * (n * weight +
// bias), is written to `dscale`. Otherwise f is 1, and the second stage applies scale. `factor` is
// that of `Affine`.
template <RowKind kKind, int kRows>
__device__ __forceinline__ void modulate_bwd(const ModulationView& m, const Values& dscale,
                                             const RowGroup& rows, int column, int D,
                                             const Float8& factor, const Float8 (&n)[kRows],
                                             Float8 (&d)[kRows], Float8& dn_sum, Float8& d_sum) {
  const int count = D - column;
  for_each<kRows>([&](int r) {
    if (!kPlain<kKind> && is_there(dscale)) {
      Float8 y = n[r] * factor;
      with_parameter(m.bias, 0, 0, column, D, [&](const Float8& bias) { y += bias; });
      store8(dscale, rows.of(D, r) + column, count, y * d[r]);
      d[r] *= 1.0f + load8(m.scale.values, rows.of(m.scale, r) + column, count);
    }
    if (r == 0 || r <= rows.last) {
      dn_sum += d[r] * n[r];
      d_sum += d[r];
    }
    d[r] *= factor;
  });
}

}  // namespace lumina_kernels::cuda
