// CPU kernels of context_drop_fwd: a window's tokens are added up in registers, vector by vector.
#define LUMINA_FILE "cpu/context_drop.cpp"
#include "cpu/lib/window.h"

#ifndef LUMINA_LEVEL
namespace lumina_kernels::cpu {

struct ContextDropFwd {
  Windows windows;
  Mask mask;
  Rows k, v, k_out, v_out;
  bool* mask_out;
  float* counts;
  int64_t G, K;
};

struct WindowMeanBwd {
  Windows windows;
  Mask mask;
  Rows dout, dx;
  const float* counts;
  int64_t G, K;
};

}  // namespace lumina_kernels::cpu
#endif

#include "cpu/lib/levels.h"
#ifdef LUMINA_LEVEL
namespace lumina_kernels::cpu::LUMINA_LEVEL {
namespace {

// mean of k and of v over the valid tokens of a window, 0 where there is none; their number
void context_drop_fwd(const ContextDropFwd& op, int64_t b, int64_t window) {
  const std::vector<int64_t>& tokens = valid_tokens(op.windows, op.mask, b, window);
  window_mean(op.k, b, tokens, op.G, op.K, op.k_out(b, window));
  window_mean(op.v, b, tokens, op.G, op.K, op.v_out(b, window));
  op.mask_out[b * op.windows.count() + window] = !tokens.empty();
  op.counts[b * op.windows.count() + window] = static_cast<float>(tokens.size());
}

// dx = dout / count for every valid token of a window, else 0
void window_mean_bwd(const WindowMeanBwd& op, int64_t b, int64_t window) {
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
}  // namespace lumina_kernels::cpu::LUMINA_LEVEL
#else
namespace lumina_kernels::cpu {

Tensor window_mean_bwd(const Tensor& dout, const Tensor& counts, const Windows& windows,
                       const Mask& mask) {
  const int64_t B = dout.size(0), G = dout.size(2), K = dout.size(3);
  Tensor dx = empty(dout, {B, windows.tokens(), G, K}, dout.scalar_type());
  if (dx.numel() == 0) return dx;
  const Tensor sizes = torch::stable::contiguous(counts);
  const WindowMeanBwd op{.windows = windows,
                         .mask = mask,
                         .dout = rows_of(dout),
                         .dx = rows_of(dx),
                         .counts = static_cast<const float*>(sizes.data_ptr()),
                         .G = G,
                         .K = K};
  const int64_t count = windows.count();
  parallel_rows(B * count, windows.work(G * K),
                [&](int64_t n) { LUMINA_CALL(window_mean_bwd, op, n / count, n % count); });
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
  const ContextDropFwd op{.windows = windows,
                          .mask = Mask(key_mask),
                          .k = rows_of(k),
                          .v = rows_of(v),
                          .k_out = rows_of(k_out),
                          .v_out = rows_of(v_out),
                          .mask_out = static_cast<bool*>(mask.data_ptr()),
                          .counts = static_cast<float*>(counts.data_ptr()),
                          .G = G,
                          .K = K};
  parallel_rows(B * count, 2 * windows.work(G * K),
                [&](int64_t n) { LUMINA_CALL(context_drop_fwd, op, n / count, n % count); });
  return {k_out, v_out, mask, counts};
}

std::tuple<Tensor, Tensor> context_drop_bwd(const Tensor& dk_out, const Tensor& dv_out,
                                            const Tensor& counts, const std::vector<int64_t>& grid,
                                            int64_t factor, const OptionalTensor& key_mask) {
  const Windows windows(grid, factor);
  const Mask mask(key_mask);
  return {window_mean_bwd(dk_out, counts, windows, mask),
          window_mean_bwd(dv_out, counts, windows, mask)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lumina_kernels_cpp, CPU, m) {
  m.impl("context_drop_fwd", TORCH_BOX(&context_drop_fwd));
  m.impl("context_drop_bwd", TORCH_BOX(&context_drop_bwd));
}

}  // namespace lumina_kernels::cpu
#endif
