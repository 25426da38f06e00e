// The launcher of gqa_attention's forward for Hopper, in gqa_attention_hopper.cu.
#pragma once

#include "cuda/gqa_attention_keys.cuh"
#include "tensor.h"

namespace lumina_kernels::cuda {

// Launches it if it takes these arguments, which have no bias and no masks of single tokens, on the
// device of q; else returns false.
bool gqa_attention_hopper_fwd(const Tensor& q, const AttentionFwdParams<uint16_t>& p, Dtype dtype);

}  // namespace lumina_kernels::cuda
