// CPU kernels of context_drop: a window's tokens are added up in registers, vector by vector.
#define LUMINA_FILE "context_drop.cpp"
#include "window.h"

#ifndef LUMINA_LEVEL
namespace lumina_kernels {

struct ContextDrop {
  Windows windows;
  Mask mask;
  Rows k, v, k_out, v_out;
  bool* mask_out;
  float* counts;
  int64_t G, K;
};

struct WindowMeansBwd {
  Windows windows;
  Mask mask;
  Rows dout, dx;
  const float* counts;
  int64_t G, K;
};

}  // namespace lumina_kernels
#endif

#include "levels.h"
#ifdef LUMINA_LEVEL
namespace lumina_kernels::LUMINA_LEVEL {
namespace {

// mean of k and of v over the valid tokens of a window, 0 where there is none; their number
void context_drop(const ContextDrop& op, int64_t b, int64_t window) {
  const std::vector<int64_t>& tokens = valid_tokens(op.windows, op.mask, b, window);
  mean_of(op.k, b, tokens, op.G, op.K, op.k_out(b, window));
  mean_of(op.v, b, tokens, op.G, op.K, op.v_out(b, window));
  op.mask_out[b * op.windows.count() + window] = !tokens.empty();
  op.counts[b * op.windows.count() + window] = static_cast<float>(tokens.size());
}

// dx = dout / count for every valid token of a window, else 0
void window_means_bwd(const WindowMeansBwd& op, int64_t b, int64_t window) {
  const int64_t width = op.G * op.K;
  const Vec size = broadcast(std::max(op.counts[b * op.windows.count() + window], 1.f));
  float* row = scratch(padded(width));
  stage(heads_at(op.dout, b, window, op.G, op.K), row);
  op.windows.for_tokens(window, [&](int64_t l) {
    const Row dx = op.dx(b, l);
    if (!op.mask(b, l)) return fill_zeros(dx, width);
    for_whole_vectors(width,
                      [&](int64_t i, int64_t count) { store(dx, i, load(row + i) / size, count); });
  });
}

}  // namespace
}  // namespace lumina_kernels::LUMINA_LEVEL
#else
namespace lumina_kernels {

Tensor window_means_bwd(const Tensor& dout, const Tensor& counts, const Windows& windows,
                        const Mask& mask) {
  const int64_t B = dout.size(0), G = dout.size(2), K = dout.size(3);
  Tensor dx = empty(dout, {B, windows.tokens(), G, K}, dout.scalar_type());
  if (dx.numel() == 0) return dx;
  const Tensor sizes = torch::stable::contiguous(counts);
  const WindowMeansBwd op{
      windows, mask, rows_of(dout), rows_of(dx), static_cast<const float*>(sizes.data_ptr()), G, K};
  const int64_t count = windows.count();
  parallel_rows(B * count, windows.work(G * K),
                [&](int64_t n) { LUMINA_CALL(window_means_bwd, op, n / count, n % count); });
  return dx;
}

namespace {

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

FourTensors context_drop_fwd(const Tensor& k, const Tensor& v, const std::vector<int64_t>& grid,
                             int64_t factor, const OptionalTensor& key_mask) {
  const Windows windows(grid, factor);
  const int64_t B = k.size(0), G = k.size(2), K = k.size(3), count = windows.count();
  Tensor k_out = empty(k, {B, count, G, K}, k.scalar_type());
  Tensor v_out = empty(v, {B, count, G, K}, v.scalar_type());
  Tensor mask = empty(k, {B, count}, ScalarType::Bool);
  Tensor counts = empty(k, {B, count}, ScalarType::Float);
  const ContextDrop op{windows,
                       Mask(key_mask),
                       rows_of(k),
                       rows_of(v),
                       rows_of(k_out),
                       rows_of(v_out),
                       static_cast<bool*>(mask.data_ptr()),
                       static_cast<float*>(counts.data_ptr()),
                       G,
                       K};
  parallel_rows(B * count, 2 * windows.work(G * K),
                [&](int64_t n) { LUMINA_CALL(context_drop, op, n / count, n % count); });
  return {k_out, v_out, mask, counts};
}

std::tuple<Tensor, Tensor> context_drop_bwd(const Tensor& dk_out, const Tensor& dv_out,
                                            const Tensor& counts, const std::vector<int64_t>& grid,
                                            int64_t factor, const OptionalTensor& key_mask) {
  const Windows windows(grid, factor);
  const Mask mask(key_mask);
  return {window_means_bwd(dk_out, counts, windows, mask),
          window_means_bwd(dv_out, counts, windows, mask)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cpp, CPU, m) {
  m.impl("context_drop_fwd", TORCH_BOX(&context_drop_fwd));
  m.impl("context_drop_bwd", TORCH_BOX(&context_drop_bwd));
}

}  // namespace lumina_kernels
#endif
