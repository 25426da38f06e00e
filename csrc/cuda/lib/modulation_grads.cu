// CUDA launcher of the second stage of a modulated norm's parameter gradients.
#include "cuda/lib/modulation_grads.cuh"
#include "cuda/lib/modulation_launch.h"

namespace lumina_kernels::cuda {
namespace {

PartialSums partials_of(const Tensor& partial, int64_t which) {
  const int64_t D = partial.size(3);
  return {pointer_to<const float>(partial) + which * D, partial.size(0), partial.size(1),
          static_cast<int>(partial.size(2)), static_cast<int>(D)};
}

// The gradient of a shift that the second stage cannot give: E has a factor 1 + scale where scale
// has a row per token, and a shift with a row per token has the gradient of the norm itself.
OptionalTensor shift_grad(const OptionalTensor& scale, const OptionalTensor& shift,
                          const Tensor& dout) {
  if (is_per_token(shift)) {
    return torch::stable::to(dout, shift->scalar_type(), {}, {}, {}, false, /*copy=*/true,
                             torch::headeronly::MemoryFormat::Contiguous);
  }
  if (!shift || !is_per_token(scale)) return {};
  const int64_t tokens[] = {1};
  const torch::headeronly::IntHeaderOnlyArrayRef dims(tokens, 1);
  return torch::stable::to(torch::stable::sum(dout, dims, false, ScalarType::Float),
                           shift->scalar_type());
}

}  // namespace

std::array<Tensor, 4> modulation_grads(const Tensor& partial, const OptionalTensor& weight,
                                       const OptionalTensor& bias, const OptionalTensor& scale,
                                       const OptionalTensor& shift, const Tensor& dout) {
  const OptionalTensor dshift = shift_grad(scale, shift, dout);
  OptionalTensor per_sample, late_shift;
  if (!is_per_token(scale)) per_sample = scale;
  if (!dshift) late_shift = shift;
  const OptionalTensor wanted[] = {weight, bias, per_sample, late_shift};
  std::array<Tensor, 4> grads;
  Values outputs[4];
  bool any = false;
  for (int i = 0; i < 4; ++i) {
    grads[i] = empty_as(wanted[i], dout);
    outputs[i] = wanted[i] ? values_of(grads[i]) : values_of(OptionalTensor());
    any |= wanted[i].has_value();
  }
  if (dshift) grads[3] = *dshift;
  if (!any) return grads;
  const OptionalTensor weights = packed(weight), biases = packed(bias), scales = packed(per_sample);
  const ModulationGradsParams p{.partials = partials_of(partial, 0),
                                .weight = values_of(weights),
                                .bias = values_of(biases),
                                .scale = rows_of(scales),
                                .dweight = outputs[0],
                                .dbias = outputs[1],
                                .dscale = outputs[2],
                                .dshift = outputs[3]};
  LUMINA_LAUNCH(partial, sums_config(partial.size(3)), modulation_grads_kernel, p);
  return grads;
}

Tensor sample_sums(const Tensor& partial, int64_t which, const Tensor& like) {
  Tensor sums = empty_as(like);
  const ModulationGradsParams p{.partials = partials_of(partial, which), .dshift = values_of(sums)};
  LUMINA_LAUNCH(partial, sums_config(partial.size(3)), modulation_grads_kernel, p);
  return sums;
}

}  // namespace lumina_kernels::cuda
