// CUDA launchers of qk_norm_rope3d_pool.
#include "cuda/lib/qk_norm_launch.h"
#include "cuda/qk_norm_rope3d_pool.cuh"

namespace lumina_kernels::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> qk_norm_rope3d_pool_fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& q_weight,
    const OptionalTensor& q_bias, const OptionalTensor& k_weight, const OptionalTensor& k_bias,
    const Tensor& positions, const Tensor& inv_freq, const Tensor& axis,
    const std::vector<int64_t>& grid, int64_t factor, const OptionalTensor& key_mask, double eps,
    const std::string& norm) {
  const MaskedWindows windows = windows_of(grid, factor, key_mask);
  const int64_t B = q.size(0), H = q.size(2), G = k.size(2), K = q.size(3);
  const int64_t L_out = count_of(windows);
  Tensor q_out = empty_as(q);
  Tensor k_out = empty(k, {B, L_out, G, K}, k.scalar_type()), v_out = empty_as(k_out);
  Tensor mask = empty(k, {B, L_out}, ScalarType::Bool);
  Tensor counts = empty(k, {B, L_out}, ScalarType::Float);
  if (B * L_out == 0) return {q_out, k_out, v_out, mask, counts};
  check_tokens(B * q.size(1));
  const Tensor qs = packed(q), ks = packed(k), vs = packed(v);
  const OptionalTensor qw = packed(q_weight), qb = packed(q_bias);
  const OptionalTensor kw = packed(k_weight), kb = packed(k_bias);
  int N;
  const NormShape shape = norm_shape(H, G, K, eps, norm, kPoolLimits, N);
  const NormParameters parameters{parameter_of(qw, K), parameter_of(qb, K), parameter_of(kw, K),
                                  parameter_of(kb, K)};
  const QkNormRope3dPoolParams p{.q = heads_of(qs),
                                 .k = heads_of(ks),
                                 .v = heads_of(vs),
                                 .q_out = heads_of(q_out),
                                 .k_out = heads_of(k_out),
                                 .v_out = heads_of(v_out),
                                 .parameters = parameters,
                                 .angles = angles_of(positions, inv_freq, axis),
                                 .shape = shape,
                                 .mask_out = pointer_to<unsigned char>(mask),
                                 .counts = pointer_to<float>(counts),
                                 .windows = windows};
  const LaunchConfig config =
      row_config(shape.layout, B * L_out, norm_floats(shape.layout, shape.norm, N, pool_tokens(N)));
  with_heads<kPoolLimits.heads>(
      N, [&](auto n) { LUMINA_LAUNCH(q, config, qk_norm_rope3d_pool_kernel<n()>, p); });
  return {q_out, k_out, v_out, mask, counts};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> qk_norm_rope3d_pool_bwd(
    const Tensor& dq_out, const Tensor& dk_out, const Tensor& dv_out, const Tensor& q,
    const Tensor& k, const OptionalTensor& q_weight, const OptionalTensor& q_bias,
    const OptionalTensor& k_weight, const OptionalTensor& k_bias, const Tensor& positions,
    const Tensor& inv_freq, const Tensor& axis, const Tensor& counts,
    const std::vector<int64_t>& grid, int64_t factor, const OptionalTensor& key_mask, double eps,
    const std::string& norm) {
  const AnglesView angles = angles_of(positions, inv_freq, axis);
  const CountedWindows pool{windows_of(grid, factor, key_mask), packed(counts)};
  const auto [dq, q_partial] = row_bwd(dq_out, q, q_weight, q_bias, angles, eps, norm, nullptr);
  const auto [dk, k_partial] = row_bwd(dk_out, k, k_weight, k_bias, angles, eps, norm, &pool);
  const Tensor dv = window_mean_bwd(dv_out, pool.counts, pool.windows);
  const ParameterGrads grads =
      parameter_grads(q_partial, k_partial, q_weight, q_bias, k_weight, k_bias);
  return {dq, dk, dv, grads.q_weight, grads.q_bias, grads.k_weight, grads.k_bias};
}

}  // namespace

LUMINA_CUDA_LIBRARY(m) {
  m.impl("qk_norm_rope3d_pool_fwd", TORCH_BOX(&qk_norm_rope3d_pool_fwd));
  m.impl("qk_norm_rope3d_pool_bwd", TORCH_BOX(&qk_norm_rope3d_pool_bwd));
}

}  // namespace lumina_kernels::cuda
