// CUDA launchers of gate_residual_norm.
#include "cuda/gate_residual_norm.cuh"
#include "cuda/lib/modulation_launch.h"

namespace lumina_kernels::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> gate_residual_norm_fwd(
    const Tensor& y, const Tensor& residual, const OptionalTensor& gate,
    const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& scale,
    const OptionalTensor& shift, double eps, std::string kind) {
  const int64_t B = y.size(0), L = y.size(1), D = y.size(2);
  const bool layer = kind == "layer";
  Tensor new_residual = empty_as(residual), normed = empty_as(residual);
  Tensor statistics = empty(y, {1 + layer, B, L}, ScalarType::Float);
  if (new_residual.numel() == 0) return {new_residual, normed, statistics};
  const Tensor ys = aligned(y), residuals = aligned(residual);
  const OptionalTensor gates = aligned(gate);
  const AlignedModulation modulation(weight, bias, scale, shift);
  const GateResidualNormFwdParams p{.y = rows_of(ys),
                                    .residual = rows_of(residuals),
                                    .gate = rows_of(gates),
                                    .modulation = modulation.rows(),
                                    .new_residual = values_of(new_residual),
                                    .normed = values_of(normed),
                                    .statistics = pointer_to<float>(statistics),
                                    .B = B,
                                    .L = L,
                                    .D = static_cast<int>(D),
                                    .eps = static_cast<float>(eps),
                                    .layer = layer};
  const RowKind rows = row_kind(
      D, {p.y, p.residual},
      {p.gate, p.modulation.weight, p.modulation.bias, p.modulation.scale, p.modulation.shift},
      {p.new_residual, p.normed});
  with_kind(rows, [&]<RowKind kKind>() {
    LUMINA_LAUNCH(y, forward_config<kKind>(B, L, D, kGateResidualNormRows),
                  (gate_residual_norm_fwd_kernel<kKind>), p);
  });
  return {new_residual, normed, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gate_residual_norm_bwd(
    const Tensor& dnew_residual, const Tensor& dnormed, const Tensor& y, const Tensor& residual,
    const OptionalTensor& gate, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& scale, const OptionalTensor& shift, const Tensor& statistics) {
  const int64_t B = y.size(0), L = y.size(1), D = y.size(2);
  Tensor dy = empty_as(y), dresidual = empty_as(residual);
  if (dy.numel() == 0) {
    return {dy,
            dresidual,
            zeros_as(gate, y),
            zeros_as(weight, y),
            zeros_as(bias, y),
            zeros_as(scale, y),
            zeros_as(shift, y)};
  }
  const OptionalTensor dgate = gradient_per_token(gate), dscale = gradient_per_token(scale);
  const Tensor dnew_residuals = aligned(dnew_residual), dnormeds = aligned(dnormed),
               ys = aligned(y);
  const Tensor residuals = aligned(residual);
  const OptionalTensor gates = aligned(gate);
  const AlignedModulation modulation(weight, bias, scale, shift);
  GateResidualNormBwdParams p{.dnew_residual = rows_of(dnew_residuals),
                              .dnormed = rows_of(dnormeds),
                              .y = rows_of(ys),
                              .residual = rows_of(residuals),
                              .gate = rows_of(gates),
                              .modulation = modulation.rows(),
                              .statistics = pointer_to<const float>(statistics),
                              .dy = values_of(dy),
                              .dresidual = values_of(dresidual),
                              .dgate = values_of(dgate),
                              .dscale = values_of(dscale),
                              .layer = statistics.size(0) == 2};
  const RowKind rows = row_kind(
      D, {p.dnew_residual, p.dnormed, p.y, p.residual},
      {p.gate, p.modulation.weight, p.modulation.bias, p.modulation.scale, p.modulation.shift},
      {p.dy, p.dresidual});
  p.chunks = with_kind(rows, [&]<RowKind kKind>() {
    return row_chunks<kKind>(y, gate_residual_norm_bwd_kernel<kKind>, B, L, D);
  });
  const Tensor partial = empty(y, {B, p.chunks.per_sample(), 3, D}, ScalarType::Float);
  p.partial = values_of(partial);
  with_kind(rows, [&]<RowKind kKind>() {
    LUMINA_LAUNCH(y, row_config(p.chunks.count(), D, kPieces<kKind>),
                  (gate_residual_norm_bwd_kernel<kKind>), p);
  });
  const auto [dweight, dbias, dscale_sum, dshift] =
      modulation_grads(partial, weight, bias, scale, shift, dnormed);
  const Tensor dgates = !gate ? nothing(y) : dgate ? *dgate : sample_sums(partial, 1, *gate);
  return {dy, dresidual, dgates, dweight, dbias, dscale ? *dscale : dscale_sum, dshift};
}

}  // namespace

LUMINA_CUDA_LIBRARY(m) {
  m.impl("gate_residual_norm_fwd", TORCH_BOX(&gate_residual_norm_fwd));
  m.impl("gate_residual_norm_bwd", TORCH_BOX(&gate_residual_norm_bwd));
}

}  // namespace lumina_kernels::cuda
