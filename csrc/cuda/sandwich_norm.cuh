// CUDA kernels of sandwich_norm: a row stays in registers between its statistic and output.
#pragma once

#include "cuda/lib/sandwich.cuh"

namespace lumina_kernels::cuda {

struct SandwichNormFwdParams {
  RowsView y;
  Sandwich sandwich;
  Values out;
  Global<float> rstd;  // (B, L)
  int64_t B, L;
  int D;
  float eps;
};

struct SandwichNormBwdParams {
  RowsView dout, y;
  Sandwich sandwich;  // without residual
  Global<const float> rstd;
  Values dy, dgate;  // dgate only if gate has a row per token
  Values partial;    // float32 (B, chunks, D)
  RowChunks chunks;
};

// For the second stage. A missing parameter and its gradient are null; gate and dgate are (B, D),
// or null too if gate has a row per token.
struct GateGradsParams {
  PartialSums partials;
  Values weight;
  RowsView gate;
  Values dweight, dgate;
  bool tanh;
};

constexpr int kSandwichNormRows = 2;  // at once in a forward

// out = residual + tanh(gate) * y * rstd * weight,  rstd = 1 / sqrt(mean(y²) + eps)
template <RowKind kKind, bool kTanh>
__global__ void __launch_bounds__(kForwardBounds<kKind>)
    sandwich_norm_fwd_kernel(const SandwichNormFwdParams p) {
  constexpr bool kWide = kKind == RowKind::kWide;
  constexpr int kP = kPieces<kKind>, kRows = kPlain<kKind> ? kSandwichNormRows : 1;
  const int64_t number = row_number(), groups = ceil_div(p.L, kRows), b = divide(number, groups);
  if (b >= p.B) return;
  const RowGroup rows = rows_at<kRows>(b, (number - b * groups) * kRows, p.L, p.L);
  const Spans spans = column_spans<kKind>(p.D);
  uint4 residual[kP][kRows];
  Float8 factor[kP];
  const auto load = [&](int base, Float8(&y)[kP][kRows]) {
    for_each<kP>([&](int j) {
      const int column = column_of(base, j);
      uint4 bits[kRows];
      load_ahead<kKind>(p.y, rows, column, p.D, bits);
      load_ahead<kKind>(p.sandwich.residual, rows, column, p.D, residual[j]);
      const SandwichAhead ahead = load_ahead<kKind>(p.sandwich, b, column, p.D);
      factor[j] = sandwich_factor<kKind, kTanh>(p.sandwich, ahead, b, column, p.D);
      with_rows<kKind>(p.y, bits, rows, column, p.D,
                       [&](int r, const Float8& in) { y[j][r] = in; });
    });
  };
  RowSums sums;
  Float8 y[kP][kRows];
  float mean[kRows], rstd[kRows];
  norm_statistics<kKind>(load, p.D, p.eps, false, sums, y, mean, rstd);
  for (int base = 0; base < spans.end; base += spans.size) {
    if (kWide) load(base, y);
    for_each<kP>([&](int j) {
      const int column = column_of(base, j);
      for_each<kRows>([&](int r) { y[j][r] *= rstd[r]; });
      sandwich<kKind, kTanh>(p.sandwich, factor[j], residual[j], rows, column, p.D, y[j]);
      store_rows<kKind>(p.out, rows, column, p.D, y[j]);
    });
  }
  if (threadIdx.x != 0) return;
  for_each<kRows>([&](int r) { p.rstd[rows.number(r)] = rstd[r]; });
}

// With n = y * rstd and d = dout * tanh(gate) * weight: dy = rstd * (d - n * mean(d * n));
// partial: sums over a chunk's rows, see sandwich_bwd.
template <RowKind kKind, bool kTanh>
__global__ void __launch_bounds__(kBackwardBounds<kKind>)
    sandwich_norm_bwd_kernel(const SandwichNormBwdParams p) {
  constexpr int kP = kPieces<kKind>, kRows = kPlain<kKind> ? 2 : 1;
  const int64_t number = row_number(), b = divide(number, p.chunks.per_sample());
  if (b >= p.chunks.B) return;
  const int D = p.chunks.D;
  const Spans spans = column_spans<kKind>(D);
  const int64_t partial = number * D;
  bool add = false;  // to what an earlier row of the chunk has written
  Float8 gate_sum[kP], held[kP], d[kP][kRows], n[kP][kRows];
  clear(gate_sum);
  const auto load_factor = [&](int column) {
    const SandwichAhead ahead = load_ahead<kKind>(p.sandwich, b, column, D);
    return sandwich_factor<kKind, kTanh>(p.sandwich, ahead, b, column, D);
  };
  if (kPlain<kKind>) held[0] = load_factor(column_of(0, 0));
  const auto flush = [&](int base) { flush_sums(p.partial, partial, base, D, add, gate_sum); };
  RowSums sums;
  for_rows_of_chunk<kRows>(p.chunks, b, number, [&](const RowGroup& rows) {
    if (kKind == RowKind::kWide) {
      clear(gate_sum);
    }
    float rstd[kRows];
    for_each<kRows>([&](int r) { rstd[r] = p.rstd[rows.number(r)]; });
    const auto gradient = [&](int base) {
      for_each<kP>([&](int j) {
        const int column = column_of(base, j);
        uint4 douts[kRows], ys[kRows];
        load_ahead<kKind>(p.dout, rows, column, D, douts);
        load_ahead<kKind>(p.y, rows, column, D, ys);
        with_rows<kKind>(p.dout, douts, rows, column, D,
                         [&](int r, const Float8& x) { d[j][r] = x; });
        with_rows<kKind>(p.y, ys, rows, column, D,
                         [&](int r, const Float8& y) { n[j][r] = y * rstd[r]; });
        sandwich_bwd<kKind, kTanh>(p.sandwich, p.dgate, rows, column, D,
                                   kPlain<kKind> ? held[j] : load_factor(column), n[j], d[j],
                                   gate_sum[j]);
      });
    };
    const auto means = norm_bwd_means<kKind>(gradient, flush, D, false, sums, d, n);
    for (int base = 0; base < spans.end; base += spans.size) {
      if (kKind == RowKind::kWide) gradient(base);
      norm_bwd(d, n, rstd, means);
      store_span<kKind>(p.dy, rows, base, D, d);
    }
    add = kKind == RowKind::kWide;
  });
  if (kKind != RowKind::kWide) flush(0);
}

// From the sums S of dout * n over a sample's rows: dgate = (1 - tanh(gate)²) * weight * S and
// dweight = sum_b tanh(gate) * S; without `tanh` dgate = weight * S and dweight = sum_b gate * S.
// Without a gate S has that factor already, or there is none, and dweight = sum_b S.
__global__ void __launch_bounds__(kSumColumns* kSumSlices)
    sandwich_norm_gate_kernel(const GateGradsParams p) {
  const int D = p.partials.D;
  const int column = static_cast<int>(blockIdx.x) * kSumColumns + static_cast<int>(threadIdx.x);
  const auto finish = [&](int64_t b, float (&S)[1]) {
    if (!is_there(p.gate)) return;
    float g = load1(p.gate.values, p.gate.row(b, 0) + column), slope = 1.0f;
    if (p.tanh) {
      g = tanhf(g);
      slope = 1.0f - g * g;
    }
    if (is_there(p.weight)) slope *= load1(p.weight, column);
    store1(p.dgate, b * D + column, slope * S[0]);
    S[0] *= g;
  };
  float dweight[1];
  sum_partials(p.partials, column, finish, dweight);
  if (threadIdx.y != 0 || column >= D || !is_there(p.dweight)) return;
  store1(p.dweight, column, dweight[0]);
}

}  // namespace lumina_kernels::cuda
