// CUDA kernels of sandwich_norm_chain: a row stays in registers through both norms.
#pragma once

#include "cuda/lib/sandwich.cuh"

namespace lumina_kernels::cuda {

struct SandwichNormChainFwdParams {
  RowsView y;
  Sandwich sandwich;
  ModulationView next;  // weight and scale
  Values new_residual, normed;
  Global<float> rstd, next_rstd;  // (B, L)
  int64_t B, L;
  int D;
  float eps;
};

struct SandwichNormChainBwdParams {
  RowsView dnew_residual, dnormed, y;
  Sandwich sandwich;
  ModulationView next;
  Global<const float> rstd, next_rstd;
  Values dy, dresidual;
  Values dgate, dscale;  // only if gate or scale has a row per token
  Values partial;  // float32 (B, chunks, 2, D): for next_weight and next_scale, for weight and gate
  RowChunks chunks;
};

constexpr int kSandwichNormChainRows = 2;  // at once in a forward

// new_residual = residual + tanh(gate) * y * rstd * weight,
// normed = new_residual * next_rstd * next_weight * (1 + next_scale)
template <RowKind kKind, bool kTanh>
__global__ void __launch_bounds__(kKind == RowKind::kWide ? kRowThreads + 64
                                                          : kForwardBounds<kKind>)
    sandwich_norm_chain_fwd_kernel(const SandwichNormChainFwdParams p) {
  constexpr bool kWide = kKind == RowKind::kWide;
  constexpr int kP = kPieces<kKind>, kRows = kPlain<kKind> ? kSandwichNormChainRows : 1;
  const int64_t number = row_number(), groups = ceil_div(p.L, kRows), b = divide(number, groups);
  if (b >= p.B) return;
  const RowGroup rows = rows_at<kRows>(b, (number - b * groups) * kRows, p.L, p.L);
  const Spans spans = column_spans<kKind>(p.D);
  const ModulationView next = {p.next.weight, {}, p.next.scale, {}};
  uint4 residual[kP][kRows];
  Float8 factor[kP];
  Affine a[kP];
  const auto load_y = [&](int base, Float8(&y)[kP][kRows]) {
    for_each<kP>([&](int j) {
      const int column = column_of(base, j);
      uint4 bits[kRows];
      load_ahead<kKind>(p.y, rows, column, p.D, bits);
      load_ahead<kKind>(p.sandwich.residual, rows, column, p.D, residual[j]);
      const SandwichAhead ahead = load_ahead<kKind>(p.sandwich, b, column, p.D);
      const AffineAhead next_ahead = load_ahead<kKind>(next, b, column, p.D);
      factor[j] = sandwich_factor<kKind, kTanh>(p.sandwich, ahead, b, column, p.D);
      a[j] = affine<kKind>(next, next_ahead, b, column, p.D);
      with_rows<kKind>(p.y, bits, rows, column, p.D,
                       [&](int r, const Float8& in) { y[j][r] = in; });
    });
  };
  RowSums sums;
  Float8 x[kP][kRows];
  float mean[kRows], rstd[kRows], next_rstd[kRows];
  norm_statistics<kKind>(load_y, p.D, p.eps, false, sums, x, mean, rstd);
  const auto make_new_residual = [&](int base, Float8(&y)[kP][kRows]) {
    if (kWide) load_y(base, y);  // otherwise it is still there
    for_each<kP>([&](int j) {
      const int column = column_of(base, j);
      for_each<kRows>([&](int r) { y[j][r] *= rstd[r]; });
      sandwich<kKind, kTanh>(p.sandwich, factor[j], residual[j], rows, column, p.D, y[j]);
      store_rows<kKind>(p.new_residual, rows, column, p.D, y[j]);
    });
  };
  norm_statistics<kKind>(make_new_residual, p.D, p.eps, false, sums, x, mean, next_rstd);
  for (int base = 0; base < spans.end; base += spans.size) {
    if (kWide) make_new_residual(base, x);
    for_each<kP>([&](int j) {
      const int column = column_of(base, j);
      for_each<kRows>([&](int r) { x[j][r] *= next_rstd[r]; });
      modulate<kKind>(next, a[j], rows, column, p.D, x[j]);
      store_rows<kKind>(p.normed, rows, column, p.D, x[j]);
    });
  }
  if (threadIdx.x != 0) return;
  for_each<kRows>([&](int r) {
    p.rstd[rows.number(r)] = rstd[r];
    p.next_rstd[rows.number(r)] = next_rstd[r];
  });
}

// dresidual is dnew_residual plus the gradient of the next norm's input, and dy follows from it as
// in sandwich_norm. The rows of new_residual are recomputed: what the forward wrote was rounded.
template <RowKind kKind, bool kTanh>
__global__ void __launch_bounds__(kBackwardBounds<kKind>)
    sandwich_norm_chain_bwd_kernel(const SandwichNormChainBwdParams p) {
  constexpr bool kWide = kKind == RowKind::kWide, kWhole = kKind == RowKind::kWhole;
  constexpr int kP = kPieces<kKind>;
  const int64_t number = row_number(), b = divide(number, p.chunks.per_sample());
  if (b >= p.chunks.B) return;
  const int D = p.chunks.D;
  const Spans spans = column_spans<kKind>(D);
  const ModulationView next = {p.next.weight, {}, p.next.scale, {}};
  const int64_t partial = number * 2 * D;
  bool add = false;  // to what an earlier row of the chunk has written
  Float8 next_sum[kP], unused[kP], gate_sum[kP], held[kP], held_next[kP];
  Float8 d[kP][1], n[kP][1];
  uint4 ys[kP][1], dnews[kP][1];
  clear(next_sum);
  clear(unused);
  clear(gate_sum);
  const auto load_factor = [&](int column) {
    const SandwichAhead ahead = load_ahead<kKind>(p.sandwich, b, column, D);
    return sandwich_factor<kKind, kTanh>(p.sandwich, ahead, b, column, D);
  };
  const auto load_next_factor = [&](int column) {
    const AffineAhead ahead = load_ahead<kKind>(next, b, column, D);
    return affine<kKind>(next, ahead, b, column, D).factor;
  };
  if (kPlain<kKind>) {
    held[0] = load_factor(column_of(0, 0));
    held_next[0] = load_next_factor(column_of(0, 0));
  }
  const auto flush_next = [&](int base) { flush_sums(p.partial, partial, base, D, add, next_sum); };
  const auto flush_gate = [&](int base) {
    flush_sums(p.partial, partial + D, base, D, add, gate_sum);
  };
  RowSums sums;
  for_rows_of_chunk<1>(p.chunks, b, number, [&](const RowGroup& rows) {
    if (kWide) {
      clear(next_sum);
      clear(unused);
      clear(gate_sum);
    }
    const float rstd[] = {p.rstd[rows.row]}, next_rstd[] = {p.next_rstd[rows.row]};
    const auto normalise = [&](int j, int column) {
      with_rows<kKind>(p.y, ys[j], rows, column, D,
                       [&](int, const Float8& y) { n[j][0] = y * rstd[0]; });
    };
    const auto next_gradient = [&](int base) {
      for_each<kP>([&](int j) {
        const int column = column_of(base, j);
        uint4 residual[1], dnormed[1];
        load_ahead<kKind>(p.y, rows, column, D, ys[j]);
        load_ahead<kKind>(p.sandwich.residual, rows, column, D, residual);
        load_ahead<kKind>(p.dnormed, rows, column, D, dnormed);
        load_ahead<kKind>(p.dnew_residual, rows, column, D, dnews[j]);
        normalise(j, column);
        if (kWide) held[j] = load_factor(column);
        sandwich<kKind, kTanh>(p.sandwich, kWhole ? load_factor(column) : held[j], residual, rows,
                               column, D, n[j]);
        n[j][0] *= next_rstd[0];
        with_rows<kKind>(p.dnormed, dnormed, rows, column, D,
                         [&](int, const Float8& x) { d[j][0] = x; });
        modulate_bwd<kKind>(next, p.dscale, rows, column, D,
                            kPlain<kKind> ? held_next[j] : load_next_factor(column), n[j], d[j],
                            next_sum[j], unused[j]);
      });
    };
    const auto next_means = norm_bwd_means<kKind>(next_gradient, flush_next, D, false, sums, d, n);
    const auto gradient = [&](int base) {
      if (kWide) next_gradient(base);
      norm_bwd(d, n, next_rstd, next_means);
      for_each<kP>([&](int j) {
        const int column = column_of(base, j);
        with_rows<kKind>(p.dnew_residual, dnews[j], rows, column, D,
                         [&](int, const Float8& x) { d[j][0] += x; });
        store_rows<kKind>(p.dresidual, rows, column, D, d[j]);
        normalise(j, column);
        sandwich_bwd<kKind, kTanh>(p.sandwich, p.dgate, rows, column, D,
                                   kWhole ? load_factor(column) : held[j], n[j], d[j], gate_sum[j]);
      });
    };
    const auto means = norm_bwd_means<kKind>(gradient, flush_gate, D, false, sums, d, n);
    for (int base = 0; base < spans.end; base += spans.size) {
      if (kWide) gradient(base);
      norm_bwd(d, n, rstd, means);
      store_span<kKind>(p.dy, rows, base, D, d);
    }
    add = kKind == RowKind::kWide;
  });
  if (kWide) return;
  flush_next(0);
  flush_gate(0);
}

}  // namespace lumina_kernels::cuda
