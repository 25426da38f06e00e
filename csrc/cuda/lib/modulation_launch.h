// Shared by the launchers of norms: parameters, and the second stages of their gradients.
#pragma once

#include <array>

#include "cuda/lib/modulation.cuh"
#include "cuda/lib/rows_launch.h"

namespace lumina_kernels::cuda {

// The parameters with aligned rows, kept alive until the launch.
class AlignedModulation {
 public:
  AlignedModulation(const OptionalTensor& weight, const OptionalTensor& bias,
                    const OptionalTensor& scale, const OptionalTensor& shift)
      : weight_(aligned(weight)),
        bias_(aligned(bias)),
        scale_(aligned(scale)),
        shift_(aligned(shift)) {}

  ModulationView rows() const {
    return {rows_of(weight_), rows_of(bias_), rows_of(scale_), rows_of(shift_)};
  }

 private:
  OptionalTensor weight_, bias_, scale_, shift_;
};

// For a scale or gate with a row per token: its gradient, which the first stage writes.
inline OptionalTensor gradient_per_token(const OptionalTensor& x) {
  return is_per_token(x) ? OptionalTensor(empty_as(*x)) : OptionalTensor();
}

// dweight, dbias, dscale and dshift (`nothing` if the parameter is missing) from the partial sums
// (B, chunks, sums, D), whose first two are A and E (modulation_grads.cuh), and from dout,
// the gradient of the modulated norm. dscale is `nothing` if scale has a row per token: the first
// stage has written it.
std::array<Tensor, 4> modulation_grads(const Tensor& partial, const OptionalTensor& weight,
                                       const OptionalTensor& bias, const OptionalTensor& scale,
                                       const OptionalTensor& shift, const Tensor& dout);

// The sums over chunks of partial sum number `which` + 1, in the shape (B, D) of `like`.
Tensor sample_sums(const Tensor& partial, int64_t which, const Tensor& like);

// The same for a sandwich norm (sandwich.cuh): f<kKind, kTanh>(), for whether its gate has a tanh.
template <class F>
auto with_kind(RowKind kind, bool tanh, F f) {
  return with_kind(kind, [&]<RowKind kKind>() {
    return tanh ? f.template operator()<kKind, true>() : f.template operator()<kKind, false>();
  });
}

// dweight and dgate of a sandwich norm (`nothing` if the parameter is missing, or if the gate has a
// row per token) from the partial sums (B, chunks, sums, D), whose sum number `which` is S
// (sandwich_norm.cuh).
std::tuple<Tensor, Tensor> gate_grads(const Tensor& partial, int64_t which,
                                      const OptionalTensor& weight, const OptionalTensor& gate,
                                      bool tanh);

}  // namespace lumina_kernels::cuda
