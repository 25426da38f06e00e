// CUDA kernels of gate_residual_norm: a row stays in registers from the sum to the norm.
#pragma once

#include "cuda/lib/modulation.cuh"

namespace lumina_kernels::cuda {

// statistics: rstd (B, L), followed, for a LayerNorm, by the mean (B, L).
struct GateResidualNormFwdParams {
  RowsView y, residual;
  RowsView gate;  // may be missing
  ModulationView modulation;
  Values new_residual, normed;
  Global<float> statistics;
  int64_t B, L;
  int D;
  float eps;
  bool layer;
};

struct GateResidualNormBwdParams {
  RowsView dnew_residual, dnormed, y, residual;
  RowsView gate;  // may be missing
  ModulationView modulation;
  Global<const float> statistics;
  Values dy, dresidual;
  Values dgate, dscale;   // only if gate or scale has a row per token
  Global<float> partial;  // (B, chunks, 3, D): two sums of modulate_bwd, then dresidual * y
  RowChunks chunks;
  bool layer;
};

struct GateResidualAhead {
  uint4 residual, gate;
};

// y becomes residual + gate * y; without a gate, residual + y.
template <bool kAhead, int kPieces>
__device__ __forceinline__ void gate_residual(const RowsView& residual, const RowsView& gate,
                                              const GateResidualAhead& ahead, int64_t b, int64_t l,
                                              int base, int D, Float8 (&y)[kPieces]) {
  for_pieces<kPieces>([&](int j) {
    const int column = column_of(base, j);
    with_parameter<kAhead>(gate, ahead.gate, b, l, column, D, [&](const Float8& g) { y[j] *= g; });
    with_parameter<kAhead>(residual, ahead.residual, b, l, column, D,
                           [&](const Float8& x) { y[j] += x; });
  });
}

// new_residual = residual + gate * y,
// normed = (norm(new_residual) * weight + bias) * (1 + scale) + shift
template <int kPieces, bool kWide>
__global__ void __launch_bounds__(row_threads(kPieces))
    gate_residual_norm_fwd_kernel(const GateResidualNormFwdParams p) {
  const int64_t row = row_number();
  if (row >= p.B * p.L) return;
  const int64_t b = divide(row, p.L), l = row - b * p.L;
  const Spans spans = column_spans<kPieces, kWide>(p.D);
  constexpr bool kAhead = kLoadsAhead<kPieces, kWide>;
  const auto make_new_residual = [&](int base, Float8(&y)[kPieces]) {
    GateResidualAhead ahead;
    if constexpr (kAhead) {
      const int column = column_of(base, 0);
      const Bits8 bits = load_bits8(p.y.values, p.y.row(b, l) + column, p.D - column);
      ahead = {load_ahead(p.residual, b, l, column, p.D), load_ahead(p.gate, b, l, column, p.D)};
      y[0] = to_float8(bits, p.y.values.dtype);
    } else {
      load_span(p.y.values, p.y.row(b, l), base, p.D, y);
    }
    gate_residual<kAhead>(p.residual, p.gate, ahead, b, l, base, p.D, y);
    store_span(p.new_residual, row * p.D, base, p.D, y);
  };
  RowSum sum;
  Float8 x[kPieces];
  const float2 statistics = norm_statistics<kWide>(make_new_residual, p.D, p.eps, p.layer, sum, x);
  const float mean = statistics.x, rstd = statistics.y;
  for (int base = 0; base < spans.end; base += spans.size) {
    if (kWide) make_new_residual(base, x);
    for_pieces<kPieces>([&](int j) { x[j] = (x[j] - mean) * rstd; });
    modulate(p.modulation, b, l, base, p.D, x);
    store_span(p.normed, row * p.D, base, p.D, x);
  }
  if (threadIdx.x != 0) return;
  p.statistics[row] = rstd;
  if (p.layer) p.statistics[p.B * p.L + row] = mean;
}

// d, the gradient of new_residual, becomes that of y; without a gate they are the same. d * y, the
// gradient of the gate, is added to gate_sum, or written to dgate if the gate has a row per token.
template <int kPieces>
__device__ __forceinline__ void gate_bwd(const GateResidualNormBwdParams& p, int64_t b, int64_t l,
                                         int64_t row, int base, Float8 (&d)[kPieces],
                                         Float8 (&gate_sum)[kPieces]) {
  if (!is_there(p.gate)) return;
  const int D = p.chunks.D;
  for_pieces<kPieces>([&](int j) {
    const int column = column_of(base, j);
    Float8 dg;
    with_parameter(p.y, b, l, column, D, [&](const Float8& y) { dg = d[j] * y; });
    if (is_there(p.dgate)) {
      store8(p.dgate, row * D + column, D - column, dg);
    } else {
      gate_sum[j] += dg;
    }
    d[j] *= load8(p.gate.values, p.gate.row(b, l) + column, D - column);
  });
}

// dresidual is dnew_residual plus the gradient of the norm's input, and dy = gate * dresidual. The
// rows of new_residual are recomputed: what the forward wrote was rounded.
template <int kPieces, bool kWide>
__global__ void __launch_bounds__(row_threads(kPieces))
    gate_residual_norm_bwd_kernel(const GateResidualNormBwdParams p) {
  const int64_t number = row_number();
  if (number >= p.chunks.count()) return;
  const int D = p.chunks.D;
  const Spans spans = column_spans<kPieces, kWide>(D);
  const Global<float> partial = p.partial + number * 3 * D;
  Float8 dn_sum[kPieces], d_sum[kPieces], gate_sum[kPieces], d[kPieces], n[kPieces];
  clear(dn_sum);
  clear(d_sum);
  clear(gate_sum);
  const auto flush = [&](int base) {
    flush_sums(partial, base, D, dn_sum);
    flush_sums(partial + D, base, D, d_sum);
  };
  const auto flush_gate = [&](int base) { flush_sums(partial + 2 * D, base, D, gate_sum); };
  RowSum sum;
  for_rows_of_chunk(p.chunks, number, [&](int64_t b, int64_t l, int64_t row) {
    const float rstd = p.statistics[row];
    const float mean = p.layer ? p.statistics[p.chunks.B * p.chunks.L + row] : 0.0f;
    const auto gradient = [&](int base) {
      load_span(p.y.values, p.y.row(b, l), base, D, n);
      gate_residual<false>(p.residual, p.gate, {}, b, l, base, D, n);
      for_pieces<kPieces>([&](int j) { n[j] = (n[j] - mean) * rstd; });
      load_span(p.dnormed.values, p.dnormed.row(b, l), base, D, d);
      modulate_bwd(p.modulation, p.dscale, b, l, row, base, D, n, d, dn_sum, d_sum);
    };
    const NormBwdMeans means = norm_bwd_means<kWide>(gradient, flush, D, p.layer, sum, d, n);
    for (int base = 0; base < spans.end; base += spans.size) {
      if (kWide) gradient(base);
      norm_bwd(d, n, rstd, means);
      load_span(p.dnew_residual.values, p.dnew_residual.row(b, l), base, D, n);
      for_pieces<kPieces>([&](int j) { d[j] += n[j]; });
      store_span(p.dresidual, row * D, base, D, d);
      gate_bwd(p, b, l, row, base, d, gate_sum);
      store_span(p.dy, row * D, base, D, d);
      if (kWide) flush_gate(base);
    }
  });
  if (kWide) return;
  flush(0);
  flush_gate(0);
}

}  // namespace lumina_kernels::cuda
