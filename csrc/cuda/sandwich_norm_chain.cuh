// CUDA kernels of sandwich_norm_chain: a row stays in registers through both norms.
#pragma once

#include "cuda/lib/sandwich_norm_row.cuh"

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
  Values dgate, dscale;   // only where gate, scale have a row per token
  Global<float> partial;  // (B, chunks, 2, D): for next_weight and next_scale, for weight and gate
  int64_t B, L, chunk;
  int D;
};

// new_residual = residual + tanh(gate) * y * rstd * weight,
// normed = new_residual * next_rstd * next_weight * (1 + next_scale)
template <int kPieces, bool kWide>
__global__ void __launch_bounds__(row_threads(kPieces))
    sandwich_norm_chain_fwd_kernel(const SandwichNormChainFwdParams p) {
  const int64_t row = row_number();
  if (row >= p.B * p.L) return;
  const int64_t b = divide(row, p.L), l = row - b * p.L;
  const Spans spans = row_spans<kPieces, kWide>(p.D);
  RowSum sum;
  float x[kPieces][8];
  const auto load_y = [&](int base, float (&y)[kPieces][8]) {
    load_span(p.y.values, p.y.row(b, l), base, p.D, y);
  };
  const float rstd = norm_statistics<kWide>(load_y, p.D, p.eps, false, sum, x).y;
  const auto make_new_residual = [&](int base, float (&y)[kPieces][8]) {
    if (kWide) load_y(base, y);  // else it is there
    for_columns<kPieces>([&](int j, int k) { y[j][k] *= rstd; });
    sandwich(p.sandwich, b, l, base, p.D, y);
    store_span(p.new_residual, row * p.D, base, p.D, y);
  };
  const float next_rstd = norm_statistics<kWide>(make_new_residual, p.D, p.eps, false, sum, x).y;
  for (int base = 0; base < spans.end; base += spans.size) {
    if (kWide) make_new_residual(base, x);
    for_columns<kPieces>([&](int j, int k) { x[j][k] *= next_rstd; });
    modulate(p.next, b, l, base, p.D, x);
    store_span(p.normed, row * p.D, base, p.D, x);
  }
  if (threadIdx.x != 0) return;
  p.rstd[row] = rstd;
  p.next_rstd[row] = next_rstd;
}

// dresidual = dnew_residual + that of the next norm's input, with `new_residual` computed again
// rather than read rounded; dy from it as in sandwich_norm. partial: sums over `chunk` rows.
template <int kPieces, bool kWide>
__global__ void __launch_bounds__(row_threads(kPieces))
    sandwich_norm_chain_bwd_kernel(const SandwichNormChainBwdParams p) {
  const int64_t number = row_number(), chunks = ceil_div(p.L, p.chunk);
  if (number >= p.B * chunks) return;
  const int64_t sample = divide(number, chunks), start = (number - sample * chunks) * p.chunk;
  const int64_t end = min(start + p.chunk, p.L);
  const int D = p.D;
  const Spans spans = row_spans<kPieces, kWide>(D);
  const Global<float> partial = p.partial + number * 2 * D;
  float next_sum[kPieces][8], unused[kPieces][8], gate_sum[kPieces][8];
  float d[kPieces][8], n[kPieces][8];
  clear(next_sum);
  clear(unused);
  clear(gate_sum);
  RowSum sum;
  for (int64_t l = start; l < end; ++l) {
    const int64_t b = opaque(sample), row = b * p.L + l;
    const float rstd = p.rstd[row], next_rstd = p.next_rstd[row];
    const auto load_n = [&](int base) {
      load_span(p.y.values, p.y.row(b, l), base, D, n);
      for_columns<kPieces>([&](int j, int k) { n[j][k] *= rstd; });
    };
    const auto next_gradient = [&](int base) {
      load_n(base);
      sandwich(p.sandwich, b, l, base, D, n);
      for_columns<kPieces>([&](int j, int k) { n[j][k] *= next_rstd; });
      load_span(p.dnormed.values, p.dnormed.row(b, l), base, D, d);
      modulate_bwd(p.next, p.dscale, b, l, row, base, D, n, d, next_sum, unused);
    };
    float along = 0.0f, next_along = 0.0f;
    for (int base = 0; base < spans.end; base += spans.size) {
      next_gradient(base);
      for_columns<kPieces>([&](int j, int k) { next_along += d[j][k] * n[j][k]; });
      if (kWide) {
        store_sums(partial, base, D, next_sum);
        clear(next_sum);
      }
    }
    next_along = sum(next_along) / static_cast<float>(D);
    const auto gradient = [&](int base) {
      if (kWide) next_gradient(base);
      norm_bwd(d, n, next_rstd, next_along, 0.0f);
      add_span(p.dnew_residual.values, p.dnew_residual.row(b, l), base, D, d);
      store_span(p.dresidual, row * D, base, D, d);
      load_n(base);
      sandwich_bwd(p.sandwich, p.dgate, b, l, row, base, D, n, d, gate_sum);
    };
    for (int base = 0; base < spans.end; base += spans.size) {
      gradient(base);
      for_columns<kPieces>([&](int j, int k) { along += d[j][k] * n[j][k]; });
      if (kWide) {
        store_sums(partial + D, base, D, gate_sum);
        clear(gate_sum);
      }
    }
    along = sum(along) / static_cast<float>(D);
    for (int base = 0; base < spans.end; base += spans.size) {
      if (kWide) gradient(base);
      norm_bwd(d, n, rstd, along, 0.0f);
      store_span(p.dy, row * D, base, D, d);
    }
  }
  if (kWide) return;
  store_sums(partial, 0, D, next_sum);
  store_sums(partial + D, 0, D, gate_sum);
}

}  // namespace lumina_kernels::cuda
