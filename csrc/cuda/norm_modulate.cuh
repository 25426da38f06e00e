// CUDA kernels of norm_modulate: a row stays in registers between its statistics and output.
#pragma once

#include "cuda/lib/modulation.cuh"

namespace lumina_kernels::cuda {

// statistics: rstd (B, L), followed, for a LayerNorm, by the mean (B, L).
struct NormModulateFwdParams {
  RowsView x;
  ModulationView modulation;
  Values out;
  Global<float> statistics;
  int64_t B, L;
  int D;
  float eps;
  bool layer;
};

struct NormModulateBwdParams {
  RowsView dout, x;
  ModulationView modulation;
  Global<const float> statistics;
  Values dx, dscale;  // dscale only if scale has a row per token
  Values partial;     // float32 (B, chunks, 2, D)
  RowChunks chunks;
  bool layer;
};

constexpr int kNormModulateRows = 4;  // at once in a forward

// out = ((x - mean) * rstd * weight + bias) * (1 + scale) + shift
template <RowKind kKind>
__global__ void __launch_bounds__(kForwardBounds<kKind>)
    norm_modulate_fwd_kernel(const NormModulateFwdParams p) {
  constexpr bool kWide = kKind == RowKind::kWide;
  constexpr int kP = kPieces<kKind>, kRows = kPlain<kKind> ? kNormModulateRows : 1;
  const int64_t number = row_number(), groups = ceil_div(p.L, kRows), b = divide(number, groups);
  if (b >= p.B) return;
  const RowGroup rows = rows_at<kRows>(b, (number - b * groups) * kRows, p.L, p.L);
  const Spans spans = column_spans<kKind>(p.D);
  Affine a[kP];
  const auto load = [&](int base, Float8(&x)[kP][kRows]) {
    for_each<kP>([&](int j) {
      const int column = column_of(base, j);
      uint4 bits[kRows];
      load_ahead<kKind>(p.x, rows, column, p.D, bits);
      const AffineAhead ahead = load_ahead<kKind>(p.modulation, b, column, p.D);
      a[j] = affine<kKind>(p.modulation, ahead, b, column, p.D);
      with_rows<kKind>(p.x, bits, rows, column, p.D,
                       [&](int r, const Float8& in) { x[j][r] = in; });
    });
  };
  RowSums sums;
  Float8 x[kP][kRows];
  float mean[kRows], rstd[kRows];
  norm_statistics<kKind>(load, p.D, p.eps, p.layer, sums, x, mean, rstd);
  for (int base = 0; base < spans.end; base += spans.size) {
    if (kWide) load(base, x);
    if (kWide && p.layer) subtract(mean, base, p.D, x);
    for_each<kP>([&](int j) {
      const int column = column_of(base, j);
      for_each<kRows>([&](int r) { x[j][r] *= rstd[r]; });
      modulate<kKind>(p.modulation, a[j], rows, column, p.D, x[j]);
      store_rows<kKind>(p.out, rows, column, p.D, x[j]);
    });
  }
  if (threadIdx.x != 0) return;
  for_each<kRows>([&](int r) {
    p.statistics[rows.number(r)] = rstd[r];
    if (p.layer) p.statistics[p.B * p.L + rows.number(r)] = mean[r];
  });
}

// With n = (x - mean) * rstd and d = dout * (1 + scale) * weight:
// dx = rstd * (d - mean(d) - n * mean(d * n)); partial: sums over a chunk's rows, see modulate_bwd.
template <RowKind kKind>
__global__ void __launch_bounds__(kBackwardBounds<kKind>)
    norm_modulate_bwd_kernel(const NormModulateBwdParams p) {
  constexpr bool kWide = kKind == RowKind::kWide;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
  constexpr int kRows = 1;  // with two, ptxas spills there
#else
  constexpr int kRows = kPlain<kKind> ? 2 : 1;
#endif
  constexpr int kP = kPieces<kKind>;
  const int64_t number = row_number(), b = divide(number, p.chunks.per_sample());
  if (b >= p.chunks.B) return;
  const int D = p.chunks.D;
  const Spans spans = column_spans<kKind>(D);
  const int64_t partial = number * 2 * D;
  bool add = false;  // to what an earlier row of the chunk has written
  Float8 dn_sum[kP], d_sum[kP], held[kP], d[kP][kRows], n[kP][kRows];
  clear(dn_sum);
  clear(d_sum);
  const auto load_factor = [&](int column) {
    const AffineAhead ahead = load_ahead<kKind>(p.modulation, b, column, D);
    return affine<kKind>(p.modulation, ahead, b, column, D).factor;
  };
  if (kPlain<kKind>) held[0] = load_factor(column_of(0, 0));
  const auto flush = [&](int base) {
    flush_sums(p.partial, partial, base, D, add, dn_sum);
    flush_sums(p.partial, partial + D, base, D, add, d_sum);
  };
  RowSums sums;
  for_rows_of_chunk<kRows>(p.chunks, b, number, [&](const RowGroup& rows) {
    if (kWide) {
      clear(dn_sum);
      clear(d_sum);
    }
    float rstd[kRows], mean[kRows];
    for_each<kRows>([&](int r) {
      rstd[r] = p.statistics[rows.number(r)];
      mean[r] = p.layer ? p.statistics[p.chunks.B * p.chunks.L + rows.number(r)] : 0.0f;
    });
    const auto gradient = [&](int base) {
      for_each<kP>([&](int j) {
        const int column = column_of(base, j);
        uint4 douts[kRows], xs[kRows];
        load_ahead<kKind>(p.dout, rows, column, D, douts);
        load_ahead<kKind>(p.x, rows, column, D, xs);
        with_rows<kKind>(p.dout, douts, rows, column, D,
                         [&](int r, const Float8& x) { d[j][r] = x; });
        with_rows<kKind>(p.x, xs, rows, column, D,
                         [&](int r, const Float8& x) { n[j][r] = (x - mean[r]) * rstd[r]; });
        modulate_bwd<kKind>(p.modulation, p.dscale, rows, column, D,
                            kPlain<kKind> ? held[j] : load_factor(column), n[j], d[j], dn_sum[j],
                            d_sum[j]);
      });
    };
    const auto means = norm_bwd_means<kKind>(gradient, flush, D, p.layer, sums, d, n);
    for (int base = 0; base < spans.end; base += spans.size) {
      if (kWide) gradient(base);
      norm_bwd(d, n, rstd, means);
      store_span<kKind>(p.dx, rows, base, D, d);
    }
    add = kKind == RowKind::kWide;
  });
  if (!kWide) flush(0);
}

}  // namespace lumina_kernels::cuda
