// Shared by the launchers that normalise queries and keys.
#pragma once

#include <type_traits>

#include "cuda/lib/qk_norm_bwd.cuh"
#include "cuda/lib/rope_launch.h"
#include "cuda/lib/window_launch.h"

namespace lumina_kernels::cuda {

// Calls body(std::integral_constant<int, N>()), where N, the heads per thread, is 1, 2, 4 up to
// kMost.
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

// Distributes H heads of q and G of k to threads, with the fewest heads N per thread that the
// limits allow.
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

// A parameter for heads of K values; `vectors` means that every head is aligned.
inline Values parameter_of(const OptionalTensor& parameter, int64_t K) {
  Values values = values_of(parameter);
  if (parameter) values.vectors &= K * static_cast<int64_t>(parameter->element_size()) % 16 == 0;
  return values;
}

// The windows to whose means a gradient belongs, and how many valid tokens they have, (B, L').
struct CountedWindows {
  MaskedWindows windows;
  Tensor counts;
};

// The most blocks of the backward, whose sums the second stage adds, and the fewest tokens of a
// block.
constexpr int64_t kMostPartials = 512, kLeastTokens = 4;

// Tokens of a block of the backward.
inline int64_t chunk_of(int64_t tokens, int64_t slots) {
  const int64_t least = std::max(kLeastTokens, ceil_div(tokens, kMostPartials));
  return slots * ceil_div(least, slots);
}

// dx, and the partial sums of dweight and dbias, float32 (blocks, sums * width), as a kernel that
// launch(heads per thread, config, parameters) launches computes them; without the rotation.
template <class F>
std::tuple<Tensor, Tensor> row_bwd(const Tensor& dout, const Tensor& x,
                                   const OptionalTensor& weight, const OptionalTensor& bias,
                                   double eps, const std::string& norm, const CountedWindows* pool,
                                   const F& launch) {
  Tensor dx = empty_as(x);
  const int64_t L = x.size(1), tokens = x.size(0) * L, H = x.size(2), K = x.size(3);
  const int64_t width = norm_of(norm) == NormKind::kRmsPerHead ? K : H * K;
  const int sums = bias ? 2 : weight ? 1 : 0;
  if (x.numel() == 0) return {dx, empty(x, {0, sums * width}, ScalarType::Float)};
  check_tokens(tokens);
  int N;
  const NormShape shape = norm_shape(H, 0, K, eps, norm, kBwdLimits, N);
  const int64_t chunk = chunk_of(tokens, shape.layout.slots);
  const int64_t blocks = ceil_div(tokens, chunk);
  Tensor partial = empty(x, {blocks, sums * width}, ScalarType::Float);
  const Tensor douts = packed(dout), xs = packed(x);
  const OptionalTensor weights = packed(weight);
  Values partials = values_of(partial);
  partials.vectors = K % 4 == 0;
  const MaskedWindows none{.T = 1,
                           .grid_h = 1,
                           .grid_w = 1,
                           .factor = 1,
                           .rows = 1,
                           .columns = 1,
                           .mask = nullptr,
                           .mask_b = 0,
                           .mask_l = 0};
  const QkNormBwdParams p{
      .dout = heads_of(douts),
      .x = heads_of(xs),
      .dx = heads_of(dx),
      .weight = parameter_of(weights, K),
      .partial = partials,
      .angles = {},
      .shape = shape,
      .sums = sums,
      .width = width,
      .tokens = tokens,
      .L = L,
      .chunk = chunk,
      .windows = pool ? pool->windows : none,
      .counts = pool ? pointer_to<const float>(pool->counts) : Global<const float>(nullptr),
      .counts_b = pool ? pool->counts.stride(0) : 0};
  const int64_t threads = shape.layout.slots * shape.layout.threads;
  const int64_t floats = std::max(norm_floats(shape.layout, shape.norm, N, 1), 8 * threads);
  const LaunchConfig config = row_config(shape.layout, blocks, floats);
  with_heads<kBwdLimits.heads>(N, [&](auto n) { launch(n, config, p); });
  return {dx, partial};
}

// The same with the rotation by angles.
std::tuple<Tensor, Tensor> row_bwd(const Tensor& dout, const Tensor& x,
                                   const OptionalTensor& weight, const OptionalTensor& bias,
                                   const AnglesView& angles, double eps, const std::string& norm,
                                   const CountedWindows* pool);

// The gradients of the parameters of q and of k from the sums of `row_bwd`; `nothing` for
// parameters that are missing.
struct ParameterGrads {
  Tensor q_weight, q_bias, k_weight, k_bias;
};
ParameterGrads parameter_grads(const Tensor& q_partial, const Tensor& k_partial,
                               const OptionalTensor& q_weight, const OptionalTensor& q_bias,
                               const OptionalTensor& k_weight, const OptionalTensor& k_bias);

}  // namespace lumina_kernels::cuda
