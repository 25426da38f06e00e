// CUDA launchers of rope3d. The gradients of q and k are the opposite rotation.
#include "cuda/lib/rope_launch.h"
#include "cuda/rope3d.cuh"

namespace lumina_kernels::cuda {
namespace {

std::tuple<Tensor, Tensor> rotated(const Tensor& q, const Tensor& k, const Tensor& positions,
                                   const Tensor& inv_freq, const Tensor& axis, float sign) {
  Tensor q_out = empty_as(q), k_out = empty_as(k);
  if (q.numel() + k.numel() == 0) return {q_out, k_out};
  const int64_t tokens = q.size(0) * q.size(1), H = q.size(2), G = k.size(2), K = q.size(3);
  check_tokens(tokens);
  const Tensor qs = packed(q), ks = packed(k);
  const RowLayout layout = token_layout(H + G, ceil_div(K, 8), kRope3dThreads);
  const Rope3dParams p{.q = heads_of(qs),
                       .k = heads_of(ks),
                       .q_out = heads_of(q_out),
                       .k_out = heads_of(k_out),
                       .angles = angles_of(positions, inv_freq, axis),
                       .layout = layout,
                       .tokens = tokens,
                       .L = q.size(1),
                       .H = static_cast<int>(H),
                       .G = static_cast<int>(G),
                       .K = static_cast<int>(K),
                       .sign = sign};
  LUMINA_LAUNCH(q, rope3d_config(layout, tokens, K), rope3d_kernel, p);
  return {q_out, k_out};
}

std::tuple<Tensor, Tensor> rope3d_fwd(const Tensor& q, const Tensor& k, const Tensor& positions,
                                      const Tensor& inv_freq, const Tensor& axis) {
  return rotated(q, k, positions, inv_freq, axis, 1.0f);
}

std::tuple<Tensor, Tensor> rope3d_bwd(const Tensor& dq_out, const Tensor& dk_out,
                                      const Tensor& positions, const Tensor& inv_freq,
                                      const Tensor& axis) {
  return rotated(dq_out, dk_out, positions, inv_freq, axis, -1.0f);
}

}  // namespace

LUMINA_CUDA_LIBRARY(m) {
  m.impl("rope3d_fwd", TORCH_BOX(&rope3d_fwd));
  m.impl("rope3d_bwd", TORCH_BOX(&rope3d_bwd));
}

}  // namespace lumina_kernels::cuda
