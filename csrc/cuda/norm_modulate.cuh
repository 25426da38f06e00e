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
  Values dx, dscale;      // dscale only if scale has a row per token
  Global<float> partial;  // (B, chunks, 2, D)
  RowChunks chunks;
  bool layer;
};

// out = ((x - mean) * rstd * weight + bias) * (1 + scale) + shift
template <int kPieces, bool kWide>
__global__ void __launch_bounds__(row_threads(kPieces))
    norm_modulate_fwd_kernel(const NormModulateFwdParams p) {
  const int64_t row = row_number();
  if (row >= p.B * p.L) return;
  const int64_t b = divide(row, p.L), l = row - b * p.L;
  const Spans spans = column_spans<kPieces, kWide>(p.D);
  const auto load = [&](int base, Float8(&x)[kPieces]) {
    load_span(p.x.values, p.x.row(b, l), base, p.D, x);
  };
  RowSum sum;
  Float8 x[kPieces];
  const float2 statistics = norm_statistics<kWide>(load, p.D, p.eps, p.layer, sum, x);
  const float mean = statistics.x, rstd = statistics.y;
  for (int base = 0; base < spans.end; base += spans.size) {
    if (kWide) load(base, x);
    for_pieces<kPieces>([&](int j) { x[j] = (x[j] - mean) * rstd; });
    modulate(p.modulation, b, l, base, p.D, x);
    store_span(p.out, row * p.D, base, p.D, x);
  }
  if (threadIdx.x != 0) return;
  p.statistics[row] = rstd;
  if (p.layer) p.statistics[p.B * p.L + row] = mean;
}

// With n = (x - mean) * rstd and d = dout * (1 + scale) * weight:
// dx = rstd * (d - mean(d) - n * mean(d * n)); partial: sums over a chunk's rows, see modulate_bwd.
template <int kPieces, bool kWide>
__global__ void __launch_bounds__(row_threads(kPieces))
    norm_modulate_bwd_kernel(const NormModulateBwdParams p) {
  const int64_t number = row_number();
  if (number >= p.chunks.count()) return;
  const int D = p.chunks.D;
  const Spans spans = column_spans<kPieces, kWide>(D);
  const Global<float> partial = p.partial + number * 2 * D;
  Float8 dn_sum[kPieces], d_sum[kPieces], d[kPieces], n[kPieces];
  clear(dn_sum);
  clear(d_sum);
  const auto flush = [&](int base) {
    flush_sums(partial, base, D, dn_sum);
    flush_sums(partial + D, base, D, d_sum);
  };
  RowSum sum;
  for_rows_of_chunk(p.chunks, number, [&](int64_t b, int64_t l, int64_t row) {
    const float rstd = p.statistics[row];
    const float mean = p.layer ? p.statistics[p.chunks.B * p.chunks.L + row] : 0.0f;
    const auto gradient = [&](int base) {
      load_span(p.dout.values, p.dout.row(b, l), base, D, d);
      load_span(p.x.values, p.x.row(b, l), base, D, n);
      for_pieces<kPieces>([&](int j) { n[j] = (n[j] - mean) * rstd; });
      modulate_bwd(p.modulation, p.dscale, b, l, row, base, D, n, d, dn_sum, d_sum);
    };
    const NormBwdMeans means = norm_bwd_means<kWide>(gradient, flush, D, p.layer, sum, d, n);
    for (int base = 0; base < spans.end; base += spans.size) {
      if (kWide) gradient(base);
      norm_bwd(d, n, rstd, means);
      store_span(p.dx, row * D, base, D, d);
    }
  });
  if (!kWide) flush(0);
}

}  // namespace lumina_kernels::cuda
