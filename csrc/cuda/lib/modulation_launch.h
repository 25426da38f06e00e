// What the launchers of several modulated norms share: parameters, and the second stages.
#pragma once

#include <array>

#include "cuda/lib/launch.h"
#include "cuda/lib/modulation.cuh"

namespace lumina_kernels::cuda {

// The parameters without gaps, kept until the launch.
class PackedModulation {
 public:
  PackedModulation(const OptionalTensor& weight, const OptionalTensor& bias,
                   const OptionalTensor& scale, const OptionalTensor& shift)
      : weight_(packed(weight)),
        bias_(packed(bias)),
        scale_(packed(scale)),
        shift_(packed(shift)) {}

  ModulationView rows() const {
    return {rows_of(weight_), rows_of(bias_), rows_of(scale_), rows_of(shift_)};
  }

 private:
  OptionalTensor weight_, bias_, scale_, shift_;
};

// The gradient of a scale or gate that has a row per token, which the first stage writes.
inline OptionalTensor gradient_per_token(const OptionalTensor& x) {
  return is_per_token(x) ? OptionalTensor(empty_as(*x)) : OptionalTensor();
}

// dweight, dbias, dscale and dshift, `nothing` where there is no such parameter, from the partial
// sums (B, chunks, sums, D), of which the first two are A and E (modulation_grads.cuh), and from
// the gradient of the modulated norm. Of a scale with a row per token the first stage has written
// the gradient; here it is `nothing`.
std::array<Tensor, 4> modulation_grads(const Tensor& partial, const OptionalTensor& weight,
                                       const OptionalTensor& bias, const OptionalTensor& scale,
                                       const OptionalTensor& shift, const Tensor& dout);

// The sums over chunks of number `which` + 1 of these partial sums, shaped (B, D) as `like`.
Tensor sample_sums(const Tensor& partial, int64_t which, const Tensor& like);

// dweight and dgate of a sandwich norm (dgate `nothing` where the gate has a row per token) from
// the partial sums (B, chunks, sums, D), of which number `which` is S (sandwich_norm.cuh).
std::tuple<Tensor, Tensor> gate_grads(const Tensor& partial, int64_t which, const Tensor& weight,
                                      const Tensor& gate);

}  // namespace lumina_kernels::cuda
