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
  Values dy, dgate;       // dgate only if gate has a row per token
  Global<float> partial;  // (B, chunks, D)
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

// out = residual + tanh(gate) * y * rstd * weight,  rstd = 1 / sqrt(mean(y²) + eps)
template <int kPieces, bool kWide, bool kTanh>
__global__ void __launch_bounds__(row_threads(kPieces))
    sandwich_norm_fwd_kernel(const SandwichNormFwdParams p) {
  const int64_t row = row_number();
  if (row >= p.B * p.L) return;
  const int64_t b = divide(row, p.L), l = row - b * p.L;
  const Spans spans = column_spans<kPieces, kWide>(p.D);
  constexpr bool kAhead = kLoadsAhead<kPieces, kWide>;
  SandwichAhead ahead;
  const auto load = [&](int base, Float8(&y)[kPieces]) {
    if constexpr (kAhead) {
      const int column = column_of(base, 0);
      const Bits8 bits = load_bits8(p.y.values, p.y.row(b, l) + column, p.D - column);
      ahead = load_ahead(p.sandwich, b, l, column, p.D);
      y[0] = to_float8(bits, p.y.values.dtype);
    } else {
      load_span(p.y.values, p.y.row(b, l), base, p.D, y);
    }
  };
  RowSum sum;
  Float8 y[kPieces];
  const float rstd = norm_statistics<kWide>(load, p.D, p.eps, false, sum, y).y;
  for (int base = 0; base < spans.end; base += spans.size) {
    if (kWide) load(base, y);
    for_pieces<kPieces>([&](int j) { y[j] *= rstd; });
    sandwich<kTanh, kAhead>(p.sandwich, ahead, b, l, base, p.D, y);
    store_span(p.out, row * p.D, base, p.D, y);
  }
  if (threadIdx.x == 0) p.rstd[row] = rstd;
}

// With n = y * rstd and d = dout * tanh(gate) * weight: dy = rstd * (d - n * mean(d * n));
// partial: sums over a chunk's rows, see sandwich_bwd.
template <int kPieces, bool kWide, bool kTanh>
__global__ void __launch_bounds__(row_threads(kPieces))
    sandwich_norm_bwd_kernel(const SandwichNormBwdParams p) {
  const int64_t number = row_number();
  if (number >= p.chunks.count()) return;
  const int D = p.chunks.D;
  const Spans spans = column_spans<kPieces, kWide>(D);
  const Global<float> partial = p.partial + number * D;
  Float8 gate_sum[kPieces], d[kPieces], n[kPieces];
  clear(gate_sum);
  const auto flush = [&](int base) { flush_sums(partial, base, D, gate_sum); };
  RowSum sum;
  for_rows_of_chunk(p.chunks, number, [&](int64_t b, int64_t l, int64_t row) {
    const float rstd = p.rstd[row];
    const auto gradient = [&](int base) {
      load_span(p.dout.values, p.dout.row(b, l), base, D, d);
      load_span(p.y.values, p.y.row(b, l), base, D, n);
      for_pieces<kPieces>([&](int j) { n[j] *= rstd; });
      sandwich_bwd<kTanh>(p.sandwich, p.dgate, b, l, row, base, D, n, d, gate_sum);
    };
    const NormBwdMeans means = norm_bwd_means<kWide>(gradient, flush, D, false, sum, d, n);
    for (int base = 0; base < spans.end; base += spans.size) {
      if (kWide) gradient(base);
      norm_bwd(d, n, rstd, means);
      store_span(p.dy, row * D, base, D, d);
    }
  });
  if (!kWide) flush(0);
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
