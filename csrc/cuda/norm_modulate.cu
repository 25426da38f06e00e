// CUDA launchers of norm_modulate.
#include "cuda/lib/modulation_launch.h"
#include "cuda/norm_modulate.cuh"

namespace lumina_kernels::cuda {
namespace {

std::tuple<Tensor, Tensor> norm_modulate_fwd(const Tensor& x, const OptionalTensor& weight,
                                             const OptionalTensor& bias,
                                             const OptionalTensor& scale,
                                             const OptionalTensor& shift, double eps,
                                             std::string kind) {
  const int64_t B = x.size(0), L = x.size(1), D = x.size(2);
  const bool layer = kind == "layer";
  Tensor out = empty_as(x);
  Tensor statistics = empty(x, {1 + layer, B, L}, ScalarType::Float);
  if (out.numel() == 0) return {out, statistics};
  const Tensor xs = aligned(x);
  const AlignedModulation modulation(weight, bias, scale, shift);
  const NormModulateFwdParams p{.x = rows_of(xs),
                                .modulation = modulation.rows(),
                                .out = values_of(out),
                                .statistics = pointer_to<float>(statistics),
                                .B = B,
                                .L = L,
                                .D = static_cast<int>(D),
                                .eps = static_cast<float>(eps),
                                .layer = layer};
  const RowKind rows = row_kind(
      D, {p.x}, {p.modulation.weight, p.modulation.bias, p.modulation.scale, p.modulation.shift},
      {p.out});
  with_kind(rows, [&]<RowKind kKind>() {
    LUMINA_LAUNCH(x, forward_config<kKind>(B, L, D, kNormModulateRows),
                  (norm_modulate_fwd_kernel<kKind>), p);
  });
  return {out, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> norm_modulate_bwd(
    const Tensor& dout, const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias,
    const OptionalTensor& scale, const OptionalTensor& shift, const Tensor& statistics) {
  const int64_t B = x.size(0), L = x.size(1), D = x.size(2);
  Tensor dx = empty_as(x);
  if (dx.numel() == 0) {
    return {dx, zeros_as(weight, x), zeros_as(bias, x), zeros_as(scale, x), zeros_as(shift, x)};
  }
  const OptionalTensor dscale = gradient_per_token(scale);
  const Tensor douts = aligned(dout), xs = aligned(x);
  const AlignedModulation modulation(weight, bias, scale, shift);
  NormModulateBwdParams p{.dout = rows_of(douts),
                          .x = rows_of(xs),
                          .modulation = modulation.rows(),
                          .statistics = pointer_to<const float>(statistics),
                          .dx = values_of(dx),
                          .dscale = values_of(dscale),
                          .layer = statistics.size(0) == 2};
  const RowKind rows = row_kind(
      D, {p.dout, p.x},
      {p.modulation.weight, p.modulation.bias, p.modulation.scale, p.modulation.shift}, {p.dx});
  p.chunks = with_kind(rows, [&]<RowKind kKind>() {
    return row_chunks<kKind>(x, norm_modulate_bwd_kernel<kKind>, B, L, D);
  });
  const Tensor partial = empty(x, {B, p.chunks.per_sample(), 2, D}, ScalarType::Float);
  p.partial = values_of(partial);
  with_kind(rows, [&]<RowKind kKind>() {
    LUMINA_LAUNCH(x, row_config(p.chunks.count(), D, kPieces<kKind>),
                  (norm_modulate_bwd_kernel<kKind>), p);
  });
  const auto [dweight, dbias, dscale_sum, dshift] =
      modulation_grads(partial, weight, bias, scale, shift, dout);
  return {dx, dweight, dbias, dscale ? *dscale : dscale_sum, dshift};
}

}  // namespace

LUMINA_CUDA_LIBRARY(m) {
  m.impl("norm_modulate_fwd", TORCH_BOX(&norm_modulate_fwd));
  m.impl("norm_modulate_bwd", TORCH_BOX(&norm_modulate_bwd));
}

}  // namespace lumina_kernels::cuda
