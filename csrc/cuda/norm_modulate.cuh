// CUDA kernels of norm_modulate: a row stays in registers between its statistics and output.
#pragma once

#include "cuda/lib/modulation.cuh"

namespace lumina_kernels::cuda {

// statistics: rstd (B, L) and, of a LayerNorm, behind it the mean (B, L).
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
  Values dx, dscale;      // dscale only where scale has a row per token
  Global<float> partial;  // (B, chunks, 2, D)
  int64_t B, L, chunk;
  int D;
  bool layer;
};

// out = ((x - mean) * rstd * weight + bias) * (1 + scale) + shift
template <int kPieces, bool kWide>
__global__ void __launch_bounds__(row_threads(kPieces))
    norm_modulate_fwd_kernel(const NormModulateFwdParams p) {
  const int64_t row = row_number();
  if (row >= p.B * p.L) return;
  const int64_t b = divide(row, p.L), l = row - b * p.L;
  const Spans spans = row_spans<kPieces, kWide>(p.D);
  const auto load = [&](int base, float (&x)[kPieces][8]) {
    load_span(p.x.values, p.x.row(b, l), base, p.D, x);
  };
  RowSum sum;
  float x[kPieces][8];
  const float2 statistics = norm_statistics<kWide>(load, p.D, p.eps, p.layer, sum, x);
  const float mean = statistics.x, rstd = statistics.y;
  for (int base = 0; base < spans.end; base += spans.size) {
    if (kWide) load(base, x);
    for_columns<kPieces>([&](int j, int k) { x[j][k] = (x[j][k] - mean) * rstd; });
    modulate(p.modulation, b, l, base, p.D, x);
    store_span(p.out, row * p.D, base, p.D, x);
  }
  if (threadIdx.x != 0) return;
  p.statistics[row] = rstd;
  if (p.layer) p.statistics[p.B * p.L + row] = mean;
}

// With n = (x - mean) * rstd, d = dout * (1 + scale) * weight:
// dx = rstd * (d - mean(d) - n * mean(d * n)); partial: sums over `chunk` rows, see modulate_bwd.
template <int kPieces, bool kWide>
__global__ void __launch_bounds__(row_threads(kPieces))
    norm_modulate_bwd_kernel(const NormModulateBwdParams p) {
  const int64_t number = row_number(), chunks = ceil_div(p.L, p.chunk);
  if (number >= p.B * chunks) return;
  const int64_t sample = divide(number, chunks), start = (number - sample * chunks) * p.chunk;
  const int64_t end = min(start + p.chunk, p.L);
  const int D = p.D;
  const Spans spans = row_spans<kPieces, kWide>(D);
  const Global<float> partial = p.partial + number * 2 * D;
  float dn_sum[kPieces][8], d_sum[kPieces][8], d[kPieces][8], n[kPieces][8];
  clear(dn_sum);
  clear(d_sum);
  RowSum sum;
#pragma unroll 1
  for (int64_t l = start; l < end; ++l) {
    const int64_t b = opaque(sample), row = b * p.L + l;
    const float rstd = p.statistics[row], mean = p.layer ? p.statistics[p.B * p.L + row] : 0.0f;
    const auto gradient = [&](int base) {
      load_span(p.dout.values, p.dout.row(b, l), base, D, d);
      load_span(p.x.values, p.x.row(b, l), base, D, n);
      for_columns<kPieces>([&](int j, int k) { n[j][k] = (n[j][k] - mean) * rstd; });
      modulate_bwd(p.modulation, p.dscale, b, l, row, base, D, n, d, dn_sum, d_sum);
    };
    float along = 0.0f, total = 0.0f;
    for (int base = 0; base < spans.end; base += spans.size) {
      gradient(base);
      for_columns<kPieces>([&](int j, int k) { along += d[j][k] * n[j][k], total += d[j][k]; });
      if (kWide) {
        store_sums(partial, base, D, dn_sum);
        store_sums(partial + D, base, D, d_sum);
        clear(dn_sum);
        clear(d_sum);
      }
    }
    const float2 sums = sum.both(along, total, p.layer);
    for (int base = 0; base < spans.end; base += spans.size) {
      if (kWide) gradient(base);
      norm_bwd(d, n, rstd, sums.x / D, p.layer ? sums.y / D : 0.0f);
      store_span(p.dx, row * D, base, D, d);
    }
  }
  if (kWide) return;
  store_sums(partial, 0, D, dn_sum);
  store_sums(partial + D, 0, D, d_sum);
}

}  // namespace lumina_kernels::cuda
