// CUDA launcher of guided_step.
#include "cuda/guided_step.cuh"
#include "cuda/lib/launch.h"

namespace lumina_kernels::cuda {
namespace {

// Of any dtype, on the device; nobody waits for its value.
OptionalTensor number_of(const OptionalTensor& number) {
  return number ? OptionalTensor(torch::stable::to(*number, ScalarType::Float)) : number;
}

Tensor guided_step_fwd(const Tensor& x, const Tensor& v, const OptionalTensor& weight,
                       double weight_value, const OptionalTensor& dt, double dt_value,
                       int64_t channels) {
  Tensor out = empty_as(x);
  if (out.numel() == 0) return out;
  const int64_t B = x.size(0), N = x.numel() / B, guided = channels * (N / x.size(1));
  const auto flat = [N](const Tensor& tensor) {
    const int64_t shape[] = {tensor.size(0), N};
    return torch::stable::reshape(torch::stable::contiguous(tensor), {shape, 2});
  };
  const Tensor xs = flat(x), vs = flat(v), outs = flat(out);
  const OptionalTensor weights = number_of(weight), dts = number_of(dt);
  const GuidedStepFwdParams p{.x = values_of(xs),
                              .v = values_of(vs),
                              .out = values_of(outs),
                              .weight = values_of(weights),
                              .dt = values_of(dts),
                              .weight_value = static_cast<float>(weight_value),
                              .dt_value = static_cast<float>(dt_value),
                              .B = B,
                              .N = N,
                              .guided = guided};
  LUMINA_LAUNCH(x, guided_step_config(B, N), guided_step_fwd_kernel, p);
  return out;
}

}  // namespace

LUMINA_CUDA_LIBRARY(m) { m.impl("guided_step_fwd", TORCH_BOX(&guided_step_fwd)); }

}  // namespace lumina_kernels::cuda
