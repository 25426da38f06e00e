// CUDA launchers of gqa_attention with its log-sum-exp: the same kernels, without text.
#include "cuda/gqa_attention_launch.h"
#include "cuda/gqa_attention_lse.cuh"

namespace lumina_kernels::cuda {
namespace {

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Results gqa_attention_lse_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                              const OptionalTensor& key_mask, double scale,
                              const OptionalTensor& bias, bool with_error) {
  const OptionalTensor none;
  const auto [out, error, stats, text_stats] =
      gqa_attention_fwd(q, k, v, key_mask, scale, none, none, none, none, bias, with_error);
  const int64_t B = q.size(0), L = q.size(1), H = q.size(2), G = k.size(2);
  const Tensor lse = empty(q, {B, L, H}, ScalarType::Float);
  if (lse.numel() > 0) {
    const AttentionLseParams p{.stats = pointer_to<const float>(stats),
                               .lse = pointer_to<float>(lse),
                               .outer = bias ? kUnscaled.outer : split_scale(scale).outer,
                               .rows = lse.numel(),
                               .L = static_cast<int>(L),
                               .G = static_cast<int>(G),
                               .R = static_cast<int>(H / G)};
    LUMINA_LAUNCH(q, gqa_attention_lse_config(p.rows), gqa_attention_lse_kernel, p);
  }
  return {out, lse, error, stats};
}

Results gqa_attention_lse_bwd(const Tensor& dout, const Tensor& dlse, const Tensor& out,
                              const Tensor& error, const Tensor& stats, const Tensor& q,
                              const Tensor& k, const Tensor& v, const OptionalTensor& key_mask,
                              double scale, const OptionalTensor& bias, bool with_dbias) {
  const OptionalTensor none;
  const auto grads =
      attention_backward(dout, torch::stable::contiguous(dlse), out, error, stats, nothing(q), q, k,
                         v, key_mask, scale, none, none, none, none, bias, with_dbias);
  return {std::get<0>(grads), std::get<1>(grads), std::get<2>(grads), std::get<6>(grads)};
}

}  // namespace

LUMINA_CUDA_LIBRARY(m) {
  m.impl("gqa_attention_lse_fwd", TORCH_BOX(&gqa_attention_lse_fwd));
  m.impl("gqa_attention_lse_bwd", TORCH_BOX(&gqa_attention_lse_bwd));
}

}  // namespace lumina_kernels::cuda
