// Shared by the launchers of gqa_attention, forward and backward.
#pragma once

#include <cmath>
#include <utility>

#include "cuda/gqa_attention_keys.cuh"
#include "cuda/lib/launch.h"

namespace lumina_kernels::cuda {

// What the kernels read; the last dimension of each has no gaps.
struct AttentionInputs {
  Tensor q, k, v;
  OptionalTensor key_mask, text_k, text_v, text_mask, text_gate, bias;
  OptionalTensor own_masks;  // text_mask is missing if every token has its own
  double scale;
};

// use(std::integral_constant<int, the first of kSizes that is not below `size`>)
template <class F, int... kSizes>
void with_size(int64_t size, std::integer_sequence<int, kSizes...>, F&& use) {
  bool found = false;
  const auto take = [&](auto one) {
    if (!found && size <= one) use(one), found = true;
  };
  (take(std::integral_constant<int, kSizes>()), ...);
  STD_TORCH_CHECK(found, "head_dim is too large");
}

// The stride of an axis with one element may be anything; it is never used.
inline int64_t step(const Tensor& x, int64_t axis) { return x.size(axis) > 1 ? x.stride(axis) : 0; }

template <class T>
AttentionHeads<T> heads_of(const Tensor& x) {
  return {pointer_to<const T>(x), step(x, 0), step(x, 1), step(x, 2)};
}

template <class T>
AttentionKeys<T> keys_of(const Tensor& k, const Tensor& v, const OptionalTensor& mask, double scale,
                         bool biased) {
  AttentionKeys<T> keys{heads_of<T>(k), heads_of<T>(v)};
  keys.count = static_cast<int>(k.size(1));
  keys.scale = static_cast<float>(scale);
  keys.split = biased ? kUnscaled : split_scale(scale);
  keys.vectors = takes_vectors(k) && takes_vectors(v) && k.size(3) % 8 == 0;
  if (mask) {
    keys.mask = pointer_to<const uint8_t>(*mask);
    keys.mask_step = step(*mask, 0);
    keys.mask_vectors = takes_vectors(*mask);
  }
  return keys;
}

inline AttentionBias bias_of(const OptionalTensor& bias) {
  AttentionBias found{values_of(bias), 0, 0, 0, 0};
  if (!bias) return found;
  int64_t* steps[] = {&found.step_key, &found.step_l, &found.step_h, &found.step_b};
  for (int64_t i = 0; i < bias->dim(); ++i) *steps[i] = step(*bias, bias->dim() - 1 - i);
  return found;
}

inline AttentionOwnMasks own_masks_of(const OptionalTensor& mask) {
  if (!mask) return {};
  return {pointer_to<const uint8_t>(*mask), step(*mask, 0), step(*mask, 1), step(*mask, 2)};
}

// All but the results.
template <class T>
AttentionFwdParams<T> attention_params(const AttentionInputs& x) {
  const int64_t L = x.q.size(1), H = x.q.size(2), G = x.k.size(2), K = x.q.size(3);
  AttentionFwdParams<T> p{};
  p.q = heads_of<T>(x.q);
  p.keys[0] = keys_of<T>(x.k, x.v, x.key_mask, x.scale, x.bias.has_value());
  p.text = x.text_k.has_value();
  if (p.text) {
    const double scale = 1 / std::sqrt(static_cast<double>(K));
    p.keys[1] = keys_of<T>(*x.text_k, *x.text_v, x.text_mask, scale, false);
  }
  p.gate = values_of(x.text_gate);
  p.bias = bias_of(x.bias);
  p.text_masks = own_masks_of(x.own_masks);
  p.L = static_cast<int>(L), p.G = static_cast<int>(G), p.R = static_cast<int>(H / G);
  p.K = static_cast<int>(K), p.rows = p.L * p.R;
  p.q_vectors = takes_vectors(x.q);
  return p;
}

inline void check_sizes(const AttentionInputs& x) {
  constexpr int64_t kMost = 1 << 30;
  const int64_t G = x.k.size(2), rows = x.q.size(1) * (x.q.size(2) / G);
  STD_TORCH_CHECK(rows < kMost && x.q.size(0) * G * ceil_div(rows, 16) < kMost,
                  "attention takes less than 2^30 rows of a head, and 2^34 in all");
  STD_TORCH_CHECK(x.k.size(1) < kMost && (!x.text_k || x.text_k->size(1) < kMost),
                  "attention takes less than 2^30 keys");
}

// A mask that is expanded over the tokens is that of all of them.
inline AttentionInputs attention_inputs(const Tensor& q, const Tensor& k, const Tensor& v,
                                        const OptionalTensor& key_mask, double scale,
                                        const OptionalTensor& text_k, const OptionalTensor& text_v,
                                        const OptionalTensor& text_mask,
                                        const OptionalTensor& text_gate,
                                        const OptionalTensor& bias) {
  OptionalTensor shared = text_mask, own;
  if (text_mask && text_mask->dim() == 3) {
    Tensor mask = *text_mask;
    shared = OptionalTensor();
    if (mask.size(1) > 0 && step(mask, 1) == 0) {
      shared = torch::stable::narrow(mask, 1, 0, 1);
    } else {
      own = mask;
    }
  }
  return {.q = packed(q),
          .k = packed(k),
          .v = packed(v),
          .key_mask = packed(key_mask),
          .text_k = packed(text_k),
          .text_v = packed(text_v),
          .text_mask = packed(shared),
          .text_gate = packed(text_gate),
          .bias = bias,
          .own_masks = own,
          .scale = scale};
}

using AttentionSaved = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using AttentionGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// out, its error, and the statistics of both softmaxes; empty if not wanted.
AttentionSaved gqa_attention_fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                 const OptionalTensor& key_mask, double scale,
                                 const OptionalTensor& text_k, const OptionalTensor& text_v,
                                 const OptionalTensor& text_mask, const OptionalTensor& text_gate,
                                 const OptionalTensor& bias, bool with_error);

// dlse is the gradient of the log-sum-exp, contiguous, if there is one.
AttentionGrads attention_backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& out,
                                  const Tensor& error, const Tensor& stats,
                                  const Tensor& text_stats, const Tensor& q, const Tensor& k,
                                  const Tensor& v, const OptionalTensor& key_mask, double scale,
                                  const OptionalTensor& text_k, const OptionalTensor& text_v,
                                  const OptionalTensor& text_mask, const OptionalTensor& text_gate,
                                  const OptionalTensor& bias, bool with_dbias);

}  // namespace lumina_kernels::cuda
