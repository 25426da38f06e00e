// CUDA launchers of sandwich_norm_chain.
#include "cuda/lib/modulation_launch.h"
#include "cuda/sandwich_norm_chain.cuh"

namespace lumina_kernels::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> sandwich_norm_chain_fwd(
    const Tensor& y, const Tensor& residual, const OptionalTensor& weight,
    const OptionalTensor& gate, const OptionalTensor& next_weight, const OptionalTensor& next_scale,
    double eps, bool tanh) {
  const int64_t B = y.size(0), L = y.size(1), D = y.size(2);
  Tensor new_residual = empty_as(residual), normed = empty_as(residual);
  Tensor rstd = empty(y, {B, L}, ScalarType::Float), next_rstd = empty_as(rstd);
  if (new_residual.numel() == 0) return {new_residual, normed, rstd, next_rstd};
  const Tensor ys = aligned(y), residuals = aligned(residual);
  const OptionalTensor weights = aligned(weight), gates = aligned(gate);
  const OptionalTensor next_weights = aligned(next_weight), next_scales = aligned(next_scale);
  const SandwichNormChainFwdParams p{
      .y = rows_of(ys),
      .sandwich = {.residual = rows_of(residuals),
                   .weight = rows_of(weights),
                   .gate = rows_of(gates)},
      .next = {.weight = rows_of(next_weights), .scale = rows_of(next_scales)},
      .new_residual = values_of(new_residual),
      .normed = values_of(normed),
      .rstd = pointer_to<float>(rstd),
      .next_rstd = pointer_to<float>(next_rstd),
      .B = B,
      .L = L,
      .D = static_cast<int>(D),
      .eps = static_cast<float>(eps)};
  const RowKind rows = row_kind(D, {p.y, p.sandwich.residual},
                                {p.sandwich.weight, p.sandwich.gate, p.next.weight, p.next.scale},
                                {p.new_residual, p.normed});
  with_kind(rows, tanh && gate, [&]<RowKind kKind, bool kTanh>() {
    LUMINA_LAUNCH(y, forward_config<kKind>(B, L, D, kSandwichNormChainRows),
                  (sandwich_norm_chain_fwd_kernel<kKind, kTanh>), p);
  });
  return {new_residual, normed, rstd, next_rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sandwich_norm_chain_bwd(
    const Tensor& dnew_residual, const Tensor& dnormed, const Tensor& y, const Tensor& residual,
    const OptionalTensor& weight, const OptionalTensor& gate, const OptionalTensor& next_weight,
    const OptionalTensor& next_scale, bool tanh, const Tensor& rstd, const Tensor& next_rstd) {
  const int64_t B = y.size(0), L = y.size(1), D = y.size(2);
  Tensor dy = empty_as(y), dresidual = empty_as(residual);
  if (dy.numel() == 0) {
    return {dy,
            dresidual,
            zeros_as(weight, y),
            zeros_as(gate, y),
            zeros_as(next_weight, y),
            zeros_as(next_scale, y)};
  }
  const OptionalTensor dgate = gradient_per_token(gate), dscale = gradient_per_token(next_scale);
  const Tensor dnew_residuals = aligned(dnew_residual), dnormeds = aligned(dnormed),
               ys = aligned(y);
  const Tensor residuals = aligned(residual);
  const OptionalTensor weights = aligned(weight), gates = aligned(gate);
  const OptionalTensor next_weights = aligned(next_weight), next_scales = aligned(next_scale);
  SandwichNormChainBwdParams p{
      .dnew_residual = rows_of(dnew_residuals),
      .dnormed = rows_of(dnormeds),
      .y = rows_of(ys),
      .sandwich = {.residual = rows_of(residuals),
                   .weight = rows_of(weights),
                   .gate = rows_of(gates)},
      .next = {.weight = rows_of(next_weights), .scale = rows_of(next_scales)},
      .rstd = pointer_to<const float>(rstd),
      .next_rstd = pointer_to<const float>(next_rstd),
      .dy = values_of(dy),
      .dresidual = values_of(dresidual),
      .dgate = values_of(dgate),
      .dscale = values_of(dscale)};
  const RowKind rows = row_kind(D, {p.dnew_residual, p.dnormed, p.y, p.sandwich.residual},
                                {p.sandwich.weight, p.sandwich.gate, p.next.weight, p.next.scale},
                                {p.dy, p.dresidual});
  p.chunks = with_kind(rows, tanh && gate, [&]<RowKind kKind, bool kTanh>() {
    return row_chunks<kKind>(y, sandwich_norm_chain_bwd_kernel<kKind, kTanh>, B, L, D);
  });
  const Tensor partial = empty(y, {B, p.chunks.per_sample(), 2, D}, ScalarType::Float);
  p.partial = values_of(partial);
  with_kind(rows, tanh && gate, [&]<RowKind kKind, bool kTanh>() {
    LUMINA_LAUNCH(y, row_config(p.chunks.count(), D, kPieces<kKind>),
                  (sandwich_norm_chain_bwd_kernel<kKind, kTanh>), p);
  });
  const auto [dweight, dgate_sum] = gate_grads(partial, 1, weight, gate, tanh);
  const auto next = modulation_grads(partial, next_weight, {}, next_scale, {}, dnormed);
  return {dy, dresidual, dweight, dgate ? *dgate : dgate_sum, next[0], dscale ? *dscale : next[2]};
}

}  // namespace

LUMINA_CUDA_LIBRARY(m) {
  m.impl("sandwich_norm_chain_fwd", TORCH_BOX(&sandwich_norm_chain_fwd));
  m.impl("sandwich_norm_chain_bwd", TORCH_BOX(&sandwich_norm_chain_bwd));
}

}  // namespace lumina_kernels::cuda
