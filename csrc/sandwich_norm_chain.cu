// CUDA launchers of sandwich_norm_chain.
#include "modulation_launch.h"
#include "sandwich_norm_chain.cuh"

namespace lumina_kernels {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> sandwich_norm_chain_fwd(
    const Tensor& y, const Tensor& residual, const Tensor& weight, const Tensor& gate,
    const OptionalTensor& next_weight, const OptionalTensor& next_scale, double eps) {
  const int64_t B = y.size(0), L = y.size(1), D = y.size(2);
  Tensor out = empty_as(residual), normed = empty_as(residual);
  Tensor rstd = empty(y, {B, L}, ScalarType::Float), next_rstd = empty_as(rstd);
  if (out.numel() == 0) return {out, normed, rstd, next_rstd};
  const Tensor ys = packed(y), residuals = packed(residual);
  const Tensor weights = packed(weight), gates = packed(gate);
  const OptionalTensor next_weights = packed(next_weight), next_scales = packed(next_scale);
  const Rows none = rows_of(OptionalTensor());
  const SandwichNormChainFwd p{rows_of(ys),
                               {rows_of(residuals), rows_of(weights), rows_of(gates)},
                               {rows_of(next_weights), none, rows_of(next_scales), none},
                               values_of(out),
                               values_of(normed),
                               pointer_to<float>(rstd),
                               pointer_to<float>(next_rstd),
                               B,
                               L,
                               static_cast<int>(D),
                               static_cast<float>(eps)};
  LUMINA_LAUNCH_ROWS(y, B * L, D, sandwich_norm_chain_fwd_kernel, p);
  return {out, normed, rstd, next_rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sandwich_norm_chain_bwd(
    const Tensor& dnew, const Tensor& dnormed, const Tensor& y, const Tensor& residual,
    const Tensor& weight, const Tensor& gate, const OptionalTensor& next_weight,
    const OptionalTensor& next_scale, const Tensor& rstd, const Tensor& next_rstd) {
  const int64_t B = y.size(0), L = y.size(1), D = y.size(2);
  Tensor dy = empty_as(y), dresidual = empty_as(residual);
  if (dy.numel() == 0) {
    return {dy,
            dresidual,
            zeros_as(weight),
            zeros_as(gate),
            zeros_as(next_weight, y),
            zeros_as(next_scale, y)};
  }
  const int64_t chunk = row_chunk(B * L, D), chunks = ceil_div(L, chunk);
  const Tensor partial = empty(y, {B, chunks, 2, D}, ScalarType::Float);
  const OptionalTensor dgate = gradient_per_token(gate), dscale = gradient_per_token(next_scale);
  const Tensor dnews = packed(dnew), dnormeds = packed(dnormed), ys = packed(y);
  const Tensor residuals = packed(residual), weights = packed(weight), gates = packed(gate);
  const OptionalTensor next_weights = packed(next_weight), next_scales = packed(next_scale);
  const Rows none = rows_of(OptionalTensor());
  const SandwichNormChainBwd p{rows_of(dnews),
                               rows_of(dnormeds),
                               rows_of(ys),
                               {rows_of(residuals), rows_of(weights), rows_of(gates)},
                               {rows_of(next_weights), none, rows_of(next_scales), none},
                               pointer_to<const float>(rstd),
                               pointer_to<const float>(next_rstd),
                               values_of(dy),
                               values_of(dresidual),
                               values_of(dgate),
                               values_of(dscale),
                               pointer_to<float>(partial),
                               B,
                               L,
                               chunk,
                               static_cast<int>(D)};
  LUMINA_LAUNCH_ROWS(y, B * chunks, D, sandwich_norm_chain_bwd_kernel, p);
  const auto [dweight, dgate_sum] = gate_grads(partial, 1, weight, gate);
  const auto next = modulation_grads(partial, next_weight, {}, next_scale, {}, dnormed);
  return {dy, dresidual, dweight, dgate ? *dgate : dgate_sum, next[0], dscale ? *dscale : next[2]};
}

}  // namespace

LUMINA_CUDA_LIBRARY(m) {
  m.impl("sandwich_norm_chain_fwd", TORCH_BOX(&sandwich_norm_chain_fwd));
  m.impl("sandwich_norm_chain_bwd", TORCH_BOX(&sandwich_norm_chain_bwd));
}

}  // namespace lumina_kernels
