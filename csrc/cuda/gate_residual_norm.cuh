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
  Values dgate, dscale;  // only if gate or scale has a row per token
  Values partial;        // float32 (B, chunks, 3, D): two sums of modulate_bwd, then dresidual * y
  RowChunks chunks;
  bool layer;
};

// The gate of sample b, 1 where there is none or where it has a row per token.
template <RowKind kKind>
__device__ __forceinline__ Float8 shared_gate(const RowsView& gate, const uint4& ahead, int64_t b,
                                              int column, int D) {
  Float8 factor = by_column([](int) { return 1.0f; });
  if (!kPlain<kKind> && gate.per_token) return factor;
  with_ahead<kKind>(gate, ahead, b, column, D, [&](const Float8& g) { factor = g; });
  return factor;
}

// y becomes residual + gate * y.
template <RowKind kKind, int kRows>
__device__ __forceinline__ void gate_residual(const RowsView& residual, const RowsView& gate,
                                              const Float8& factor, const uint4 (&bits)[kRows],
                                              const RowGroup& rows, int column, int D,
                                              Float8 (&y)[kRows]) {
  for_each<kRows>([&](int r) { y[r] *= factor; });
  if (!kPlain<kKind> && gate.per_token) {
    with_parameter(gate, rows.b, rows.l, column, D, [&](const Float8& g) { y[0] *= g; });
  }
  with_rows<kKind>(residual, bits, rows, column, D, [&](int r, const Float8& x) { y[r] += x; });
}

constexpr int kGateResidualNormRows = 2;  // at once in a forward

// new_residual = residual + gate * y,
// normed = (norm(new_residual) * weight + bias) * (1 + scale) + shift
template <RowKind kKind>
__global__ void __launch_bounds__(kForwardBounds<kKind>)
    gate_residual_norm_fwd_kernel(const GateResidualNormFwdParams p) {
  constexpr bool kWide = kKind == RowKind::kWide;
  constexpr int kP = kPieces<kKind>, kRows = kPlain<kKind> ? kGateResidualNormRows : 1;
  const int64_t number = row_number(), groups = ceil_div(p.L, kRows), b = divide(number, groups);
  if (b >= p.B) return;
  const RowGroup rows = rows_at<kRows>(b, (number - b * groups) * kRows, p.L, p.L);
  const Spans spans = column_spans<kKind>(p.D);
  Affine a[kP];
  const auto make_new_residual = [&](int base, Float8(&y)[kP][kRows]) {
    for_each<kP>([&](int j) {
      const int column = column_of(base, j);
      uint4 bits[kRows], residual[kRows];
      load_ahead<kKind>(p.y, rows, column, p.D, bits);
      load_ahead<kKind>(p.residual, rows, column, p.D, residual);
      const uint4 gate = load_ahead<kKind>(p.gate, b, column, p.D);
      const AffineAhead ahead = load_ahead<kKind>(p.modulation, b, column, p.D);
      const Float8 factor = shared_gate<kKind>(p.gate, gate, b, column, p.D);
      with_rows<kKind>(p.y, bits, rows, column, p.D,
                       [&](int r, const Float8& in) { y[j][r] = in; });
      gate_residual<kKind>(p.residual, p.gate, factor, residual, rows, column, p.D, y[j]);
      store_rows<kKind>(p.new_residual, rows, column, p.D, y[j]);
      a[j] = affine<kKind>(p.modulation, ahead, b, column, p.D);
    });
  };
  RowSums sums;
  Float8 x[kP][kRows];
  float mean[kRows], rstd[kRows];
  norm_statistics<kKind>(make_new_residual, p.D, p.eps, p.layer, sums, x, mean, rstd);
  for (int base = 0; base < spans.end; base += spans.size) {
    if (kWide) make_new_residual(base, x);
    if (kWide && p.layer) subtract(mean, base, p.D, x);
    for_each<kP>([&](int j) {
      const int column = column_of(base, j);
      for_each<kRows>([&](int r) { x[j][r] *= rstd[r]; });
      modulate<kKind>(p.modulation, a[j], rows, column, p.D, x[j]);
      store_rows<kKind>(p.normed, rows, column, p.D, x[j]);
    });
  }
  if (threadIdx.x != 0) return;
  for_each<kRows>([&](int r) {
    p.statistics[rows.number(r)] = rstd[r];
    if (p.layer) p.statistics[p.B * p.L + rows.number(r)] = mean[r];
  });
}

// d, the gradient of new_residual, becomes that of y; without a gate they are the same. d * y, the
// gradient of the gate, is added to gate_sum, or written to dgate if the gate has a row per token.
template <RowKind kKind>
__device__ __forceinline__ void gate_bwd(const GateResidualNormBwdParams& p, const uint4 (&ys)[1],
                                         const Float8& factor, const RowGroup& rows, int column,
                                         Float8& d, Float8& gate_sum) {
  if (!is_there(p.gate)) return;
  const int D = p.chunks.D;
  Float8 dg;
  with_rows<kKind>(p.y, ys, rows, column, D, [&](int, const Float8& y) { dg = d * y; });
  if (kPlain<kKind> || !is_there(p.dgate)) {
    gate_sum += dg;
    d *= factor;
  } else {
    store8(p.dgate, rows.of(D, 0) + column, D - column, dg);
    d *= load8(p.gate.values, rows.of(p.gate, 0) + column, D - column);
  }
}

// dresidual is dnew_residual plus the gradient of the norm's input, and dy = gate * dresidual. The
// rows of new_residual are recomputed: what the forward wrote was rounded.
template <RowKind kKind>
__global__ void __launch_bounds__(kBackwardBounds<kKind>)
    gate_residual_norm_bwd_kernel(const GateResidualNormBwdParams p) {
  constexpr bool kWide = kKind == RowKind::kWide;
  constexpr int kP = kPieces<kKind>;
  const int64_t number = row_number(), b = divide(number, p.chunks.per_sample());
  if (b >= p.chunks.B) return;
  const int D = p.chunks.D;
  const Spans spans = column_spans<kKind>(D);
  const int64_t partial = number * 3 * D;
  bool add = false;  // to what an earlier row of the chunk has written
  Float8 dn_sum[kP], d_sum[kP], gate_sum[kP], held_gate[kP], held_factor[kP], d[kP][1], n[kP][1];
  uint4 ys[kP][1], dnews[kP][1];
  clear(dn_sum);
  clear(d_sum);
  clear(gate_sum);
  const auto load_gate = [&](int column) {
    return shared_gate<kKind>(p.gate, load_ahead<kKind>(p.gate, b, column, D), b, column, D);
  };
  const auto load_factor = [&](int column) {
    const AffineAhead ahead = load_ahead<kKind>(p.modulation, b, column, D);
    return affine<kKind>(p.modulation, ahead, b, column, D).factor;
  };
  if (kPlain<kKind>) {
    held_gate[0] = load_gate(column_of(0, 0));
    held_factor[0] = load_factor(column_of(0, 0));
  }
  const auto flush = [&](int base) {
    flush_sums(p.partial, partial, base, D, add, dn_sum);
    flush_sums(p.partial, partial + D, base, D, add, d_sum);
  };
  const auto flush_gate = [&](int base) {
    flush_sums(p.partial, partial + 2 * D, base, D, add, gate_sum);
  };
  RowSums sums;
  for_rows_of_chunk<1>(p.chunks, b, number, [&](const RowGroup& rows) {
    if (kWide) {
      clear(dn_sum);
      clear(d_sum);
      clear(gate_sum);
    }
    const float rstd[] = {p.statistics[rows.row]};
    const float mean = p.layer ? p.statistics[p.chunks.B * p.chunks.L + rows.row] : 0.0f;
    const auto gradient = [&](int base) {
      for_each<kP>([&](int j) {
        const int column = column_of(base, j);
        uint4 residual[1], dnormed[1];
        load_ahead<kKind>(p.y, rows, column, D, ys[j]);
        load_ahead<kKind>(p.residual, rows, column, D, residual);
        load_ahead<kKind>(p.dnormed, rows, column, D, dnormed);
        load_ahead<kKind>(p.dnew_residual, rows, column, D, dnews[j]);
        with_rows<kKind>(p.y, ys[j], rows, column, D, [&](int, const Float8& y) { n[j][0] = y; });
        gate_residual<kKind>(p.residual, p.gate, kPlain<kKind> ? held_gate[j] : load_gate(column),
                             residual, rows, column, D, n[j]);
        n[j][0] = (n[j][0] - mean) * rstd[0];
        with_rows<kKind>(p.dnormed, dnormed, rows, column, D,
                         [&](int, const Float8& x) { d[j][0] = x; });
        modulate_bwd<kKind>(p.modulation, p.dscale, rows, column, D,
                            kPlain<kKind> ? held_factor[j] : load_factor(column), n[j], d[j],
                            dn_sum[j], d_sum[j]);
      });
    };
    const auto means = norm_bwd_means<kKind>(gradient, flush, D, p.layer, sums, d, n);
    for (int base = 0; base < spans.end; base += spans.size) {
      if (kWide) gradient(base);
      norm_bwd(d, n, rstd, means);
      for_each<kP>([&](int j) {
        const int column = column_of(base, j);
        with_rows<kKind>(p.dnew_residual, dnews[j], rows, column, D,
                         [&](int, const Float8& x) { d[j][0] += x; });
        store_rows<kKind>(p.dresidual, rows, column, D, d[j]);
        gate_bwd<kKind>(p, ys[j], kPlain<kKind> ? held_gate[j] : load_gate(column), rows, column,
                        d[j][0], gate_sum[j]);
        store_rows<kKind>(p.dy, rows, column, D, d[j]);
      });
      if (kWide) flush_gate(base);
    }
    add = kKind == RowKind::kWide;
  });
  if (kWide) return;
  flush(0);
  flush_gate(0);
}

}  // namespace lumina_kernels::cuda
