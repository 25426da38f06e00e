// What the launchers that normalise queries and keys share.
#pragma once

#include <type_traits>

#include "cuda/lib/qk_norm.cuh"
#include "cuda/lib/rope_launch.h"
#include "cuda/lib/window_launch.h"

namespace lumina_kernels::cuda {

// Calls body(std::integral_constant<int, N>()) with the heads N of a thread, 1, 2, 4 to kMost.
template <int kMost, class Body>
void with_heads(int N, const Body& body) {
  if constexpr (kMost > 1) {
    if (N < kMost) return with_heads<kMost / 2>(N, body);
  }
  body(std::integral_constant<int, kMost>());
}

inline NormKind norm_of(const std::string& norm) {
  if (norm == "layer_across_heads") return NormKind::kLayerAcrossHeads;
  if (norm == "rms_per_head") return NormKind::kRmsPerHead;
  STD_TORCH_CHECK(norm == "rms_across_heads", "unknown norm ", norm);
  return NormKind::kRmsAcrossHeads;
}

// H heads of q and G of k among threads, with the fewest heads N of a thread that the limits allow.
inline NormShape norm_shape(int64_t H, int64_t G, int64_t K, double eps, const std::string& norm,
                            const NormLimits& limits, int& N) {
  const int64_t pieces = ceil_div(K, 8);
  const auto threads = [&](int64_t n) { return pieces * ceil_div(H + G, n); };
  const auto share = [](int64_t n) { return 1.0f / static_cast<float>(n); };
  N = 1;
  while (N < limits.heads && threads(N) > limits.threads) N *= 2;
  STD_TORCH_CHECK(threads(N) <= limits.bound(N), "a token has ", K * (H + G),
                  " values to normalise at once, and the CUDA kernel holds at most ",
                  8 * limits.heads * limits.last_threads);
  return {.layout = row_layout(H + G, pieces, N, limits.fill),
          .H = static_cast<int>(H),
          .G = static_cast<int>(G),
          .K = static_cast<int>(K),
          .norm = norm_of(norm),
          .eps = static_cast<float>(eps),
          .q_share = share(H * K),
          .k_share = share(G * K),
          .head_share = share(K)};
}

// A parameter for heads of K values: their first ones are aligned too.
inline Values parameter_of(const OptionalTensor& parameter, int64_t K) {
  Values values = values_of(parameter);
  if (parameter) values.vectors &= K * static_cast<int64_t>(parameter->element_size()) % 16 == 0;
  return values;
}

// The windows of (B, L') counts that the gradient of a row is for.
struct CountedWindows {
  MaskedWindows windows;
  Tensor counts;
};

// dx, and the partial sums of dweight and dbias, (blocks, sums * width), float32.
std::tuple<Tensor, Tensor> row_bwd(const Tensor& dout, const Tensor& x,
                                   const OptionalTensor& weight, const OptionalTensor& bias,
                                   const AnglesView& angles, double eps, const std::string& norm,
                                   const CountedWindows* pool);

// Gradients of the parameters of q and of k from `row_bwd`'s sums, `nothing` for those that are not
// there.
struct ParameterGrads {
  Tensor q_weight, q_bias, k_weight, k_bias;
};
ParameterGrads parameter_grads(const Tensor& q_partial, const Tensor& k_partial,
                               const OptionalTensor& q_weight, const OptionalTensor& q_bias,
                               const OptionalTensor& k_weight, const OptionalTensor& k_bias);

}  // namespace lumina_kernels::cuda
