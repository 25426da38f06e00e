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
  Values dgate, dscale;   // only if gate or scale has a row per token
  Global<float> partial;  // (B, chunks, 2, D): for next_weight and next_scale, for weight and gate
  RowChunks chunks;
};

// When the statistics of a row are stored: with four pieces and no tanh a register spills
// otherwise, on sm_90 and sm_120 if it is early, on sm_100 if it is late.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200
constexpr bool kStoresEarly = true;
#else
constexpr bool kStoresEarly = false;
#endif

// new_residual = residual + tanh(gate) * y * rstd * weight,
// normed = new_residual * next_rstd * next_weight * (1 + next_scale)
template <int kPieces, bool kWide, bool kTanh>
__global__ void __launch_bounds__(row_threads(kPieces))
    sandwich_norm_chain_fwd_kernel(const SandwichNormChainFwdParams p) {
  const int64_t row = row_number();
  if (row >= p.B * p.L) return;
  const int64_t b = divide(row, p.L), l = row - b * p.L;
  const Spans spans = column_spans<kPieces, kWide>(p.D);
  RowSum sum;
  Float8 x[kPieces];
  const auto load_y = [&](int base, Float8(&y)[kPieces]) {
    load_span(p.y.values, p.y.row(b, l), base, p.D, y);
  };
  const float rstd = norm_statistics<kWide>(load_y, p.D, p.eps, false, sum, x).y;
  if (kStoresEarly && threadIdx.x == 0) p.rstd[row] = rstd;
  const auto make_new_residual = [&](int base, Float8(&y)[kPieces]) {
    if (kWide) load_y(base, y);  // otherwise it is still there
    for_pieces<kPieces>([&](int j) { y[j] *= rstd; });
    sandwich<kTanh, false>(p.sandwich, {}, b, l, base, p.D, y);
    store_span(p.new_residual, row * p.D, base, p.D, y);
  };
  const float next_rstd = norm_statistics<kWide>(make_new_residual, p.D, p.eps, false, sum, x).y;
  if (kStoresEarly && threadIdx.x == 0) p.next_rstd[row] = next_rstd;
  for (int base = 0; base < spans.end; base += spans.size) {
    if (kWide) make_new_residual(base, x);
    for_pieces<kPieces>([&](int j) { x[j] *= next_rstd; });
    modulate(p.next, b, l, base, p.D, x);
    store_span(p.normed, row * p.D, base, p.D, x);
  }
  if (kStoresEarly || threadIdx.x != 0) return;
  p.rstd[row] = rstd;
  p.next_rstd[row] = next_rstd;
}

// dresidual is dnew_residual plus the gradient of the next norm's input, and dy follows from it as
// in sandwich_norm. The rows of new_residual are recomputed: what the forward wrote was rounded.
template <int kPieces, bool kWide, bool kTanh>
__global__ void __launch_bounds__(row_threads(kPieces))
    sandwich_norm_chain_bwd_kernel(const SandwichNormChainBwdParams p) {
  const int64_t number = row_number();
  if (number >= p.chunks.count()) return;
  const int D = p.chunks.D;
  const Spans spans = column_spans<kPieces, kWide>(D);
  const Global<float> partial = p.partial + number * 2 * D;
  Float8 next_sum[kPieces], unused[kPieces], gate_sum[kPieces], d[kPieces], n[kPieces];
  clear(next_sum);
  clear(unused);
  clear(gate_sum);
  const auto flush_next = [&](int base) { flush_sums(partial, base, D, next_sum); };
  const auto flush_gate = [&](int base) { flush_sums(partial + D, base, D, gate_sum); };
  RowSum sum;
  for_rows_of_chunk(p.chunks, number, [&](int64_t b, int64_t l, int64_t row) {
    const float rstd = p.rstd[row], next_rstd = p.next_rstd[row];
    const auto load_n = [&](int base) {
      load_span(p.y.values, p.y.row(b, l), base, D, n);
      for_pieces<kPieces>([&](int j) { n[j] *= rstd; });
    };
    const auto next_gradient = [&](int base) {
      load_n(base);
      sandwich<kTanh, false>(p.sandwich, {}, b, l, base, D, n);
      for_pieces<kPieces>([&](int j) { n[j] *= next_rstd; });
      load_span(p.dnormed.values, p.dnormed.row(b, l), base, D, d);
      modulate_bwd(p.next, p.dscale, b, l, row, base, D, n, d, next_sum, unused);
    };
    const NormBwdMeans next_means =
        norm_bwd_means<kWide>(next_gradient, flush_next, D, false, sum, d, n);
    const auto gradient = [&](int base) {
      if (kWide) next_gradient(base);
      norm_bwd(d, n, next_rstd, next_means);
      load_span(p.dnew_residual.values, p.dnew_residual.row(b, l), base, D, n);
      for_pieces<kPieces>([&](int j) { d[j] += n[j]; });
      store_span(p.dresidual, row * D, base, D, d);
      load_n(base);
      sandwich_bwd<kTanh>(p.sandwich, p.dgate, b, l, row, base, D, n, d, gate_sum);
    };
    const NormBwdMeans means = norm_bwd_means<kWide>(gradient, flush_gate, D, false, sum, d, n);
    for (int base = 0; base < spans.end; base += spans.size) {
      if (kWide) gradient(base);
      norm_bwd(d, n, rstd, means);
      store_span(p.dy, row * D, base, D, d);
    }
  });
  if (kWide) return;
  flush_next(0);
  flush_gate(0);
}

}  // namespace lumina_kernels::cuda
