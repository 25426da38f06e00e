// CUDA launcher of gqa_attention.
#include "cuda/gqa_attention.cuh"
#include "cuda/gqa_attention_hopper.h"
#include "cuda/gqa_attention_launch.h"
#include "cuda/gqa_attention_split.h"

namespace lumina_kernels::cuda {
namespace {

template <class T>
AttentionFwdParams<T> arguments(const AttentionInputs& x, const AttentionSaved& outs) {
  const auto& [out, error, stats, text_stats] = outs;
  AttentionFwdParams<T> p = attention_params<T>(x);
  p.out = pointer_to<T>(out);
  if (error.numel() > 0) p.error = pointer_to<uint8_t>(error);
  p.stats = pointer_to<float>(stats);
  if (p.text) p.text_stats = pointer_to<float>(text_stats);
  return p;
}

template <int kLaneColumns>
void launch_float(const AttentionInputs& x, const AttentionSaved& outs) {
  AttentionFwdParams<float> p = arguments<float>(x, outs);
  p.row_blocks = static_cast<int>(ceil_div(p.rows, AttentionFloatTile<kLaneColumns>::kRows));
  const LaunchConfig config = gqa_attention_float_config<kLaneColumns>(x.q.size(0) * p.G, p.rows);
  LUMINA_LAUNCH(x.q, config, gqa_attention_float_fwd_kernel<kLaneColumns>, p);
}

template <int kHeadDim, Dtype kDtype, bool kBias, bool kOwnMasks>
void launch_mma(const AttentionInputs& x, const AttentionSaved& outs) {
  AttentionFwdParams<uint16_t> p = arguments<uint16_t>(x, outs);
  p.row_blocks = static_cast<int>(ceil_div(p.rows, AttentionTile<kHeadDim, kBias>::kRows));
  const LaunchConfig config =
      gqa_attention_config<kHeadDim, kBias>(x.q.size(0) * p.G, p.rows, x.text_k.has_value());
  LUMINA_LAUNCH(x.q, config, (gqa_attention_fwd_kernel<kHeadDim, kDtype, kBias, kOwnMasks>), p);
}

template <int kHeadDim, Dtype kDtype>
void launch_mma(const AttentionInputs& x, const AttentionSaved& outs) {
  if (x.bias) {  // rarely with text: one kernel takes both kinds of masks
    launch_mma<kHeadDim, kDtype, true, true>(x, outs);
  } else if (x.own_masks) {
    launch_mma<kHeadDim, kDtype, false, true>(x, outs);
  } else {
    launch_mma<kHeadDim, kDtype, false, false>(x, outs);
  }
}

// out, its error, and the statistics of both softmaxes; empty if not wanted.
AttentionSaved outputs_of(const Tensor& q, int64_t G, bool text, bool with_error) {
  const int64_t B = q.size(0), L = q.size(1), H = q.size(2), K = q.size(3);
  const Tensor stats = empty(q, {B, G, L, H / G, 2}, ScalarType::Float);
  return {empty(q, {B, L, H, K}, q.scalar_type()),
          with_error ? empty(q, {B, L, H, K}, ScalarType::Char) : empty(q, {0}, ScalarType::Char),
          stats, text ? empty_as(stats) : empty(q, {0}, ScalarType::Float)};
}

}  // namespace

AttentionSaved gqa_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const OptionalTensor& key_mask, double scale,
                                 const OptionalTensor& text_k, const OptionalTensor& text_v,
                                 const OptionalTensor& text_mask, const OptionalTensor& text_gate,
                                 const OptionalTensor& bias, bool with_error) {
  const Dtype dtype = dtype_of(q);
  const AttentionSaved outs =
      outputs_of(q, k.size(2), text_k.has_value(), with_error && dtype != Dtype::kFloat);
  if (std::get<0>(outs).numel() == 0) return outs;
  const AttentionInputs x =
      attention_inputs(q, k, v, key_mask, scale, text_k, text_v, text_mask, text_gate, bias);
  check_sizes(x);
  const int64_t K = q.size(3);
  if (dtype == Dtype::kFloat) {
    with_size(ceil_div(K, 32), AttentionFloatColumns(),
              [&](auto columns) { launch_float<columns()>(x, outs); });
    return outs;
  }
  if (!x.bias && !x.own_masks) {
    const AttentionFwdParams<uint16_t> p = arguments<uint16_t>(x, outs);
    if (gqa_attention_hopper_fwd(q, p, dtype)) return outs;
    if (gqa_attention_split_fwd(q, std::get<0>(outs), p)) return outs;
  }
  with_size(K, AttentionHeadDims(), [&](auto size) {
    if (dtype == Dtype::kHalf) {
      launch_mma<size(), Dtype::kHalf>(x, outs);
    } else {
      launch_mma<size(), Dtype::kBFloat16>(x, outs);
    }
  });
  return outs;
}

LUMINA_CUDA_LIBRARY(m) { m.impl("gqa_attention_fwd", TORCH_BOX(&gqa_attention_fwd)); }

}  // namespace lumina_kernels::cuda
