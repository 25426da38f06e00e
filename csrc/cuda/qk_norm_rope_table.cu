// CUDA launchers of qk_norm_rope_table.
#include "cuda/lib/qk_norm_launch.h"
#include "cuda/qk_norm_rope_table.cuh"

namespace lumina_kernels::cuda {
namespace {

std::tuple<Tensor, Tensor> qk_norm_rope_table_fwd(
    const Tensor& q, const OptionalTensor& k, const OptionalTensor& q_weight,
    const OptionalTensor& q_bias, const OptionalTensor& k_weight, const OptionalTensor& k_bias,
    const Tensor& cos, const Tensor& sin, const std::string& pairing, int64_t channels, double eps,
    const std::string& norm) {
  Tensor q_out = empty_as(q), k_out = empty_as(k, q);
  if (q.numel() + k_out.numel() == 0) return {q_out, k_out};
  const int64_t tokens = q.size(0) * q.size(1), K = q.size(3);
  check_tokens(tokens);
  const Tensor qs = packed(q), ks = packed(or_no_heads(k, q));
  const OptionalTensor qw = packed(q_weight), qb = packed(q_bias);
  const OptionalTensor kw = packed(k_weight), kb = packed(k_bias);
  int N;
  const NormShape shape = norm_shape(q.size(2), ks.size(2), K, eps, norm, kFwdLimits, N);
  const NormParameters parameters{parameter_of(qw, K), parameter_of(qb, K), parameter_of(kw, K),
                                  parameter_of(kb, K)};
  const TablesView tables = tables_of(cos, sin, pairing, channels, false);
  const QkNormRopeTableFwdParams p{.q = heads_of(qs),
                                   .k = heads_of(ks),
                                   .q_out = heads_of(q_out),
                                   .k_out = heads_of(k ? k_out : ks),
                                   .parameters = parameters,
                                   .tables = tables,
                                   .shape = shape,
                                   .tokens = tokens,
                                   .L = q.size(1)};
  const int T = fwd_tokens(N);
  const LaunchConfig config =
      row_config(shape.layout, ceil_div(tokens, T * shape.layout.slots),
                 table_floats(shape.layout, shape.norm, N, tables.per_head, T));
  with_heads<kFwdLimits.heads>(
      N, [&](auto n) { LUMINA_LAUNCH(q, config, qk_norm_rope_table_kernel<n()>, p); });
  return {q_out, k_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> qk_norm_rope_table_bwd(
    const Tensor& dq_out, const OptionalTensor& dk_out, const Tensor& q, const OptionalTensor& k,
    const OptionalTensor& q_weight, const OptionalTensor& q_bias, const OptionalTensor& k_weight,
    const OptionalTensor& k_bias, const Tensor& cos, const Tensor& sin, const std::string& pairing,
    int64_t channels, double eps, const std::string& norm) {
  const TablesView tables = tables_of(cos, sin, pairing, channels, true);
  const auto launch = [&](auto n, LaunchConfig config, const QkNormBwdParams& rows) {
    const QkNormRopeTableBwdParams p{rows, tables};
    const NormShape& shape = rows.shape;
    config.shared_bytes = 4 * table_floats(shape.layout, shape.norm, n(), tables.per_head, 1);
    LUMINA_LAUNCH(q, config, qk_norm_rope_table_bwd_kernel<n()>, p);
  };
  const auto [dq, q_partial] = row_bwd(dq_out, q, q_weight, q_bias, eps, norm, nullptr, launch);
  const auto [dk, k_partial] = row_bwd(or_no_heads(dk_out, q), or_no_heads(k, q), k_weight, k_bias,
                                       eps, norm, nullptr, launch);
  const ParameterGrads grads =
      parameter_grads(q_partial, k_partial, q_weight, q_bias, k_weight, k_bias);
  return {dq, k ? dk : nothing(q), grads.q_weight, grads.q_bias, grads.k_weight, grads.k_bias};
}

}  // namespace

LUMINA_CUDA_LIBRARY(m) {
  m.impl("qk_norm_rope_table_fwd", TORCH_BOX(&qk_norm_rope_table_fwd));
  m.impl("qk_norm_rope_table_bwd", TORCH_BOX(&qk_norm_rope_table_bwd));
}

}  // namespace lumina_kernels::cuda
