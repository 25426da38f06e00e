// CUDA launchers of context_drop.
#include <algorithm>

#include "cuda/context_drop.cuh"
#include "cuda/lib/window_launch.h"

namespace lumina_kernels::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> context_drop_fwd(const Tensor& k, const Tensor& v,
                                                            const std::vector<int64_t>& grid,
                                                            int64_t factor,
                                                            const OptionalTensor& key_mask) {
  const MaskedWindows windows = windows_of(grid, factor, key_mask);
  const int64_t B = k.size(0), G = k.size(2), K = k.size(3), L_out = count_of(windows);
  Tensor k_out = empty(k, {B, L_out, G, K}, k.scalar_type()), v_out = empty_as(k_out);
  Tensor mask = empty(k, {B, L_out}, ScalarType::Bool);
  Tensor counts = empty(k, {B, L_out}, ScalarType::Float);
  if (B * L_out == 0) return {k_out, v_out, mask, counts};
  check_tokens(B * k.size(1));
  const Tensor ks = packed(k), vs = packed(v);
  const ContextDropFwdParams p{.k = heads_of(ks),
                               .v = heads_of(vs),
                               .k_out = heads_of(k_out),
                               .v_out = heads_of(v_out),
                               .mask_out = pointer_to<unsigned char>(mask),
                               .counts = pointer_to<float>(counts),
                               .windows = windows,
                               .G = static_cast<int>(G),
                               .K = static_cast<int>(K)};
  LUMINA_LAUNCH(k, context_drop_config(B * L_out, 2 * G, K), context_drop_kernel, p);
  return {k_out, v_out, mask, counts};
}

// The gradient of v, and of k where dk_out is there.
std::tuple<OptionalTensor, Tensor> means_bwd(const OptionalTensor& dk_out, const Tensor& dv_out,
                                             const Tensor& counts, const MaskedWindows& windows) {
  const int64_t B = dv_out.size(0), G = dv_out.size(2), K = dv_out.size(3);
  const int64_t L = int64_t{1} * windows.T * windows.grid_h * windows.grid_w;
  Tensor dv = empty(dv_out, {B, L, G, K}, dv_out.scalar_type());
  const OptionalTensor dk = dk_out ? OptionalTensor(empty_as(dv)) : std::nullopt;
  if (dv.numel() == 0) return {dk, dv};
  check_tokens(B * L);
  const OptionalTensor dks = packed(dk_out);
  const Tensor dvs = packed(dv_out);
  const int tensors = dk ? 2 : 1;
  const ContextDropBwdParams p{.dk_out = heads_of(dks),
                               .dv_out = heads_of(dvs),
                               .dk = heads_of(dk),
                               .dv = heads_of(dv),
                               .counts = pointer_to<const float>(counts),
                               .counts_b = counts.stride(0),
                               .windows = windows,
                               .tensors = tensors,
                               .G = static_cast<int>(G),
                               .K = static_cast<int>(K)};
  LUMINA_LAUNCH(dv, context_drop_config(B * count_of(windows), tensors * G, K),
                context_drop_bwd_kernel, p);
  return {dk, dv};
}

std::tuple<Tensor, Tensor> context_drop_bwd(const Tensor& dk_out, const Tensor& dv_out,
                                            const Tensor& counts, const std::vector<int64_t>& grid,
                                            int64_t factor, const OptionalTensor& key_mask) {
  const auto [dk, dv] = means_bwd(dk_out, dv_out, counts, windows_of(grid, factor, key_mask));
  return {*dk, dv};
}

}  // namespace

Tensor window_mean_bwd(const Tensor& dv_out, const Tensor& counts, const MaskedWindows& windows) {
  return std::get<1>(means_bwd(std::nullopt, dv_out, counts, windows));
}

LUMINA_CUDA_LIBRARY(m) {
  m.impl("context_drop_fwd", TORCH_BOX(&context_drop_fwd));
  m.impl("context_drop_bwd", TORCH_BOX(&context_drop_bwd));
}

}  // namespace lumina_kernels::cuda
