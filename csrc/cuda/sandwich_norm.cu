// CUDA launchers of sandwich_norm.
#include "cuda/lib/modulation_launch.h"
#include "cuda/sandwich_norm.cuh"

namespace lumina_kernels::cuda {

std::tuple<Tensor, Tensor> gate_grads(const Tensor& partial, int64_t which,
                                      const OptionalTensor& weight, const OptionalTensor& gate,
                                      bool tanh) {
  const int64_t B = partial.size(0), D = partial.size(3);
  OptionalTensor per_sample;
  if (!is_per_token(gate)) per_sample = packed(gate);
  Tensor dweight = empty_as(weight, partial), dgate = empty_as(per_sample, partial);
  if (!weight && !per_sample) return {dweight, dgate};
  const OptionalTensor weights = packed(weight);
  const auto output = [](const OptionalTensor& parameter, const Tensor& gradient) {
    return values_of(parameter ? OptionalTensor(gradient) : OptionalTensor());
  };
  const GateGradsParams p{{pointer_to<const float>(partial) + which * D, B, partial.size(1),
                           static_cast<int>(partial.size(2)), static_cast<int>(D)},
                          values_of(weights),
                          rows_of(per_sample),
                          output(weight, dweight),
                          output(per_sample, dgate),
                          tanh};
  LUMINA_LAUNCH(partial, sums_config(D), sandwich_norm_gate_kernel, p);
  return {dweight, dgate};
}

namespace {

std::tuple<Tensor, Tensor> sandwich_norm_fwd(const Tensor& y, const Tensor& residual,
                                             const OptionalTensor& weight,
                                             const OptionalTensor& gate, double eps, bool tanh) {
  const int64_t B = y.size(0), L = y.size(1), D = y.size(2);
  Tensor out = empty_as(residual), rstd = empty(y, {B, L}, ScalarType::Float);
  if (out.numel() == 0) return {out, rstd};
  const Tensor ys = aligned(y), residuals = aligned(residual);
  const OptionalTensor weights = aligned(weight), gates = aligned(gate);
  const SandwichNormFwdParams p{.y = rows_of(ys),
                                .sandwich = {.residual = rows_of(residuals),
                                             .weight = rows_of(weights),
                                             .gate = rows_of(gates)},
                                .out = values_of(out),
                                .rstd = pointer_to<float>(rstd),
                                .B = B,
                                .L = L,
                                .D = static_cast<int>(D),
                                .eps = static_cast<float>(eps)};
  const RowKind rows =
      row_kind(D, {p.y, p.sandwich.residual}, {p.sandwich.weight, p.sandwich.gate}, {p.out});
  with_kind(rows, tanh && gate, [&]<RowKind kKind, bool kTanh>() {
    LUMINA_LAUNCH(y, forward_config<kKind>(B, L, D, kSandwichNormRows),
                  (sandwich_norm_fwd_kernel<kKind, kTanh>), p);
  });
  return {out, rstd};
}

std::tuple<Tensor, Tensor, Tensor> sandwich_norm_bwd(const Tensor& dout, const Tensor& y,
                                                     const OptionalTensor& weight,
                                                     const OptionalTensor& gate, bool tanh,
                                                     const Tensor& rstd) {
  const int64_t B = y.size(0), L = y.size(1), D = y.size(2);
  Tensor dy = empty_as(y);
  if (dy.numel() == 0) return {dy, zeros_as(weight, y), zeros_as(gate, y)};
  const OptionalTensor per_token = gradient_per_token(gate);
  const Tensor douts = aligned(dout), ys = aligned(y);
  const OptionalTensor weights = aligned(weight), gates = aligned(gate);
  SandwichNormBwdParams p{.dout = rows_of(douts),
                          .y = rows_of(ys),
                          .sandwich = {.weight = rows_of(weights), .gate = rows_of(gates)},
                          .rstd = pointer_to<const float>(rstd),
                          .dy = values_of(dy),
                          .dgate = values_of(per_token)};
  const RowKind rows = row_kind(D, {p.dout, p.y}, {p.sandwich.weight, p.sandwich.gate}, {p.dy});
  p.chunks = with_kind(rows, tanh && gate, [&]<RowKind kKind, bool kTanh>() {
    return row_chunks<kKind>(y, sandwich_norm_bwd_kernel<kKind, kTanh>, B, L, D);
  });
  const Tensor partial = empty(y, {B, p.chunks.per_sample(), 1, D}, ScalarType::Float);
  p.partial = values_of(partial);
  with_kind(rows, tanh && gate, [&]<RowKind kKind, bool kTanh>() {
    LUMINA_LAUNCH(y, row_config(p.chunks.count(), D, kPieces<kKind>),
                  (sandwich_norm_bwd_kernel<kKind, kTanh>), p);
  });
  const auto [dweight, per_sample] = gate_grads(partial, 0, weight, gate, tanh);
  return {dy, dweight, per_token ? *per_token : per_sample};
}

}  // namespace

LUMINA_CUDA_LIBRARY(m) {
  m.impl("sandwich_norm_fwd", TORCH_BOX(&sandwich_norm_fwd));
  m.impl("sandwich_norm_bwd", TORCH_BOX(&sandwich_norm_bwd));
}

}  // namespace lumina_kernels::cuda
