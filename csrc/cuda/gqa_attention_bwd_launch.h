// Between the launcher of gqa_attention's backward and those of its kernels on tensor cores, which
// are compiled by themselves.
#pragma once

#include <algorithm>

#include "cuda/gqa_attention_bwd_mma.cuh"
#include "cuda/gqa_attention_launch.h"

namespace lumina_kernels::cuda {

// launch(head_dim, kExtras)
template <class F>
void with_bwd_size(const AttentionBwdParams<uint16_t>& p, F&& launch) {
  if (p.fwd.bias.values.data != nullptr || p.fwd.text_masks.data != nullptr) {
    with_size(p.fwd.K, AttentionExtraHeadDims(), [&](auto K) { launch(K, std::true_type()); });
  } else {
    with_size(p.fwd.K, AttentionBwdHeadDims(), [&](auto K) { launch(K, std::false_type()); });
  }
}

// Sets how many blocks the third kernel takes for the keys of each branch, and returns the sum.
template <class T>
int64_t set_key_blocks(AttentionBwdParams<T>& p, int64_t B, int keys) {
  for (int i = 0; i < 2; ++i) {
    p.key_blocks[i] = static_cast<int>(ceil_div(p.fwd.keys[i].count, keys));
    p.by_blocks[i] = Divider(std::max(p.key_blocks[i], 1));
  }
  p.text_blocks = static_cast<int>(B * p.fwd.G * p.key_blocks[1]);
  return p.text_blocks + B * p.fwd.G * p.key_blocks[0];
}

// `like` is a tensor on their device, B the number of samples.
void launch_dq(const Tensor& like, AttentionBwdParams<uint16_t> p, int64_t B, Dtype dtype);
void launch_dkv(const Tensor& like, AttentionBwdParams<uint16_t> p, int64_t B, Dtype dtype);

}  // namespace lumina_kernels::cuda
