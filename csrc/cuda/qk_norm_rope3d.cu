// CUDA launchers of qk_norm_rope3d.
#include "cuda/lib/qk_norm_launch.h"
#include "cuda/qk_norm_rope3d.cuh"

namespace lumina_kernels::cuda {
namespace {

std::tuple<Tensor, Tensor> qk_norm_rope3d_fwd(
    const Tensor& q, const Tensor& k, const OptionalTensor& q_weight, const OptionalTensor& q_bias,
    const OptionalTensor& k_weight, const OptionalTensor& k_bias, const Tensor& positions,
    const Tensor& inv_freq, const Tensor& axis, double eps, const std::string& norm) {
  Tensor q_out = empty_as(q), k_out = empty_as(k);
  if (q.numel() + k.numel() == 0) return {q_out, k_out};
  const int64_t tokens = q.size(0) * q.size(1), K = q.size(3);
  check_tokens(tokens);
  const Tensor qs = packed(q), ks = packed(k);
  const OptionalTensor qw = packed(q_weight), qb = packed(q_bias);
  const OptionalTensor kw = packed(k_weight), kb = packed(k_bias);
  int N;
  const NormShape shape = norm_shape(q.size(2), k.size(2), K, eps, norm, kFwdLimits, N);
  const NormParameters parameters{parameter_of(qw, K), parameter_of(qb, K), parameter_of(kw, K),
                                  parameter_of(kb, K)};
  const QkNormRope3dFwdParams p{.q = heads_of(qs),
                                .k = heads_of(ks),
                                .q_out = heads_of(q_out),
                                .k_out = heads_of(k_out),
                                .parameters = parameters,
                                .angles = angles_of(positions, inv_freq, axis),
                                .shape = shape,
                                .tokens = tokens,
                                .L = q.size(1)};
  const int T = fwd_tokens(N);
  const LaunchConfig config = row_config(shape.layout, ceil_div(tokens, T * shape.layout.slots),
                                         norm_floats(shape.layout, shape.norm, N, T));
  with_heads<kFwdLimits.heads>(
      N, [&](auto n) { LUMINA_LAUNCH(q, config, qk_norm_rope3d_kernel<n()>, p); });
  return {q_out, k_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> qk_norm_rope3d_bwd(
    const Tensor& dq_out, const Tensor& dk_out, const Tensor& q, const Tensor& k,
    const OptionalTensor& q_weight, const OptionalTensor& q_bias, const OptionalTensor& k_weight,
    const OptionalTensor& k_bias, const Tensor& positions, const Tensor& inv_freq,
    const Tensor& axis, double eps, const std::string& norm) {
  const AnglesView angles = angles_of(positions, inv_freq, axis);
  const auto [dq, q_partial] = row_bwd(dq_out, q, q_weight, q_bias, angles, eps, norm, nullptr);
  const auto [dk, k_partial] = row_bwd(dk_out, k, k_weight, k_bias, angles, eps, norm, nullptr);
  const ParameterGrads grads =
      parameter_grads(q_partial, k_partial, q_weight, q_bias, k_weight, k_bias);
  return {dq, dk, grads.q_weight, grads.q_bias, grads.k_weight, grads.k_bias};
}

// What the second stage sums for one parameter: columns `first` to `first` + width of the sums.
ParameterSum sum_of(const Tensor& partial, int64_t first, const OptionalTensor& parameter,
                    const Tensor& grad) {
  if (!parameter || grad.numel() == 0) return {nullptr, 0, 0, 0, values_of(OptionalTensor())};
  return {pointer_to<const float>(partial) + first, partial.size(0), partial.size(1), grad.numel(),
          values_of(grad)};
}

}  // namespace

std::tuple<Tensor, Tensor> row_bwd(const Tensor& dout, const Tensor& x,
                                   const OptionalTensor& weight, const OptionalTensor& bias,
                                   const AnglesView& angles, double eps, const std::string& norm,
                                   const CountedWindows* pool) {
  const auto launch = [&](auto n, const LaunchConfig& config, QkNormBwdParams p) {
    p.angles = angles;
    LUMINA_LAUNCH(x, config, qk_norm_rope3d_bwd_kernel<n()>, p);
  };
  return row_bwd(dout, x, weight, bias, eps, norm, pool, launch);
}

ParameterGrads parameter_grads(const Tensor& q_partial, const Tensor& k_partial,
                               const OptionalTensor& q_weight, const OptionalTensor& q_bias,
                               const OptionalTensor& k_weight, const OptionalTensor& k_bias) {
  const ParameterGrads grads{zeros_as(q_weight, q_partial), zeros_as(q_bias, q_partial),
                             zeros_as(k_weight, k_partial), zeros_as(k_bias, k_partial)};
  const ParameterSums p{sum_of(q_partial, 0, q_weight, grads.q_weight),
                        sum_of(q_partial, grads.q_bias.numel(), q_bias, grads.q_bias),
                        sum_of(k_partial, 0, k_weight, grads.k_weight),
                        sum_of(k_partial, grads.k_bias.numel(), k_bias, grads.k_bias)};
  const int64_t width =
      std::max({p.q_weight.width, p.q_bias.width, p.k_weight.width, p.k_bias.width});
  if (width > 0) {
    LUMINA_LAUNCH(q_partial, parameter_config(width), qk_norm_rope3d_parameters_kernel, p);
  }
  return grads;
}

LUMINA_CUDA_LIBRARY(m) {
  m.impl("qk_norm_rope3d_fwd", TORCH_BOX(&qk_norm_rope3d_fwd));
  m.impl("qk_norm_rope3d_bwd", TORCH_BOX(&qk_norm_rope3d_bwd));
}

}  // namespace lumina_kernels::cuda
