// CUDA kernels of gate_residual_norm: a row stays in registers from the sum to the norm.
#pragma once

#include "cuda/lib/modulation.cuh"

namespace lumina_kernels::cuda {

// statistics: rstd (B, L) and, of a LayerNorm, behind it the mean (B, L).
struct GateResidualNormFwdParams {
  RowsView y, residual, gate;
  ModulationView modulation;
  Values new_residual, normed;
  Global<float> statistics;
  int64_t B, L;
  int D;
  float eps;
  bool layer;
};

struct GateResidualNormBwdParams {
  RowsView dnew_residual, dnormed, y, residual, gate;
  ModulationView modulation;
  Global<const float> statistics;
  Values dy, dresidual;
  Values dgate, dscale;   // only where gate, scale have a row per token
  Global<float> partial;  // (B, chunks, 3, D): two sums of modulate_bwd, then dresidual * y
  int64_t B, L, chunk;
  int D;
  bool layer;
};

// y becomes residual + gate * y.
template <int kPieces>
__device__ __forceinline__ void gate_residual(const RowsView& residual, const RowsView& gate,
                                              int64_t b, int64_t l, int base, int D,
                                              float (&y)[kPieces][8]) {
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const int column = column_of(base, j);
    with_parameter(gate, b, l, column, D, [&](int k, float p) { y[j][k] *= p; });
    with_parameter(residual, b, l, column, D, [&](int k, float p) { y[j][k] += p; });
  }
}

// new_residual = residual + gate * y, normed = (norm(new_residual) * weight + bias) * (1 + scale) +
// shift
template <int kPieces, bool kWide>
__global__ void __launch_bounds__(row_threads(kPieces))
    gate_residual_norm_fwd_kernel(const GateResidualNormFwdParams p) {
  const int64_t row = row_number();
  if (row >= p.B * p.L) return;
  const int64_t b = divide(row, p.L), l = row - b * p.L;
  const Spans spans = row_spans<kPieces, kWide>(p.D);
  const auto make_new_residual = [&](int base, float (&y)[kPieces][8]) {
    load_span(p.y.values, p.y.row(b, l), base, p.D, y);
    gate_residual(p.residual, p.gate, b, l, base, p.D, y);
    store_span(p.new_residual, row * p.D, base, p.D, y);
  };
  RowSum sum;
  float x[kPieces][8];
  const float2 statistics = norm_statistics<kWide>(make_new_residual, p.D, p.eps, p.layer, sum, x);
  const float mean = statistics.x, rstd = statistics.y;
  for (int base = 0; base < spans.end; base += spans.size) {
    if (kWide) make_new_residual(base, x);
    for_columns<kPieces>([&](int j, int k) { x[j][k] = (x[j][k] - mean) * rstd; });
    modulate(p.modulation, b, l, base, p.D, x);
    store_span(p.normed, row * p.D, base, p.D, x);
  }
  if (threadIdx.x != 0) return;
  p.statistics[row] = rstd;
  if (p.layer) p.statistics[p.B * p.L + row] = mean;
}

// d, the gradient of new_residual, becomes that of y. gate_sum, or dgate where the gate has a row
// per token, gets d * y.
template <int kPieces>
__device__ __forceinline__ void gate_bwd(const GateResidualNormBwdParams& p, int64_t b, int64_t l,
                                         int64_t row, int base, float (&d)[kPieces][8],
                                         float (&gate_sum)[kPieces][8]) {
#pragma unroll
  for (int j = 0; j < kPieces; ++j) {
    const int column = column_of(base, j);
    float dg[8];
    with_parameter(p.y, b, l, column, p.D, [&](int k, float y) { dg[k] = d[j][k] * y; });
    if (is_there(p.dgate)) {
      store8(p.dgate, row * p.D + column, p.D - column, dg);
    } else {
#pragma unroll
      for (int k = 0; k < 8; ++k) gate_sum[j][k] += dg[k];
    }
    with_parameter(p.gate, b, l, column, p.D, [&](int k, float g) { d[j][k] *= g; });
  }
}

// dresidual = dnew_residual + that of the norm's input, dy = gate * dresidual; `new_residual` is
// computed again rather than read rounded. partial: sums over `chunk` rows; of dresidual * y, which
// is dgate.
template <int kPieces, bool kWide>
__global__ void __launch_bounds__(row_threads(kPieces))
    gate_residual_norm_bwd_kernel(const GateResidualNormBwdParams p) {
  const int64_t number = row_number(), chunks = ceil_div(p.L, p.chunk);
  if (number >= p.B * chunks) return;
  const int64_t sample = divide(number, chunks), start = (number - sample * chunks) * p.chunk;
  const int64_t end = min(start + p.chunk, p.L);
  const int D = p.D;
  const Spans spans = row_spans<kPieces, kWide>(D);
  const Global<float> partial = p.partial + number * 3 * D;
  float dn_sum[kPieces][8], d_sum[kPieces][8], gate_sum[kPieces][8];
  float d[kPieces][8], n[kPieces][8];
  clear(dn_sum);
  clear(d_sum);
  clear(gate_sum);
  RowSum sum;
  for (int64_t l = start; l < end; ++l) {
    const int64_t b = opaque(sample), row = b * p.L + l;
    const float rstd = p.statistics[row], mean = p.layer ? p.statistics[p.B * p.L + row] : 0.0f;
    const auto gradient = [&](int base) {
      load_span(p.y.values, p.y.row(b, l), base, D, n);
      gate_residual(p.residual, p.gate, b, l, base, D, n);
      for_columns<kPieces>([&](int j, int k) { n[j][k] = (n[j][k] - mean) * rstd; });
      load_span(p.dnormed.values, p.dnormed.row(b, l), base, D, d);
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
      add_span(p.dnew_residual.values, p.dnew_residual.row(b, l), base, D, d);
      store_span(p.dresidual, row * D, base, D, d);
      gate_bwd(p, b, l, row, base, d, gate_sum);
      store_span(p.dy, row * D, base, D, d);
      if (kWide) {
        store_sums(partial + 2 * D, base, D, gate_sum);
        clear(gate_sum);
      }
    }
  }
  if (kWide) return;
  store_sums(partial, 0, D, dn_sum);
  store_sums(partial + D, 0, D, d_sum);
  store_sums(partial + 2 * D, 0, D, gate_sum);
}

}  // namespace lumina_kernels::cuda
